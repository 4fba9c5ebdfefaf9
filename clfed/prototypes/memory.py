r"""Prototype memory: what is known of each class, as exact sums that form a commutative group.

.. math:: n_c = \sum_i [y_i = c], \qquad s_c = \sum_i [y_i = c]\, q_i,
          \qquad Q = \sum_i q_i q_i^T, \qquad q_i = round(2^{16} z_i)

Everything is an integer, so ``a + b == b + a``, ``(a + b) + c == a + (b + c)`` and
``(a + b) - b == a`` hold bit for bit: the merged state does not depend on who added what when,
and deletion is exact. Classes are named, never numbered.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clfed.errors import (
    InvalidEmbedding,
    InvalidMessage,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.files import read_file, write_file
from clfed.prototypes.algebra import combined, without_zeros
from clfed.prototypes.fixed_point import (
    RESOLUTION,
    outer_by_class,
    outer_total,
    quantise,
    quantised_sum_by_class,
    sum_by_class,
)
from clfed.prototypes.storage import pack, unpack
from clfed.prototypes.tables import Moments, check_tables, checked_names

__all__ = ["RESOLUTION", "Moments", "PrototypeMemory"]

_KIND = "prototype memory"


@dataclass(frozen=True, eq=False, repr=False)
class PrototypeMemory:
    """Counts, sums and, where asked for, second moments of the embeddings of named classes.

    A value: no method changes it, and its tensors must not be changed in place. Equal contents
    have equal bytes, because classes are sorted and rows that are zero throughout are dropped.
    The constructor trusts its arguments; :meth:`of` checks and sorts what comes from elsewhere.

    Attributes:
        classes: Class names, sorted, :math:`C` of them.
        counts: Examples of each class, shape ``(C,)`` int64; negative ones are debts.
        sums: Sum of the quantised embeddings, shape ``(C, D)`` int64, unit ``RESOLUTION``.
        embedding_id: Identity of the embedding; memories of different ones never mix.
        moments: Which second moments are kept.
        outer: Their exact sums, int64, unit ``RESOLUTION**2``: shape ``(D, D)`` over all classes
            for ``"shared"``, ``(C, D, D)`` for ``"class"``, None for ``"none"``.

    Example:
        >>> zero = PrototypeMemory.empty(2, "demo")
        >>> seen = zero.observe(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), ["owl", "owl"])
        >>> (zero + seen).prototypes().tolist(), (seen - seen) == zero
        ([[2.0, 0.0]], True)
    """

    classes: tuple[str, ...]
    counts: Tensor
    sums: Tensor
    embedding_id: str
    moments: Moments = "none"
    outer: Tensor | None = None

    @classmethod
    def empty(cls, dim: int, embedding_id: str, moments: Moments = "none") -> PrototypeMemory:
        """The zero of the group: no class, embeddings of ``dim`` columns."""
        if not isinstance(dim, int) or dim < 1:
            raise InvalidMessage(f"expected an embedding size of at least 1, got {dim!r}")
        return cls.of(
            (),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dim, dtype=torch.int64),
            embedding_id,
            moments=moments,
            outer=_zero_outer(0, dim, moments),
        )

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        counts: Tensor,
        sums: Tensor,
        embedding_id: str,
        *,
        moments: Moments = "none",
        outer: Tensor | None = None,
    ) -> PrototypeMemory:
        """Check foreign tables, in any order of classes, and bring them into canonical form.

        Raises:
            InvalidMessage: Names, dtypes or shapes do not fit, or a name comes twice.
        """
        classes = checked_names(classes, "class name")
        check_tables(classes, counts, sums, embedding_id, moments=moments, outer=outer)
        order = sorted(range(len(classes)), key=classes.__getitem__)
        if order != [*range(len(classes))]:
            rows = torch.tensor(order)
            classes = tuple(map(classes.__getitem__, order))
            counts, sums = counts[rows], sums[rows]
            outer = outer[rows] if moments == "class" and outer is not None else outer
        return without_zeros(cls(classes, counts, sums, embedding_id, moments, outer))

    @property
    def dim(self) -> int:
        """Embedding size :math:`D`."""
        return self.sums.shape[1]

    @property
    def total_count(self) -> int:
        """Examples of all classes together."""
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory; names and file headers are not counted."""
        tensors = (self.counts, self.sums, self.outer)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Row of each class name."""
        return dict(zip(self.classes, range(len(self.classes)), strict=True))

    def observe(self, embeddings: Tensor, labels: Sequence[str]) -> PrototypeMemory:
        """The memory of these examples alone: ``memory + memory.observe(...)`` learns them.

        Args:
            embeddings: Shape ``(B, D)``, floating point, finite, magnitudes at most 2**15.
            labels: ``B`` class names.

        Returns:
            The delta, of the same embedding and moments as this memory.

        Raises:
            InvalidEmbedding: Wrong shape, NaN, infinite, out of range, or not one label each.
            InvalidMessage: A label is not a printable name of 1 to 128 characters.
        """
        quantise(embeddings[:0], self.dim)
        if len(labels) != len(embeddings):
            raise InvalidEmbedding(
                f"expected {len(embeddings)} labels, one an embedding, got {len(labels)}"
            )
        try:
            distinct = sorted(set(labels))
        except TypeError as error:
            raise InvalidMessage(f"expected strings as labels: {error}") from None
        classes = checked_names(labels if isinstance(labels, str) else distinct, "class name")
        position = dict(zip(classes, range(len(classes)), strict=True))
        index = torch.tensor([*map(position.__getitem__, labels)], dtype=torch.int64)
        outer = None
        if self.moments == "none":
            sums = quantised_sum_by_class(embeddings, self.dim, index, len(classes))
        else:
            q, peak = quantise(embeddings, self.dim)
            sums = sum_by_class(q, index, len(classes))
            if self.moments == "shared":
                outer = outer_total(q, peak)
            else:
                outer = outer_by_class(q, index, len(classes), peak)
        return PrototypeMemory(
            classes,
            torch.bincount(index, minlength=len(classes)),
            sums,
            self.embedding_id,
            self.moments,
            outer,
        )

    def __add__(self, other: PrototypeMemory) -> PrototypeMemory:
        return combined(self, other, subtract=False)

    def __sub__(self, other: PrototypeMemory) -> PrototypeMemory:
        return combined(self, other, subtract=True)

    def __neg__(self) -> PrototypeMemory:
        return PrototypeMemory.empty(self.dim, self.embedding_id, self.moments) - self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrototypeMemory):
            return NotImplemented
        return (
            (self.embedding_id, self.moments) == (other.embedding_id, other.moments)
            and self.classes == other.classes
            and torch.equal(self.counts, other.counts)
            and torch.equal(self.sums, other.sums)
            and (
                self.outer is other.outer
                or (
                    self.outer is not None
                    and other.outer is not None
                    and torch.equal(self.outer, other.outer)
                )
            )
        )

    def __hash__(self) -> int:
        return hash((self.embedding_id, self.moments, self.classes, *self.counts.tolist()))

    def __len__(self) -> int:
        return len(self.classes)

    def __bool__(self) -> bool:
        """False for the zero of the group alone."""
        return bool(self.classes) or (self.outer is not None and bool(self.outer.any()))

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def __repr__(self) -> str:
        return (
            f"PrototypeMemory({len(self)} classes, {self.total_count} examples, dim={self.dim}, "
            f"moments={self.moments!r}, embedding={self.embedding_id[:12]!r})"
        )

    def rows(self, names: Sequence[str]) -> Tensor:
        """Row of each name, shape ``(len(names),)`` int64, in the order of ``names``.

        Raises:
            UnknownClass: A name is not in this memory.
        """
        try:
            return torch.tensor([*map(self.index.__getitem__, names)], dtype=torch.int64)
        except (KeyError, TypeError):
            unknown = [name for name in names if name not in self.index]
            raise UnknownClass(
                f"expected names among {len(self)} classes, got {', '.join(map(repr, unknown[:5]))}"
            ) from None

    def select(self, names: Iterable[str]) -> PrototypeMemory:
        """The memory of these classes alone, in canonical order.

        Raises:
            UnknownClass: A name is not in this memory.
            UnsupportedStatistics: Shared second moments cannot be divided among classes.
        """
        chosen = sorted(set(names))
        rows = self.rows(chosen)
        self._refuse_shared("taking out some classes")
        outer = None if self.outer is None else self.outer[rows]
        return PrototypeMemory(
            tuple(chosen),
            self.counts[rows],
            self.sums[rows],
            self.embedding_id,
            self.moments,
            outer,
        )

    def without(self, names: Iterable[str]) -> PrototypeMemory:
        """The memory as if these classes had never been seen.

        Raises:
            UnknownClass: A name is not in this memory.
            UnsupportedStatistics: Shared second moments cannot be divided among classes.
        """
        dropped = set(names)
        self.rows(sorted(dropped))
        return self.select(name for name in self.classes if name not in dropped)

    def with_moments(self, moments: Moments) -> PrototypeMemory:
        """Fewer second moments: ``class`` to ``shared`` or ``none``, ``shared`` to ``none``.

        Raises:
            UnsupportedStatistics: More would be needed than is kept.
        """
        if moments == self.moments:
            return self
        if moments == "none":
            outer = None
        elif moments == "shared" and self.moments == "class" and self.outer is not None:
            if float(self.outer.double().abs().sum(0).amax() if len(self) else 0.0) >= 2.0**62:
                raise InvalidEmbedding("expected pooled second moments that fit into 64 bits")
            outer = self.outer.sum(0)
        else:
            raise UnsupportedStatistics(
                f"expected a memory with moments={moments!r} or more, got {self.moments!r}"
            )
        return without_zeros(
            PrototypeMemory(self.classes, self.counts, self.sums, self.embedding_id, moments, outer)
        )

    def means(self) -> Tensor:
        """Class means, shape ``(C, D)`` float64.

        Raises:
            InvalidMessage: A class has fewer examples than one.
        """
        if len(self) and int(self.counts.amin()) < 1:
            bad = self.classes[int(self.counts.argmin())]
            raise InvalidMessage(
                f"expected at least one example of each class, got {int(self.counts.amin())} "
                f"of {bad!r}",
                remedy="This is a difference of memories; add it to the memory it belongs to.",
            )
        return self.sums.double() / self.counts.double()[:, None] * RESOLUTION

    def prototypes(self) -> Tensor:
        """Class means, shape ``(C, D)`` float32, divided in float64.

        Raises:
            InvalidMessage: A class has fewer examples than one.
        """
        return self.means().float()

    def to_bytes(self) -> bytes:
        """Canonical safetensors bytes: equal memories have equal bytes."""
        tensors = {"counts": self.counts, "sums": self.sums}
        if self.outer is not None:
            tensors["outer"] = self.outer
        header = {
            "classes": self.classes,
            "embedding_id": self.embedding_id,
            "moments": self.moments,
        }
        return pack(tensors, _KIND, header)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "these bytes") -> PrototypeMemory:
        """Read what :meth:`to_bytes` wrote, believing nothing.

        Raises:
            InvalidMessage: Damaged, incomplete, or not in canonical form; names ``source``.
        """
        tensors, header = unpack(data, _KIND, source)
        try:
            memory = cls.of(
                tuple(header["classes"]),
                tensors["counts"],
                tensors["sums"],
                header["embedding_id"],
                moments=header["moments"],
                outer=tensors.get("outer"),
            )
        except (KeyError, TypeError) as error:
            raise InvalidMessage(f"expected a complete {_KIND} in {source}: {error!r}") from error
        except InvalidMessage as error:
            raise InvalidMessage(f"{source}: {error}") from error
        if memory.to_bytes() != data:
            raise InvalidMessage(f"expected a canonical {_KIND} in {source}, got another encoding")
        return memory

    def sha256(self) -> str:
        """Hexadecimal digest of the canonical bytes; computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the canonical bytes, all or none.

        Raises:
            RunFolderError: The file cannot be written.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrototypeMemory:
        """Read a file that :meth:`save` wrote.

        Raises:
            MissingData: There is no such file.
            InvalidMessage: The file is damaged or something else.
        """
        return cls.from_bytes(read_file(path), str(path))

    def _refuse_shared(self, what: str) -> None:
        if self.moments == "shared":
            raise UnsupportedStatistics(
                f"expected second moments by class for {what}, got shared ones",
                remedy="Keep memory.moments=class, or drop them first: with_moments('none').",
            )


def _zero_outer(classes: int, dim: int, moments: Moments) -> Tensor | None:
    if moments == "none":
        return None
    shape = (dim, dim) if moments == "shared" else (classes, dim, dim)
    return torch.zeros(shape, dtype=torch.int64)
