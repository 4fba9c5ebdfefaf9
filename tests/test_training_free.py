"""FedNCM, Fed3R and FedCOF on missions, against plain numpy on the pooled embeddings."""

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp
from simulations import TASKS, Simulation, support_of

from clfed.errors import ConfigError
from clfed.federated.grid import LocalGrid
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.classifiers import nearest_mean
from clfed.strategies import Fed3R, FedCOF, FedNCM

RESOLUTION = 2.0**-16  # of the sums that travel
FIELD = ("scenario.tasks=1", "scenario.beta=1.0", "scenario.nodes=4")
AGAIN = (  # the same classes come back on several missions
    "data.base_classes=0",
    "scenario=multi_client",
    "scenario.nodes=3",
    "scenario.rounds=4",
    "scenario.classes_per_mission=4",
    "scenario.shots=5",
    "scenario.overlap=null",
    "scenario.test_images=10",
)


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


def rounded(embeddings: torch.Tensor) -> np.ndarray:
    """What the statistics are exact sums of: embeddings on a grid of 2^-16."""
    return np.round(embeddings.double().numpy() / RESOLUTION) * RESOLUTION


def pooled(world: Simulation) -> dict[str, np.ndarray]:
    """The embeddings of all images that any node met, by class."""
    return {
        name: rounded(world.encoder.embed(images))
        for name, images in support_of(world.field).items()
    }


def queries(world: Simulation) -> torch.Tensor:
    return world.encoder.embed(world.field.plan.test.images)


def by_message(world: Simulation) -> list[dict[str, np.ndarray]]:
    """The embeddings of each mission of each node, by class: one message brings one mission."""
    plan, found = world.field.plan, []
    for mission in plan.missions:
        labels = plan.support.labels[mission.indices]
        embedded = rounded(world.encoder.embed(plan.support.images[mission.indices]))
        found.append(
            {
                plan.support.classes[row]: embedded[(labels == row).numpy()]
                for row in labels.unique().tolist()
            }
        )
    return found


# Fed3R


@pytest.mark.parametrize("penalty", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("field", [FIELD, ("scenario.tasks=3",), ("scenario.beta=null",)])
def test_fed3r_is_the_ridge_regression_of_the_pooled_embeddings(tmp_path, field, penalty):
    world = Simulation.of(tmp_path, "strategy=fed3r", f"strategy.penalty={penalty}", *field)
    world.play()
    data = pooled(world)
    names = sorted(data)
    inputs = np.concatenate([data[name] for name in names])
    targets = np.repeat(np.eye(len(names)), [len(data[name]) for name in names], axis=0)
    # Ridge regression as least squares with extra rows: nothing here forms the products.
    dim = inputs.shape[1]
    tall = np.concatenate([inputs, np.sqrt(penalty) * np.eye(dim)])
    goal = np.concatenate([targets, np.zeros((dim, len(names)))])
    solution = np.linalg.lstsq(tall, goal, rcond=None)[0]
    solution /= np.linalg.norm(solution, axis=0)
    classifier = world.strategy.classifier()
    assert classifier.classes == tuple(names)
    np.testing.assert_allclose(classifier.weight.numpy().T, solution, rtol=1e-8, atol=1e-8)
    ours = classifier.scores(queries(world)).numpy()
    np.testing.assert_allclose(ours, queries(world).double().numpy() @ solution, atol=1e-7)


def test_fed3r_without_unit_length_is_the_bare_solution(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fed3r", "strategy.normalise=false")
    world.play()
    data = pooled(world)
    gram = sum(z.T @ z for z in data.values()) + np.eye(16)
    sums = np.stack([data[name].sum(0) for name in sorted(data)], axis=1)
    expected = np.linalg.solve(gram, sums)
    weight = world.strategy.classifier().weight.numpy().T
    np.testing.assert_allclose(weight, expected, rtol=1e-8, atol=1e-10)


def test_fed3r_is_the_same_however_the_images_are_divided(tmp_path):
    one = Simulation.of(tmp_path, "strategy=fed3r", "scenario.nodes=1", "scenario.tasks=1")
    many = Simulation.of(tmp_path, "strategy=fed3r", "scenario.nodes=6", "scenario.tasks=1")
    one.play(), many.play()
    assert one.strategy.memory == many.strategy.memory
    assert torch.equal(one.strategy.classifier().weight, many.strategy.classifier().weight)


# FedCOF


def fedcof(data, groups, shrinkage=5.0, relative=True):
    """The formula of the paper with loops over groups; ``groups``: embeddings by class each."""
    names = sorted(data)
    everything = np.concatenate([data[name] for name in names])
    dim = everything.shape[1]
    mean = everything.mean(0)
    matrix = np.zeros((dim, dim))
    degrees = 0
    for name in names:
        of_class = [group[name] for group in groups if name in group]
        if len(of_class) < 2:
            continue
        centre = data[name].mean(0)
        spread = np.zeros((dim, dim))
        for z in of_class:
            spread += len(z) * np.outer(z.mean(0) - centre, z.mean(0) - centre)
        matrix += (len(data[name]) - 1) * spread / (len(of_class) - 1)
        degrees += len(data[name]) - 1
    variance = np.trace(matrix) / degrees / dim if relative and degrees else 1.0
    matrix += degrees * shrinkage * variance * np.eye(dim)
    matrix += len(everything) * np.outer(mean, mean)
    solution = np.linalg.solve(matrix, np.stack([data[name].sum(0) for name in names], axis=1))
    return solution / np.linalg.norm(solution, axis=0)


@pytest.mark.parametrize(("shrinkage", "relative"), [(1.0, False), (0.1, False), (5.0, True)])
@pytest.mark.parametrize(
    "field", [(*TASKS, "scenario.nodes=4"), (*TASKS, "scenario.tasks=1", "scenario.nodes=6"), AGAIN]
)
def test_fedcof_is_its_formula_over_messages(tmp_path, field, shrinkage, relative):
    world = Simulation.of(
        tmp_path,
        "strategy=fedcof",
        f"strategy.shrinkage={shrinkage}",
        f"strategy.relative={relative}",
        scenario=field,
    )
    world.play()
    groups = by_message(world)
    data = {
        name: np.concatenate([g[name] for g in groups if name in g])
        for name in {name for g in groups for name in g}
    }
    expected = fedcof(data, groups, shrinkage, relative)
    weight = world.strategy.classifier().weight.numpy().T
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-9)


def test_a_node_that_meets_a_class_again_adds_a_group(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedcof", scenario=AGAIN)
    world.play()
    groups = by_message(world)
    by_node = {}
    for mission, group in zip(world.field.plan.missions, groups, strict=True):
        for name, z in group.items():
            by_node.setdefault(mission.node, {}).setdefault(name, []).append(z)
    merged = [{n: np.concatenate(z) for n, z in of_node.items()} for of_node in by_node.values()]
    assert sum(map(len, groups)) > sum(map(len, merged)), "no node met a class twice"
    data = {
        n: np.concatenate([g[n] for g in groups if n in g]) for n in {n for g in groups for n in g}
    }
    weight = world.strategy.classifier().weight.numpy().T
    assert np.abs(weight - fedcof(data, groups)).max() < 1e-6
    assert np.abs(weight - fedcof(data, merged)).max() > 1e-3


def test_its_covariance_is_unbiased_over_draws_of_groups():
    """Mean over draws of sum_k n_k (m_k - m)(m_k - m)^T / (K - 1) is the covariance of examples.

    The library's own matrix shows it: with one class, W is along [(N - 1) S + N m m^T]^-1 m.
    """
    rng = np.random.default_rng(5)
    root = np.array([[1.0, 0.0, 0.0], [0.7, 0.6, 0.0], [-0.3, 0.2, 0.8]])
    sizes, draws = (1, 2, 6, 11, 20), 4000
    total, estimates = sum(sizes), []
    for _ in range(draws):
        x = rng.normal(size=(total, 3)) @ root.T + 2
        pieces = np.split(x, np.cumsum(sizes)[:-1])
        centre = x.mean(0)
        spread = [len(z) * np.outer(z.mean(0) - centre, z.mean(0) - centre) for z in pieces]
        estimates.append(sum(spread) / (len(sizes) - 1))
    covariance = root @ root.T
    # An estimate spreads by sqrt(2 / (K - 1)) of its size; its mean by that over sqrt(draws).
    error = 4 * np.sqrt(2 / (len(sizes) - 1) / draws)
    assert np.abs(np.mean(estimates, axis=0) - covariance).max() < error

    strategy = FedCOF(PrototypeMemory.empty(3, "e"), shrinkage=1e-9)
    x = np.round((rng.normal(size=(total, 3)) @ root.T + 2) / RESOLUTION) * RESOLUTION
    pieces = np.split(x, np.cumsum(sizes)[:-1])
    deliver(strategy, *({"a": piece} for piece in pieces))
    centre = x.mean(0)
    spread = sum(len(z) * np.outer(z.mean(0) - centre, z.mean(0) - centre) for z in pieces) / 4
    expected = np.linalg.solve((total - 1) * spread + total * np.outer(centre, centre), centre)
    weight = strategy.classifier().weight[0].numpy()
    np.testing.assert_allclose(weight, expected / np.linalg.norm(expected), rtol=1e-5)


def deliver(strategy, *messages, first=0):
    """Take messages in as a round would: one contributor each, embeddings by class."""
    from clfed.prototypes import Contribution

    empty = strategy.ledger.total - strategy.ledger.total
    for number, message in enumerate(messages, start=first):
        labels = [name for name, z in message.items() for _ in z]
        seen = empty.observe(torch.from_numpy(np.concatenate([*message.values()])), labels)
        receipt = strategy.ledger.receive(Contribution.of(f"n{number}", 1, seen))
        strategy._parts.append(receipt.delta)


def test_with_one_group_a_class_it_is_the_nearest_mean(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedcof", "scenario.nodes=1")
    world.play()
    assert torch.equal(
        world.strategy.classifier().weight, nearest_mean(world.strategy.memory).weight
    )


def test_classes_of_one_group_add_nothing_to_the_scatter():
    rng = np.random.default_rng(0)
    strategy = FedCOF(PrototypeMemory.empty(3, "e"))
    messages = [
        {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(7, 3)) + 1},
        {"a": rng.normal(size=(2, 3))},
    ]
    messages = [{c: np.round(z / RESOLUTION) * RESOLUTION for c, z in m.items()} for m in messages]
    deliver(strategy, *messages)
    data = {"a": np.concatenate([m["a"] for m in messages]), "b": messages[0]["b"]}
    weight = strategy.classifier().weight.numpy().T
    np.testing.assert_allclose(weight, fedcof(data, messages), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("what", ["a contributor", "a class"])
def test_after_a_deletion_the_groups_are_what_nodes_hold_by_now(tmp_path, what):
    world = Simulation.of(tmp_path, "strategy=fedcof", scenario=AGAIN)
    world.play()
    strategy, plan = world.strategy, world.field.plan
    before = strategy.classifier().weight
    if what == "a contributor":
        strategy.ledger.forget_contributor("node-1")
    else:
        strategy.ledger.forget_class(strategy.memory.classes[0])
    gone = set() if what == "a contributor" else {sorted(plan.known(plan.rounds))[0]}
    by_node: dict[int, dict[str, list[np.ndarray]]] = {}
    for mission, group in zip(plan.missions, by_message(world), strict=True):
        for name, z in group.items():
            if not (what == "a contributor" and mission.node == 1) and name not in gone:
                by_node.setdefault(mission.node, {}).setdefault(name, []).append(z)
    groups = [{n: np.concatenate(z) for n, z in of_node.items()} for of_node in by_node.values()]
    data = {
        n: np.concatenate([g[n] for g in groups if n in g]) for n in {n for g in groups for n in g}
    }
    classifier = strategy.classifier()
    assert classifier.classes == tuple(sorted(data))
    np.testing.assert_allclose(
        classifier.weight.numpy().T, fedcof(data, groups), rtol=1e-6, atol=1e-9
    )
    assert before.shape != classifier.weight.shape or not torch.equal(before, classifier.weight)


def test_after_a_node_took_something_back_the_groups_are_what_nodes_hold_by_now():
    from clfed.prototypes import Contribution

    rng = np.random.default_rng(1)
    strategy = FedCOF(PrototypeMemory.empty(3, "e"))
    grid = [np.round(rng.normal(size=(n, 3)) / RESOLUTION) * RESOLUTION for n in (4, 5, 3)]
    deliver(strategy, {"a": grid[0]}, {"a": grid[1]}, {"a": grid[2]})
    kept = grid[2][:1]
    less = strategy.ledger.total - strategy.ledger.total
    less = less.observe(torch.from_numpy(kept), ["a"])
    strategy._parts.append(strategy.ledger.receive(Contribution.of("n2", 2, less)).delta)
    groups = [{"a": grid[0]}, {"a": grid[1]}, {"a": kept}]
    data = {"a": np.concatenate([g["a"] for g in groups])}
    weight = strategy.classifier().weight.numpy().T
    np.testing.assert_allclose(weight, fedcof(data, groups), rtol=1e-7, atol=1e-9)


# FedNCM


def test_fedncm_on_one_mission_is_the_nearest_mean_by_cosine(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedncm", "scenario.tasks=1")
    world.play()
    data = pooled(world)
    names = sorted(data)
    means = np.stack([data[name].mean(0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    z = queries(world).double().numpy()
    classifier = world.strategy.classifier()
    assert classifier.classes == tuple(names)
    np.testing.assert_allclose(classifier.weight.numpy(), means, rtol=1e-9, atol=1e-12)
    cosines = z / np.linalg.norm(z, axis=1, keepdims=True) @ means.T
    np.testing.assert_allclose(classifier.scores(torch.from_numpy(z)).numpy(), cosines, atol=1e-9)
    assert (classifier.predict(queries(world)).numpy() == cosines.argmax(1)).all()


def test_fedncm_and_fedcof_send_the_same_bytes_and_fed3r_the_products_on_top(tmp_path):
    sent = {}
    for name in ("fedncm", "fedcof", "fed3r", "prototype_averaging"):
        world = Simulation.of(tmp_path, f"strategy={name}")
        world.play()
        sent[name] = [
            {key: array.data for key, array in reply.content["rows"].items()}
            for reply in world.grid.of("train")
        ]
    assert sent["fedncm"] == sent["fedcof"] == sent["prototype_averaging"]
    assert len(sent["fedncm"]) == 6
    for plain, more in zip(sent["fedncm"], sent["fed3r"], strict=True):
        assert plain["sums"] == more["sums"] and plain["counts"] == more["counts"]
        assert len(more["outer"]) >= 16 * 17 // 2  # an upper triangle, in some integers
        assert set(more) - set(plain) == {"outer"}


# Settings

EMPTY = PrototypeMemory.empty(3, "e")
PRODUCTS = PrototypeMemory.empty(3, "e", "shared")
NO_NUMBER = [0, -1, float("nan"), float("inf"), "1", None, True]


@pytest.mark.parametrize("value", NO_NUMBER)
def test_numbers_that_make_no_sense_are_refused(value):
    with pytest.raises(ConfigError, match=r"strategy\.shrinkage"):
        FedCOF(EMPTY, shrinkage=value)
    with pytest.raises(ConfigError, match=r"strategy\.penalty"):
        Fed3R(PRODUCTS, penalty=value)


def test_other_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"strategy\.normalise"):
        Fed3R(PRODUCTS, normalise="yes")
    for moments in ("none", "class", None):
        with pytest.raises(ConfigError, match=r"memory\.moments"):
            Fed3R(EMPTY if moments == "none" else PRODUCTS, moments=moments)
    for kind, empty in ((FedCOF, EMPTY), (Fed3R, PRODUCTS)):
        with pytest.raises(ConfigError, match="add up"):
            kind(empty, merge="legacy_double_shrink")
    assert FedNCM(EMPTY, merge="legacy_double_shrink").leaves
