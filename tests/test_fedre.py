"""FedRE: mixtures, the head that learns on them, and what each side accepts of the other."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import Simulation

from clfed.backbones import MLP, Encoder
from clfed.errors import ConfigError, InvalidEmbedding, InvalidMessage
from clfed.federated.grid import LocalGrid
from clfed.learners.common_head import MAPPINGS, MappedNetwork, initial_row, train_head
from clfed.prototypes.entangling import MECHANISMS, Entangled, entangle
from clfed.strategies.fedre import FedRE, FedRETraining
from clfed.strategies.training import TrainingStrategy

WIDTH = 6
POOL = [{"_target_": "clfed.backbones.MLP", "widths": [w]} for w in (5, 12)]


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def simulation(folder, *overrides, **local):
    return Simulation.of(
        folder, "strategy=fedre", f"strategy.width={WIDTH}", *overrides, local=local, names="xyz"
    )


# Mixtures

tables = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


@given(tables, st.sampled_from(MECHANISMS), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_label_weights_are_a_distribution_and_mix_what_they_say(labels, mechanism, seed):
    # An embedding that is the class itself, one-hot, must come out as the label weights.
    classes = sorted(set(labels))
    features = torch.eye(len(classes))[[classes.index(name) for name in labels]]
    mixture = entangle(features, labels, mechanism, rng(seed))
    assert mixture.classes == tuple(classes)
    assert mixture.weights.dtype == mixture.representation.dtype == torch.float32
    assert bool((mixture.weights >= 0).all())
    assert float(mixture.weights.double().sum()) == pytest.approx(1, abs=1e-7)
    np.testing.assert_allclose(mixture.representation, mixture.weights, atol=1e-6)


@given(tables, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_random_average_prototypes_by_hand(labels, seed):
    values = np.random.default_rng(seed).normal(size=(len(labels), WIDTH)).astype(np.float32)
    mixture = entangle(torch.from_numpy(values), labels, "rap", rng(seed))
    drawn = 1 - torch.rand(len(set(labels)), generator=rng(seed), dtype=torch.float64).numpy()
    expected, total = np.zeros(WIDTH), math.fsum(drawn)
    for number, name in enumerate(sorted(set(labels))):
        own = [v.astype(float) for v, label in zip(values, labels, strict=True) if label == name]
        expected += drawn[number] / total * sum(own) / len(own)
        assert float(mixture.weights[number]) == pytest.approx(drawn[number] / total, rel=1e-6)
    np.testing.assert_allclose(mixture.representation, expected, rtol=1e-5, atol=1e-6)


def test_equal_weights_are_means_of_images_and_of_classes():
    values, labels = torch.tensor([[1.0], [1.0], [1.0], [5.0]]), ["b", "b", "b", "a"]
    var, vap = (entangle(values, labels, m, rng()) for m in ("var", "vap"))
    assert var.weights.tolist() == [0.25, 0.75] and var.representation.tolist() == [2.0]
    assert vap.weights.tolist() == [0.5, 0.5] and vap.representation.tolist() == [3.0]


def test_a_single_one_is_an_image_or_a_class_mean():
    values, labels = torch.tensor([[1.0], [2.0], [6.0]]), ["a", "a", "b"]
    found = {
        m: {
            (*mixture.weights.tolist(), *mixture.representation.tolist())
            for seed in range(40)
            for mixture in [entangle(values, labels, m, rng(seed))]
        }
        for m in ("rsr", "rsp")
    }
    assert found["rsr"] == {(1, 0, 1), (1, 0, 2), (0, 1, 6)}
    assert found["rsp"] == {(1, 0, 1.5), (0, 1, 6)}


def test_random_weights_on_images_follow_the_number_of_images():
    labels = ["a"] * 900 + ["b"] * 100
    mixture = entangle(torch.ones(1000, 1), labels, "rar", rng())
    assert float(mixture.weights[0]) == pytest.approx(0.9, abs=0.03)
    assert float(mixture.weights[0]) != pytest.approx(0.9, abs=1e-6)


# The head

heads = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@given(heads)
@settings(max_examples=60, deadline=None)
def test_a_step_of_the_head_is_the_gradient_of_the_summed_loss(sizes):
    nodes, classes, batch, seed = sizes
    draw = np.random.default_rng(seed)
    head = draw.normal(size=(classes, WIDTH + 1)).astype(np.float32)
    mixtures = draw.normal(size=(nodes, WIDTH)).astype(np.float32)
    labels = draw.dirichlet(np.ones(classes), size=nodes).astype(np.float32)
    options = {"lr": 0.1, "batch_size": batch}
    got = train_head(*map(torch.from_numpy, (head, mixtures, labels)), **options, rng=rng(seed))
    expected = head.astype(float)
    order = torch.randperm(nodes, generator=rng(seed)).tolist()
    for start in range(0, nodes, batch):
        gradient = np.zeros_like(expected)
        for node in order[start : start + batch]:
            inputs = np.append(mixtures[node], 1.0)
            p = softmax(expected @ inputs)
            # The loss is the weighted sum of cross-entropies with each class, whose gradient is
            # p less one at that class.
            for row, weight in enumerate(labels[node]):
                gradient += weight * np.outer(p - np.eye(classes)[row], inputs)
        expected -= 0.1 * gradient
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_first_rows_depend_on_seed_and_name_alone():
    row = initial_row(3, "fox", 400)
    assert torch.equal(row, initial_row(3, "fox", 400)) and len(row) == 401
    assert not torch.equal(row, initial_row(4, "fox", 400))
    assert not torch.equal(row, initial_row(3, "owl", 400))
    assert 0.9 / 20 < float(row.abs().max()) <= 1 / 20
    assert abs(float(row.mean())) < 0.01


def server(**options):
    return FedRE(None, local={}, session="s", wait=0.0, width=WIDTH, seed=5, **options)


def mixture(classes, seed=0):
    draw = np.random.default_rng(seed)
    weights = draw.dirichlet(np.ones(len(classes))).astype(np.float32)
    values = draw.normal(size=WIDTH).astype(np.float32)
    return Entangled(tuple(classes), torch.from_numpy(values), torch.from_numpy(weights))


def rows(strategy):
    arrays = strategy.arrays()
    table = np.c_[arrays["weight"].numpy(), arrays["bias"].numpy()]
    return dict(zip(strategy.classes, table, strict=True))


def test_the_head_grows_and_rows_of_classes_that_nobody_has_stay():
    strategy = server()
    assert strategy.arrays()["weight"].numpy().shape == (0, WIDTH)
    strategy.merge(1, {"x": mixture("bd", 1)})
    first = rows(strategy)
    strategy.merge(2, {"x": mixture("ca", 2), "y": mixture("cb", 3)})
    second = rows(strategy)
    assert list(first) == ["b", "d"] and list(second) == ["a", "b", "c", "d"]
    assert (second["d"] == first["d"]).all() and (second["b"] != first["b"]).any()
    start = torch.stack([initial_row(5, "c", WIDTH)]).numpy()
    assert 0 < np.abs(second["c"] - start).max() < 0.1


def test_one_class_alone_teaches_nothing():
    strategy = server()
    strategy.merge(1, {"x": mixture("a")})
    np.testing.assert_array_equal(rows(strategy)["a"], initial_row(5, "a", WIDTH))


def test_a_head_that_diverges_is_an_error_and_stays_as_it_was():
    strategy = server(lr=1e38)
    strategy._grow("ab")
    before = rows(strategy)
    far = Entangled(("a", "b"), torch.full((WIDTH,), 3e4), torch.tensor([0.5, 0.5]))
    with pytest.raises(InvalidEmbedding, match="diverged"):
        strategy.merge(1, {"x": far, "y": far})
    assert all((rows(strategy)[name] == before[name]).all() for name in "ab")


# Networks


def encoder(width=4):
    torch.manual_seed(0)
    backbone = MLP(3, 1, widths=[width])
    config = {"_target_": "clfed.backbones.MLP", "widths": [width]}
    return Encoder(backbone, config, input_shape=(3,))


def mapped(mapping, width, dim, place="x"):
    options = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    return MappedNetwork(encoder(dim), mapping=mapping, width=width, seed=1, place=place, **options)


def pooled(row, width, reduce):
    """Adaptive pooling by its definition: cell i spans floor(i d / w) to ceil((i + 1) d / w)."""
    d = len(row)
    return [reduce(row[i * d // width : -(-(i + 1) * d // width)]) for i in range(width)]


@pytest.mark.parametrize(("mapping", "reduce"), [("avg", np.mean), ("max", np.max)])
@pytest.mark.parametrize(("dim", "width"), [(8, 4), (4, 8), (7, 3), (5, 5)])
def test_pooling_to_the_common_size_by_its_definition(mapping, reduce, dim, width):
    inputs = torch.randn(3, 3, generator=rng())
    raw = encoder(dim).embed(inputs).numpy()
    got = mapped(mapping, width, dim).embed(inputs)
    expected = [pooled(row, width, reduce) for row in raw]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_learned_mapping_is_the_nodes_own_and_learns():
    one, again, other = (mapped("fc", 2, 4, place) for place in ("x", "x", "y"))
    weights = [network.backbone[1].weight.detach().clone() for network in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    one.grow(["a", "b"])
    images, labels = torch.randn(8, 3, generator=rng()), torch.tensor([0, 1] * 4)
    one.fit(images, labels, epochs=1, batch_size=4, rng=rng())
    assert not torch.equal(one.backbone[1].weight, weights[0])


def test_new_rows_are_those_that_the_server_draws():
    network = mapped("avg", 2, 4)
    network.grow(["b", "a", "b"])
    assert network.classes == ("b", "a")
    for name, weight, bias in zip("ba", network.head.weight, network.head.bias, strict=True):
        assert torch.equal(torch.cat([weight, bias[None]]), initial_row(1, name, 2))


# Rounds


def test_heads_are_equal_on_all_nodes_after_a_broadcast(tmp_path):
    sim = simulation(tmp_path, "strategy.rounds_per_mission=10", backbones=POOL)
    arrays = sim.play(10)
    half = FedRETraining(
        **{k: v for k, v in sim.config["strategy"]["local"].items() if k != "_target_"}
    )
    ids = sim.strategy.connected(sim.grid)
    asked = sim.strategy.requests(1, arrays, ConfigRecord(), ids, "query.predict")
    sim.grid.send_and_receive(asked)
    answers = {}
    images = sim.field.plan.test.images[sim.field.plan.asked(1)]
    for number, (reply, request) in enumerate(zip(sim.grid.replies[-3:], asked, strict=True)):
        state = sim.grid._contexts[number + 1].state
        visit = replace(sim.visit(number), node="xyz"[number], state=state)
        network = half.network(visit, request.content)
        assert network.classes == sim.strategy.classes
        np.testing.assert_array_equal(network.head.weight.detach(), arrays["weight"].numpy())
        np.testing.assert_array_equal(network.head.bias.detach(), arrays["bias"].numpy())
        # The node's answer is that of its own extractor under the server's head.
        logits = network.embed(images).numpy() @ arrays["weight"].numpy().T + arrays["bias"].numpy()
        told = reply.content["answers"]["predicted"].numpy()
        assert (told == logits.argmax(1)).mean() > 0.99
        assert json.loads(reply.content["status"]["classes"]) == list(sim.strategy.classes)
        answers[number] = told.tobytes()
    assert len(set(answers.values())) > 1


def test_a_message_is_the_embedding_size_and_one_number_a_class(tmp_path):
    sim = simulation(tmp_path, "strategy.width=512", backbones=POOL)
    sim.play(1)
    replies = sim.grid.of("train.local")
    assert len(replies) == 3
    numbers = []
    for reply in replies:
        classes = json.loads(reply.content["status"]["classes"])
        assert set(reply.content) == {"status", "entangled"}
        arrays = [array.numpy() for array in reply.content["entangled"].values()]
        assert sum(array.nbytes for array in arrays) == 4 * (512 + len(classes))
        assert classes == sorted(set(sim.field.images(len(numbers), 1)[1]))
        numbers.append(sum(array.size for array in arrays) - len(classes))
    # The paper's count leaves the labels out: 512 a node, 5,120 for ten.
    assert numbers == [512] * 3


def test_the_same_seed_sends_the_same_bytes_and_every_round_other_weights(tmp_path):
    def sent(*overrides):
        sim = simulation(
            tmp_path / str(len(overrides)), *overrides, "strategy.rounds_per_mission=2"
        )
        sim.play(2)
        return [
            b"".join(array.data for array in reply.content["entangled"].values())
            for reply in sim.grid.of("train.local")
        ], [reply.content["entangled"]["weights"].numpy() for reply in sim.grid.of("train.local")]

    first, weights = sent()
    assert first == sent()[0] != sent("seed=1")[0]
    for node in range(3):
        now, then = weights[node], weights[node + 3]
        assert now.shape == then.shape and len(now) > 1 and not np.allclose(now, then)


def test_the_mixture_of_a_message_replays_bit_for_bit(tmp_path):
    sim = simulation(tmp_path)
    sim.play(1)
    for number, reply in enumerate(sim.grid.of("train.local")):
        _, labels = sim.field.images(number, 1)
        drawn = replace(sim.visit(number), node="xyz"[number])
        u = 1 - torch.rand(len(set(labels)), generator=drawn.rng("entangle"), dtype=torch.float64)
        expected = (u / u.sum()).float().numpy()
        got = reply.content["entangled"]["weights"].numpy()
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_mechanism_and_mapping_plays(tmp_path, mechanism, mapping):
    sim = simulation(tmp_path, mechanism=mechanism, mapping=mapping)
    sim.play(1)
    assert set(sim.strategy.classes) == set(sim.field.plan.known(1))


def test_the_warning_comes_once_a_mission_where_one_class_is_alone(tmp_path, caplog):
    half = FedRETraining()
    sim = simulation(tmp_path)
    request = RecordDict({"head": server().arrays(), "round": ConfigRecord({"classes": "[]"})})
    visit = sim.visit()
    images, labels = visit.images, list(visit.labels)
    assert len(set(labels)) > 1
    with caplog.at_level(logging.WARNING, "clfed.strategies.fedre"):
        half.train(visit, request)
        assert not caplog.records
        one = [row for row, name in enumerate(labels) if name == labels[0]]
        visit = replace(visit, images=images[one], labels=[labels[0]] * len(one))
        reply = half.train(visit, request)
        half.train(visit, request)
    assert [record.getMessage().split(" holds")[0] for record in caplog.records] == [
        "Privacy: the message of node-0"
    ]
    assert reply["entangled"]["weights"].numpy().tolist() == [1.0]


def test_all_images_count_where_loaders_would_drop_the_last_ones(tmp_path):
    # Seven images with batches of four; the last class is in the last batch alone.
    half = FedRETraining(epochs=0, batch_size=4)
    visit = simulation(tmp_path).visit()
    visit = replace(visit, images=visit.images[:7], labels=["a"] * 6 + ["b"])
    request = RecordDict({"head": server().arrays(), "round": ConfigRecord({"classes": "[]"})})
    reply = half.train(visit, request)
    assert json.loads(reply["status"]["classes"]) == ["a", "b"]
    features = half.network(visit, request).embed(visit.images).numpy().astype(float)
    weights = reply["entangled"]["weights"].numpy()
    expected = weights[0] * features[:6].mean(0) + weights[1] * features[6]
    np.testing.assert_allclose(reply["entangled"]["representation"].numpy(), expected, rtol=1e-5)


def test_a_node_without_images_sends_and_changes_nothing(tmp_path):
    half = FedRETraining()
    visit = simulation(tmp_path).visit()
    visit = replace(visit, images=visit.images[:0], labels=[])
    request = RecordDict({"head": server().arrays(), "round": ConfigRecord({"classes": "[]"})})
    assert not half.train(visit, request)
    assert server().read("x", RecordDict({"status": ConfigRecord({"contributor": "x"})})) is None
    images = torch.zeros(3, *visit.images.shape[1:])
    classes, answers = half.predict(visit, request, images)
    assert classes == ("",) and answers.tolist() == [0, 0, 0]


# Distrust

GOOD = {"representation": np.ones(WIDTH, np.float32), "weights": np.array([0.25, 0.75], np.float32)}


def reply(arrays, classes='["a", "b"]', node=1, name="bad"):
    request = Message(RecordDict(), dst_node_id=node, message_type="train.local")
    # Flower numbers messages when they enter the network.
    request.metadata.__dict__["_message_id"] = str(node)
    record = ArrayRecord({k: v if isinstance(v, Array) else Array(v) for k, v in arrays.items()})
    status = ConfigRecord({"contributor": name, "classes": classes})
    return Message(RecordDict({"entangled": record, "status": status}), reply_to=request)


def changed(**arrays):
    return {k: v for k, v in (GOOD | arrays).items() if v is not None}


def pickled():
    array = Array(GOOD["weights"])
    return Array(array.dtype, array.shape, array.stype, b"\x80\x04K\x01.")


BAD = {
    "another width": changed(representation=np.ones(WIDTH + 1, np.float32)),
    "two dimensions": changed(representation=np.ones((1, WIDTH), np.float32)),
    "not a number": changed(representation=np.full(WIDTH, np.nan, np.float32)),
    "infinite": changed(representation=np.full(WIDTH, -np.inf, np.float32)),
    "out of range": changed(representation=np.full(WIDTH, 1e9, np.float32)),
    "another type": changed(representation=np.ones(WIDTH, np.float64)),
    "whole numbers": changed(weights=np.array([0, 1])),
    "missing": changed(weights=None),
    "pickled": changed(weights=pickled()),
    "more weights than classes": changed(weights=np.array([0.25, 0.5, 0.25], np.float32)),
    "a sum above one": changed(weights=np.array([0.5, 0.75], np.float32)),
    "a sum below one": changed(weights=np.array([0.25, 0.5], np.float32)),
    "negative": changed(weights=np.array([-0.25, 1.25], np.float32)),
    "a weight that is no number": changed(weights=np.array([np.nan, 1], np.float32)),
}
NAMES = {
    "a class twice": '["a", "a"]',
    "no list": '{"a": 1, "b": 2}',
    "no names": "[1, 2]",
    "no JSON": "[",
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", [*BAD, *NAMES])
def test_a_bad_reply_is_refused_and_changes_nothing(case, caplog):
    bad = reply(BAD.get(case, GOOD), NAMES.get(case, '["a", "b"]'))
    with pytest.raises(InvalidMessage):
        server().read("bad", bad.content)
    good = reply(GOOD, '["b", "c"]', node=2, name="good")
    alone, together = server(), server()
    alone.aggregate_train(1, [good])
    with caplog.at_level(logging.WARNING):
        together.aggregate_train(1, [bad, good])
    assert "left out node id 1" in caplog.text
    assert together.classes == alone.classes == ("b", "c")
    assert all((rows(together)[n] == rows(alone)[n]).all() for n in together.classes)


def test_no_classes_are_no_mixture():
    empty = changed(weights=np.empty(0, np.float32))
    with pytest.raises(InvalidMessage, match="sum 1"):
        server().read("x", reply(empty, "[]").content)


def test_the_order_of_replies_changes_no_bit():
    replies = [
        reply(changed(representation=np.full(WIDTH, i + 0.1, np.float32)), node=i, name=f"n{3 - i}")
        for i in (1, 2, 3)
    ]
    found = []
    for order in (replies, replies[::-1]):
        strategy = server(batch_size=2)
        arrays, metrics = strategy.aggregate_train(1, order)
        found.append([array.data for array in arrays.values()])
        assert dict(metrics) == {"classes": 2, "nodes": 3}
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 0), ("width", 1.5), ("batch_size", True), ("lr", 0), ("lr", math.inf), ("lr", "1")],
)
def test_bad_settings_of_the_server_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"strategy\.{key} must"):
        FedRE(None, local={}, session="s", **{key: value})


@pytest.mark.parametrize("key", ["mapping", "mechanism"])
def test_bad_settings_of_a_node_are_refused(key):
    with pytest.raises(ConfigError, match=rf"strategy\.local\.{key} must be one of .*'rat'"):
        FedRETraining(**{key: "rat"})


def test_what_leaves_is_declared():
    assert issubclass(FedRE, TrainingStrategy) and FedRE.personal
    assert "one random mixture" in FedRE.leaves
