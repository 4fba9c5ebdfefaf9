"""Robust totals of a ledger: against numpy and scipy, and what liars can and cannot do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clfed.errors import ClfedError, ConfigError, InvalidEmbedding, UnsupportedStatistics
from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory
from clfed.prototypes import robust as module
from clfed.prototypes.robust import robust_total

DIM = 3
UNIT = 65536  # of a sum
LIMIT = 2**31  # largest coordinate of one embedding, in that unit
CLASSES = ("ant", "bee", "cat", "dog")
NODES = tuple(f"n{k}" for k in range(8))

counts = st.integers(1, 60)
coordinates = st.integers(-(2**22), 2**22)
row = st.tuples(counts, st.lists(coordinates, min_size=DIM, max_size=DIM))
tables = st.dictionaries(
    st.sampled_from(NODES), st.dictionaries(st.sampled_from(CLASSES), row), min_size=1
)
trims = st.sampled_from([0, 0.1, 0.2, 0.25, 1 / 3, 0.34, 0.49])


def message(node, held, version=1, dim=DIM):
    """A contribution of ``{class: (count, sum)}``, made without the code under test."""
    return Contribution(
        node,
        version,
        "e",
        tuple(held),
        torch.tensor([count for count, _ in held.values()], dtype=torch.int64),
        torch.tensor([total for _, total in held.values()], dtype=torch.int64).reshape(-1, dim),
    )


def ledger_of(table, dim=DIM, **options):
    ledger = ContributorLedger(dim, "e", **options)
    for node, held in table.items():
        ledger.receive(message(node, held, dim=dim))
    return ledger


def holders(table, name):
    return [(node, held[name]) for node, held in table.items() if name in held]


def by_class(table):
    """Counts and sums, both as arrays of all holders, of each class."""
    rows = {c: [held for _, held in holders(table, c)] for c in CLASSES}
    return {
        c: (np.array([n for n, _ in held]), np.array([s for _, s in held], dtype=float))
        for c, held in rows.items()
        if held
    }


def lonely(value, n=1, dim=DIM):
    return n, [n * value] * dim


@settings(deadline=None, max_examples=80)
@given(tables, trims)
def test_rules_agree_with_numpy_and_scipy(table, trim):
    ledger = ledger_of(table)
    median = robust_total(ledger, "median")
    trimmed = robust_total(ledger, "trimmed", trim=trim)
    assert robust_total(ledger, "none") is ledger.total
    for name, (n, sums) in by_class(table).items():
        means = sums / n[:, None]
        if len(n) < 3:
            middle = mean = sums.sum(0) / n.sum()
        else:
            middle = np.median(means, axis=0)
            mean = stats.trim_mean(means, trim, axis=0)
        for memory, expected in ((median, middle), (trimmed, mean)):
            got = memory.select([name])
            assert got.counts.tolist() == [n.sum()]
            assert np.abs(got.sums[0].numpy() - expected * n.sum()).max() <= 0.5 + 1e-5


@settings(deadline=None, max_examples=60)
@given(tables, st.sampled_from([1.0, 7.5, 40.0, 1e300]))
def test_norm_caps_agree_with_a_loop(table, norm):
    ledger = ledger_of(table)
    total = robust_total(ledger, "none", norm=norm)
    median = robust_total(ledger, "median", norm=norm)
    for name, (n, sums) in by_class(table).items():
        lengths = [np.linalg.norm(s / k / UNIT) for k, s in zip(n, sums, strict=True)]
        capped = np.array(
            [s if a <= norm else s * (norm / a) for s, a in zip(sums, lengths, strict=True)]
        )
        slack = len(n) + 1e-4  # each capped row is rounded by less than one unit
        assert np.abs(total.select([name]).sums[0].numpy() - capped.sum(0)).max() <= slack
        middle = np.median(capped / n[:, None], axis=0) if len(n) > 2 else capped.sum(0) / n.sum()
        slack = n.sum() + 0.5 if len(n) > 2 else slack
        assert np.abs(median.select([name]).sums[0].numpy() - middle * n.sum()).max() <= slack
        if len(n) == 1:
            assert float(total.select([name]).means().norm()) <= norm * (1 + 1e-12)
    if norm == 1e300:
        assert total == ledger.total and median == robust_total(ledger, "median")


@settings(deadline=None, max_examples=60)
@given(tables, st.randoms(use_true_random=False), st.sampled_from(["median", "trimmed"]))
def test_order_names_and_other_classes_do_not_matter(table, rng, rule):
    expected = robust_total(ledger_of(table), rule, norm=30.0)
    messages = [message(node, held) for node, held in table.items()] * 2
    names = dict(zip(NODES, rng.sample(NODES, len(NODES)), strict=True))
    messages = [replace(sent, contributor=names[sent.contributor]) for sent in messages]
    rng.shuffle(messages)
    ledger = ContributorLedger(DIM, "e")
    for sent in messages:
        ledger.receive(sent)
    assert robust_total(ledger, rule, norm=30.0).to_bytes() == expected.to_bytes()
    for name in expected.classes:
        alone = {node: {name: held[name]} for node, held in table.items() if name in held}
        only = robust_total(ledger_of(alone), rule, norm=30.0)
        assert only.to_bytes() == expected.select([name]).to_bytes()


@settings(deadline=None, max_examples=60)
@given(tables, st.sampled_from(["none", "median", "trimmed"]), st.sampled_from([None, 20.0]))
def test_what_is_deleted_might_never_have_been(table, rule, norm):
    gone, *rest = table
    kept = {node: {c: r for c, r in table[node].items() if c != "bee"} for node in rest}
    expected = robust_total(ledger_of(kept), rule, norm=norm)
    ledger = ledger_of(table)
    ledger.forget_contributor(gone)
    ledger.forget_class("bee")
    before = ledger.to_bytes()
    assert robust_total(ledger, rule, norm=norm).to_bytes() == expected.to_bytes()
    assert ledger.to_bytes() == before


@settings(deadline=None, max_examples=60)
@given(tables, st.sampled_from(["median", "trimmed"]))
def test_one_or_two_holders_keep_their_exact_sum(table, rule):
    huge = {"dog": (2**31 - 1, [2**61 + 1, -(2**53) - 1, 1])}  # not exact in float64
    table = {node: {c: r for c, r in held.items() if c != "dog"} for node, held in table.items()}
    ledger = ledger_of(table | {"lone": huge}, cap=2**31 - 1)
    robust = robust_total(ledger, rule)
    for name in robust.classes:
        if len(holders(table, name)) <= 2:
            assert robust.select([name]) == ledger.total.select([name])
    assert robust.select(["dog"]).sums.tolist() == [huge["dog"][1]]
    assert robust.classes == ledger.total.classes
    assert torch.equal(robust.counts, ledger.total.counts)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("claimed", [1, 1_000_000])
@pytest.mark.parametrize("rule", ["median", "trimmed"])
@pytest.mark.parametrize(("nodes", "liars"), [(3, 1), (5, 1), (7, 1), (5, 2), (7, 3)])
def test_liars_at_the_limit_stay_within_the_honest_range(nodes, liars, rule, claimed, sign):
    rng = np.random.default_rng(nodes)
    honest = rng.integers(-3 * UNIT, 3 * UNIT, (nodes - liars, DIM))
    table = {f"n{k}": {"owl": (1, [int(v) for v in z])} for k, z in enumerate(honest)}
    table["n0"]["yak"] = lonely(5 * UNIT)
    for liar in range(liars):
        table[f"liar{liar}"] = {"owl": lonely(sign * LIMIT, claimed)}
    ledger = ledger_of(table)
    # The trimmed mean stands as many liars as it was told to expect.
    robust = robust_total(ledger, rule, trim=(liars + 0.1) / nodes)
    mean = robust.select(["owl"]).means().numpy()[0] * UNIT
    assert (honest.min(0) - 0.5 <= mean).all() and (mean <= honest.max(0) + 0.5).all()
    spoilt = ledger.total.select(["owl"]).means().numpy()[0] * UNIT
    assert (np.abs(spoilt) > 100 * np.abs(honest).max()).all()
    assert robust.select(["yak"]) == ledger.total.select(["yak"])


def test_a_poisoned_node_costs_nothing_and_a_lone_owner_keeps_everything():
    rng = np.random.default_rng(0)
    names = [f"class {c:02d}" for c in range(21)]  # sorted, as the memory has them
    centres = rng.normal(0, 1, (21, 32))
    queries = centres[np.arange(21).repeat(50)] + rng.normal(0, 0.5, (21 * 50, 32))
    ledger = ContributorLedger(32, "e")
    for node in range(6):  # everybody holds 20 classes, one of five honest nodes the last one
        known = 21 if node == 3 else 20
        z = centres[:known].repeat(5, 0) + rng.normal(0, 0.5, (5 * known, 32))
        rows = PrototypeMemory.empty(32, "e").observe(
            torch.tensor(1000 - 1000 * z if node == 5 else z), np.repeat(names[:known], 5).tolist()
        )
        ledger.receive(Contribution.of(f"n{node}", 1, rows))

    def right(memory):
        gaps = ((queries[:, None] - memory.means().numpy()) ** 2).sum(2)
        return (gaps.argmin(1).reshape(21, 50) == np.arange(21)[:, None]).mean(1)

    assert right(ledger.total)[:20].mean() < 0.2
    for rule, norm in (("median", None), ("trimmed", None), ("trimmed", 10.0)):
        assert (right(robust_total(ledger, rule, norm=norm)) == 1).all()


def test_one_liar_too_many_wins():
    table = {"a": {"owl": lonely(UNIT)}, "b": {"owl": lonely(UNIT)}}
    liars = {f"liar{k}": {"owl": lonely(LIMIT)} for k in range(3)}
    assert robust_total(ledger_of(table | liars), "median").prototypes()[0, 0] == LIMIT / UNIT
    one = ledger_of({"a": table["a"], "b": table["b"], "liar": liars["liar0"]})
    # Too small a fraction of three holders leaves out none of them.
    assert robust_total(one, "trimmed", trim=0.3).prototypes()[0, 0] > 10_000
    assert robust_total(one, "trimmed").prototypes()[0, 0] == 1.0


def test_nobody_buys_weight_with_its_count():
    table = {f"n{k}": {"owl": lonely(k * UNIT, 1)} for k in range(1, 5)}
    table["n9"] = {"owl": lonely(9 * UNIT, 1000)}
    ledger = ledger_of(table)
    assert robust_total(ledger, "median").prototypes().tolist() == [[3.0] * DIM]
    assert robust_total(ledger, "trimmed", trim=0.2).prototypes().tolist() == [[3.0] * DIM]
    assert robust_total(ledger, "trimmed", trim=0).means()[0, 0] == pytest.approx(3.8, abs=1e-5)
    assert robust_total(ledger, "median").total_count == 1004


def test_nodes_that_agree_are_left_alone():
    table = {f"n{k}": {"owl": (5, [7 * (k // 8 + 1), -11, 13])} for k in range(8)}
    ledger = ledger_of(table)
    for rule in ("median", "trimmed"):
        assert robust_total(ledger, rule) == ledger.total


def test_small_blocks_give_the_same_bytes(monkeypatch):
    rng = np.random.default_rng(3)
    table = {
        f"n{k}": {
            f"c{c:02d}": (int(rng.integers(1, 9)), rng.integers(-(2**20), 2**20, DIM).tolist())
            for c in rng.permutation(30)[: rng.integers(5, 30)]
        }
        for k in range(12)
    }
    ledger = ledger_of(table)
    whole = [robust_total(ledger, rule, norm=9.0).to_bytes() for rule in ("median", "trimmed")]
    for entries in (1, 50, 400):
        monkeypatch.setattr(module, "_BLOCK_ENTRIES", entries)
        assert whole == [
            robust_total(ledger, rule, norm=9.0).to_bytes() for rule in ("median", "trimmed")
        ]


def test_an_empty_ledger_stays_empty():
    for options in ({"rule": "none"}, {"rule": "median"}, {"rule": "trimmed", "norm": 1.0}):
        assert robust_total(ContributorLedger(DIM, "e"), **options) == PrototypeMemory.empty(
            DIM, "e"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "mean"},
        {"rule": ""},
        {"rule": None},
        {"rule": ["median"]},
        {"trim": 0.5},
        {"trim": -0.01},
        {"trim": float("nan")},
        {"trim": "0.1"},
        {"trim": None},
        {"trim": True},
        {"norm": 0},
        {"norm": -1.0},
        {"norm": float("nan")},
        {"norm": float("inf")},
        {"norm": "1"},
        {"norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("moments", ["none", "class"])
def test_bad_settings_are_refused_first(options, moments):
    with pytest.raises(ConfigError, match=r"Expected .* got"):
        robust_total(ContributorLedger(DIM, "e", moments), **{"rule": "median"} | options)


@pytest.mark.parametrize("moments", ["shared", "class"])
def test_second_moments_are_refused(moments):
    ledger = ContributorLedger(DIM, "e", moments)
    rows = PrototypeMemory.empty(DIM, "e", moments).observe(torch.ones(2, DIM), ["owl", "owl"])
    ledger.receive(Contribution.of("n1", 1, rows))
    for options in ({"rule": "median"}, {"rule": "trimmed"}, {"rule": "none", "norm": 1.0}):
        with pytest.raises(UnsupportedStatistics, match="moments"):
            robust_total(ledger, **options)
    assert robust_total(ledger, "none") == rows


def test_sums_that_would_wrap_around_are_refused():
    cap = 2**31 - 1
    rows = {"a": lonely(LIMIT, cap, 1), "b": lonely(-LIMIT, cap, 1), "c": lonely(LIMIT, cap, 1)}
    ledger = ledger_of({node: {"owl": held} for node, held in rows.items()}, dim=1, cap=cap)
    for options in ({"rule": "median"}, {"rule": "none", "norm": 1e5}):
        with pytest.raises(InvalidEmbedding) as caught:
            robust_total(ledger, **options)
        assert isinstance(caught.value, ClfedError) and "cap" in caught.value.remedy
    assert robust_total(ledger, "median", norm=1.0).means().tolist() == [[1.0]]
