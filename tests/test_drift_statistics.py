"""Additive drift statistics against plain numpy, and what a server does with them."""

import functools
import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.backbones import MLP, Encoder
from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    InvalidEmbedding,
    InvalidMessage,
    NotEnoughData,
    UnsupportedStatistics,
)
from clfed.federated.grid import LocalGrid
from clfed.federated.local_training import Visit
from clfed.federated.wire import decode_memory, encode_memory
from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory
from clfed.prototypes.drift_statistics import DriftStatistics, carried, carry_over
from clfed.strategies.drift_survey import DriftReport, DriftSurvey

GRID = 2.0**-8  # numbers that the fixed point holds exactly


def embeddings(rng, count, dim):
    """Two embeddings of the same images, ``(N, D)`` each."""
    old = np.round(rng.standard_normal((count, dim)) / GRID) * GRID
    new = np.round((old @ rng.standard_normal((dim, dim)) + 1) / GRID) * GRID
    return old, new


def statistics(old, new):
    return DriftStatistics.of(torch.from_numpy(old), torch.from_numpy(new), "old", "new")


@given(st.integers(1, 5), st.integers(1, 30), st.sampled_from([0.0, 1e-3, 0.5]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_map_is_ridge_regression(dim, extra, penalty, seed):
    old, new = embeddings(np.random.default_rng(seed), 2 * dim + extra, dim)
    cross, gram = np.zeros((dim, dim)), np.zeros((dim, dim))
    for before, after in zip(old, new, strict=True):
        cross += np.outer(after, before)
        gram += np.outer(before, before)
    expected = cross @ np.linalg.inv(gram + penalty * np.trace(gram) / dim * np.eye(dim))
    found = statistics(old, new).matrix(penalty)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    missed = sum(((expected @ b - a) ** 2).sum() for b, a in zip(old, new, strict=True))
    assert statistics(old, new).misfit(found) == pytest.approx(
        missed / (new**2).sum(), rel=1e-6, abs=1e-9
    )


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_parts_add_up_to_the_whole_in_any_order(sizes, seed):
    rng = np.random.default_rng(seed)
    old, new = rng.standard_normal((2, sum(sizes), 3)) * 100
    ends = np.cumsum(sizes)
    parts = [statistics(old[e - s : e], new[e - s : e]) for s, e in zip(sizes, ends, strict=True)]
    random.Random(seed).shuffle(parts)
    whole = statistics(old, new)
    total = functools.reduce(lambda a, b: b + a, parts)
    assert total == whole and hash(total) == hash(whole)
    assert total.pairs.to_bytes() == whole.pairs.to_bytes()
    assert (total - parts[0]) + parts[0] == whole
    assert total.count == sum(sizes) and total.dim == 3


def test_a_linear_drift_is_found_from_nodes_that_each_see_too_little():
    rng = np.random.default_rng(0)
    turn = np.round(rng.standard_normal((6, 6)) / GRID) * GRID
    parts = [np.round(rng.standard_normal((2, 6)) / GRID) * GRID for _ in range(4)]
    total = sum((statistics(p, p @ turn.T) for p in parts), DriftStatistics.empty(6, "old", "new"))
    np.testing.assert_allclose(total.matrix(0.0), turn, atol=1e-6)
    assert total.misfit(torch.from_numpy(turn)) < 1e-9
    assert total.misfit(torch.zeros(6, 6, dtype=torch.float64)) == pytest.approx(1.0)


def memory(rows, labels, embedding="old", moments="none"):
    empty = PrototypeMemory.empty(rows.shape[1], embedding, moments)
    return empty.observe(torch.from_numpy(rows), labels)


@pytest.mark.parametrize("moments", ["none", "class"])
def test_class_means_move_with_the_map(moments):
    rng = np.random.default_rng(1)
    old, new = embeddings(rng, 40, 4)
    held = np.round(rng.standard_normal((6, 4)) / GRID) * GRID
    before = memory(held, ["owl", "fox", "fox", "elk", "elk", "elk"], moments=moments)
    found = carried(before, statistics(old, new), 0.0)
    a = np.linalg.lstsq(old, new, rcond=None)[0].T
    assert found.embedding_id == "new" and found.classes == before.classes
    assert torch.equal(found.counts, before.counts)
    groups = [held[3:], held[1:3], held[:1]]
    for row, members in zip(found.means(), groups, strict=True):
        np.testing.assert_allclose(row, a @ members.mean(0), atol=1e-4)
    if moments == "class":
        from clfed.prototypes.moments import class_scatter

        for found_scatter, members in zip(class_scatter(found), groups, strict=True):
            centred = (members - members.mean(0)) @ a.T
            np.testing.assert_allclose(found_scatter, centred.T @ centred, atol=1e-3)


def test_what_does_not_belong_together_is_refused():
    rng = np.random.default_rng(2)
    old, new = embeddings(rng, 9, 2)
    whole = statistics(old, new)
    with pytest.raises(EmbeddingMismatch):
        whole + DriftStatistics.of(torch.ones(1, 2), torch.ones(1, 2), "old", "newer")
    with pytest.raises(EmbeddingMismatch, match="old"):
        carried(memory(old, ["x"] * 9, "older"), whole)
    with pytest.raises(EmbeddingMismatch):
        carried(memory(old[:, :1], ["x"] * 9), whole)
    with pytest.raises(UnsupportedStatistics):
        carried(memory(old, ["x"] * 9, moments="shared"), whole)
    with pytest.raises(InvalidEmbedding, match="same images"):
        DriftStatistics.of(torch.ones(2, 2), torch.ones(3, 2), "old", "new")
    with pytest.raises(InvalidEmbedding):
        DriftStatistics.of(torch.ones(1, 2), torch.full((1, 2), torch.nan), "old", "new")
    with pytest.raises(NotEnoughData):
        carried(memory(old, ["x"] * 9), DriftStatistics.empty(2, "old", "new"))
    with pytest.raises(EmbeddingMismatch):  # the older prototypes themselves
        ContributorLedger(2, "new").receive(Contribution.of("hut", 1, memory(old, ["x"] * 9)))


def test_a_new_ledger_takes_over_those_without_images_and_nobody_else():
    rng = np.random.default_rng(3)
    old, new = embeddings(rng, 30, 2)
    whole, turn = statistics(old, new), statistics(old, new).matrix(1e-3)
    before, now = ContributorLedger(2, "old"), ContributorLedger(2, "new")
    for version, name in enumerate(("gone", "there"), start=7):
        share = memory(old[:5], ["owl"] * 5)
        before.receive(Contribution.of(name, version, share))
    there = memory(new[:5], ["owl"] * 5, "new")
    now.receive(Contribution.of("there", 1, there, complete=True))
    assert carry_over(before, now, whole) == ("gone",)
    assert now.share("there") == there
    np.testing.assert_allclose(
        now.share("gone").means()[0], turn @ torch.from_numpy(old[:5].mean(0)), atol=1e-4
    )
    assert carry_over(before, now, whole) == ()
    # A node that comes back with images replaces the guess.
    now.receive(Contribution.of("gone", 8, there, complete=True))
    assert now.share("gone") == there


def test_ledgers_of_other_kinds_are_left_alone():
    whole = statistics(*embeddings(np.random.default_rng(4), 9, 2))
    before, now = ContributorLedger(2, "old"), ContributorLedger(2, "newer")
    with pytest.raises(EmbeddingMismatch):
        carry_over(before, now, whole)
    with pytest.raises(UnsupportedStatistics):
        carry_over(before, ContributorLedger(2, "new", "class"), whole)
    before.receive(Contribution.of("a", 1, memory(np.ones((1, 2)), ["owl"])))
    now = ContributorLedger(2, "new")
    with pytest.raises(NotEnoughData):
        carry_over(before, now, DriftStatistics.empty(2, "old", "new"))
    assert now == ContributorLedger(2, "new")


# The round that gathers them


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


def encoder(seed, dim=3):
    """One layer over ready features of three columns."""
    network = MLP(3, 0, (dim,))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in network.parameters():
            weights.copy_(torch.randn(weights.shape, generator=rng))
    config = {"_target_": "clfed.backbones.MLP", "widths": [dim]}
    return Encoder(network, config, input_shape=(3,))


OLD, NEW = encoder(0), encoder(1)
IMAGES = torch.rand(40, 3, generator=torch.Generator().manual_seed(2))


def visit(images, name="hut"):
    return Visit(
        node=name,
        number=0,
        mission=1,
        round=1,
        seed=0,
        encoder=NEW,
        images=images,
        labels=["owl"] * len(images),
        state=RecordDict(),
    )


def survey(**options):
    return DriftSurvey(NEW, before=OLD, local={}, session="s", wait=0.0, **options)


def answered(server, images, name="hut", node=1, least=5):
    """What a node replies to the server's request."""
    request = server.content(1, server.arrays())
    content = DriftReport(least=least).train(visit(images, name), request)
    return message(content, name, node)


def message(content, name="hut", node=1):
    request = Message(RecordDict(), dst_node_id=node, message_type="train.local")
    # Flower numbers messages when they enter the network.
    request.metadata.__dict__["_message_id"] = str(node)
    content["status"] = ConfigRecord({"contributor": name})
    return Message(content, reply_to=request)


def test_the_server_ends_with_the_statistics_of_all_images():
    server = survey()
    parts = {"hut": IMAGES[:20], "pier": IMAGES[20:26], "tent": IMAGES[26:]}
    replies = [answered(server, part, name, i) for i, (name, part) in enumerate(parts.items(), 1)]
    server.aggregate_train(1, replies)
    whole = DriftStatistics.of(
        OLD.embed(IMAGES), NEW.embed(IMAGES), OLD.embedding_id, NEW.embedding_id
    )
    assert server.statistics() == whole
    server.aggregate_train(1, replies[::-1])  # the same messages again
    assert server.statistics() == whole
    assert server.statistics(without=["pier"]).count == 34
    old, new = OLD.embed(IMAGES).double().numpy(), NEW.embed(IMAGES).double().numpy()
    gram = old.T @ old
    expected = new.T @ old @ np.linalg.inv(gram + 1e-3 * np.trace(gram) / 3 * np.eye(3))
    np.testing.assert_allclose(server.statistics().matrix(1e-3), expected, atol=1e-3)


def test_too_few_images_send_nothing():
    server = survey()
    reply = answered(server, IMAGES[:4])
    assert set(reply.content) == {"status"}
    server.aggregate_train(1, [reply, answered(server, IMAGES[:5], "pier", 2)])
    assert server.statistics().count == 5
    for least in (0, 1.5, True):
        with pytest.raises(ConfigError, match="least"):
            DriftReport(least=least)
    with pytest.raises(ConfigError, match="same size"):
        DriftSurvey(NEW, before=encoder(0, dim=2), local={})


def pairs(**changes):
    """A record of statistics with something wrong."""
    whole = DriftStatistics.of(
        OLD.embed(IMAGES), NEW.embed(IMAGES), OLD.embedding_id, NEW.embedding_id
    ).pairs
    fields = {
        name: changes.get(name, getattr(whole, name))
        for name in ("classes", "counts", "sums", "embedding_id", "moments", "outer")
    }
    return RecordDict({"pairs": encode_memory(PrototypeMemory(**fields))})


BAD = {
    "of other embeddings": lambda: pairs(embedding_id="f" * 64),
    "of another size": lambda: RecordDict(
        {"pairs": encode_memory(PrototypeMemory.empty(4, pairs_id(), "shared"))}
    ),
    "without second moments": lambda: pairs(moments="none", outer=None),
    "second moments of nothing real": lambda: pairs(outer=-torch.eye(6, dtype=torch.int64)),
    "fewer than no images": lambda: pairs(counts=torch.tensor([-3])),
    "more than anybody has": lambda: pairs(counts=torch.tensor([10**9])),
    "no statistics": lambda: RecordDict({"pairs": ArrayRecord({"x": Array(np.zeros(1))})}),
    "another kind of record": lambda: RecordDict({"pairs": ConfigRecord({"x": 1})}),
}


def pairs_id():
    return decode_memory(pairs()["pairs"]).embedding_id


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_changes_nothing(name):
    server = survey()
    with pytest.raises(InvalidMessage):
        server.read("hut", BAD[name]())
    good = answered(server, IMAGES[:20], "pier", 2)
    server.aggregate_train(1, [message(BAD[name]()), good])
    assert server.statistics().count == 20 and [*server.shares] == [(1, "pier")]


def test_a_share_that_overflows_the_sum_is_left_out():
    server = survey()
    huge = pairs(outer=torch.diag(torch.full((6,), 2**62 + 2**61, dtype=torch.int64)))
    replies = [message(RecordDict(dict(huge)), name, i) for i, name in enumerate("ab", 1)]
    server.aggregate_train(1, [*replies, answered(server, IMAGES[:7], "c", 3)])
    assert [*server.shares] == [(1, "a"), (1, "c")]
