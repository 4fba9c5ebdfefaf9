"""Who contributed what: a replicated table that any order of messages leaves in one state.

For each contributor and class the ledger keeps the row of the highest version. Rows are the
contributor's own cumulative evidence, so a message may come late, twice or out of order; the
merged memory is the sum of all rows and is kept up to date by exact differences.

What commutes: receiving with receiving, and receiving with forgetting a contributor or a class
that has been seen before, to the byte. What does not: forgetting a name that has not been seen
yet, or that complete messages have made void (a no-op), forgetting samples (exact only against the
row that holds them), and a contributor that breaks the rules by giving two contents one version
(the first one stays).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from clfed.errors import EmbeddingMismatch, InvalidMessage, UnsupportedStatistics
from clfed.files import read_file, write_file
from clfed.prototypes.contribution import (
    DEFAULT_CAP,
    Contribution,
    Receipt,
    check_evidence,
)
from clfed.prototypes.groups import Groups, groups_of
from clfed.prototypes.memory import Moments, PrototypeMemory
from clfed.prototypes.shares import (
    Share,
    outer_change,
    pack_shares,
    part,
    plain,
    sum_of,
    unpack_shares,
)

__all__ = ["Contribution", "ContributorLedger", "Receipt"]


class ContributorLedger:
    """Evidence by contributor and class, with versions and tombstones.

    With ``moments="shared"`` the second moments belong to a contributor as a whole and carry a
    version of their own: the newest wins, whichever rows came with it. Until all messages have
    arrived they may be newer than some rows, and covariances read off the total are off by that
    much; the end state is exact. A class cannot be forgotten by such a ledger.

    Args:
        dim: Embedding size.
        embedding_id: Identity of the embedding; contributions of others are refused.
        moments: Second moments that each contribution must bring.
        cap: Largest number of examples of one class that one contributor may claim.
    """

    def __init__(
        self, dim: int, embedding_id: str, moments: Moments = "none", *, cap: int = DEFAULT_CAP
    ) -> None:
        self._zero = PrototypeMemory.empty(dim, embedding_id, moments)
        self._total = self._zero
        self._shares: dict[str, Share] = {}
        self._retired: frozenset[str] = frozenset()
        self.cap = cap

    @property
    def dim(self) -> int:
        """Embedding size."""
        return self._zero.dim

    @property
    def embedding_id(self) -> str:
        """Identity of the embedding."""
        return self._zero.embedding_id

    @property
    def moments(self) -> Moments:
        """Second moments that are kept."""
        return self._zero.moments

    @property
    def total(self) -> PrototypeMemory:
        """The merged memory: the sum of all rows."""
        return self._total

    @property
    def contributors(self) -> tuple[str, ...]:
        """Names that hold evidence, sorted."""
        return tuple(name for name, share in sorted(self._shares.items()) if share.evidence)

    @property
    def forgotten_contributors(self) -> tuple[str, ...]:
        """Names that are refused until readmitted, sorted."""
        return tuple(name for name, share in sorted(self._shares.items()) if share.forgotten)

    @property
    def retired_classes(self) -> tuple[str, ...]:
        """Classes that are refused until readmitted, sorted."""
        return tuple(sorted(self._retired))

    def version_of(self, contributor: str) -> int:
        """Highest version that has arrived from a contributor; 0 if none has."""
        share = self._shares.get(contributor)
        return share.latest if share else 0

    def share(self, contributor: str) -> PrototypeMemory:
        """What the ledger holds of one contributor; zero for a name it does not know."""
        share = self._shares.get(contributor)
        return share.evidence if share else self._zero

    def groups(self) -> Groups:
        """One group for each class of each contributor, by contributor, then by class.

        The class index refers to ``total.classes``. Rows are cumulative, so a contributor that
        comes back enlarges its groups; it does not add new ones.
        """
        return groups_of(self._total, map(self.share, self.contributors))

    def receive(self, contribution: Contribution) -> Receipt:
        """Take in a contribution, once however often it comes.

        Args:
            contribution: Cumulative rows of one contributor.

        Returns:
            What was applied and what was not.

        Raises:
            EmbeddingMismatch: It describes another embedding.
            UnsupportedStatistics: It brings other second moments than this ledger keeps.
            InvalidMessage: It breaks the format; like all errors, this changes nothing.
            InvalidEmbedding: The total would no longer fit into 64 bits.
        """
        self._check(contribution)
        name, version = contribution.contributor, contribution.version
        classes = contribution.classes
        share = self._shares.get(name) or Share(self._zero)
        seen = replace(share, latest=max(share.latest, version))
        if share.forgotten or version <= share.floor:
            self._shares[name] = seen
            names = tuple(sorted(classes))
            return (
                Receipt(self._zero, refused=names)
                if share.forgotten
                else Receipt(self._zero, stale=names)
            )
        refused = self._retired.intersection(classes)
        message, mark = contribution.memory(), 2 * version
        newer, same = set(classes) - refused, set[str]()
        if version <= share.latest:  # otherwise every row is newer
            same = {c for c in newer if share.marks.get(c, 0) == mark}
            newer = {c for c in newer if share.marks.get(c, 0) < mark}
        void = {
            c for c, at in share.marks.items() if contribution.complete and at < mark
        }.difference(classes)
        rows, held = plain(message), plain(share.evidence)
        delta = part(rows, newer) - part(held, newer | void)
        conflicting = {*(part(rows, same) - part(held, same)).classes} if same else set[str]()
        outer_mark = share.outer_mark
        if self.moments == "shared":
            change = outer_change(message, share.evidence)
            if mark == outer_mark and bool(change.any()):
                conflicting = set(classes) - newer
            if mark <= outer_mark:
                change = torch.zeros_like(change)
            delta = replace(delta, moments="shared", outer=change)
            outer_mark = max(mark, outer_mark)
        if delta:
            total = self._total + delta  # the last step that may fail
            seen = replace(seen, evidence=share.evidence + delta)
            self._total = total
        marks = share.marks | dict.fromkeys(newer, mark) if newer else share.marks
        if contribution.complete:
            # Older messages are void, so nothing has to be remembered of the rows that they wrote.
            marks = {c: at for c, at in marks.items() if c not in void}
            seen = replace(seen, floor=version)
        self._shares[name] = replace(seen, outer_mark=outer_mark, marks=marks)
        return Receipt(
            delta,
            accepted=tuple(sorted(newer | void)),
            stale=tuple(sorted(set(classes) - newer - refused - conflicting)),
            conflicting=tuple(sorted(conflicting)),
            refused=tuple(sorted(refused)),
        )

    def forget_contributor(self, name: str) -> PrototypeMemory:
        """Remove all evidence of a contributor and refuse it until it is readmitted.

        Returns:
            What was removed; zero, with no other effect, for a name never seen.
        """
        share = self._shares.get(name)
        if share is None:
            return self._zero
        self._total = self._total - share.evidence
        self._shares[name] = Share(self._zero, latest=share.latest, forgotten=True)
        return share.evidence

    def readmit_contributor(self, name: str) -> bool:
        """Accept a forgotten contributor again, but none of the versions seen so far.

        Returns:
            Whether it had been forgotten.
        """
        share = self._shares.get(name)
        if share is None or not share.forgotten:
            return False
        self._shares[name] = replace(share, forgotten=False, floor=share.latest)
        return True

    def forget_class(self, name: str) -> PrototypeMemory:
        """Remove a class from every contributor and refuse it until it is readmitted.

        Returns:
            What was removed; zero, with no other effect, for a class never seen.

        Raises:
            UnsupportedStatistics: Shared second moments cannot be divided among classes.
        """
        if self.moments == "shared":
            raise UnsupportedStatistics(
                "expected second moments by class for forgetting a class, got shared ones",
                remedy="Keep memory.moments=class or none, or let each contributor send its rows "
                "and moments without the class.",
            )
        if not any(name in share.marks for share in self._shares.values()):
            return self._zero
        removed = part(self._total, {name})
        # While a class is retired no trace of it is kept by contributor, so that a message that
        # comes before the request and one that comes after it leave the same state.
        for contributor, share in self._shares.items():
            if name in share.marks:
                self._shares[contributor] = replace(
                    share,
                    evidence=share.evidence - part(share.evidence, {name}),
                    marks={c: mark for c, mark in share.marks.items() if c != name},
                )
        self._total = self._total - removed
        self._retired |= {name}
        return removed

    def readmit_class(self, name: str) -> bool:
        """Accept a retired class again, but none of the versions seen so far.

        Returns:
            Whether it had been retired.
        """
        if name not in self._retired:
            return False
        self._retired -= {name}
        for contributor, share in self._shares.items():
            if not share.forgotten:
                marks = share.marks | {name: share.sealed}
                self._shares[contributor] = replace(share, marks=marks)
        return True

    def forget_samples(self, contributor: str, delta: PrototypeMemory) -> PrototypeMemory:
        """Subtract examples that a contributor had sent.

        The contributor itself must leave them out of its next rows, which replace these.

        Args:
            contributor: Who sent them.
            delta: The memory of exactly these examples, as ``observe`` makes it.

        Returns:
            What was removed; zero, with no other effect, for a contributor never seen.

        Raises:
            EmbeddingMismatch: The delta describes another embedding.
            UnsupportedStatistics: The delta keeps other second moments.
            InvalidMessage: More would be removed than is held, or the delta is none of examples.
        """
        share = self._shares.get(contributor)
        if share is None:
            return self._zero
        rest = share.evidence - delta
        for piece in (delta, rest):
            try:
                check_evidence(
                    piece.classes,
                    piece.counts,
                    piece.sums,
                    outer=piece.outer,
                    # Of shared moments the newest matrix wins, so rows that are still on their
                    # way may be in it and rows that it replaced may not.
                    together=False,
                )
            except InvalidMessage as error:
                raise InvalidMessage(
                    f"expected examples that {contributor!r} holds, got others: {error}",
                    remedy="Forget only what this contributor has sent; nothing was changed.",
                ) from error
        self._total = self._total - delta
        self._shares[contributor] = replace(
            share,
            evidence=rest,
            outer_mark=share.sealed if self.moments == "shared" and delta else share.outer_mark,
            marks=share.marks | dict.fromkeys(delta.classes, share.sealed),
        )
        return delta

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ContributorLedger):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def to_bytes(self) -> bytes:
        """Canonical bytes of rows, versions and tombstones: equal states have equal bytes."""
        return pack_shares(self._zero, self._shares, self._retired)

    @classmethod
    def from_bytes(
        cls, data: bytes, source: str = "these bytes", *, cap: int = DEFAULT_CAP
    ) -> ContributorLedger:
        """Read what :meth:`to_bytes` wrote, believing nothing.

        Raises:
            InvalidMessage: Damaged, incomplete, or not in canonical form; names ``source``.
        """
        zero, shares, retired = unpack_shares(data, source)
        ledger = cls.assembled(zero, shares, retired, cap=cap)
        if ledger.to_bytes() != data:
            raise InvalidMessage(f"expected a canonical ledger in {source}, got another encoding")
        return ledger

    @classmethod
    def assembled(
        cls,
        zero: PrototypeMemory,
        shares: Mapping[str, Share],
        retired: Iterable[str] = (),
        *,
        cap: int = DEFAULT_CAP,
    ) -> ContributorLedger:
        """Put a ledger together from parts that were checked when they were read."""
        ledger = cls(zero.dim, zero.embedding_id, zero.moments, cap=cap)
        ledger._shares, ledger._retired = dict(shares), frozenset(retired)
        ledger._total = sum_of(zero, (share.evidence for share in shares.values()))
        return ledger

    @property
    def shares(self) -> Mapping[str, Share]:
        """What is held of each contributor; a share that changes becomes another object."""
        return MappingProxyType(self._shares)

    def sha256(self) -> str:
        """Hexadecimal digest of the canonical bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state, all or none.

        Raises:
            RunFolderError: The file cannot be written.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, cap: int = DEFAULT_CAP) -> ContributorLedger:
        """Read a file that :meth:`save` wrote.

        Raises:
            MissingData: There is no such file.
            InvalidMessage: The file is damaged or something else.
        """
        return cls.from_bytes(read_file(path), str(path), cap=cap)

    def _check(self, contribution: Contribution) -> None:
        contribution.validate(self.cap)
        if contribution.embedding_id != self.embedding_id:
            raise EmbeddingMismatch(
                f"{contribution.contributor!r} sent prototypes of embedding "
                f"{contribution.embedding_id[:12]!r}, but this ledger keeps "
                f"{self.embedding_id[:12]!r}"
            )
        if contribution.sums.shape[1] != self.dim:
            raise EmbeddingMismatch(
                f"{contribution.contributor!r} sent {contribution.sums.shape[1]} columns, "
                f"expected {self.dim}"
            )
        if contribution.moments != self.moments:
            raise UnsupportedStatistics(
                f"{contribution.contributor!r} sent moments={contribution.moments!r}, "
                f"expected {self.moments!r}",
                remedy="Give every node and the server the same memory.moments.",
            )
