"""Prototype memory: laws of a commutative group, exactness, and what is refused."""

import contextlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.errors import (
    EmbeddingMismatch,
    InvalidEmbedding,
    InvalidMessage,
    MissingData,
    RunFolderError,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.prototypes import RESOLUTION, PrototypeMemory
from clfed.prototypes.fixed_point import outer_by_class, outer_total, quantise
from clfed.prototypes.moments import class_scatter, gram, scatter

MOMENTS = ("none", "shared", "class")
DIM = 3

coordinates = st.floats(-100, 100, width=32)
samples = st.lists(
    st.tuples(
        st.sampled_from(["ape", "bee", "cat", "Ωmega"]),
        st.lists(coordinates, min_size=DIM, max_size=DIM),
    ),
    max_size=12,
)
moments = st.sampled_from(MOMENTS)


def seen(examples, kind="none", identity="e"):
    zero = PrototypeMemory.empty(DIM, identity, kind)
    rows = torch.tensor([row for _, row in examples], dtype=torch.float32).reshape(-1, DIM)
    return zero.observe(rows, [name for name, _ in examples])


@given(moments, samples, samples, samples)
def test_memory_is_a_commutative_group(kind, x, y, z):
    a, b, c = seen(x, kind), seen(y, kind), seen(z, kind)
    zero = PrototypeMemory.empty(DIM, "e", kind)
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + zero == a == a - zero
    assert a - a == zero == a + -a
    assert (a + b) - b == a
    assert a - (b + c) == (a - b) - c
    assert b - a == -(a - b)
    assert hash(a + b) == hash(b + a)


@given(moments, samples, samples)
def test_equal_contents_have_equal_bytes(kind, x, y):
    a, b = seen(x, kind), seen(y, kind)
    assert (a + b).to_bytes() == (b + a).to_bytes()
    assert ((a + b) - b).sha256() == a.sha256()
    for memory in (a, a - b):
        assert PrototypeMemory.from_bytes(memory.to_bytes()) == memory


@given(moments, samples, st.randoms(use_true_random=False), st.integers(1, 5))
def test_partition_and_order_do_not_matter(kind, x, rng, parts):
    whole = seen(x, kind)
    shuffled = rng.sample(x, len(x))
    pieces = [seen(shuffled[k::parts], kind) for k in range(parts)]
    assert sum(pieces, PrototypeMemory.empty(DIM, "e", kind)) == whole


@given(samples)
def test_matches_integers_of_python(x):
    memory = seen(x, "class")
    for row, name in enumerate(memory.classes):
        quantised = [[round(v * 2**16) for v in values] for label, values in x if label == name]
        assert int(memory.counts[row]) == len(quantised)
        assert memory.sums[row].tolist() == [sum(column) for column in zip(*quantised, strict=True)]
        expected = [[sum(q[i] * q[j] for q in quantised) for j in range(DIM)] for i in range(DIM)]
        assert memory.outer[row].tolist() == expected
    assert sorted({label for label, _ in x}) == list(memory.classes)
    assert memory.total_count == len(x)


@pytest.mark.parametrize("scale", [1.0, 100.0, 20000.0])
@pytest.mark.parametrize("batch", [1, 70, 1000])
def test_second_moments_are_exact_at_any_scale(scale, batch):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(batch, 5, generator=generator) * 2 - 1) * scale
    if batch * scale**2 * 2**32 > 2**61:
        x = x[:3]
    labels = torch.randint(0, 4, (len(x),), generator=generator)
    q, peak = quantise(x, 5)
    exact = q.numpy().astype(np.int64).astype(object)
    assert outer_total(q, peak).tolist() == (exact.T @ exact).tolist()
    by_class = outer_by_class(q, labels, 4, peak)
    for c in range(4):
        rows = exact[labels.numpy() == c]
        assert by_class[c].tolist() == (rows.T @ rows).astype(object).tolist() or not len(rows)
        if not len(rows):
            assert not by_class[c].any()


def test_uneven_classes_are_exact():
    generator = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.zeros(900, dtype=torch.int64), torch.arange(1, 40)])
    q, peak = quantise(torch.randn(len(labels), 6, generator=generator), 6)
    by_class = outer_by_class(q, labels, 40, peak)
    assert torch.equal(by_class.sum(0), outer_total(q, peak))
    assert torch.equal(by_class[0], outer_total(q[:900], peak))
    assert torch.equal(by_class[7], outer_total(q[906:907], peak))


def test_second_moments_shared_is_the_sum_over_classes():
    examples = [("ape", [1.0, 2.0, 3.0]), ("bee", [0.5, 0.0, -1.0]), ("ape", [2.0, 2.0, 2.0])]
    by_class = seen(examples, "class")
    assert by_class.with_moments("shared") == seen(examples, "shared")
    assert (
        by_class.with_moments("none")
        == seen(examples)
        == seen(examples, "shared").with_moments("none")
    )
    with pytest.raises(UnsupportedStatistics):
        seen(examples).with_moments("shared")


def test_scatter_agrees_with_numpy():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, DIM, generator=generator) + 5
    labels = ["ab"[i % 2] for i in range(50)]
    memory = PrototypeMemory.empty(DIM, "e", "class").observe(x, labels)
    for row, part in enumerate((x[::2], x[1::2])):
        expected = np.cov(part.double().numpy().T) * (len(part) - 1)
        np.testing.assert_allclose(class_scatter(memory)[row], expected, atol=2e-3)
    np.testing.assert_allclose(scatter(memory), class_scatter(memory).sum(0), rtol=1e-9)
    np.testing.assert_allclose(gram(memory.with_moments("shared")), gram(memory), rtol=1e-15)
    assert torch.equal(class_scatter(memory, ["b"])[0], class_scatter(memory)[1])


def test_prototypes_are_class_means():
    memory = seen([("owl", [1.0, 0.0, 0.0]), ("owl", [3.0, 0.0, 0.0]), ("ant", [0.0, 5.0, 0.25])])
    assert memory.classes == ("ant", "owl")
    assert memory.prototypes().tolist() == [[0.0, 5.0, 0.25], [2.0, 0.0, 0.0]]
    assert memory.prototypes().dtype == torch.float32
    assert (len(memory), memory.dim, memory.total_count, memory.nbytes) == (2, 3, 3, 64)
    assert "owl" in memory and "emu" not in memory
    with pytest.raises(InvalidMessage, match="-2 of 'owl'"):
        (-memory).prototypes()


def test_forgetting_a_class_is_never_having_seen_it():
    x = [("ape", [1.0, 2.0, 3.0]), ("bee", [4.0, 5.0, 6.0]), ("cat", [7.0, 8.0, 9.0])]
    for kind in ("none", "class"):
        assert seen(x, kind).without(["bee"]) == seen([x[0], x[2]], kind)
        assert seen(x, kind).select(["cat", "ape"]) == seen([x[0], x[2]], kind)
    with pytest.raises(UnknownClass, match="'dog'"):
        seen(x).without(["dog"])
    with pytest.raises(UnsupportedStatistics):
        seen(x, "shared").without(["bee"])


def test_shared_moments_leave_with_their_samples():
    x = [("ape", [1.0, 2.0, 3.0]), ("bee", [4.0, 5.0, 6.0])]
    rest = seen(x, "shared") - seen(x[1:], "shared")
    assert rest == seen(x[:1], "shared")
    only_moments = seen(x[:1], "shared") - seen([("ape", [1.0, 2.0, 3.0])], "shared")
    assert not only_moments


def test_half_rounds_to_even_and_precision_is_kept():
    zero = PrototypeMemory.empty(2, "e")
    tie = zero.observe(torch.tensor([[0.5 * RESOLUTION, 1.5 * RESOLUTION]]), ["a"])
    assert tie.sums.tolist() == [[0, 2]]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert zero.observe(torch.tensor([[1.5, -2.25]], dtype=dtype), ["a"]).sums.tolist() == [
            [98304, -147456]
        ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**15 + 1, -1e30])
def test_bad_values_are_refused(value):
    x = torch.zeros(2, DIM)
    x[1, 2] = value
    with pytest.raises(InvalidEmbedding, match="finite"):
        PrototypeMemory.empty(DIM, "e").observe(x, ["a", "b"])


@pytest.mark.parametrize(
    ("embeddings", "labels", "error"),
    [
        (torch.zeros(2, 4), ["a", "b"], InvalidEmbedding),
        (torch.zeros(DIM), ["a"], InvalidEmbedding),
        (torch.zeros(2, DIM, dtype=torch.int64), ["a", "b"], InvalidEmbedding),
        (torch.zeros(2, DIM), ["a"], InvalidEmbedding),
        (torch.zeros(2, DIM), ["a", ""], InvalidMessage),
        (torch.zeros(2, DIM), ["a", "b\n"], InvalidMessage),
        (torch.zeros(2, DIM), ["a", "x" * 129], InvalidMessage),
        (torch.zeros(2, DIM), ["a", "\ud800"], InvalidMessage),
        (torch.zeros(2, DIM), [0, 1], InvalidMessage),
        (torch.zeros(2, DIM), ["a", 1], InvalidMessage),
        (torch.zeros(2, DIM), [["a"], ["b"]], InvalidMessage),
        (torch.zeros(2, DIM), "ab", InvalidMessage),
    ],
)
def test_bad_batches_are_refused(embeddings, labels, error):
    with pytest.raises(error) as caught:
        PrototypeMemory.empty(DIM, "e").observe(embeddings, labels)
    assert ("expected" in str(caught.value) and "got" in str(caught.value)) or "strings" in str(
        caught.value
    )


@pytest.mark.parametrize("kind", ["shared", "class"])
def test_second_moments_that_would_overflow_are_refused(kind):
    zero = PrototypeMemory.empty(2, "e", kind)
    with pytest.raises(InvalidEmbedding) as caught:
        zero.observe(torch.full((2, 2), 2.0**15), ["a", "a"])
    assert "Scale" in caught.value.remedy
    large = zero.observe(torch.full((1, 2), 30000.0), ["a"])
    with pytest.raises(InvalidEmbedding, match="64 bits"):
        large + large + large
    with pytest.raises(InvalidEmbedding, match="64 bits"):
        -large - large - large


def test_nothing_wraps_around():
    top = torch.tensor([2**62], dtype=torch.int64)
    a = PrototypeMemory.of(["a"], top, top[:, None], "e")
    with pytest.raises(InvalidEmbedding, match="64 bits"):
        a + a
    assert (a - a).classes == ()


def test_different_memories_do_not_mix():
    a = seen([("ape", [1.0, 2.0, 3.0])])
    with pytest.raises(EmbeddingMismatch):
        a + seen([], identity="other")
    with pytest.raises(EmbeddingMismatch):
        a + PrototypeMemory.empty(4, "e")
    with pytest.raises(UnsupportedStatistics):
        a - seen([], "class")
    assert a != seen([("ape", [1.0, 2.0, 3.0])], identity="other")
    assert a != "a memory"


def test_empty_batches_and_memories(tmp_path):
    for kind in MOMENTS:
        zero = PrototypeMemory.empty(DIM, "e", kind)
        assert zero.observe(torch.zeros(0, DIM), []) == zero
        assert zero.prototypes().shape == (0, DIM)
        zero.save(tmp_path / kind)
        assert PrototypeMemory.load(tmp_path / kind) == zero
    for dim in (0, -1, 2.0):
        with pytest.raises(InvalidMessage):
            PrototypeMemory.empty(dim, "e")
    with pytest.raises(InvalidMessage):
        PrototypeMemory.empty(DIM, "")
    with pytest.raises(InvalidMessage):
        PrototypeMemory.empty(DIM, "e", "most")


def tables(**changes):
    values = {
        "classes": ["b", "a"],
        "counts": torch.tensor([1, 2]),
        "sums": torch.tensor([[3, 4], [5, 6]]),
        "embedding_id": "e",
        **changes,
    }
    return PrototypeMemory.of(**values)


def test_foreign_tables_are_sorted_and_zero_rows_dropped():
    memory = tables(
        classes=["b", "z", "a"],
        counts=torch.tensor([1, 0, 2]),
        sums=torch.tensor([[3, 4], [0, 0], [5, 6]]),
    )
    assert memory == tables()
    assert memory.classes == ("a", "b") and memory.sums.tolist() == [[5, 6], [3, 4]]
    debt = tables(counts=torch.tensor([0, 2]))
    assert debt.classes == ("a", "b"), "a row without examples but with a sum is not zero"


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["a", "a"]},
        {"classes": ["a"]},
        {"classes": ["a", "\x00"]},
        {"counts": torch.tensor([1.0, 2.0])},
        {"counts": torch.tensor([[1, 2]])},
        {"counts": [1, 2]},
        {"sums": torch.tensor([3, 4])},
        {"sums": torch.zeros(2, 0, dtype=torch.int64)},
        {"sums": torch.zeros(2, 2)},
        {"embedding_id": ""},
        {"embedding_id": 7},
        {"moments": "class"},
        {"outer": torch.zeros(2, 2, dtype=torch.int64)},
        {"moments": "shared", "outer": torch.zeros(2, 2, 2, dtype=torch.int64)},
        {"moments": "shared", "outer": torch.tensor([[1, 2], [3, 4]])},
    ],
)
def test_foreign_tables_that_do_not_fit_are_refused(changes):
    with pytest.raises(InvalidMessage):
        tables(**changes)


@pytest.mark.parametrize("kind", MOMENTS)
def test_files_survive_and_damage_is_named(tmp_path, kind):
    memory = seen([("ape", [1.0, 2.0, 3.0]), ("Ωmega", [4.0, 5.0, 6.0])], kind)
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    assert PrototypeMemory.load(path) == memory
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:7],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
        b"\xff" * len(whole),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InvalidMessage, match=r"memory\.safetensors"):
            PrototypeMemory.load(path)
    for old, new in (
        (b"ape", b"zoo"),
        (b"schema", b"shemac"),
        (b"prototype memory", b"contributor book"),
    ):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(InvalidMessage, match=r"memory\.safetensors"):
            PrototypeMemory.load(path)
    with pytest.raises(MissingData):
        PrototypeMemory.load(tmp_path / "absent")
    with pytest.raises(RunFolderError):
        memory.save(tmp_path / "absent" / "memory")


@settings(max_examples=200)
@given(st.data())
def test_flipped_bytes_never_crash(data):
    whole = bytearray(seen([("ape", [1.0, 2.0, 3.0])], "class").to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidMessage):  # the only refusal; changed numbers go unnoticed
        PrototypeMemory.from_bytes(bytes(whole))


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "memory"
    former = seen([("ape", [1.0, 2.0, 3.0])])
    former.save(path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunFolderError, match="No space"):
        seen([]).save(path)
    monkeypatch.undo()
    assert PrototypeMemory.load(path) == former
    assert [file.name for file in tmp_path.iterdir()] == ["memory"]


def test_bytes_are_the_same_in_another_process():
    program = (
        "import torch; from clfed.prototypes import PrototypeMemory as M;"
        "print(M.empty(2, 'e', 'class').observe(torch.eye(2), ['b', 'a']).sha256())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    here = PrototypeMemory.empty(2, "e", "class").observe(torch.eye(2), ["b", "a"]).sha256()
    assert runs == {f"{here}\n".encode()}


def test_operations_leave_their_operands_alone():
    for kind in MOMENTS:
        a, b = (
            seen([("ape", [1.0, 2.0, 3.0])], kind),
            seen([("ape", [4.0, 5.0, 6.0]), ("bee", [1.0, 1.0, 1.0])], kind),
        )
        before = a.to_bytes(), b.to_bytes()
        _ = a + b, b - a, -a, b.observe(torch.ones(1, DIM), ["ape"]), b.with_moments("none")
        assert (a.to_bytes(), b.to_bytes()) == before
