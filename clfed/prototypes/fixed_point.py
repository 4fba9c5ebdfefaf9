"""Exact arithmetic on quantised embeddings: integers in int64, products through float64 BLAS.

An embedding :math:`z` is rounded once to :math:`q = round(2^{16} z)`. Everything after that is
integer arithmetic, so sums do not depend on order, grouping or machine. A float64 matrix product
of integers is exact, in any summation order, as long as no partial sum reaches :math:`2^{53}`;
larger values are split into two 16-bit halves first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clfed.errors import InvalidEmbedding

SCALE = 65536.0
RESOLUTION = 1.0 / SCALE
RANGE = 32768.0

_EXACT = 2.0**53
_SPLIT_ROWS = 2**20  # halves are below 2^16, so 2^20 products stay below 2^52
_DIRECT_ROWS = 64  # chunks shorter than this lose more than the three products of a split
_BLOCK_ENTRIES = 2**22
_CACHED_ENTRIES = 2**16  # float64 numbers that stay in a processor's cache
_EXACT_ROWS = 2**22 - 1
_SECOND_MOMENT_LIMIT = 2.0**62
_SMALLER = "Scale the embeddings down, for instance to unit length, before they are summed."


def quantise(embeddings: Tensor, dim: int) -> tuple[Tensor, float]:
    r"""Round embeddings to multiples of ``RESOLUTION``, half to even.

    Args:
        embeddings: :math:`z`, shape ``(B, dim)``, any floating dtype, :math:`|z| \le 2^{15}`.
        dim: The number of columns that is expected.

    Returns:
        :math:`q = round(2^{16} z)`, shape ``(B, dim)``, integers held in float64 on the CPU, and
        :math:`\max |q|` (zero for an empty batch).

    Raises:
        InvalidEmbedding: Wrong shape or dtype, NaN, infinite or out of range.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise InvalidEmbedding(
            f"expected embeddings of shape (B, {dim}), got {tuple(embeddings.shape)}"
        )
    if not embeddings.is_floating_point():
        raise InvalidEmbedding(f"expected floating point embeddings, got {embeddings.dtype}")
    q = embeddings.detach().to(device="cpu", dtype=torch.float64, copy=True).mul_(SCALE).round_()
    if not q.numel():
        return q, 0.0
    low, high = q.aminmax()
    peak = float(torch.maximum(-low, high))
    if not peak <= RANGE * SCALE:  # written so that NaN fails too
        raise InvalidEmbedding(
            f"expected finite embeddings within ±{RANGE:g}, got a largest magnitude of "
            f"{peak * RESOLUTION:g}",
            remedy=InvalidEmbedding.remedy if math.isnan(peak) else _SMALLER,
        )
    return q, peak


def checked_sum(a: Tensor, b: Tensor, *, subtract: bool = False) -> Tensor:
    """``a + b`` or ``a - b`` of int64 tensors of one shape, refusing to wrap around.

    Raises:
        InvalidEmbedding: An entry of the result does not fit into int64.
    """
    result = a - b if subtract else a + b
    # The sign of the result betrays a wrap: two operands of one sign gave the other sign.
    wrapped = ((a ^ b) & (a ^ result)) if subtract else ((a ^ result) & (b ^ result))
    if wrapped.numel() and int(wrapped.amin()) < 0:
        raise InvalidEmbedding(
            "expected statistics that fit into 64 bits, got a larger sum", remedy=_SMALLER
        )
    return result


def sum_by_class(q: Tensor, index: Tensor, classes: int) -> Tensor:
    r"""Exact :math:`\sum_i [y_i = c]\, q_i`.

    Args:
        q: Quantised embeddings, shape ``(B, D)``.
        index: :math:`y`, shape ``(B,)`` int64.
        classes: Number of classes :math:`C`.

    Returns:
        Shape ``(C, D)`` int64.
    """
    total = torch.zeros(classes, q.shape[1], dtype=torch.int64)
    # Numbers of at most 2^31, fewer than 2^22 of them: float64 adds them without rounding.
    for part, names in zip(
        torch.split(q, _EXACT_ROWS), torch.split(index, _EXACT_ROWS), strict=True
    ):
        sums = torch.zeros(classes, q.shape[1], dtype=torch.float64)
        total += sums.index_add_(0, names, part).long()
    return total


def quantised_sum_by_class(embeddings: Tensor, dim: int, index: Tensor, classes: int) -> Tensor:
    """Quantise and sum in blocks that fit into a cache, so that no quantised copy is held.

    Args:
        embeddings: What :func:`quantise` takes, shape ``(B, dim)``.
        dim: The number of columns that is expected.
        index: Class of each row, shape ``(B,)`` int64.
        classes: Number of classes :math:`C`.

    Returns:
        Shape ``(C, dim)`` int64.

    Raises:
        InvalidEmbedding: As :func:`quantise`.
    """
    quantise(embeddings[:0], dim)
    total = torch.zeros(classes, dim, dtype=torch.int64)
    rows = max(1, _CACHED_ENTRIES // dim)
    for begin in range(0, len(embeddings), _EXACT_ROWS):
        sums = torch.zeros(classes, dim, dtype=torch.float64)
        for start in range(begin, min(begin + _EXACT_ROWS, len(embeddings)), rows):
            end = min(start + rows, begin + _EXACT_ROWS)
            sums.index_add_(0, index[start:end], quantise(embeddings[start:end], dim)[0])
        total += sums.long()
    return total


def outer_total(q: Tensor, peak: float) -> Tensor:
    r"""Exact :math:`\sum_i q_i q_i^T`.

    Args:
        q: Integers in float64, shape ``(B, D)``, magnitudes at most ``peak`` :math:`\le 2^{31}`.
        peak: As returned by :func:`quantise`.

    Returns:
        Shape ``(D, D)`` int64. Cost: one float64 product, three for large values.

    Raises:
        InvalidEmbedding: The sums would not fit into int64.
    """
    _refuse_overflow((q * q).sum(0))
    rows = int((_EXACT - 1) // max(peak * peak, 1.0))
    if rows < min(_DIRECT_ROWS, len(q)):
        rows = _SPLIT_ROWS
    total = torch.zeros(q.shape[1], q.shape[1], dtype=torch.int64)
    for start in range(0, len(q), rows):
        total += _product(q[start : start + rows], peak)
    return total


def outer_by_class(q: Tensor, labels: Tensor, num_classes: int, peak: float) -> Tensor:
    r"""Exact :math:`\sum_{i: y_i = c} q_i q_i^T` for every class.

    The samples are sorted by class and cut into pieces of the mean class size, so that all pieces
    form one zero-padded batch of matrix products: at most ``2 B`` rows and ``B / P + C`` pieces,
    however uneven the classes are. The batch is worked off in blocks of bounded memory.

    Args:
        q: Integers in float64, shape ``(B, D)``, magnitudes at most ``peak``.
        labels: Shape ``(B,)`` int64 in ``[0, num_classes)``.
        num_classes: :math:`C`.
        peak: As returned by :func:`quantise`.

    Returns:
        Shape ``(C, D, D)`` int64.

    Raises:
        InvalidEmbedding: The sums would not fit into int64.
    """
    batch, dim = q.shape
    outer = torch.zeros(num_classes, dim, dim, dtype=torch.int64)
    if not batch:
        return outer
    squares = q.new_zeros(num_classes, dim).index_add_(0, labels, q * q)
    _refuse_overflow(squares)
    length = min(-(-batch // num_classes), _SPLIT_ROWS)
    ordered, order = labels.sort(stable=True)
    counts = torch.bincount(labels, minlength=num_classes)
    rank = torch.arange(batch) - (counts.cumsum(0) - counts)[ordered]
    pieces = (counts + length - 1) // length
    first = pieces.cumsum(0) - pieces
    slots = (first[ordered] + rank // length) * length + rank % length
    padded = q.new_zeros(int(pieces.sum()) * length, dim)
    padded[slots] = q[order]
    owner = torch.repeat_interleave(torch.arange(num_classes), pieces)
    block = max(1, _BLOCK_ENTRIES // (dim * max(dim, length)))
    batches = padded.view(-1, length, dim)
    for start in range(0, len(owner), block):
        part = slice(start, start + block)
        outer.index_add_(0, owner[part], _product(batches[part], peak))
    return outer


def _refuse_overflow(squares: Tensor) -> None:
    # |Σ q_i q_j| ≤ sqrt(Σ q_i² Σ q_j²): the largest diagonal entry bounds the whole matrix.
    bound = float(squares.amax()) if squares.numel() else 0.0
    if bound >= _SECOND_MOMENT_LIMIT:
        raise InvalidEmbedding(
            f"expected second moments below {_SECOND_MOMENT_LIMIT * RESOLUTION**2:g}, "
            f"got {bound * RESOLUTION**2:g}",
            remedy=_SMALLER,
        )


def _product(q: Tensor, peak: float) -> Tensor:
    """Exact ``q.mT @ q`` for ``(..., R, D)`` integers in float64, as int64."""
    if q.shape[-2] * peak * peak < _EXACT:
        return (q.mT @ q).long()
    high = (q / SCALE).floor_()
    low = q - high * SCALE
    cross = (high.mT @ low).long()
    square = ((high.mT @ high).long() << 16) + cross + cross.mT
    return (square << 16) + (low.mT @ low).long()
