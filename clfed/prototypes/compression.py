r"""Class sums in 16, 8 or 4 bits an entry: smaller messages, at an error with a bound.

Every row is rounded to a grid of its own between its smallest and largest entry. All arithmetic is
on integers, so every machine expands a message to the same bits, and counts are exact:

.. math:: g_k = l + \mathrm{round}\!\left(\frac{k (h - l)}{m}\right), \quad
          l = \min_d s_d,\ h = \max_d s_d,\ m = \min(2^b - 1, h - l),\ k = 0 \dots m

A row whose range is below :math:`2^b` is exact. Both ends lie on the grid, so no entry leaves the
range that was seen, and what the ledger asks of honest sums stays true.

A grid for each row, not for each column: the bytes of a row then depend on that row alone. Rows
may be sent together or apart, replaced by a newer version, and deleted without a trace, whereas the
limits of columns would tell of rows that are gone. It also costs less, 8 bytes a row against 8 a
column.

What holds and what is lost:

* An expanded message is an ordinary memory: adding and subtracting it is exact, in any order. A
  class or a contributor is deleted exactly.
* The merged sum is the sum of rounded rows, so it is not the pooled one: its error is at most the
  sum of those of the rows.
* A single sample is deleted at its node, which holds the exact sums; the server has forgotten it
  once the node has sent that row again.
* Rounded at random, every entry is exact in expectation, but compressing twice gives two contents.
  A ledger refuses other content under a version that it has seen, so keep what was sent, or make
  the generator from node and version.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clfed.errors import ConfigError, InvalidMessage, UnsupportedStatistics
from clfed.prototypes.fixed_point import checked_sum
from clfed.prototypes.memory import PrototypeMemory

BITS = (4, 8, 16)


@dataclass(frozen=True, eq=False)
class Compressed:
    r"""The rows of a memory with rounded sums, as the tables that travel.

    With tables in the narrowest integers, ``w`` bytes for a count and ``e`` for an end (``e = 4``
    up to :math:`2^{15}` in a class's sum), a message of :math:`C` rows has a payload of
    :math:`C (w + 2 e + \lceil D b / 8 \rceil)` bytes beside names and headers; the lossless one has
    :math:`C (w + e D)`.

    Attributes:
        classes: Class names, :math:`C` of them.
        counts: Examples of each class, shape ``(C,)`` int64, exact.
        ends: Smallest and largest entry :math:`l, h` of each row, shape ``(C, 2)`` int64, exact.
        codes: Packed :math:`k`, shape ``(C, ceil(dim * bits / 8))`` uint8: little-endian, the
            lower half of a byte first; an odd row of 4 bits ends in a zero half.
        bits: 4, 8 or 16.
        dim: Embedding size :math:`D`.
        embedding_id: Identity of the embedding.
    """

    classes: tuple[str, ...]
    counts: Tensor
    ends: Tensor
    codes: Tensor
    bits: int
    dim: int
    embedding_id: str


def compress(memory: PrototypeMemory, bits: int, rng: torch.Generator | None = None) -> Compressed:
    """Round the sums of a memory; its counts stay exact.

    Args:
        memory: Without second moments.
        bits: 4, 8 or 16 for each entry.
        rng: Round at random and without bias; to the nearest point of the grid when omitted.

    Raises:
        ConfigError: Another number of bits.
        UnsupportedStatistics: The memory keeps second moments; rounded, they would contradict the
            sums.
        InvalidEmbedding: The range of a row does not fit into 64 bits.

    Example:
        >>> owls = PrototypeMemory.empty(3, "demo").observe(torch.eye(3), ["owl"] * 3)
        >>> owls += owls.observe(torch.tensor([[0.0, 0.5, 2.0]]), ["owl"])
        >>> [round(entry, 3) for entry in expand(compress(owls, 4)).prototypes()[0].tolist()]
        [0.25, 0.383, 0.75]
    """
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"expected messages of 4, 8 or 16 bits an entry, got {bits!r}")
    if memory.moments != "none":
        raise UnsupportedStatistics(
            f"expected a memory without second moments, got moments={memory.moments!r}",
            remedy="Send it as it is, sketch it, or drop them first: memory.with_moments('none').",
        )
    ends, codes = round_rows(memory.sums, bits, rng)
    return Compressed(
        memory.classes, memory.counts, ends, codes, bits, memory.dim, memory.embedding_id
    )


def expand(message: Compressed) -> PrototypeMemory:
    """The memory that a message describes, believing nothing of it.

    Raises:
        InvalidMessage: Names, dtypes, shapes or codes do not fit together.
    """
    sums = restore_rows(message.ends, message.codes, message.bits, message.dim)
    return PrototypeMemory.of(message.classes, message.counts, sums, message.embedding_id)


def round_rows(
    sums: Tensor, bits: int, rng: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Round every row of a table to a grid between its own ends.

    To the nearest point (half to the even one) the error of an entry is at most half of
    :func:`spacing`. At random, :math:`P(g_{k+1}) = (s - g_k) / (g_{k+1} - g_k)` in steps of
    :math:`2^{-53}`: the expectation is the entry itself, the error below one spacing.

    Args:
        sums: Shape ``(C, D)`` int64.
        bits: 4, 8 or 16.
        rng: For rounding at random.

    Returns:
        Ends ``(C, 2)`` int64 and packed codes ``(C, ceil(D * bits / 8))`` uint8.

    Raises:
        InvalidEmbedding: The range of a row does not fit into 64 bits.
    """
    low, high = sums.amin(1, keepdim=True), sums.amax(1, keepdim=True)
    span = checked_sum(high, low, subtract=True)
    steps = span.clamp(max=2**bits - 1)
    share = (sums - low).double() / span.clamp(min=1)
    # In floating point, and between points that are rounded themselves, this may be one too few or
    # too many, but only where the entry all but coincides with a point, which is chosen below.
    code = (share * steps).long().minimum(steps)
    below = _grid(low, span, steps, code)
    gap = _grid(low, span, steps, (code + 1).minimum(steps)) - below
    excess = sums - below
    if rng is None:
        up = (excess > gap - excess) | ((excess == gap - excess) & (code % 2 == 1) & (gap > 0))
    else:
        up = torch.rand(sums.shape, generator=rng, dtype=torch.float64) * gap < excess
    return torch.cat([low, high], 1), _packed(code + up, bits)


def restore_rows(ends: Tensor, codes: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of :func:`round_rows` up to the rounding.

    Args:
        ends: Shape ``(C, 2)`` int64.
        codes: Shape ``(C, ceil(dim * bits / 8))`` uint8.
        bits: 4, 8 or 16.
        dim: Number of columns.

    Returns:
        Shape ``(C, dim)`` int64, every entry between the ends of its row.

    Raises:
        InvalidMessage: A dtype, a shape or a value is not what :func:`round_rows` returns.
    """
    _check_message(ends, codes, bits, dim)
    code = _unpacked(codes, bits)
    span = ends[:, 1:] - ends[:, :1]
    steps = span.clamp(max=2**bits - 1)  # negative where a range wraps around: no code fits it
    if bool((code > steps).any()) or bool(code[:, dim:].any()):
        raise InvalidMessage("expected codes within the grid of their row, got others")
    return _grid(ends[:, :1], span, steps, code[:, :dim])


def spacing(ends: Tensor, bits: int) -> Tensor:
    """The largest gap of each row's grid, in units of the sums.

    Args:
        ends: Shape ``(C, 2)`` int64.
        bits: 4, 8 or 16.

    Returns:
        Shape ``(C,)`` int64: ``ceil(range / (2**bits - 1))``, at least 1 where there is a range.
    """
    steps = 2**bits - 1
    gaps: Tensor = -((ends[:, 0] - ends[:, 1]) // steps)
    return gaps


def _grid(low: Tensor, span: Tensor, steps: Tensor, code: Tensor) -> Tensor:
    """Grid points; the product ``code * span`` is split so that it fits into 64 bits."""
    parts = steps.clamp(min=1)
    return low + code * (span // parts) + (code * (span % parts) + parts // 2) // parts


def _packed(code: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return torch.stack([code & 255, code >> 8], 2).flatten(1).to(torch.uint8)
    if bits == 8:
        return code.to(torch.uint8)
    even = torch.nn.functional.pad(code, (0, code.shape[1] % 2))
    return (even[:, ::2] | even[:, 1::2] << 4).to(torch.uint8)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    code = codes.long()
    if bits == 16:
        return code[:, ::2] | code[:, 1::2] << 8
    if bits == 8:
        return code
    return torch.stack([code & 15, code >> 4], 2).flatten(1)


def _check_message(ends: Tensor, codes: Tensor, bits: int, dim: int) -> None:
    if type(bits) is not int or bits not in BITS or type(dim) is not int or dim < 1:
        raise InvalidMessage(
            f"expected 4, 8 or 16 bits an entry and a positive size, got {bits!r} and {dim!r}"
        )
    if not isinstance(ends, Tensor) or not isinstance(codes, Tensor):
        raise InvalidMessage(
            f"expected tensors of ends and codes, got {type(ends).__name__} and "
            f"{type(codes).__name__}"
        )
    rows = len(ends) if ends.ndim else 0
    if ends.dtype != torch.int64 or tuple(ends.shape) != (rows, 2):
        raise InvalidMessage(
            f"expected ends of shape (C, 2) int64, got {tuple(ends.shape)} {ends.dtype}"
        )
    width = -(-dim * bits // 8)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (rows, width):
        raise InvalidMessage(
            f"expected codes of shape {(rows, width)} uint8, got {tuple(codes.shape)} {codes.dtype}"
        )
    if bool((ends[:, 1] < ends[:, 0]).any()):
        raise InvalidMessage("expected the smaller end of every row first, got others")
