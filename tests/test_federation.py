"""The federation: apps, strategy and grids, on ready features, against the same data pooled."""

import copy
import json

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from clfed.backbones import Encoder, Identity
from clfed.errors import ConfigError, FederationError, UnsupportedStatistics
from clfed.federated import node as node_module
from clfed.federated.client_app import app
from clfed.federated.field import field_settings, names, open_field
from clfed.federated.grid import LocalGrid, exchange
from clfed.federated.node import briefing
from clfed.federated.rounds import run_rounds
from clfed.federated.wire import decode_memory, encode_contribution, encode_memory
from clfed.prototypes import Contribution, PrototypeMemory, compress, expand
from clfed.strategies import PrototypeAveraging

DATA = {
    "_target_": "clfed.data.digits.load",
    "as_features": True,
    "base_classes": 0,
    "validation_classes": 0,
}
SCENARIO = {
    "_target_": "clfed.scenarios.multi_client",
    "nodes": 4,
    "rounds": 3,
    "classes_per_mission": 4,
    "shots": 5,
    "replacement": False,
}


@pytest.fixture(scope="module")
def settings():
    return field_settings(DATA, SCENARIO, seed=1)


@pytest.fixture
def encoder():
    return Encoder(Identity(64, 64), {"_target_": "clfed.backbones.Identity"}, input_shape=(64,))


def federation(settings, encoder, tmp_path, grid=LocalGrid, moments="none", **options):
    empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id, moments)
    records = briefing({"field": settings, "moments": moments, "cache_dir": str(tmp_path)}, encoder)
    strategy = PrototypeAveraging(empty, briefing=records, session="s", nodes=4, wait=1, **options)
    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    return strategy, grid(app, nodes)


def pooled(settings, encoder, moments="none", rounds=3):
    field = open_field(settings)
    met = field.plan.met(rounds)
    empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id, moments)
    return empty.observe(
        field.embed(field.plan.support, encoder)[met], names(field.plan.support, met)
    )


def run(strategy, grid, rounds=3, after=lambda report, arrays: None):
    return run_rounds(strategy, grid, strategy.arrays(), rounds=rounds, timeout=2, after=after)


@pytest.mark.parametrize("moments", ["none", "shared", "class"])
def test_merged_equals_pooled_to_the_byte(settings, encoder, tmp_path, moments):
    strategy, grid = federation(settings, encoder, tmp_path, moments=moments)
    arrays = run(strategy, grid)
    assert strategy.memory == pooled(settings, encoder, moments)
    assert decode_memory(arrays) == strategy.memory
    assert strategy.memory.sha256() == pooled(settings, encoder, moments).sha256()


class Backwards(LocalGrid):
    """Addresses nodes, and hands over replies, in the opposite order."""

    def get_node_ids(self):
        return list(super().get_node_ids())[::-1]

    def pull_messages(self, message_ids):
        return list(super().pull_messages(message_ids))[::-1]


class Twice(LocalGrid):
    """Delivers every reply twice."""

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        return replies + copy.copy(replies)


class Lossy(LocalGrid):
    """Loses the replies of the first two nodes in the first two rounds."""

    lost = 0

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        if replies and self.lost < 2:
            self.lost += 1
            return replies[2:]
        return replies


class Repeating(LocalGrid):
    """Delivers every request twice; only the second reply comes through."""

    def push_messages(self, messages):
        messages = list(messages)
        super().push_messages(copy.deepcopy(messages))
        return super().push_messages(messages)


@pytest.mark.parametrize("grid", [Backwards, Lossy, Repeating])
def test_order_loss_and_repetition_change_nothing(settings, encoder, tmp_path, grid):
    strategy, unreliable = federation(settings, encoder, tmp_path, grid=grid)
    run(strategy, unreliable)
    assert strategy.memory == pooled(settings, encoder)


def test_every_node_ends_with_the_merged_memory(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    run(strategy, grid)
    replies = exchange(grid, strategy.configure_broadcast(grid), timeout=1)
    assert {r.content["status"]["sha256"] for r in replies} == {strategy.memory.sha256()}
    held = [decode_memory(c.state["merged"]) for c in grid._contexts.values()]
    assert held == [strategy.memory] * 4


def test_a_node_sends_only_its_own_changed_rows(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    plan = open_field(settings).plan
    sent = []
    original = strategy.aggregate_train

    def spy(number, replies):
        replies = list(replies)
        for reply in replies:
            head = json.loads(reply.content["rows"]["head"].numpy().tobytes())
            sent.append((number, head["contributor"], set(head["classes"])))
        return original(number, replies)

    strategy.aggregate_train = spy
    run(strategy, grid)
    assert len(sent) == 12
    for number, name, classes in sent:
        assert classes == set(plan.mission(int(name.split("-")[1]), number).classes)


def test_the_encoder_travels_once(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    down = []
    run(strategy, grid, after=lambda report, arrays: down.append(report.down))
    assert len(encoder.to_bytes()) * 4 < down[0]
    again = list(strategy.configure_train(4, strategy.arrays(), ConfigRecord(), grid))
    assert all("encoder" not in m.content and "briefing" not in m.content for m in again)


def test_a_node_that_lost_its_state_learns_again_and_nothing_is_counted_twice(
    settings, encoder, tmp_path
):
    strategy, grid = federation(settings, encoder, tmp_path)
    run(strategy, grid, rounds=1)
    before = strategy.memory
    for context in grid._contexts.values():
        context.state = RecordDict()
    messages = list(strategy.configure_train(2, strategy.arrays(), ConfigRecord(), grid))
    strategy.aggregate_train(2, exchange(grid, messages, timeout=1))
    assert len(strategy.last.unbriefed) == 4 and strategy.memory == before
    briefed = list(strategy.configure_train(2, strategy.arrays(), ConfigRecord(), grid))
    assert all("encoder" in m.content for m in briefed)
    strategy.aggregate_train(2, exchange(grid, briefed, timeout=1))
    assert strategy.memory == pooled(settings, encoder, rounds=2)


def test_another_process_finds_the_encoder_on_disk(settings, encoder, tmp_path, monkeypatch):
    strategy, grid = federation(settings, encoder, tmp_path)
    monkeypatch.setattr(node_module, "_encoders", {})
    run(strategy, grid, rounds=1)
    monkeypatch.setattr(node_module, "_encoders", {})
    run(strategy, grid)
    assert list((tmp_path / "encoders").iterdir())
    assert strategy.memory == pooled(settings, encoder)


def reply(grid, content, node=1):
    request = Message(RecordDict(), dst_node_id=node, message_type="train")
    request.metadata.__dict__["_message_id"] = f"m{node}"
    if isinstance(content, Error):
        return Message(content, reply_to=request)
    return Message(content, reply_to=request)


def contribution(encoder, **changes):
    fields = {
        "contributor": "evil",
        "version": 1,
        "embedding_id": encoder.embedding_id,
        "classes": ("a",),
        "counts": torch.tensor([1]),
        "sums": torch.ones(1, 64, dtype=torch.int64),
    }
    return Contribution(**fields | changes)


def content(rows, name="evil"):
    return RecordDict({"status": ConfigRecord({"contributor": name}), "rows": rows})


BAD = {
    "error reply": lambda e: Error(code=2, reason="the camera fell"),
    "no status": lambda e: RecordDict({"rows": encode_contribution(contribution(e))}),
    "no record": lambda e: RecordDict({}),
    "another name": lambda e: content(encode_contribution(contribution(e)), "good"),
    "foreign embedding": lambda e: content(
        encode_contribution(contribution(e, embedding_id="f" * 64))
    ),
    "negative count": lambda e: content(
        encode_contribution(contribution(e, counts=torch.tensor([-5])))
    ),
    "absurd count": lambda e: content(
        encode_contribution(contribution(e, counts=torch.tensor([2**40])))
    ),
    "impossible sum": lambda e: content(
        encode_contribution(contribution(e, sums=torch.full((1, 64), 2**60)))
    ),
    "sum of nothing": lambda e: content(
        encode_contribution(contribution(e, counts=torch.tensor([0])))
    ),
    "version zero": lambda e: content(encode_contribution(contribution(e, version=0))),
    "wrong dimension": lambda e: content(
        encode_contribution(contribution(e, sums=torch.ones(1, 63, dtype=torch.int64)))
    ),
    "not an array record": lambda e: content(ConfigRecord({})),
    "garbage": lambda e: content(ArrayRecord({"x": encode_contribution(contribution(e))["sums"]})),
    "a memory, not a contribution": lambda e: content(
        encode_memory(PrototypeMemory.empty(64, e.embedding_id))
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_changes_nothing_and_is_named(settings, encoder, tmp_path, name):
    strategy, grid = federation(settings, encoder, tmp_path)
    run(strategy, grid, rounds=1)
    state, ledger = strategy.memory.to_bytes(), strategy.ledger.to_bytes()
    strategy.aggregate_train(2, [reply(grid, BAD[name](encoder))])
    assert strategy.memory.to_bytes() == state and strategy.ledger.to_bytes() == ledger
    assert len(strategy.last.refused) == 1


def test_a_good_reply_beside_a_bad_one_is_merged(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    good = content(encode_contribution(contribution(encoder)))
    bad = content(
        encode_contribution(contribution(encoder, contributor="x", counts=torch.tensor([-1]))), "x"
    )
    strategy.aggregate_train(1, [reply(grid, bad, 2), reply(grid, good)])
    assert strategy.memory.classes == ("a",) and len(strategy.last.refused) == 1


def test_a_duplicate_and_a_stale_message_count_once(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    new = contribution(encoder, version=2, counts=torch.tensor([2]))
    for rows in (new, new, contribution(encoder)):
        strategy.aggregate_train(1, [reply(grid, content(encode_contribution(rows)))])
    assert strategy.memory.counts.tolist() == [2]
    assert dict(strategy.last.stale) == {"evil": 1}


def test_two_nodes_with_one_name_are_refused(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    rows = content(encode_contribution(contribution(encoder)))
    strategy.aggregate_train(1, [reply(grid, rows, 1), reply(grid, rows, 2)])
    assert len(strategy.last.refused) == 1


def test_a_connected_node_cannot_take_another_ones_name(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    run(strategy, grid)
    state = strategy.ledger.to_bytes()
    forged = contribution(encoder, contributor="node-0", version=99)
    strategy.aggregate_train(4, [reply(grid, content(encode_contribution(forged), "node-0"), 2)])
    assert strategy.ledger.to_bytes() == state
    assert "another connected node" in "".join(strategy.last.refused.values())


def test_failing_nodes_end_the_run_with_their_own_words(settings, encoder, tmp_path):
    strategy, _ = federation(settings, encoder, tmp_path)
    with pytest.raises(FederationError, match="partition-id"):
        run(strategy, LocalGrid(app, [{}, {}, {}, {}]))


def test_waits_have_limits(settings, encoder, tmp_path):
    class Silent(LocalGrid):
        def pull_messages(self, message_ids):
            return []

    strategy, silent = federation(settings, encoder, tmp_path, grid=Silent)
    with pytest.raises(FederationError, match=r"within 0\.1 s"):
        run_rounds(
            strategy, silent, strategy.arrays(), rounds=1, timeout=0.1, after=lambda *a: None
        )
    strategy, _ = federation(settings, encoder, tmp_path)
    strategy.wait = 0.1
    with pytest.raises(FederationError, match="No node"):
        run(strategy, LocalGrid(app, []))


def test_an_exception_at_a_node_leaves_its_state_as_it_was(settings, encoder, tmp_path):
    strategy, grid = federation(settings, encoder, tmp_path)
    run(strategy, grid, rounds=1)
    before = [encode(c.state) for c in grid._contexts.values()]
    broken = Message(RecordDict({"round": ConfigRecord({"session": "s"})}), 1, "train")
    (answer,) = exchange(grid, [broken], timeout=1)
    assert answer.has_error()
    assert [encode(c.state) for c in grid._contexts.values()] == before


def encode(state):
    return str(state["node"]["json"]), decode_memory(state["own"]).sha256()


@pytest.mark.slow
def test_flowers_own_simulation_gives_the_same_bytes(settings, encoder, tmp_path):
    from clfed.federated.engines import ray

    strategy, _ = federation(settings, encoder, tmp_path)
    ray(
        lambda grid: run_rounds(
            strategy, grid, strategy.arrays(), rounds=3, timeout=120, after=lambda *a: None
        ),
        nodes=4,
    )
    assert strategy.memory == pooled(settings, encoder)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("grid", [LocalGrid, Lossy])
def test_rounded_messages_merge_what_was_sent(settings, encoder, tmp_path, bits, grid):
    strategy, unreliable = federation(
        settings, encoder, tmp_path, grid=grid, message_bits=bits, cap=100
    )
    ups = []
    run(strategy, unreliable, after=lambda report, arrays: ups.append(report.up))
    exact = pooled(settings, encoder)
    own = []
    field = open_field(settings)
    support = field.embed(field.plan.support, encoder)
    empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id)
    for node in range(4):
        met = field.plan.met(3, node)
        seen = empty.observe(support[met], names(field.plan.support, met))
        own.append(expand(compress(seen, bits)))
    assert strategy.memory == sum(own, start=empty)
    assert (strategy.memory.counts == exact.counts).all()
    assert strategy.memory != exact
    error = float((strategy.memory.prototypes() - exact.prototypes()).abs().max())
    assert error < 16.5 / 2**bits * 4  # pixels of 0 to 16, at most four nodes a class


def test_rounded_messages_are_smaller(settings, encoder, tmp_path):
    ups = {}
    for bits in (None, 8, 4):
        strategy, grid = federation(settings, encoder, tmp_path, message_bits=bits)
        total = []
        run(strategy, grid, after=lambda report, arrays, total=total: total.append(report.up))
        ups[bits] = sum(total)
    assert ups[4] < ups[8] < ups[None]


def test_what_cannot_be_rounded_is_refused_before_a_round(settings, encoder, tmp_path):
    with pytest.raises(ConfigError, match="4, 8 or 16 bits"):
        federation(settings, encoder, tmp_path, message_bits=5)
    with pytest.raises(UnsupportedStatistics, match="second moments"):
        federation(settings, encoder, tmp_path, moments="shared", message_bits=8)
