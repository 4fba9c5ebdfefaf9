"""FedAvg with a growing head, against a loop that averages one number at a time."""

import json
import math
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed import __version__
from clfed.errors import FederationError
from clfed.federated.grid import LocalGrid
from clfed.strategies import FedAvg

WIDTH = 3


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


class Nodes:
    """A grid that only knows who is there."""

    def __init__(self, count):
        self.count = count

    def get_node_ids(self):
        return range(self.count, 0, -1)


def strategy():
    """A server that has sent a network without classes to one node."""
    server = FedAvg(None, local={}, briefing={}, session="s", wait=0.0)
    start = record(network("", np.random.default_rng(0)))
    list(server.configure_train(1, start, ConfigRecord(), Nodes(1)))
    return server


def network(classes, rng):
    return {
        "backbone.weight": rng.standard_normal((2, WIDTH)).astype(np.float32),
        "backbone.running_var": rng.random(WIDTH).astype(np.float32),
        "backbone.num_batches_tracked": np.array(rng.integers(0, 50), np.int64),
        "head.weight": rng.standard_normal((len(classes), WIDTH)).astype(np.float32),
        "head.bias": rng.standard_normal(len(classes)).astype(np.float32),
    }


def record(model):
    return ArrayRecord({name: Array(values) for name, values in model.items()})


def message(content, node=1):
    request = Message(RecordDict(), dst_node_id=node, message_type="train.local")
    # Flower numbers messages when they enter the network.
    request.metadata.__dict__["_message_id"] = str(node)
    return Message(content, reply_to=request)


def reply(name, classes, examples, model, node=1):
    text = json.dumps(classes if isinstance(classes, dict) else list(classes))
    status = ConfigRecord({"contributor": name, "classes": text, "examples": examples})
    return message(RecordDict({"model": record(model), "status": status}), node)


def plain(arrays):
    return {name: array.numpy() for name, array in arrays.items()}


def slow_average(parts):
    """Average number by number: ``parts`` is (classes, examples, model); rows go by class name."""
    every = sorted({name for classes, _, _ in parts for name in classes})
    result = {}
    for key, shape in ((k, v.shape) for k, v in parts[0][2].items()):
        if key.startswith("head."):
            rows = []
            for name in every:
                having = [(n, m[key][list(c).index(name)]) for c, n, m in parts if name in c]
                rows.append(
                    sum(n * row.astype(float) for n, row in having) / sum(n for n, _ in having)
                )
            result[key] = np.array(rows)
        elif key.endswith("tracked"):
            result[key] = max(int(model[key]) for _, _, model in parts)
        else:
            flat = [
                math.fsum(n * float(m[key].flat[i]) for _, n, m in parts)
                / sum(n for _, n, _ in parts)
                for i in range(int(np.prod(shape)))
            ]
            result[key] = np.reshape(flat, shape)
    return every, result


heads = st.lists(
    st.tuples(st.permutations("abcde").map(lambda p: p[:3]), st.integers(1, 60)),
    min_size=1,
    max_size=4,
)


@given(heads, st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_it_is_the_average_number_by_number(heads, seed):
    rng = np.random.default_rng(seed)
    parts = [(classes, examples, network(classes, rng)) for classes, examples in heads]
    server = strategy()
    replies = [reply(f"n{i}", *part) for i, part in enumerate(parts)]
    arrays, metrics = server.aggregate_train(1, replies)
    every, expected = slow_average(parts)
    assert server.classes == tuple(every)
    for key, value in plain(arrays).items():
        assert value.dtype == parts[0][2][key].dtype and value.shape == np.shape(expected[key])
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6)
    assert metrics == {"classes": len(every), "examples": sum(n for _, n, _ in parts)}


def test_an_absent_class_is_not_a_row_of_zeros():
    one, two = network("ab", np.random.default_rng(0)), network("bc", np.random.default_rng(1))
    server = strategy()
    arrays, _ = server.aggregate_train(1, [reply("x", "ab", 10, one), reply("y", "bc", 30, two)])
    weight = plain(arrays)["head.weight"]
    np.testing.assert_array_equal(weight[0], one["head.weight"][0])
    np.testing.assert_allclose(
        weight[1], 0.25 * one["head.weight"][1] + 0.75 * two["head.weight"][0], rtol=1e-6
    )
    np.testing.assert_array_equal(weight[2], two["head.weight"][1])


def test_with_one_head_it_is_plain_fedavg():
    rng = np.random.default_rng(3)
    models = [network("abc", rng) for _ in range(3)]
    weights = np.array([5, 1, 2])
    server = strategy()
    replies = [reply(f"n{i}", "abc", int(n), models[i]) for i, n in enumerate(weights)]
    arrays, _ = server.aggregate_train(1, replies)
    for key in ("backbone.weight", "head.weight", "head.bias"):
        expected = np.average([m[key].astype(float) for m in models], axis=0, weights=weights)
        np.testing.assert_allclose(plain(arrays)[key], expected, rtol=1e-5, atol=1e-7)


def test_the_order_of_replies_changes_no_bit():
    rng = np.random.default_rng(4)
    replies = [
        reply(f"n{i}", classes, n, network(classes, rng), node=9 - i)
        for i, (classes, n) in enumerate([("ab", 7), ("bca", 11), ("cd", 3)])
    ]
    results = set()
    for order in permutations(replies):
        server = strategy()
        arrays, _ = server.aggregate_train(1, order)
        results.add((server.classes, *(a.tobytes() for a in plain(arrays).values())))
    assert len(results) == 1


def test_errors_and_replies_without_training_do_not_count():
    rng = np.random.default_rng(5)
    good = reply("good", "ab", 4, network("ab", rng))
    others = [
        message(Error(2, "out of memory")),
        reply("idle", "abz", 0, network("abz", rng)),
        message(RecordDict({"status": ConfigRecord({"contributor": "", "needs-briefing": True})})),
    ]
    alone, _ = strategy().aggregate_train(1, [good])
    server = strategy()
    together, metrics = server.aggregate_train(1, [*others, good])
    assert server.classes == ("a", "b") and metrics["examples"] == 4
    assert all((plain(alone)[k] == v).all() for k, v in plain(together).items())
    assert strategy().aggregate_train(1, others) == (None, None)
    assert strategy().aggregate_train(1, []) == (None, None)


def test_classes_are_kept_when_nobody_sends_their_rows():
    rng = np.random.default_rng(6)
    server = strategy()
    first, _ = server.aggregate_train(1, [reply("x", "ab", 4, network("ab", rng))])
    list(server.configure_train(2, first, ConfigRecord(), Nodes(1)))
    late = network("b", rng)
    second, _ = server.aggregate_train(2, [reply("x", "b", 4, late)])
    assert server.classes == ("a", "b")
    np.testing.assert_array_equal(plain(second)["head.weight"][0], plain(first)["head.weight"][0])
    np.testing.assert_array_equal(plain(second)["head.weight"][1], late["head.weight"][0])


def broken(**changes):
    model = network("ab", np.random.default_rng(7))
    return {k: v for k, v in (model | changes).items() if v is not None}


NAN = np.full((2, WIDTH), np.nan, np.float32)
BAD = {
    "not finite": lambda: reply("bad", "ab", 5, broken(**{"backbone.weight": NAN})),
    "not finite in the head": lambda: reply("bad", "ab", 5, broken(**{"head.weight": NAN})),
    "another shape": lambda: reply(
        "bad", "ab", 5, broken(**{"backbone.weight": np.ones((2, 9), np.float32)})
    ),
    "an array is missing": lambda: reply("bad", "ab", 5, broken(**{"backbone.weight": None})),
    "more classes than rows": lambda: reply("bad", "abc", 5, broken()),
    "a class twice": lambda: reply("bad", "aa", 5, broken()),
    "classes that are no names": lambda: reply("bad", [1, 2], 5, broken()),
    "classes that are no list": lambda: reply("bad", {"a": 0, "b": 1}, 5, broken()),
    "fewer than no examples": lambda: reply("bad", "ab", -5, broken()),
    "absurdly many examples": lambda: reply("bad", "ab", 10**12, broken()),
    "a status without a name": lambda: message(
        RecordDict({"model": record(broken()), "status": ConfigRecord({"examples": 5})})
    ),
    "no status": lambda: message(RecordDict({"model": record(broken())})),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_changes_nothing(name):
    good = [
        reply(f"good {i}", "ab", 4, network("ab", np.random.default_rng(8 + i))) for i in range(2)
    ]
    alone, _ = strategy().aggregate_train(1, good)
    server = strategy()
    with np.errstate(all="ignore"):
        together, _ = server.aggregate_train(1, [BAD[name](), *good])
    assert server.classes == ("a", "b")
    assert all((plain(alone)[k] == v).all() for k, v in plain(together).items())


# Requests


def test_the_network_goes_to_everybody_and_the_briefing_once():
    server = FedAvg(
        None,
        local={"_target_": "y"},
        briefing={"briefing": ConfigRecord({"settings": "x"})},
        seed=5,
        session="mine",
        nodes=3,
        wait=0.0,
    )
    arrays = record(network("", np.random.default_rng(0)))
    first = list(server.configure_train(1, arrays, ConfigRecord({"extra": 1}), Nodes(3)))
    assert [m.metadata.dst_node_id for m in first] == [1, 2, 3]
    assert {m.metadata.message_type for m in first} == {"train.local"}
    assert all("briefing" in m.content and "model" in m.content for m in first)
    assert dict(first[0].content["local"]) == {"json": '{"_target_": "y"}'}
    assert dict(first[0].content["round"]) == {
        "extra": 1,
        "round": 1,
        "mission": 1,
        "seed": 5,
        "session": "mine",
        "clfed": __version__,
        "classes": "[]",
    }
    model = network("ba", np.random.default_rng(1))
    server.aggregate_train(1, [reply(f"x{i}", "ba", 1, model, node=i) for i in (1, 2, 3)])
    second = list(server.configure_train(2, arrays, ConfigRecord(), Nodes(3)))
    assert all("briefing" not in m.content for m in second)
    assert json.loads(second[0].content["round"]["classes"]) == ["a", "b"]


def test_a_node_that_asks_for_the_briefing_gets_it():
    server = FedAvg(
        None,
        local={},
        briefing={"briefing": ConfigRecord({"settings": "x"})},
        session="s",
        wait=0.0,
    )
    arrays = record(network("", np.random.default_rng(0)))
    list(server.configure_train(1, arrays, ConfigRecord(), Nodes(2)))
    asking = RecordDict({"status": ConfigRecord({"contributor": "", "needs-briefing": True})})
    done = reply("x", "ab", 1, network("ab", np.random.default_rng(1)), node=1)
    server.aggregate_train(1, [done, message(asking, node=2)])
    second = list(server.configure_train(2, arrays, ConfigRecord(), Nodes(2)))
    assert ["briefing" in m.content for m in second] == [False, True]


def test_nobody_there_is_an_error_and_nothing_is_sent_for_evaluation():
    server = FedAvg(None, local={}, briefing={}, session="s", wait=0.0)
    with pytest.raises(FederationError, match="No node"):
        server.configure_train(1, ArrayRecord(), ConfigRecord(), Nodes(0))
    assert server.configure_evaluate(1, ArrayRecord(), ConfigRecord(), Nodes(1)) == []
    assert server.aggregate_evaluate(1, []) is None


def test_with_one_head_it_is_the_average_that_flower_makes():
    rng = np.random.default_rng(9)
    parts = [(f"n{i}", network("abc", rng), 5 + 7 * i) for i in range(3)]
    ours, _ = strategy().aggregate_train(1, [reply(n, "abc", k, m) for n, m, k in parts])
    theirs, _ = FlowerFedAvg().aggregate_train(
        1,
        [
            message(RecordDict({"model": record(m), "m": MetricRecord({"num-examples": k})}))
            for _, m, k in parts
        ],
    )
    expected = plain(theirs)
    assert expected.keys() == plain(ours).keys()
    for key, value in plain(ours).items():
        if value.dtype == np.float32:  # Flower averages counters as well
            np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6)


def test_an_impostor_does_not_count_whoever_comes_first():
    rng = np.random.default_rng(10)
    good, other = reply("a", "ab", 4, network("ab", rng), node=1), network("ab", rng)
    false = reply("a", "ab", 9, other, node=2)
    honest, _ = strategy().aggregate_train(1, [good])
    for order in permutations([good, false]):
        known = strategy()
        first, _ = known.aggregate_train(1, [good])
        list(known.configure_train(2, first, ConfigRecord(), Nodes(2)))
        again, _ = known.aggregate_train(2, order)
        assert all((plain(honest)[key] == value).all() for key, value in plain(again).items())
        assert strategy().aggregate_train(1, order) == (None, None)  # nobody had the name before
