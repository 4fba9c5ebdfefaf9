"""Addition and subtraction of memories, exact and in canonical form."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, compress
from typing import TYPE_CHECKING

import torch

from clfed.errors import EmbeddingMismatch, UnsupportedStatistics
from clfed.prototypes.fixed_point import checked_sum

if TYPE_CHECKING:
    from clfed.prototypes.memory import PrototypeMemory


def combined(a: PrototypeMemory, b: PrototypeMemory, *, subtract: bool) -> PrototypeMemory:
    """``a + b`` or ``a - b``: only the rows that ``b`` has are computed, the others copied.

    Raises:
        EmbeddingMismatch: Statistics of different embeddings.
        UnsupportedStatistics: Different second moments.
        InvalidEmbedding: The result does not fit into 64 bits.
    """
    check_compatible(a, b)
    base = _grown(a, b.classes)
    index = base.index
    rows = torch.tensor([*map(index.__getitem__, b.classes)], dtype=torch.int64)
    counts = checked_sum(base.counts[rows], b.counts, subtract=subtract)
    sums = checked_sum(base.sums[rows], b.sums, subtract=subtract)
    outer = base.outer
    if outer is not None and b.outer is not None:
        if a.moments == "shared":
            outer = checked_sum(outer, b.outer, subtract=subtract)
        else:
            touched = checked_sum(outer[rows], b.outer, subtract=subtract)
            outer = outer.index_copy(0, rows, touched)
    result = replace(
        base,
        counts=base.counts.index_copy(0, rows, counts),
        sums=base.sums.index_copy(0, rows, sums),
        outer=outer,
    )
    if 0 in counts.tolist():
        return without_zeros(result)
    result.__dict__["index"] = index  # same classes: spare the next sum the making of it
    return result


def check_compatible(a: PrototypeMemory, b: PrototypeMemory) -> None:
    """Refuse two memories that cannot be added.

    Raises:
        EmbeddingMismatch: Statistics of different embeddings.
        UnsupportedStatistics: Different second moments.
    """
    if a.embedding_id != b.embedding_id:
        raise EmbeddingMismatch(
            f"expected statistics of embedding {a.embedding_id[:12]!r}, got {b.embedding_id[:12]!r}"
        )
    if a.dim != b.dim:
        raise EmbeddingMismatch(
            f"expected embeddings of {a.dim} columns, got {b.dim} under one identity"
        )
    if a.moments != b.moments:
        raise UnsupportedStatistics(
            f"expected statistics with moments={a.moments!r}, got {b.moments!r}",
            remedy="Bring both to the smaller one: memory.with_moments(...).",
        )


def without_zeros(memory: PrototypeMemory) -> PrototypeMemory:
    """Drop the rows that carry nothing, so that equal contents have equal bytes."""
    empty = memory.counts == 0
    if not bool(empty.any()):
        return memory
    empty &= ~memory.sums.any(dim=1)
    by_class = memory.outer if memory.moments == "class" else None
    if by_class is not None:
        empty &= ~by_class.flatten(1).any(dim=1)
    keep = ~empty
    return replace(
        memory,
        classes=tuple(compress(memory.classes, keep.tolist())),
        counts=memory.counts[keep],
        sums=memory.sums[keep],
        outer=memory.outer if by_class is None else by_class[keep],
    )


def _grown(memory: PrototypeMemory, names: tuple[str, ...]) -> PrototypeMemory:
    """The memory with zero rows for the names that it lacks; not canonical."""
    if memory.index.keys() >= set(names):
        return memory
    # Two sorted runs: sorting them costs one merge.
    classes = tuple(sorted(dict.fromkeys(chain(memory.classes, names))))
    index = dict(zip(classes, range(len(classes)), strict=True))
    rows = torch.tensor([*map(index.__getitem__, memory.classes)], dtype=torch.int64)
    outer = memory.outer
    if memory.moments == "class" and outer is not None:
        outer = outer.new_zeros(len(classes), *outer.shape[1:]).index_copy_(0, rows, outer)
    grown = replace(
        memory,
        classes=classes,
        counts=memory.counts.new_zeros(len(classes)).index_copy_(0, rows, memory.counts),
        sums=memory.sums.new_zeros(len(classes), memory.dim).index_copy_(0, rows, memory.sums),
        outer=outer,
    )
    grown.__dict__["index"] = index
    return grown
