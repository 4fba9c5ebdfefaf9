"""Merge rules: the exact sum, and the published rule against a loop of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.errors import EmbeddingMismatch, InvalidMessage, UnsupportedStatistics
from clfed.prototypes import MERGES, PrototypeMemory

DIM = 2
batches = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(-50, 50), min_size=DIM, max_size=DIM)),
    max_size=8,
)


def seen(examples, kind="none"):
    rows = torch.tensor([row for _, row in examples], dtype=torch.float64).reshape(-1, DIM)
    return PrototypeMemory.empty(DIM, "e", kind).observe(rows, [name for name, _ in examples])


def published(state, clients):
    """The double shrink written from its description, one class and client at a time."""
    server = {c: [len(rows), np.mean(rows, axis=0)] for c, rows in state.items()}
    sent = []
    for client in clients:
        message = {}
        for c, rows in client.items():
            m, mean = len(rows), np.mean(rows, axis=0)
            if c in state:
                n, mu = len(state[c]), np.mean(state[c], axis=0)
                mean = (n * mu + m * mean) / (n + m)
            message[c] = (m, mean)
        sent.append(message)
    for message in sent:
        for c, (m, nu) in message.items():
            if c not in server:
                server[c] = [m, nu]
                continue
            n, mu = server[c]
            server[c] = [n + m, mu + m / (n + m) * (nu - mu)]
    return server


def by_class(examples):
    rows = {}
    for name, row in examples:
        rows.setdefault(name, []).append(np.array(row, dtype=float))
    return rows


@settings(deadline=None)
@given(batches, st.lists(batches, max_size=4))
def test_legacy_rule_agrees_with_a_loop(state, clients):
    merged = MERGES["legacy_double_shrink"](seen(state), [seen(client) for client in clients])
    expected = published(by_class(state), [by_class(client) for client in clients])
    assert merged.classes == tuple(sorted(expected))
    for row, name in enumerate(merged.classes):
        count, mean = expected[name]
        assert int(merged.counts[row]) == count
        np.testing.assert_allclose(merged.means()[row], mean, atol=1e-4)


@settings(deadline=None)
@given(batches, st.lists(batches, max_size=4), st.randoms(use_true_random=False))
def test_pooled_is_the_memory_of_all_examples(state, clients, rng):
    deltas = [seen(client) for client in clients]
    rng.shuffle(deltas)
    everything = seen([*state, *(example for client in clients for example in client)])
    assert MERGES["pooled"](seen(state), deltas) == everything
    unseen = MERGES["legacy_double_shrink"](seen([]), deltas)
    assert unseen == seen([example for client in clients for example in client])


def test_the_known_example_shrinks_twice():
    state = seen([("owl", [0, 0])] * 30)
    delta = seen([("owl", [1, 1])] * 30)
    assert MERGES["legacy_double_shrink"](state, [delta]).prototypes().tolist() == [[0.25, 0.25]]
    assert MERGES["pooled"](state, [delta]).prototypes().tolist() == [[0.5, 0.5]]


def test_first_batch_still_weighs_half_after_many_missions():
    state = seen([("owl", [1, 0])] * 30)
    for _ in range(16):
        state = MERGES["legacy_double_shrink"](state, [seen([("owl", [0, 0])] * 30)])
    weight = state.means()[0, 0].item()
    product = np.prod([1 - (1 / (k + 1)) ** 2 for k in range(1, 17)])
    assert weight == pytest.approx(product, abs=1e-4)
    assert weight == pytest.approx(0.53, abs=0.005)


def test_untouched_classes_keep_their_mean():
    state = seen([("ant", [1, 2]), ("ant", [3, 5]), ("owl", [7, 7])])
    merged = MERGES["legacy_double_shrink"](state, [seen([("owl", [1, 1]), ("yak", [2, 2])])])
    assert torch.equal(merged.sums[0], state.sums[0])
    assert merged.select(["yak"]) == seen([("yak", [2, 2])])
    assert MERGES["legacy_double_shrink"](state, []) == state == MERGES["pooled"](state, [])


def test_what_the_legacy_rule_cannot_do_is_refused():
    legacy = MERGES["legacy_double_shrink"]
    for kind in ("shared", "class"):
        with pytest.raises(UnsupportedStatistics):
            legacy(seen([], kind), [seen([("owl", [1, 1])], kind)])
    with pytest.raises(InvalidMessage):
        legacy(seen([("owl", [1, 1])] * 3), [-seen([("owl", [1, 1])])])
    with pytest.raises(EmbeddingMismatch):
        legacy(seen([]), [PrototypeMemory.empty(DIM, "other")])
