"""What one contributor sends, what the ledger answers, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clfed.errors import InvalidMessage
from clfed.prototypes.fixed_point import RANGE, SCALE
from clfed.prototypes.memory import PrototypeMemory
from clfed.prototypes.tables import Moments, check_tables, checked_names

MAX_COUNT = 2**31 - 1
# A million at the largest magnitude from each of 4,000 contributors still fits into 64 bits.
DEFAULT_CAP = 1_000_000
VERSION_LIMIT = 2**53
_LARGEST = int(RANGE * SCALE)
_SLACK = 1 + 1e-9  # float64 rounding of the comparisons below


@dataclass(frozen=True, eq=False)
class Contribution:
    """Rows of one contributor: its own evidence, cumulative, never the merged state.

    Attributes:
        contributor: Who saw the examples.
        version: Grows with every message of this contributor, from 1 to below 2**53.
        embedding_id: Identity of the embedding.
        classes: Names of the rows, any order, each once: the classes that changed.
        counts: All examples that this contributor holds now, shape ``(C,)`` int64; 0 says that it
            no longer holds any.
        sums: Sum of their quantised embeddings, shape ``(C, D)`` int64.
        moments: Which second moments come along.
        outer: For ``"class"`` one matrix a row, ``(C, D, D)`` int64; for ``"shared"`` one matrix
            ``(D, D)`` of *all* examples the contributor holds, whichever rows are sent.
        complete: Whether these are all rows of the contributor: of every other class it holds
            nothing, and all older messages are void. So a contributor that cannot know what the
            ledger has of it, after its own state was lost or restored, needs no other message.
    """

    contributor: str
    version: int
    embedding_id: str
    classes: tuple[str, ...]
    counts: Tensor
    sums: Tensor
    moments: Moments = "none"
    outer: Tensor | None = None
    complete: bool = False

    @classmethod
    def of(
        cls,
        contributor: str,
        version: int,
        memory: PrototypeMemory,
        *,
        gone: Sequence[str] = (),
        complete: bool = False,
    ) -> Contribution:
        """A contribution that carries the rows of a memory.

        Args:
            contributor: Who saw the examples.
            version: Number of this message.
            memory: The rows to send; of shared moments the whole of the contributor's evidence.
            gone: Classes of which the contributor no longer holds an example.
            complete: Whether these are all of the contributor's rows.
        """
        extra = len(gone)
        outer = memory.outer
        if memory.moments == "class" and outer is not None:
            outer = torch.cat([outer, outer.new_zeros(extra, memory.dim, memory.dim)])
        return cls(
            contributor,
            version,
            memory.embedding_id,
            memory.classes + tuple(gone),
            torch.cat([memory.counts, memory.counts.new_zeros(extra)]),
            torch.cat([memory.sums, memory.sums.new_zeros(extra, memory.dim)]),
            memory.moments,
            outer,
            complete,
        )

    @classmethod
    def between(
        cls, contributor: str, version: int, before: PrototypeMemory, now: PrototypeMemory
    ) -> Contribution:
        """The rows that changed from one state of a contributor to the next.

        Args:
            contributor: Who saw the examples.
            version: Number of this message.
            before: What the receiver has.
            now: What it shall have.

        Raises:
            EmbeddingMismatch: The two are of different embeddings.
            UnsupportedStatistics: They keep different second moments.
        """
        changed = (now - before).classes
        held = now.rows([name for name in changed if name in now])
        gone = [name for name in changed if name not in now]
        # Shared second moments are those of all of a contributor's examples, whichever rows travel.
        outer = now.outer if now.moments == "shared" or now.outer is None else now.outer[held]
        rows = replace(
            now,
            classes=tuple(name for name in changed if name in now),
            counts=now.counts[held],
            sums=now.sums[held],
            outer=outer,
        )
        return cls.of(contributor, version, rows, gone=gone)

    def memory(self) -> PrototypeMemory:
        """The rows as a memory: zero rows, which say "no longer held", leave no trace in it.

        Raises:
            InvalidMessage: Names, dtypes or shapes do not fit together.
        """
        return PrototypeMemory.of(
            self.classes,
            self.counts,
            self.sums,
            self.embedding_id,
            moments=self.moments,
            outer=self.outer,
        )

    def validate(self, cap: int = DEFAULT_CAP) -> None:
        """Refuse what no honest contributor can send.

        Args:
            cap: Largest number of examples of one class, at most 2**31 - 1.

        Raises:
            InvalidMessage: Names, version, dtypes, shapes or values do not fit.
        """
        check_contributor(self.contributor)
        check_version(self.version)
        if type(self.complete) is not bool:
            raise InvalidMessage(f"expected complete to be true or false, got {self.complete!r}")
        checked_names(self.classes, "class name")
        check_tables(
            self.classes,
            self.counts,
            self.sums,
            self.embedding_id,
            moments=self.moments,
            outer=self.outer,
        )
        check_evidence(self.classes, self.counts, self.sums, outer=self.outer, cap=cap)


@dataclass(frozen=True)
class Receipt:
    """What a ledger did with a contribution.

    A class that is stale, conflicting or refused has to be sent again with a newer version if the
    contributor still holds evidence that the ledger has not accepted.

    Attributes:
        delta: New minus old evidence that was applied to the total; zero for a replay.
        accepted: Classes whose rows are now the ones of this message, also those that a complete
            message left out.
        stale: Classes for which a row of this or a newer version had arrived before.
        conflicting: Classes that came with other content under a version already seen; ignored.
        refused: Classes that are retired, or all of them if the contributor is forgotten.
    """

    delta: PrototypeMemory
    accepted: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    conflicting: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def check_contributor(name: str) -> None:
    """Refuse a contributor name that is not a printable string of 1 to 128 characters."""
    checked_names([name], "contributor name")


def check_version(version: int) -> None:
    """Refuse a version outside ``[1, 2**53)``."""
    if type(version) is not int or not 1 <= version < VERSION_LIMIT:
        raise InvalidMessage(f"expected an integer version from 1 to 2**53 - 1, got {version!r}")


def check_evidence(
    classes: Sequence[str],
    counts: Tensor,
    sums: Tensor,
    *,
    outer: Tensor | None,
    cap: int = MAX_COUNT,
    together: bool = True,
) -> None:
    r"""Refuse tables that no set of examples can have produced.

    Necessary conditions: :math:`0 \le n_c \le cap`, :math:`|s_c| \le 2^{31} n_c`, and for second
    moments :math:`n_c Q_{ii} \ge s_{ci}^2`, :math:`Q_{ij}^2 \le Q_{ii} Q_{jj}`.

    Args:
        classes: Names, for the message.
        counts: Shape ``(C,)`` int64.
        sums: Shape ``(C, D)`` int64.
        outer: None, ``(C, D, D)`` or ``(D, D)`` int64.
        cap: Largest count.
        together: Whether shared second moments cover all these rows. Those a ledger keeps may be
            of a newer version than some rows, until the missing message comes.

    Raises:
        InvalidMessage: A condition is broken.
    """
    if not 1 <= cap <= MAX_COUNT:
        raise InvalidMessage(f"expected a cap from 1 to {MAX_COUNT}, got {cap}")
    bad = (counts < 0) | (counts > cap)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise InvalidMessage(
            f"expected 0 to {cap} examples of {classes[row]!r}, got {int(counts[row])}"
        )
    limit = (counts * _LARGEST)[:, None]
    outside = ((sums > limit) | (sums < -limit)).any(dim=1)
    if bool(outside.any()):
        row = int(outside.int().argmax())
        raise InvalidMessage(
            f"expected the sum of {int(counts[row])} embeddings of {classes[row]!r} to lie within "
            f"±{RANGE:g} each, got more"
        )
    if outer is not None and outer.numel():
        _check_second_moments(counts.double(), sums.double(), outer.double(), together)


def _check_second_moments(counts: Tensor, sums: Tensor, outer: Tensor, together: bool) -> None:
    diagonal = outer.diagonal(dim1=-2, dim2=-1)
    least = sums**2 / counts.clamp(min=1)[:, None]
    largest = counts[:, None] * float(_LARGEST) ** 2
    if outer.ndim == 2:
        # The matrix covers all examples of the contributor, the rows perhaps only some classes.
        least, fits = least.sum(0) * together, torch.ones((), dtype=torch.bool)
    else:
        fits = (diagonal <= largest * _SLACK).all()
    bound = diagonal[..., :, None] * diagonal[..., None, :]
    sound = (
        fits
        & (diagonal >= 0).all()
        & (diagonal * _SLACK >= least).all()
        & (outer**2 <= bound * _SLACK).all()
    )
    if not bool(sound):
        raise InvalidMessage("expected second moments of real embeddings, got impossible ones")
