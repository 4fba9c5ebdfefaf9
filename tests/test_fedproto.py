"""FedProto against plain loops: what is averaged, what draws, who answers, what is refused."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import Simulation, support_of

from clfed.errors import ConfigError, InvalidMessage
from clfed.federated.grid import LocalGrid
from clfed.federated.wire import record_bytes
from clfed.learners.fine_tuning import FineTuning
from clfed.strategies.fedproto import FedProto, FedProtoTraining
from clfed.strategies.personal import PersonalTraining

WIDTH = 4


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return Simulation.of(folder, "strategy=fedproto", f"backbone.widths=[{WIDTH}]").encoder


def server(encoder, **options):
    return FedProto(encoder, local={}, session="s", wait=0.0, **options)


def content(classes, counts, means, told=None):
    arrays = {"counts": Array(np.asarray(counts)), "means": Array(np.asarray(means))}
    head = {"contributor": "x", "classes": json.dumps(classes) if told is None else told}
    return RecordDict({"prototypes": ArrayRecord(arrays), "status": ConfigRecord(head)})


def reply(name, classes, counts, means, node=1):
    request = Message(RecordDict(), dst_node_id=node, message_type="train.local")
    request.metadata.__dict__["_message_id"] = str(node)
    parts = content(classes, np.array(counts, np.int64), np.array(means, np.float32))
    parts["status"]["contributor"] = name
    return Message(parts, reply_to=request)


def table(strategy):
    return dict(zip(strategy.classes, strategy.arrays()["means"].numpy(), strict=True))


# Averages

reports = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40), min_size=1),
    min_size=1,
    max_size=4,
)


@given(reports, st.sampled_from(["exact", "paper", "code"]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_each_average_is_the_formula_number_by_number(encoder, reports, aggregation, seed):
    rng = np.random.default_rng(seed)
    sent = [
        {c: (n, rng.normal(size=WIDTH).astype(np.float32)) for c, n in r.items()} for r in reports
    ]
    strategy = server(encoder, aggregation=aggregation)
    strategy.aggregate_train(
        1,
        [
            reply(f"n{i}", list(r), [n for n, _ in r.values()], [m for _, m in r.values()], i + 1)
            for i, r in enumerate(sent)
        ],
    )
    found = table(strategy)
    assert sorted(found) == sorted({c for r in sent for c in r})
    for name, prototype in found.items():
        of_class = [r[name] for r in sent if name in r]
        total = sum(n for n, _ in of_class)
        for column in range(WIDTH):
            if aggregation == "code":
                expected = sum(float(m[column]) for _, m in of_class) / len(of_class)
            else:
                expected = sum(n * float(m[column]) for n, m in of_class) / total
            if aggregation == "paper":
                expected /= len(of_class)
            assert prototype[column] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_exact_prototypes_of_a_frozen_network_are_the_means_of_all_images(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedproto", "strategy.local.epochs=0")
    world.play()
    weights = {k: v.double().numpy() for k, v in world.encoder.backbone.state_dict().items()}
    mean, std = world.encoder.transform.mean[0], world.encoder.transform.std[0]
    found = table(world.strategy)
    pooled = support_of(world.field)
    assert sorted(found) == sorted(pooled) == [str(digit) for digit in range(10)]
    shared = 0
    for name, images in pooled.items():
        pixels = (images.numpy().reshape(len(images), -1) / 255 - mean) / std
        embedded = np.maximum(pixels @ weights["layers.1.weight"].T + weights["layers.1.bias"], 0)
        np.testing.assert_allclose(found[name], embedded.mean(0), rtol=1e-5, atol=1e-5)
        shared += sum(name in m.classes for m in world.field.plan.missions) > 1
    assert shared > 3, "classes that one node alone met show nothing"


@pytest.mark.parametrize("aggregation", ["paper", "code"])
def test_the_other_averages_are_not_the_pooled_mean(tmp_path, aggregation):
    frozen = ("strategy=fedproto", "strategy.local.epochs=0")
    exact = Simulation.of(tmp_path, *frozen)
    other = Simulation.of(tmp_path, *frozen, f"strategy.aggregation={aggregation}")
    exact.play(), other.play()
    apart = [np.abs(table(exact.strategy)[c] - m).max() for c, m in table(other.strategy).items()]
    assert max(apart) > 1e-3


def test_the_order_of_replies_changes_no_bit(encoder):
    rng = np.random.default_rng(4)
    replies = [
        reply(
            f"n{i}",
            [*classes],
            [*range(1, len(classes) + 1)],
            rng.normal(size=(len(classes), WIDTH)),
            i,
        )
        for i, classes in enumerate(["ab", "bca", "cb"], start=1)
    ]
    results = set()
    for order in permutations(replies):
        strategy = server(encoder)
        arrays, _ = strategy.aggregate_train(1, order)
        results.add((strategy.classes, arrays["means"].data))
    assert len(results) == 1


def test_a_newer_report_replaces_an_older_one_on_the_same_mission_and_all_on_the_next(encoder):
    strategy = server(encoder, rounds_per_mission=2)
    one, two, three = np.eye(3, WIDTH)
    strategy.aggregate_train(
        1, [reply("x", ["a"], [1], [one]), reply("y", ["a", "b"], [3, 2], [two, two], 2)]
    )
    np.testing.assert_allclose(table(strategy)["a"], (one + 3 * two) / 4)
    # The second round asks x alone: what y said on this mission still counts.
    strategy.aggregate_train(2, [reply("x", ["a"], [1], [three])])
    np.testing.assert_allclose(table(strategy)["a"], (three + 3 * two) / 4)
    np.testing.assert_allclose(table(strategy)["b"], two)
    # The next mission: networks have moved on, so nothing of the last one is mixed in.
    strategy.aggregate_train(3, [reply("x", ["a", "c"], [5, 1], [one, one])])
    np.testing.assert_allclose(table(strategy)["a"], one)
    np.testing.assert_allclose(table(strategy)["b"], two)
    assert strategy.classes == ("a", "b", "c")


# What draws, and what leaves


def request(names, means):
    return RecordDict(
        {
            "round": ConfigRecord({"classes": json.dumps(names)}),
            "prototypes": ArrayRecord({"means": Array(np.asarray(means, np.float32))}),
        }
    )


@pytest.mark.parametrize("logits", ["all", "met"])
def test_the_loss_is_cross_entropy_and_the_mean_squared_distance(tmp_path, logits):
    world = Simulation.of(tmp_path, "strategy=fedproto", f"backbone.widths=[{WIDTH}]")
    visit = world.visit()
    method = FedProtoTraining(weight=0.7, logits=logits)
    network = FineTuning(world.encoder, ["zebra", *sorted(set(visit.labels))])
    rng = np.random.default_rng(0)
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(rng.normal(size=network.head.weight.shape)))
    known = [*sorted(set(visit.labels))[1:], "unheard of"]
    means = rng.normal(size=(len(known), WIDTH)).astype(np.float32)
    labels = network.label(visit.labels)
    loss = method.loss(network, visit, request(known, means))(network, visit.images, labels)

    state = {k: v.detach().double().numpy() for k, v in network.state_dict().items()}
    transform = world.encoder.transform
    entropy = distance = 0.0
    met = sorted(set(visit.labels))
    assert any(name not in known for name in visit.labels)
    for image, name in zip(visit.images.numpy(), visit.labels, strict=True):
        pixels = (image.flatten() / 255 - transform.mean[0]) / transform.std[0]
        z = np.maximum(
            state["backbone.layers.1.weight"] @ pixels + state["backbone.layers.1.bias"], 0
        )
        scores = dict(
            zip(network.classes, state["head.weight"] @ z + state["head.bias"], strict=True)
        )
        among = met if logits == "met" else network.classes
        entropy += np.log(sum(np.exp(scores[c]) for c in among)) - scores[name]
        if name in known:
            distance += float(np.mean((z - means[known.index(name)]) ** 2))
    expected = (entropy + 0.7 * distance) / len(visit.labels)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_without_weight_it_trains_as_nodes_alone_do(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedproto")
    means = np.ones((10, 16))
    asked = request([str(digit) for digit in range(10)], means)
    one, two = world.visit(), world.visit()
    FedProtoTraining(weight=0, epochs=2).train(one, asked)
    PersonalTraining(epochs=2).train(two, asked)
    assert all(one.state["model"][k].data == two.state["model"][k].data for k in two.state["model"])
    drawn = world.visit()
    FedProtoTraining(weight=5, epochs=30).train(drawn, asked)
    distance = [_distance(world, visit, means) for visit in (one, drawn)]
    assert distance[1] < 0.5 * distance[0]


def _distance(world, visit, means):
    prototypes = FedProtoTraining(epochs=0).train(visit, request([], np.zeros((0, 16))))[
        "prototypes"
    ]
    return float(np.abs(prototypes["means"].numpy() - means[0]).mean())


def test_names_counts_and_means_leave_a_node_and_nothing_else(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedproto", "strategy.local.epochs=1")
    world.play()
    sent = world.grid.of("train.local")
    assert len(sent) == 6
    for message in sent:
        assert set(message.content) == {"prototypes", "status"}
        classes = json.loads(message.content["status"]["classes"])
        arrays = message.content["prototypes"]
        assert arrays["means"].numpy().shape == (len(classes), 16)
        header = 128  # of a NumPy file
        numbers = len(classes) * (16 * 4 + 8)
        assert arrays.count_bytes() == numbers + 2 * header + len("counts") + len("means")
        assert record_bytes(message.content) < numbers + 600


def test_nodes_of_several_architectures_agree_on_prototypes_of_one_size(tmp_path):
    pool = [
        {"_target_": "clfed.backbones.MLP", "widths": [24, 8]},
        {"_target_": "clfed.backbones.MLP", "widths": [8]},
    ]
    world = Simulation.of(
        tmp_path, "strategy=fedproto", "strategy.local.epochs=1", local={"backbones": pool}
    )
    world.play()
    assert world.strategy.arrays()["means"].numpy().shape == (10, 8)
    pool[1]["widths"] = [9]
    with pytest.raises(
        ConfigError, match="embeddings of one size, which prototypes share, got 8, 9"
    ):
        Simulation.of(tmp_path, "strategy=fedproto", local={"backbones": pool})


# Who answers


def test_a_node_answers_with_its_own_network_and_the_nearest_global_prototype(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedproto", "strategy.local.lr=0.1")
    arrays = world.play()
    strategy = world.strategy
    images = world.field.plan.test.images[world.field.plan.asked(2)]
    messages = strategy.requests(2, arrays, ConfigRecord(), [1, 2, 3], "query.predict")
    answers = []
    for node, message in enumerate(world.grid.send_and_receive(messages)):
        status, found = message.content["status"], message.content["answers"]["predicted"].numpy()
        assert json.loads(status["classes"]) == list(strategy.classes) and status["number"] == node
        answers.append(found)
        kept = world.grid._contexts[node + 1].state["model"]
        weight, bias = (
            kept[f"backbone.layers.1.{part}"].numpy().astype(float) for part in ("weight", "bias")
        )
        transform = world.encoder.transform
        for image, row in zip(images[::5].numpy(), found[::5], strict=True):
            pixels = (image.flatten() / 255 - transform.mean[0]) / transform.std[0]
            z = np.maximum(weight @ pixels + bias, 0)
            distances = [float(np.sum((z - p) ** 2)) for p in arrays["means"].numpy().astype(float)]
            assert distances[row] <= min(distances) * (1 + 1e-4)
    assert any((one != answers[0]).any() for one in answers[1:]), "every node has its own network"


def test_before_there_is_a_prototype_nothing_is_answered_rightly(tmp_path):
    world = Simulation.of(tmp_path, "strategy=fedproto")
    classes, rows = FedProtoTraining().predict(
        world.visit(), request([], np.zeros((0, 16))), world.field.plan.test.images[:4]
    )
    assert list(classes) == [""] and rows.tolist() == [0, 0, 0, 0]


def test_a_node_without_images_sends_no_prototype_and_still_answers(tmp_path, encoder):
    world = Simulation.of(tmp_path, "strategy=fedproto", f"backbone.widths=[{WIDTH}]")
    images, _ = world.field.images(0, 1)
    visit = world.visit(mission=99)
    assert not visit.labels
    sent = FedProtoTraining().train(visit, request(["a"], [[0, 0, 0, 1]]))
    assert server(encoder).read("x", sent) is None
    classes, rows = FedProtoTraining().predict(visit, request(["a"], [[0, 0, 0, 1]]), images[:3])
    assert list(classes) == ["a"] and rows.tolist() == [0, 0, 0]


# What is refused


ONES = np.ones((2, WIDTH), np.float32)
COUNTS = np.array([1, 2], np.int64)


def truncated(key):
    parts = content(["a", "b"], COUNTS, ONES)
    array = parts["prototypes"][key]
    parts["prototypes"][key] = Array(array.dtype, array.shape, array.stype, array.data[:-3])
    return parts


def disguised(**changes):
    parts = content(["a", "b"], COUNTS, ONES)
    array = parts["prototypes"]["means"]
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    parts["prototypes"]["means"] = Array(**(fields | changes))
    return parts


BAD = {
    "not finite": lambda: content(["a", "b"], COUNTS, ONES * np.nan),
    "infinite": lambda: content(["a", "b"], COUNTS, ONES * np.inf),
    "another width": lambda: content(["a", "b"], COUNTS, np.ones((2, 5), np.float32)),
    "float64": lambda: content(["a", "b"], COUNTS, np.ones((2, WIDTH))),
    "fewer rows": lambda: content(["a", "b"], COUNTS, ONES[:1]),
    "columns first": lambda: content(["a", "b"], COUNTS, np.asfortranarray(ONES)),
    "counts of another type": lambda: content(["a", "b"], COUNTS.astype(np.int32), ONES),
    "no image of a class": lambda: content(["a", "b"], [1, 0], ONES),
    "a debt": lambda: content(["a", "b"], [1, -4], ONES),
    "absurdly many images": lambda: content(["a", "b"], [1, 10**12], ONES),
    "a class twice": lambda: content(["a", "a"], COUNTS, ONES),
    "a class without a name": lambda: content(["a", ""], COUNTS, ONES),
    "classes that are numbers": lambda: content([1, 2], COUNTS, ONES),
    "classes that are no list": lambda: content({"a": 1, "b": 2}, COUNTS, ONES),
    "classes that are no JSON": lambda: content([], COUNTS, ONES, told="[a"),
    "classes nested beyond measure": lambda: content([], COUNTS, ONES, told="[" * 100_000),
    "cut off means": lambda: truncated("means"),
    "cut off counts": lambda: truncated("counts"),
    "another serialisation": lambda: disguised(stype="pickle"),
    "an archive": lambda: disguised(data=b"PK\x03\x04" + bytes(200)),
    "no data": lambda: disguised(data=b""),
    "a header that asks for an expression": lambda: disguised(
        data=b"\x93NUMPY\x01\x00\x10\x00{'descr': open('x')}"
    ),
    "no prototypes": lambda: RecordDict(
        {"status": ConfigRecord({"contributor": "x", "classes": "[]"})}
    ),
    "no classes": lambda: RecordDict({"status": ConfigRecord({"contributor": "x"})}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_is_refused_and_changes_nothing(encoder, name):
    strategy = server(encoder)
    with pytest.raises(InvalidMessage):
        strategy.read("x", BAD[name]())
    assert strategy.classes == ()


def test_good_and_bad_together_are_the_good_alone(encoder):
    good = reply("good", ["a"], [2], [[1, 2, 3, 4]])
    strategy = server(encoder)
    bad = reply("bad", ["a"], [2], [[np.nan] * 4], node=2)
    arrays, metrics = strategy.aggregate_train(1, [bad, good])
    assert arrays["means"].numpy().tolist() == [[1, 2, 3, 4]]
    assert dict(metrics) == {"classes": 1, "examples": 2}


@pytest.mark.parametrize("aggregation", ["mean", None, 1])
def test_an_unknown_average_is_refused(encoder, aggregation):
    with pytest.raises(ConfigError, match=r"strategy\.aggregation"):
        server(encoder, aggregation=aggregation)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", None, True])
def test_a_weight_that_makes_no_sense_is_refused(weight):
    with pytest.raises(ConfigError, match=r"strategy\.local\.weight"):
        FedProtoTraining(weight=weight)
