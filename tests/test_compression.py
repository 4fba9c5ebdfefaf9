"""Rounded and sketched messages: against slow loops, numpy and counted bytes."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    InvalidEmbedding,
    InvalidMessage,
    UnsupportedStatistics,
)
from clfed.federated.wire import encode_contribution, encode_memory, narrow, record_bytes
from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory, read_off
from clfed.prototypes.compression import (
    compress,
    expand,
    restore_rows,
    round_rows,
    spacing,
)
from clfed.prototypes.sketch import Sketch

BITS = (4, 8, 16)
LIMIT = 2**62 - 1  # honest sums of embeddings lie within

bits_of = st.sampled_from(BITS)
reach = st.sampled_from([1, 5, 300, 2**17, 2**40, LIMIT])
tables = reach.flatmap(
    lambda limit: st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(-limit, limit), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        )
    )
)


def observed(seed=0, dim=12, classes=4, count=30, moments="none", size=1.0, embedding="e"):
    rng = torch.Generator().manual_seed(seed)
    z = size * torch.randn(count, dim, generator=rng)
    labels = [f"class {i % classes}" for i in range(count)]
    return PrototypeMemory.empty(dim, embedding, moments).observe(z, labels)


def grid_of(row, bits):
    """All points of a row's grid, in Python's unbounded integers."""
    low, high = min(row), max(row)
    steps = min(2**bits - 1, high - low)
    if steps == 0:
        return [low]
    return [low + (k * (high - low) + steps // 2) // steps for k in range(steps + 1)]


def nearest(value, grid):
    """Number of the nearest point; of two at one distance the even one."""
    return min(range(len(grid)), key=lambda k: (abs(grid[k] - value), k % 2))


# --- rounding ---------------------------------------------------------------------------------


@given(tables, st.sampled_from([4, 8]))
@settings(max_examples=60, deadline=None)
def test_every_entry_becomes_the_nearest_point_of_its_row(rows, bits):
    ends, codes = round_rows(torch.tensor(rows), bits)
    assert ends.tolist() == [[min(row), max(row)] for row in rows]
    restored = restore_rows(ends, codes, bits, len(rows[0])).tolist()
    for row, back, packed in zip(rows, restored, codes.tolist(), strict=True):
        grid = grid_of(row, bits)
        chosen = [nearest(value, grid) for value in row]
        assert back == [grid[k] for k in chosen]
        if bits == 8:
            assert packed == chosen
        else:
            halves = [half for byte in packed for half in (byte % 16, byte // 16)]
            assert halves == chosen + [0] * (len(row) % 2)


def test_sixteen_bits_are_nearest_too_and_little_endian():
    row = [-(2**61), 12345678901234567, 2**61, 3, -7]
    grid = np.array(grid_of(row, 16), dtype=object)
    ends, codes = round_rows(torch.tensor([row]), 16)
    chosen = [int(np.argmin(abs(grid - value))) for value in row]
    assert codes.numpy().view("<u2")[0].tolist() == chosen
    assert restore_rows(ends, codes, 16, 5)[0].tolist() == [grid[k] for k in chosen]


@given(tables, bits_of, st.none() | st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_the_error_is_bounded_and_no_entry_leaves_its_range(rows, bits, seed):
    sums = torch.tensor(rows)
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    ends, codes = round_rows(sums, bits, rng)
    back = restore_rows(ends, codes, bits, sums.shape[1])
    for row, new, gap in zip(rows, back.tolist(), spacing(ends, bits).tolist(), strict=True):
        span = max(row) - min(row)
        assert gap == -(-span // (2**bits - 1))
        largest = gap // 2 if seed is None else max(gap - 1, 0)
        assert all(abs(a - b) <= largest for a, b in zip(row, new, strict=True))
        assert (min(new), max(new)) == (min(row), max(row))
        assert span >= 2**bits or new == row


@given(tables, bits_of)
@settings(max_examples=80, deadline=None)
def test_rounding_again_changes_nothing(rows, bits):
    ends, codes = round_rows(torch.tensor(rows), bits)
    back = restore_rows(ends, codes, bits, len(rows[0]))
    for rng in (None, torch.Generator().manual_seed(1)):  # a point of the grid has no choice
        again = round_rows(back, bits, rng)
        assert torch.equal(again[0], ends) and torch.equal(again[1], codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_at_random_is_right_in_expectation_and_to_the_nearest_is_not(bits):
    copies = 40_000
    row = torch.cat([torch.tensor([-1_000_003, 2_500_000]), torch.arange(0, 90_000, 997)])
    table = row.expand(copies, -1)
    ends, codes = round_rows(table, bits, torch.Generator().manual_seed(0))
    mean = restore_rows(ends, codes, bits, len(row)).double().mean(0)
    gap = float(spacing(ends[:1], bits))
    tolerance = 5 * gap / 2 / math.sqrt(copies)  # a draw of two points has at most gap / 2 as std
    assert float((mean - row).abs().max()) < tolerance
    once = restore_rows(*round_rows(row[None], bits), bits, len(row))[0]
    assert float((once - row).abs().max()) > 10 * tolerance


def test_the_same_generator_gives_the_same_bytes_and_another_one_others():
    sums = observed().sums
    first, second, other = (
        round_rows(sums, 4, torch.Generator().manual_seed(seed))[1] for seed in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


# --- messages ---------------------------------------------------------------------------------


@given(st.integers(0, 20), bits_of, st.integers(1, 9), st.sampled_from([1e-4, 1.0, 3e3]))
@settings(max_examples=40, deadline=None)
def test_what_a_message_describes_is_a_memory_with_exact_counts(seed, bits, dim, size):
    memory = observed(seed, dim, size=size)
    back = expand(compress(memory, bits))
    assert (back.classes, back.embedding_id) == (memory.classes, memory.embedding_id)
    assert torch.equal(back.counts, memory.counts)
    largest = spacing(compress(memory, bits).ends, bits)[:, None] // 2
    assert bool(((back.sums - memory.sums).abs() <= largest).all())
    assert expand(compress(memory - memory, bits)) == memory - memory


@pytest.mark.parametrize("bits", BITS)
def test_a_row_depends_on_nothing_but_itself(bits):
    memory = observed()
    names = ["class 3", "class 1"]
    assert expand(compress(memory.select(names), bits)) == expand(compress(memory, bits)).select(
        names
    )
    assert expand(compress(memory.without(names), bits)) == expand(compress(memory, bits)).without(
        names
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True), bits_of)
@settings(max_examples=30, deadline=None)
def test_a_merge_is_off_by_the_bounds_of_its_rows_at_most(seeds, bits):
    nodes = [observed(seed, count=9 + seed) for seed in seeds]
    zero = PrototypeMemory.empty(12, "e")
    pooled, merged = sum(nodes, zero), zero
    allowed = torch.zeros(4, 1, dtype=torch.int64)
    for node in nodes:
        message = compress(node, bits)
        merged += expand(message)
        allowed += spacing(message.ends, bits)[:, None] // 2
    assert torch.equal(merged.counts, pooled.counts)
    assert bool(((merged.sums - pooled.sums).abs() <= allowed).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1.0, 32768.0])
def test_a_ledger_takes_replays_replaces_and_forgets_expanded_rows(bits, size):
    ledger = ContributorLedger(5, "e")
    zero = PrototypeMemory.empty(5, "e")
    rng = torch.Generator().manual_seed(0)
    corners = size * torch.sign(torch.randn(8, 5, generator=rng))  # as large as a sum can be
    first = expand(compress(zero.observe(corners[:3], ["owl", "fox", "owl"]), bits))
    other = expand(compress(zero.observe(corners[3:6], ["owl", "elk", "owl"]), bits))
    ledger.receive(Contribution.of("north", 1, first))
    ledger.receive(Contribution.of("south", 1, other))
    assert ledger.total == first + other
    assert ledger.receive(Contribution.of("north", 1, first)).accepted == ()
    # An image of the owl is gone at its node, which sends the row again from its exact sum.
    second = expand(compress(zero.observe(corners[:1], ["owl"]), bits))
    ledger.receive(Contribution.of("north", 2, second, gone=("fox",)))
    assert ledger.total == second + other
    ledger.forget_contributor("south")
    assert ledger.total == second


def record_of(message):
    """The tables that would travel, as a record of the wire."""
    head = {"classes": message.classes, "bits": message.bits, "dim": message.dim}
    return ArrayRecord(
        {
            "head": Array(np.frombuffer(json.dumps(head).encode(), np.uint8)),
            "counts": Array(narrow(message.counts.numpy())),
            "ends": Array(narrow(message.ends.numpy())),
            "codes": Array(message.codes.numpy()),
        }
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dim", "classes"), [(64, 5), (7, 30), (784, 10)])
def test_bytes_are_those_of_the_formula(bits, dim, classes):
    memory = observed(dim=dim, classes=classes, count=3 * classes)
    record = record_of(compress(memory, bits))
    payload = classes * (1 + 2 * 4 + math.ceil(dim * bits / 8))
    header = 128  # of a numpy file; small ones fit into it
    counted = sum(len(record[name].data) - header for name in ("counts", "ends", "codes"))
    assert counted == payload
    assert record_bytes(RecordDict({"rows": record})) == (
        payload + 3 * header + len(record["head"].data) + len("headcountsendscodes")
    )
    plain = encode_memory(memory)
    assert len(plain["counts"].data) + len(plain["sums"].data) - 2 * header == classes * (
        1 + 4 * dim
    )


def test_a_message_of_ten_classes_is_about_five_times_smaller_with_four_bits():
    rows = Contribution.of("north", 1, observed(dim=256, classes=10))
    plain = record_bytes(RecordDict({"rows": encode_contribution(rows)}))
    small = record_bytes(RecordDict({"rows": record_of(compress(rows.memory(), 4))}))
    assert 5 < plain / small < 6


@pytest.mark.parametrize("bits", [0, 1, 2, 32, 8.0, True, "8", None])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="4, 8 or 16 bits"):
        compress(observed(), bits)


@pytest.mark.parametrize("moments", ["shared", "class"])
def test_second_moments_are_not_rounded(moments):
    with pytest.raises(UnsupportedStatistics, match="second moments"):
        compress(observed(moments=moments), 8)


def test_a_range_beyond_64_bits_is_refused():
    sums = torch.tensor([[-(2**63), 2**63 - 1]])
    with pytest.raises(InvalidEmbedding, match="64 bits"):
        round_rows(sums, 8)


def changed(message, **changes):
    return replace(message, **changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: changed(m, bits=5),
        lambda m: changed(m, bits=8),
        lambda m: changed(m, bits="4"),
        lambda m: changed(m, bits=True),
        lambda m: changed(m, dim=0),
        lambda m: changed(m, dim=15),
        lambda m: changed(m, dim=13.0),
        lambda m: changed(m, codes=m.codes.long()),
        lambda m: changed(m, codes=m.codes[:, :-1]),
        lambda m: changed(m, codes=m.codes[:-1]),
        lambda m: changed(m, codes=m.codes.tolist()),
        lambda m: changed(m, codes=m.codes | 240),  # the half byte after 13 codes is not zero
        lambda m: changed(m, ends=m.ends.float()),
        lambda m: changed(m, ends=m.ends[:, :1]),
        lambda m: changed(m, ends=m.ends[0, 0]),
        lambda m: changed(m, ends=m.ends.flip(1)),
        lambda m: changed(m, ends=torch.tensor([[-(2**62) - 1, 2**62]] * 4)),
        lambda m: changed(m, ends=torch.tensor([[2**63 - 1, -(2**63)]] * 4), codes=m.codes * 0),
        lambda m: changed(m, ends=torch.tensor([[-(2**63), 2**63 - 1]] * 4), codes=m.codes * 0),
        lambda m: changed(m, ends=m.ends[:, :1].expand(-1, 2)),  # one point, many codes
        lambda m: changed(m, ends=m.ends[:, :1] + torch.tensor([0, 3])),  # four points
        lambda m: changed(m, counts=m.counts[1:]),
        lambda m: changed(m, counts=m.counts.double()),
        lambda m: changed(m, classes=m.classes[:1] * 4),
        lambda m: changed(m, classes=("a\n", *m.classes[1:])),
        lambda m: changed(m, embedding_id=""),
    ],
)
def test_what_no_compression_gives_is_refused(spoil):
    message = compress(observed(dim=13), 4)
    assert expand(message).dim == 13
    with pytest.raises(InvalidMessage):
        expand(spoil(message))


# --- sketches ---------------------------------------------------------------------------------


def matrix(sketch):
    """The map as a dense matrix of Python integers, made entry by entry."""
    bucket, sign = sketch.table
    dense = np.zeros((sketch.dim_out, sketch.dim_in), dtype=object)
    for d, (row, value) in enumerate(zip(bucket.tolist(), sign.tolist(), strict=True)):
        dense[row, d] = value
    return dense


@given(st.integers(1, 12), st.data(), st.sampled_from(["none", "shared", "class"]))
@settings(max_examples=40, deadline=None)
def test_a_sketched_memory_is_the_matrix_product_in_unbounded_integers(dim, data, moments):
    sketch = Sketch(dim, data.draw(st.integers(1, dim)), data.draw(st.integers(0, 5)))
    memory = observed(dim=dim, moments=moments)
    small, dense = sketch.memory(memory), matrix(sketch)
    assert small.sums.tolist() == (memory.sums.numpy().astype(object) @ dense.T).tolist()
    assert torch.equal(small.counts, memory.counts)
    if memory.outer is not None:
        expected = dense @ memory.outer.numpy().astype(object) @ dense.T
        assert small.outer.tolist() == expected.tolist()


@given(
    st.integers(0, 30),
    st.integers(1, 9),
    st.sampled_from(["none", "shared", "class"]),
    st.sampled_from([1e-4, 1.0, 1e3]),
)
@settings(max_examples=40, deadline=None)
def test_sketching_commutes_with_learning_merging_and_forgetting(seed, dim_out, moments, size):
    sketch = Sketch(9, dim_out, seed)
    a, b = (observed(s, 9, 3, 11, moments, size) for s in (seed, seed + 1))
    assert sketch.memory(a + b) == sketch.memory(a) + sketch.memory(b)
    assert sketch.memory(a + b) - sketch.memory(b) == sketch.memory(a)
    z = size * torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    names = ["class 0", "new", "new", "class 1", "class 0"]
    learned = sketch.memory(a).observe(sketch(z), names)
    assert learned == sketch.memory(a.observe(z, names))
    if moments != "shared":
        assert sketch.memory(a.without(["class 1"])) == sketch.memory(a).without(["class 1"])


def test_a_difference_that_no_sketch_shows_leaves_no_row():
    sketch = Sketch(2, 1, 0)
    zero = PrototypeMemory.empty(2, "e")
    a, b = (zero.observe(row[None], ["owl"]) for row in torch.diag(sketch.table[1].float()))
    assert a != b and sketch.memory(a) == sketch.memory(b)
    assert sketch.memory(a - b) == sketch.memory(zero) and not len(sketch.memory(a - b))


def test_a_sketch_of_full_size_changes_no_distance():
    memory, sketch = observed(moments="shared"), Sketch(12, 12, 4)
    z = torch.randn(40, 12, generator=torch.Generator().manual_seed(9))
    for name in ("ncm", "lda", "ridge"):
        whole, small = read_off(name, memory), read_off(name, sketch.memory(memory))
        assert torch.allclose(whole.scores(z), small.scores(sketch(z)), atol=1e-3)
        assert torch.equal(whole.predict(z), small.predict(sketch(z)))
    assert torch.allclose(sketch(z).norm(dim=1), z.double().norm(dim=1), atol=1e-3)


@pytest.mark.parametrize(("dim", "size"), [(8, 4), (8, 2), (7, 3), (6, 5)])
def test_inner_products_are_right_in_expectation_with_the_variance_of_the_formula(dim, size):
    x = np.linspace(-1, 2, dim)
    y = np.cos(np.arange(dim))
    both = torch.from_numpy(np.stack([x, y]))
    draws = 4000
    products, norms = np.empty(draws), np.empty(draws)
    for seed in range(draws):
        a, b = Sketch(dim, size, seed)(both).numpy()
        products[seed], norms[seed] = a @ b, a @ a
    sizes = np.bincount(np.arange(dim) % size)
    shared = (sizes * (sizes - 1)).sum() / (dim * (dim - 1))
    pairs = list(itertools.combinations(range(dim), 2))
    variance = shared * sum((x[i] * y[j] + x[j] * y[i]) ** 2 for i, j in pairs)
    assert abs(products.mean() - x @ y) < 5 * math.sqrt(variance / draws)
    of_norm = 2 * shared * 2 * sum(x[i] ** 2 * x[j] ** 2 for i, j in pairs)
    assert abs(norms.mean() - x @ x) < 5 * math.sqrt(of_norm / draws)
    assert 0.85 < norms.var() / of_norm < 1.15
    assert 0.85 < products.var() / variance < 1.15
    if dim % size == 0:
        assert shared == pytest.approx((dim - size) / (size * (dim - 1)))


def test_the_map_is_pinned_and_its_identity_says_which_it_is():
    bucket, sign = Sketch(8, 4, 0).table
    assert (bucket.tolist(), sign.tolist()) == (
        [1, 0, 3, 3, 2, 2, 0, 1],
        [1, 1, -1, 1, -1, -1, 1, -1],
    )
    names = {
        sketch.embedding_id(original)
        for sketch in (Sketch(8, 4, 0), Sketch(8, 4, 1), Sketch(8, 2, 0))
        for original in ("e", "f")
    }
    assert len(names) == 6
    assert all(len(name) <= 128 and name.startswith("sketch") for name in names)
    assert all(sorted(Sketch(10, 4, s).table[0].bincount()) == [2, 2, 3, 3] for s in range(5))


def test_sketches_of_other_maps_and_sizes_are_refused():
    memory = observed()
    with pytest.raises(EmbeddingMismatch, match="12"):
        Sketch(9, 3, 0).memory(memory)
    with pytest.raises(InvalidEmbedding, match=r"\(B, 9\)"):
        Sketch(9, 3, 0)(torch.zeros(2, 12))
    with pytest.raises(InvalidEmbedding, match="finite"):
        Sketch(9, 3, 0)(torch.full((2, 9), math.nan))
    with pytest.raises(EmbeddingMismatch, match="sketch3"):
        Sketch(12, 3, 0).memory(memory) + Sketch(12, 3, 1).memory(memory)
    with pytest.raises(EmbeddingMismatch):
        Sketch(12, 12, 0).memory(memory) + memory
    for size in (0, 13, -1):
        with pytest.raises(ConfigError, match="1 to 12"):
            Sketch(12, size, 0)


@pytest.mark.parametrize("moments", ["none", "class"])
def test_sums_that_would_not_fit_are_refused(moments):
    big = torch.full((1, 4), 2**61)
    outer = torch.zeros(1, 4, 4, dtype=torch.int64) if moments == "class" else None
    memory = PrototypeMemory.of(
        ["owl"], torch.tensor([2**31]), big, "e", moments=moments, outer=outer
    )
    with pytest.raises(InvalidEmbedding, match="64 bits"):
        Sketch(4, 1, 0).memory(memory)


@pytest.mark.parametrize("bits", BITS)
def test_a_sketch_can_be_rounded_too(bits):
    sketch, memory = Sketch(12, 6, 0), observed()
    small = sketch.memory(memory)
    back = expand(compress(small, bits))
    assert (back.dim, back.embedding_id) == (6, small.embedding_id)
    assert float((back.means() - small.means()).abs().max()) < 2.0 ** (3 - bits)
