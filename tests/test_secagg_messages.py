"""Secure aggregation over Flower messages: a grid, nodes that fail, and requests out of turn."""

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clfed.errors import FederationError, InvalidMessage
from clfed.federated.grid import LocalGrid
from clfed.privacy.roster import ADVERTISEMENT
from clfed.privacy.secagg_messages import STEPS, respond, secure_sum
from clfed.privacy.secure_aggregation import SEALED, SHARE, Client
from clfed.privacy.terms import Terms, majority
from clfed.prototypes import PrototypeMemory

EMPTY = PrototypeMemory.empty(4, "e")
NAMES = ("elk", "fox", "owl")


def terms(members, round_id="r1"):
    return Terms(round_id, NAMES, 4, "e", members, majority(members), cap=100)


def delta(node):
    rng = torch.Generator().manual_seed(node)
    images = torch.rand(node, 4, generator=rng)
    return EMPTY.observe(images, [NAMES[k % 3] for k in range(node)])


def summed(nodes):
    return sum(map(delta, nodes), start=EMPTY)


class Nodes(LocalGrid):
    """Nodes that fail, or whose reply is lost, at a step; keeps all messages and replies.

    Args:
        count: How many there are.
        failing: Step by node id.
        silent: Step by node id.
    """

    def __init__(self, count, failing=None, silent=None):
        failing, self.silent = failing or {}, silent or {}
        self.sent, self.got = [], []
        app = ClientApp()
        for step in STEPS:

            def handle(message, context, step=step):
                if failing.get(context.node_id) == step:
                    raise RuntimeError("the battery is empty")
                reply = respond(step, message.content, context, lambda _: delta(context.node_id))
                return Message(reply, reply_to=message)

            app.query(step)(handle)
        super().__init__(app, [{}] * count)

    def push_messages(self, messages):
        self.sent += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = [
            reply
            for reply in super().pull_messages(message_ids)
            if self.silent.get(reply.metadata.src_node_id)
            != reply.metadata.message_type.split(".")[1]
        ]
        self.got += replies
        return replies

    def state(self, node):
        return self._contexts[node].state


def add_up(grid, count, **options):
    return secure_sum(grid, range(1, count + 1), terms(count, **options), timeout=0.05)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_sum_over_messages_is_exact_and_its_bytes_are_known(count):
    grid = Nodes(count)
    result = add_up(grid, count)
    assert result.memory == summed(range(1, count + 1))
    assert result.contributors == tuple(range(1, count + 1))
    assert result.refused == {}
    payload = ADVERTISEMENT + (count - 1) * SEALED + 8 * 3 * 5 + count * SHARE
    names = sum(len(str(node)) for node in range(1, count + 1))
    assert result.up == count * payload + names + (count - 1) * names + names + count * names
    assert result.down > count * count * ADVERTISEMENT


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["failing", "silent"])
def test_nodes_may_be_lost_at_any_step(step, how):
    result = add_up(Nodes(5, **{how: {2: step, 4: step}}), 5)
    rest = range(1, 6) if step == "secagg_unmask" else [1, 3, 5]
    assert result.memory == summed(rest)
    assert result.contributors == tuple(rest)
    reasons = {2, 4} if how == "failing" else set()
    assert set(result.refused) == reasons
    assert all("the battery is empty" in reason for reason in result.refused.values())


def test_too_few_nodes_end_the_round_and_the_next_one_succeeds():
    grid = Nodes(5, {1: STEPS[0], 2: STEPS[1], 3: STEPS[2]})
    with pytest.raises(FederationError, match="masked tables of at least 3 nodes, got 2"):
        add_up(grid, 5)
    grid = Nodes(5, silent={1: STEPS[0], 2: STEPS[1], 3: STEPS[2]})
    with pytest.raises(FederationError, match="masked tables of at least 3 nodes, got 2"):
        add_up(grid, 5)
    grid.silent = {}
    assert add_up(grid, 5, round_id="r2").memory == summed(range(1, 6))


def test_no_message_shows_what_a_node_has():
    grid = Nodes(3)
    add_up(grid, 3)
    seen = b"".join(
        value
        for message in [*grid.sent, *grid.got]
        for record in message.content.values()
        for value in record.values()
        if isinstance(value, bytes)
    )
    for node in (1, 2, 3):
        for row in delta(node).sums.numpy():
            for entry in row:
                assert entry.astype("<i8").tobytes() not in seen


def test_requests_out_of_turn_or_of_another_round_change_nothing():
    grid = Nodes(3)
    add_up(grid, 3)
    kept = grid.state(1)["secagg"]
    unmask = next(m for m in grid.sent if m.metadata.message_type == "query.secagg_unmask")
    state = RecordDict({"secagg": kept})
    context = Context(1, 1, {}, state, {})
    with pytest.raises(InvalidMessage, match="no step is taken twice"):
        respond("secagg_unmask", unmask.content, context, lambda _: delta(1))

    # The node has begun another round; what belongs to the old one must not be told in it.
    other = terms(3, "r2")
    begin = RecordDict({"round": ConfigRecord({"digest": other.digest, "terms": other.to_bytes()})})
    respond("secagg_keys", begin, context, lambda _: delta(1))
    before = context.state["secagg"]["client"]
    for action in STEPS[1:]:
        with pytest.raises(InvalidMessage, match="round that this node takes part in"):
            respond(action, unmask.content, context, lambda _: delta(1))
    assert context.state["secagg"]["client"] == before


@pytest.mark.parametrize(
    ("action", "content"),
    [
        ("secagg_keys", {}),
        ("secagg_keys", {"round": {"digest": b"1"}}),
        ("secagg_keys", {"round": {"digest": b"1", "terms": b"{}"}}),
        ("secagg_keys", {"round": {"digest": b"1", "terms": terms(3).to_bytes()}}),
        ("secagg_shares", {"round": {"digest": terms(3).digest}}),
        ("secagg_shares", {"round": {"digest": terms(3).digest}, "parts": {"1": "text"}}),
        ("secagg_masked", {"round": {"digest": terms(3).digest}, "parts": {"2": b""}}),
        ("secagg_unmask", {"round": {"digest": terms(3).digest}, "parts": {"1": 1}}),
        ("other", {"round": {"digest": terms(3).digest}}),
    ],
)
def test_malformed_requests_are_refused(action, content):
    client = Client("1", terms(3))
    client.advertise()
    kept = ConfigRecord({"client": client.to_bytes()})
    context = Context(1, 1, {}, RecordDict({"secagg": kept}), {})
    records = RecordDict({name: ConfigRecord(entries) for name, entries in content.items()})
    with pytest.raises(InvalidMessage):
        respond(action, records, context, lambda _: delta(1))
    assert context.state["secagg"]["client"] == client.to_bytes()


def test_what_is_neither_yes_nor_no_opens_nothing():
    grid = Nodes(4, dict.fromkeys(range(1, 5), "secagg_unmask"))
    with pytest.raises(FederationError):
        add_up(grid, 4)
    context = Context(1, 1, {}, grid.state(1), {})
    head = ConfigRecord({"digest": terms(4).digest})
    fates = {"1": True, "2": True, "3": True, "4": 1}
    with pytest.raises(InvalidMessage, match="'4' came, got 1"):
        ask = RecordDict({"round": head, "parts": ConfigRecord(fates)})
        respond("secagg_unmask", ask, context, lambda _: delta(1))
    ask = RecordDict({"round": head, "parts": ConfigRecord(fates | {"4": True})})
    reply = respond("secagg_unmask", ask, context, lambda _: delta(1))
    assert {len(share) for share in reply["parts"].values()} == {SHARE}


def test_a_node_without_state_refuses_all_but_the_first_step():
    context = Context(1, 1, {}, RecordDict(), {})
    content = RecordDict({"round": ConfigRecord({"digest": terms(3).digest})})
    for action in STEPS[1:]:
        with pytest.raises(InvalidMessage):
            respond(action, content, context, lambda _: delta(1))


class Meddler(Nodes):
    """Nodes of which one sends what it should not, at one step."""

    def __init__(self, count, step, parts):
        super().__init__(count)
        self.step, self.parts = step, parts

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            meta = reply.metadata
            if meta.src_node_id == 2 and meta.message_type == f"query.{self.step}":
                reply.content["parts"] = self.parts(reply.content["parts"])
        return replies


def cut(record):
    return ConfigRecord({name: value[:-3] for name, value in record.items()})


def longer(record):
    return ConfigRecord({name: value + b"abc" for name, value in record.items()})


def renamed(record):
    return ConfigRecord({f"{name}0": value for name, value in record.items()})


def numbers(record):
    return ConfigRecord(dict.fromkeys(record, 3))


@pytest.mark.parametrize("parts", [cut, longer, renamed, numbers])
@pytest.mark.parametrize("step", STEPS)
def test_malformed_replies_count_as_lost(step, parts):
    result = add_up(Meddler(4, step, parts), 4)
    rest = [1, 2, 3, 4] if step == "secagg_unmask" else [1, 3, 4]
    assert result.memory == summed(rest)
    assert set(result.refused) == {2}
