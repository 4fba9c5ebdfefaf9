"""The contributor ledger: any order of messages, exact forgetting, no return of the forgotten."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.errors import (
    ClfedError,
    EmbeddingMismatch,
    InvalidMessage,
    MissingData,
    UnsupportedStatistics,
)
from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory

MOMENTS = ("none", "shared", "class")
DIM = 2
NAMES = ("ant", "bee", "cat", "dog")
NODES = ("n1", "n2", "n3")


def seen(kind, *examples):
    rows = torch.tensor([row for _, row in examples], dtype=torch.float32).reshape(-1, DIM)
    return PrototypeMemory.empty(DIM, "e", kind).observe(rows, [name for name, _ in examples])


def ledger_of(kind, messages=()):
    ledger = ContributorLedger(DIM, "e", kind)
    for message in messages:
        ledger.receive(message)
    return ledger


def history(rng, kind, node, length, complete=0.3):
    """Messages of a node that learns and forgets examples: each carries the rows that changed."""
    held, messages, version = [], [], 0
    for step in range(length):
        version += rng.randint(1, 3)
        before = seen(kind, *held)
        if step and rng.random() < 0.4:
            rng.shuffle(held)
            held = held[: len(held) // 2]
        if not step:
            held = [(name, [rng.uniform(-9, 9), 1.0]) for name in NAMES]
        held = held + [
            (rng.choice(NAMES), [rng.uniform(-9, 9), rng.uniform(-9, 9)]) for _ in range(3)
        ]
        now = seen(kind, *held)
        if step and rng.random() < complete:
            messages.append(Contribution.of(node, version, now, complete=True))
            continue
        if kind == "shared":
            gone = sorted(set(before.classes) - set(now.classes))
            messages.append(Contribution.of(node, version, now, gone=gone))
            continue
        changed = (now - before).classes
        rows = now.select(c for c in changed if c in now)
        messages.append(
            Contribution.of(node, version, rows, gone=[c for c in changed if c not in now])
        )
    return messages, seen(kind, *held)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_any_order_any_number_of_times_gives_the_same_bytes(kind, rng):
    made = {node: history(rng, kind, node, rng.randint(1, 5)) for node in NODES}
    messages = [message for stream, _ in made.values() for message in stream]
    in_order = ledger_of(kind, messages)
    shuffled = messages + rng.choices(messages, k=5)
    rng.shuffle(shuffled)
    mixed = ledger_of(kind, shuffled)
    assert mixed.to_bytes() == in_order.to_bytes()
    assert mixed == in_order
    final = [memory for _, memory in made.values()]
    assert mixed.total == sum(final, PrototypeMemory.empty(DIM, "e", kind))
    assert [mixed.share(node) for node in NODES] == final
    assert mixed.contributors == tuple(n for n, memory in zip(NODES, final, strict=True) if memory)
    assert ContributorLedger.from_bytes(mixed.to_bytes()) == mixed
    assert ContributorLedger.from_bytes(mixed.to_bytes()).total == mixed.total


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["none", "class"]), st.randoms(use_true_random=False))
def test_receiving_and_forgetting_commute(kind, rng):
    made = {node: history(rng, kind, node, 4, complete=0) for node in NODES}
    first = [stream[0] for stream, _ in made.values()]
    actions = [("receive", message) for stream, _ in made.values() for message in stream[1:]]
    actions += [("forget_contributor", "n1"), ("forget_class", "bee"), ("forget_class", "dog")]
    states = []
    for _ in range(3):
        rng.shuffle(actions)
        ledger = ledger_of(kind, first)
        for action, argument in actions:
            getattr(ledger, action)(argument)
        states.append(ledger.to_bytes())
    assert len(set(states)) == 1
    left = sum((made[node][1] for node in NODES[1:]), PrototypeMemory.empty(DIM, "e", kind))
    assert ledger.total == left.without([c for c in ("bee", "dog") if c in left])
    assert ledger.retired_classes == ("bee", "dog")
    assert ledger.forgotten_contributors == ("n1",)
    assert ContributorLedger.from_bytes(states[0]).to_bytes() == states[0]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_total_is_the_sum_of_shares_whatever_happens(kind, rng):
    made = {node: history(rng, kind, node, 5) for node in NODES}
    messages = [message for stream, _ in made.values() for message in stream]
    ledger = ContributorLedger(DIM, "e", kind)
    for _ in range(25):
        action = rng.choice(["receive"] * 5 + ["contributor", "class", "samples", "back"])
        if action == "receive":
            before = ledger.total
            receipt = ledger.receive(rng.choice(messages))
            assert ledger.total - before == receipt.delta
        elif action == "contributor":
            before = ledger.total
            assert before - ledger.forget_contributor(rng.choice(NODES)) == ledger.total
        elif action == "class" and kind != "shared":
            before = ledger.total
            assert before - ledger.forget_class(rng.choice(NAMES)) == ledger.total
        elif action == "samples":
            node = rng.choice(NODES)
            share = ledger.share(node)
            assert ledger.forget_samples(node, share) == share
            assert not ledger.share(node)
        elif action == "back":
            ledger.readmit_class(rng.choice(NAMES))
            ledger.readmit_contributor(rng.choice(NODES))
        shares = [ledger.share(node) for node in NODES]
        assert ledger.total == sum(shares, PrototypeMemory.empty(DIM, "e", kind))
        groups = ledger.groups()
        assert int(groups.counts.sum()) == ledger.total.total_count
    assert ContributorLedger.from_bytes(ledger.to_bytes()) == ledger


def test_receipts_say_what_happened():
    ledger = ContributorLedger(DIM, "e")
    one = seen("none", ("ant", [1.0, 2.0]), ("bee", [3.0, 4.0]))
    two = seen("none", ("ant", [1.0, 2.0]), ("ant", [5.0, 6.0]))
    first = ledger.receive(Contribution.of("n1", 3, one))
    assert (first.delta, first.accepted, first.stale) == (one, ("ant", "bee"), ())
    again = ledger.receive(Contribution.of("n1", 3, one))
    assert (bool(again.delta), again.stale, again.conflicting) == (False, ("ant", "bee"), ())
    newer = ledger.receive(Contribution.of("n1", 5, two))
    assert newer.delta == seen("none", ("ant", [5.0, 6.0]))
    older = ledger.receive(Contribution.of("n1", 4, one))
    assert (older.accepted, older.stale) == (("bee",), ("ant",))
    before = ledger.to_bytes()
    other = ledger.receive(Contribution.of("n1", 5, one.select(["ant"])))
    assert (other.conflicting, other.stale, bool(other.delta)) == (("ant",), (), False)
    assert ledger.to_bytes() == before
    gone = ledger.receive(Contribution.of("n1", 6, seen("none"), gone=["ant"]))
    assert (gone.delta, gone.accepted) == (-two, ("ant",))
    assert ledger.total.classes == ("bee",)
    assert ledger.version_of("n1") == 6 and ledger.version_of("nobody") == 0
    ledger.receive(Contribution.of("n2", 1, one))
    ledger.forget_class("bee")
    mixed = ledger.receive(Contribution.of("n2", 2, one))
    assert (mixed.accepted, mixed.refused) == (("ant",), ("bee",))


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_complete_message_voids_what_it_leaves_out(kind):
    old = seen(kind, ("ant", [1, 0]), ("bee", [0, 1]))
    new = seen(kind, ("cat", [2, 2]))
    messages = [
        Contribution.of("n1", 4, old),
        Contribution.of("n1", 7, new, complete=True),
        Contribution.of("n1", 6, seen(kind, ("dog", [5, 5]))),
    ]
    for order in (messages, messages[::-1], messages[1:] + messages):
        ledger = ledger_of(kind, order)
        assert ledger.total == new
        assert ledger.to_bytes() == ledger_of(kind, messages).to_bytes()
    ledger = ledger_of(kind, messages[:1])
    receipt = ledger.receive(messages[1])
    assert receipt.accepted == ("ant", "bee", "cat")
    assert ledger.receive(messages[2]).stale == ("dog",)
    nothing = Contribution.of("n1", 8, seen(kind), complete=True)
    assert ledger.receive(nothing).accepted == ("cat",)
    assert not ledger.total
    with pytest.raises(InvalidMessage, match="true or false"):
        ledger.receive(replace(nothing, version=9, complete=1))


def test_groups_are_ordered_by_contributor_then_class():
    a = seen("none", ("bee", [1.0, 0.0]), ("ant", [2.0, 0.0]), ("ant", [4.0, 0.0]))
    b = seen("none", ("bee", [3.0, 0.0]))
    ledger = ledger_of("none", [Contribution.of("z", 1, b), Contribution.of("a", 1, a)])
    groups = ledger.groups()
    assert groups.class_index.tolist() == [0, 1, 1]
    assert groups.counts.tolist() == [2, 1, 1]
    assert (groups.sums[:, 0] / 65536).tolist() == [6.0, 1.0, 3.0]
    assert ContributorLedger(DIM, "e").groups().sums.shape == (0, DIM)


@pytest.mark.parametrize("kind", ["none", "class"])
def test_a_forgotten_class_stays_away(kind):
    one = seen(kind, ("ant", [1.0, 2.0]), ("bee", [3.0, 4.0]))
    late = Contribution.of("n1", 2, seen(kind, ("bee", [5.0, 6.0])))
    ledger = ledger_of(
        kind, [Contribution.of("n1", 1, one), Contribution.of("n1", 3, one.select(["ant"]))]
    )
    assert ledger.forget_class("bee") == one.select(["bee"])
    assert ledger.total == one.select(["ant"])
    assert ledger.receive(Contribution.of("n1", 1, one)).refused == ("bee",)
    assert ledger.receive(Contribution.of("n1", 7, one)).refused == ("bee",)
    assert "bee" not in ledger.total
    assert ledger.readmit_class("bee") and not ledger.readmit_class("bee")
    for old in (Contribution.of("n1", 1, one), late, Contribution.of("n1", 7, one)):
        assert "bee" in ledger.receive(old).stale
    assert "bee" not in ledger.total
    assert ledger.receive(Contribution.of("n1", 8, one)).accepted == ("ant", "bee")


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_forgotten_contributor_stays_away(kind):
    one, two = seen(kind, ("ant", [1.0, 2.0])), seen(kind, ("ant", [3.0, 4.0]))
    ledger = ledger_of(kind, [Contribution.of("n1", 4, one), Contribution.of("n2", 1, two)])
    assert ledger.forget_contributor("n1") == one
    assert ledger.total == two and ledger.contributors == ("n2",)
    assert ledger.receive(Contribution.of("n1", 4, one)).refused == ("ant",)
    assert ledger.receive(Contribution.of("n1", 9, one)).refused == ("ant",)
    assert ledger.total == two
    assert ledger.readmit_contributor("n1") and not ledger.readmit_contributor("n1")
    for version in (1, 4, 9):
        assert ledger.receive(Contribution.of("n1", version, one)).stale == ("ant",)
    assert ledger.total == two
    assert ledger.receive(Contribution.of("n1", 10, one)).delta == one


@pytest.mark.parametrize("kind", MOMENTS)
def test_forgotten_samples_stay_away(kind):
    keep, drop = (
        seen(kind, ("ant", [1.0, 2.0]), ("bee", [0.0, 1.0])),
        seen(kind, ("ant", [3.0, 4.0])),
    )
    message = Contribution.of("n1", 4, keep + drop)
    ledger = ledger_of(kind, [message])
    assert ledger.forget_samples("n1", drop) == drop
    assert ledger.total == keep
    for version in (1, 4):
        receipt = ledger.receive(replace(message, version=version))
        assert "ant" in receipt.stale and not receipt.delta
    assert ledger.total == keep
    assert ledger.receive(Contribution.of("n1", 5, keep)).accepted == keep.classes
    assert ledger.total == keep


@pytest.mark.parametrize("kind", MOMENTS)
def test_more_than_is_held_is_not_subtracted(kind):
    held = seen(kind, ("ant", [1.0, 2.0]), ("ant", [3.0, 4.0]))
    ledger = ledger_of(kind, [Contribution.of("n1", 1, held)])
    before = ledger.to_bytes()
    for delta in (
        seen(kind, ("bee", [1.0, 2.0])),
        held + held,
        -held,
        held + seen(kind, ("ant", [0.0, 0.0])),
        seen(kind, ("ant", [1.0, 2.0]), ("ant", [3.0, 5.0])),
    ):
        with pytest.raises(InvalidMessage):
            ledger.forget_samples("n1", delta)
        assert ledger.to_bytes() == before
    with pytest.raises(EmbeddingMismatch):
        ledger.forget_samples("n1", PrototypeMemory.empty(DIM, "other", kind))


def test_unknown_names_are_a_no_op():
    ledger = ledger_of("none", [Contribution.of("n1", 1, seen("none", ("ant", [1.0, 2.0])))])
    before = ledger.to_bytes()
    assert not ledger.forget_contributor("n9")
    assert not ledger.forget_class("yak")
    assert not ledger.forget_samples("n9", seen("none", ("ant", [1.0, 2.0])))
    assert not ledger.readmit_class("yak") and not ledger.readmit_contributor("n1")
    assert ledger.to_bytes() == before
    assert not ledger.share("n9")


def test_shared_moments_belong_to_the_whole_contributor():
    x, y = seen("shared", ("ant", [1.0, 2.0])), seen("shared", ("bee", [3.0, 4.0]))
    ledger = ContributorLedger(DIM, "e", "shared")
    ledger.receive(Contribution.of("n1", 1, x))
    only_bee = replace(
        Contribution.of("n1", 2, x + y), classes=("bee",), counts=y.counts, sums=y.sums
    )
    ledger.receive(only_bee)
    assert ledger.total == x + y
    conflict = replace(only_bee, outer=(x + y + y).outer)
    assert ledger.receive(conflict).conflicting == ("bee",)
    assert ledger.total == x + y
    with pytest.raises(UnsupportedStatistics):
        ledger.forget_class("ant")


GOOD = Contribution.of("n1", 5, seen("none", ("ant", [1.0, 2.0]), ("bee", [3.0, 4.0])))
INT = torch.int64


@pytest.mark.parametrize(
    "changes",
    [
        {"contributor": ""},
        {"contributor": "a\tb"},
        {"contributor": "x" * 129},
        {"contributor": 3},
        {"version": 0},
        {"version": -1},
        {"version": 2**53},
        {"version": 1.0},
        {"version": True},
        {"embedding_id": "other"},
        {"embedding_id": ""},
        {"classes": ("ant", "ant")},
        {"classes": ("ant",)},
        {"classes": ("ant", "")},
        {"classes": ("ant", "b\x00")},
        {"classes": ("ant", 2)},
        {"classes": "ab"},
        {"classes": None},
        {"sums": None},
        {"counts": torch.tensor([1, -1])},
        {"counts": torch.tensor([1, 1_000_001])},
        {"counts": torch.tensor([1, 2**40])},
        {"counts": torch.tensor([1, 0])},
        {"counts": torch.tensor([1.0, 1.0])},
        {"counts": torch.tensor([1, 1], dtype=torch.int32)},
        {"counts": torch.tensor([1])},
        {"sums": torch.zeros(2, DIM)},
        {"sums": torch.full((2, DIM), torch.nan)},
        {"sums": torch.zeros(2, DIM + 1, dtype=INT)},
        {"sums": torch.zeros(2, 0, dtype=INT)},
        {"sums": torch.full((2, DIM), 2**31 + 1)},
        {"sums": torch.full((2, DIM), -(2**63))},
        {"moments": "all"},
        {"moments": "shared", "outer": torch.zeros(DIM, DIM, dtype=INT)},
        {"moments": "class", "outer": torch.zeros(2, DIM, DIM, dtype=INT)},
        {"outer": torch.zeros(DIM, DIM, dtype=INT)},
    ],
    ids=lambda changes: "-".join(f"{k}={str(v)[:20]}" for k, v in changes.items()),
)
def test_bad_contributions_change_nothing(changes):
    ledger = ledger_of("none", [replace(GOOD, version=1)])
    before, total = ledger.to_bytes(), ledger.total
    with pytest.raises(ClfedError) as caught:
        ledger.receive(replace(GOOD, **changes))
    assert caught.value.code in (21, 22, 23)
    assert ledger.to_bytes() == before and ledger.total == total
    assert ledger.receive(GOOD).accepted == ("ant", "bee")


@pytest.mark.parametrize("kind", ["shared", "class"])
def test_impossible_second_moments_change_nothing(kind):
    good = Contribution.of("n1", 1, seen(kind, ("ant", [1.0, 2.0]), ("ant", [3.0, -1.0])))
    ledger = ContributorLedger(DIM, "e", kind)
    before = ledger.to_bytes()
    flipped = good.outer.clone()
    flipped[..., 0, 1] *= 9
    flipped[..., 1, 0] *= 9
    for outer in (good.outer * 0, -good.outer, good.outer // 4, flipped, None, good.outer.double()):
        with pytest.raises(InvalidMessage):
            ledger.receive(replace(good, outer=outer))
        assert ledger.to_bytes() == before
    with pytest.raises(UnsupportedStatistics):
        ledger.receive(GOOD)
    ledger.receive(good)


def test_cap_and_version_bounds():
    ledger = ContributorLedger(DIM, "e", cap=2)
    two = seen("none", ("ant", [1.0, 2.0]), ("ant", [1.0, 2.0]))
    with pytest.raises(InvalidMessage, match="0 to 2"):
        ledger.receive(Contribution.of("n1", 1, two + two))
    assert ledger.receive(Contribution.of("n1", 2**53 - 1, two)).delta == two
    ledger.forget_contributor("n1")
    assert ContributorLedger.from_bytes(ledger.to_bytes()) == ledger


def test_files_survive_and_damage_is_named(tmp_path):
    rng = random.Random(0)
    for kind in MOMENTS:
        path = tmp_path / f"ledger-{kind}"
        ledger = ledger_of(kind, history(rng, kind, "n1", 3)[0] + history(rng, kind, "n2", 2)[0])
        ledger.forget_contributor("n1")
        ledger.save(path)
        loaded = ContributorLedger.load(path)
        assert loaded == ledger and loaded.total == ledger.total
        assert loaded.receive(replace(GOOD, contributor="n1")).refused if kind == "none" else True
        whole = path.read_bytes()
        for damaged in (
            b"",
            whole[:-1],
            whole[:40],
            whole.replace(b"marks", b"maaks"),
            whole.replace(b'"latest\\":', b'"latest\\":-'),
        ):
            path.write_bytes(damaged)
            with pytest.raises(InvalidMessage, match="ledger-"):
                ContributorLedger.load(path)
    with pytest.raises(MissingData):
        ContributorLedger.load(tmp_path / "absent")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_never_crash(data):
    ledger = ledger_of("class", history(random.Random(1), "class", "n1", 2)[0])
    whole = bytearray(ledger.to_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = ContributorLedger.from_bytes(bytes(whole))
    except InvalidMessage:
        return
    assert ContributorLedger.from_bytes(loaded.to_bytes()) == loaded
