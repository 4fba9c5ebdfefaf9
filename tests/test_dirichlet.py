"""The scenario of tasks whose images are divided unevenly: a partition, and shares as drawn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios import dirichlet

CLASSES = tuple("abcdef")


def images(per_class: int) -> ImageSet:
    count = per_class * len(CLASSES)
    labels = torch.arange(count) % len(CLASSES)
    pixels = torch.arange(count, dtype=torch.float32)[:, None]
    return ImageSet(pixels, labels, CLASSES)


def benchmark(per_class: int = 40, test: int | None = 12) -> Benchmark:
    groups = {"base": CLASSES[:2], "validation": (), "field": CLASSES[2:]}
    tested = None if test is None else images(test)
    return Benchmark("tiny", images(per_class), tested, groups, (), (), "Made for tests.")


def held(plan, node=None):
    """How many images of each class the nodes (or one) meet over all missions."""
    parts = [m.indices for m in plan.missions if node in (None, m.node)]
    indices = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return np.bincount(plan.support.labels[indices], minlength=len(plan.support.classes))


plans = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "nodes": st.integers(1, 7),
        "tasks": st.integers(1, 4),
        "beta": st.sampled_from([None, 0.05, 0.5, 1, 100.0]),
        "groups": st.sampled_from(["all", "field"]),
        "train_images": st.sampled_from([None, 1, 13]),
        "test_images": st.sampled_from([None, 1, 5]),
    }
)


@given(plans, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_image_is_met_once_and_every_test_image_is_like_one_node(options, own_test):
    source = benchmark(test=12 if own_test else None)
    plan = dirichlet(source, **options)
    known = CLASSES if options["groups"] == "all" else CLASSES[2:]
    assert plan.support.classes == plan.test.classes == known
    assert (plan.nodes, plan.rounds) == (options["nodes"], options["tasks"])
    met = torch.cat([m.indices for m in plan.missions])
    assert sorted(met.tolist()) == list(range(len(plan.support)))
    tested = torch.cat(plan.test_shares)
    assert sorted(tested.tolist()) == list(range(len(plan.test)))
    assert len(plan.test_shares) == options["nodes"]
    # Images of a data set without a test split are never in both.
    if not own_test:
        assert not set(plan.support.images.flatten().tolist()) & set(
            plan.test.images.flatten().tolist()
        )
    sizes = [len(part) for part in plan.support.indices_by_class()]
    if options["train_images"] is not None:
        assert sizes == [options["train_images"]] * len(known)
    if options["test_images"] is not None:
        assert [*map(len, plan.test.indices_by_class())] == [options["test_images"]] * len(known)


@given(plans)
@settings(max_examples=30, deadline=None)
def test_a_class_belongs_to_one_task_and_a_mission_names_what_it_holds(options):
    plan = dirichlet(benchmark(), **options)
    tasks: dict[str, set[int]] = {}
    for mission in plan.missions:
        labels = plan.support.labels[mission.indices].unique().tolist()
        assert mission.classes == tuple(plan.support.classes[row] for row in labels)
        assert len(mission.indices) > 0 and 0 <= mission.node < options["nodes"]
        for name in mission.classes:
            tasks.setdefault(name, set()).add(mission.round)
    assert sorted(tasks) == list(plan.support.classes)
    assert all(len(of_class) == 1 for of_class in tasks.values())
    sizes = [
        sum(of_class == {task} for of_class in tasks.values()) for task in range(1, plan.rounds + 1)
    ]
    assert max(sizes) - min(sizes) <= 1
    order = [(mission.round, mission.node) for mission in plan.missions]
    assert order == sorted(set(order))


@given(plans)
@settings(max_examples=20, deadline=None)
def test_the_same_seed_gives_the_same_plan(options):
    torch.rand(3)  # the ambient state must not matter
    one, two = dirichlet(benchmark(), **options), dirichlet(benchmark(), **options)
    assert one.support.fingerprint == two.support.fingerprint
    assert one.test.fingerprint == two.test.fingerprint
    assert [m.classes for m in one.missions] == [m.classes for m in two.missions]
    assert all(
        torch.equal(a.indices, b.indices) for a, b in zip(one.missions, two.missions, strict=True)
    )
    assert all(map(torch.equal, one.test_shares, two.test_shares))


def test_another_seed_gives_other_tasks_and_other_shares():
    plans = [dirichlet(benchmark(), seed=s, nodes=3, tasks=2, beta=0.5) for s in range(6)]
    assert len({tuple(held(plan, 0)) for plan in plans}) > 3
    assert len({plan.known(1) for plan in plans}) > 2


@pytest.mark.parametrize("nodes", [1, 3, 5, 7])
def test_without_beta_every_class_is_divided_evenly(nodes):
    plan = dirichlet(benchmark(per_class=41), seed=3, nodes=nodes, tasks=2, beta=None)
    shares = np.stack([held(plan, node) for node in range(nodes)])
    assert (shares.sum(0) == 41).all()
    assert (shares.max(0) - shares.min(0) <= 1).all()
    tested = np.stack(
        [np.bincount(plan.test.labels[part], minlength=6) for part in plan.test_shares]
    )
    assert (tested.max(0) - tested.min(0) <= 1).all()


def test_test_images_are_divided_as_the_images_that_nodes_meet():
    plan = dirichlet(benchmark(per_class=200, test=100), seed=1, nodes=4, tasks=3, beta=0.3)
    met = np.stack([held(plan, node) for node in range(4)]) / 200
    like = np.stack([np.bincount(plan.test.labels[p], minlength=6) for p in plan.test_shares]) / 100
    # Whole images: half of one of the few, half of one of the many.
    assert np.abs(met - like).max() <= 0.5 / 100 + 0.5 / 200 + 1e-9


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0, 50.0])
def test_the_shares_spread_as_a_dirichlet_draw_does(beta):
    """Var of one share is ``(1/K)(1 - 1/K) / (K beta + 1)``, over many classes and seeds."""
    nodes, found = 4, []
    for seed in range(80):
        plan = dirichlet(benchmark(per_class=120), seed=seed, nodes=nodes, tasks=1, beta=beta)
        found += [held(plan, node) / 120 for node in range(nodes)]
    shares = np.concatenate(found)
    assert shares.mean() == pytest.approx(1 / nodes)
    expected = (1 / nodes) * (1 - 1 / nodes) / (nodes * beta + 1)
    assert shares.var() == pytest.approx(expected, rel=0.12)


def test_a_tiny_beta_gives_nearly_every_class_to_one_node_and_some_nodes_nothing():
    plan = dirichlet(benchmark(), seed=0, nodes=5, tasks=3, beta=0.01)
    shares = np.stack([held(plan, node) for node in range(5)])
    assert (shares.max(0) >= 0.9 * 40).sum() >= 5
    assert len(plan.missions) < 15, "a node that meets nothing has no mission"


def test_field_classes_alone_are_met_where_a_base_was_trained():
    plan = dirichlet(load(), seed=0, nodes=2, tasks=2, beta=0.5, groups="field")
    assert plan.support.classes == tuple("56789")
    whole = dirichlet(load(), seed=0, nodes=2, tasks=2, beta=0.5)
    assert whole.support.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, value) for key in ("nodes", "tasks") for value in (0, -1, 1.5, True, "2", None)],
        *[("beta", value) for value in (0, -0.5, float("inf"), float("nan"), "0.5", True)],
        *[("groups", value) for value in ("base", None, 1)],
        *[("train_images", value) for value in (0, -3, 2.5, "all", True)],
        *[("test_images", value) for value in (0, -3, 2.5, "all", True)],
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(key, value):
    options = {"nodes": 2, "tasks": 2, "beta": 0.5, key: value}
    with pytest.raises(ConfigError, match=f"scenario.{key}"):
        dirichlet(benchmark(), seed=0, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": 7}, "7 tasks, but there are only 6 classes"),
        ({"train_images": 41}, "scenario.train_images asks for 41"),
        ({"test_images": 13}, "scenario.test_images asks for 13"),
    ],
)
def test_more_than_there_is_cannot_be_had(options, told):
    with pytest.raises(NotEnoughData, match=told):
        dirichlet(benchmark(), seed=0, **{"nodes": 2, "tasks": 2, "beta": 0.5, **options})
