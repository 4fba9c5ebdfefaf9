"""What all parties of one secure aggregation agree on beforehand, and the table that they fill."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    InvalidMessage,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.prototypes.fixed_point import RANGE, SCALE
from clfed.prototypes.tables import checked_names

# Two contributors read each other off their sum, and a sum of one is that one's table.
LEAST = 3
Words: TypeAlias = NDArray[np.uint64]
_LARGEST = int(RANGE * SCALE)
_MODULUS_HALF = 2**63


def majority(members: int) -> int:
    """Return the smallest threshold of a round of so many members.

    Example:
        >>> [majority(members) for members in (3, 4, 5, 10)]
        [3, 3, 3, 6]
    """
    return max(LEAST, members // 2 + 1)


@dataclass(frozen=True)
class Terms:
    r"""The public settings of one round; whoever holds others cannot take part in it.

    Sums are taken modulo :math:`2^{64}`, which is exact as long as no true sum leaves int64:

    .. math:: K \cdot cap \cdot RANGE \cdot SCALE < 2^{63} \iff K \cdot cap < 2^{32}

    Attributes:
        round_id: Names the round; never used for another one.
        classes: The class names that can be told, sorted; fixed and known to all, so that a
            table does not say which of them its sender has met.
        dim: Embedding size :math:`D`.
        embedding_id: Identity of the embedding.
        members: Most contributors :math:`K` that the round may have.
        threshold: Fewest contributors :math:`t` at each step, and shares that open a secret. More
            than half of the members, or a server could tell one half that a contributor was lost
            and the other half that it was not, and open both of its secrets.
        cap: Largest number of examples of one class that a contributor may add or take back.

    Raises:
        ConfigError: Fewer than three members, a threshold that does not protect, or sums that
            could wrap around.
        InvalidMessage: A name cannot be printed, or the classes are not sorted or come twice.
    """

    round_id: str
    classes: tuple[str, ...]
    dim: int
    embedding_id: str
    members: int
    threshold: int
    cap: int = DEFAULT_CAP

    def __post_init__(self) -> None:
        checked_names([self.round_id], "round name")
        checked_names([self.embedding_id], "embedding name")
        if not self.classes or list(checked_names(self.classes, "class name")) != sorted(
            set(self.classes)
        ):
            raise InvalidMessage("Expected sorted class names, each once, got others or none.")
        numbers = (self.dim, self.members, self.threshold, self.cap)
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ConfigError(
                "Expected embedding size, members, threshold and cap from 1 on, got "
                f"{', '.join(map(repr, numbers))}.",
                remedy="Give whole numbers.",
            )
        if not majority(self.members) <= self.threshold <= self.members:
            raise ConfigError(
                f"Expected at least {LEAST} members and a threshold from {majority(self.members)} "
                f"to {self.members}, got {self.members} and {self.threshold}.",
                remedy="Wait for more nodes, or raise the threshold above half of them.",
            )
        if self.members * self.cap * _LARGEST >= _MODULUS_HALF:
            raise ConfigError(
                f"Expected members times cap below {_MODULUS_HALF // _LARGEST:,}, got "
                f"{self.members * self.cap:,}: the sum might not fit into 64 bits.",
                remedy="Lower the cap to the largest number of images of a class at one node.",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the table: a class a row, its count and then its sums."""
        return len(self.classes), 1 + self.dim

    @property
    def words(self) -> int:
        """Number of 64-bit words in the table."""
        return len(self.classes) * (1 + self.dim)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the terms; every key and seal of the round depends on it."""
        return hashlib.sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal terms have equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Terms:
        """Read what :meth:`to_bytes` wrote, believing nothing.

        Raises:
            InvalidMessage: These are no terms.
            ConfigError: The terms protect nobody, see the class.
        """
        try:
            fields = json.loads(data)
            terms = cls(**{**fields, "classes": tuple(fields["classes"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidMessage(f"Expected the terms of a round, got: {error!r}.") from error
        if terms.to_bytes() != data:
            raise InvalidMessage("Expected the terms of a round, got another encoding of them.")
        return terms


def to_words(delta: PrototypeMemory, terms: Terms) -> Words:
    """Spread statistics over the table that all contributors fill.

    Args:
        delta: What is to be added, class by class; negative where something is taken back.
        terms: Of the round.

    Returns:
        Shape ``(terms.words,)`` uint64: the int64 entries in two's complement, zero rows for
        classes that the contributor does not touch.

    Raises:
        EmbeddingMismatch: The delta is of another embedding.
        UnsupportedStatistics: It has second moments, for whose sums 64 bits are too few.
        UnknownClass: It has a class that is not in the terms.
        InvalidMessage: An entry lies beyond what the cap allows.
    """
    if (delta.embedding_id, delta.dim) != (terms.embedding_id, terms.dim):
        raise EmbeddingMismatch(
            f"Expected statistics of {terms.dim} columns of embedding {terms.embedding_id[:12]!r}, "
            f"got {delta.dim} of {delta.embedding_id[:12]!r}."
        )
    if delta.moments != "none":
        raise UnsupportedStatistics(
            f"Expected counts and sums alone, got moments={delta.moments!r} as well.",
            remedy="Drop them first: memory.with_moments('none').",
        )
    row = dict(zip(terms.classes, range(len(terms.classes)), strict=True))
    unknown = [name for name in delta.classes if name not in row]
    if unknown:
        raise UnknownClass(
            f"Expected classes among the {len(row)} of the terms, got {unknown[0]!r}.",
            remedy="Agree on the new name for all nodes, then send it in the next round.",
        )
    entries = np.concatenate([delta.counts.numpy()[:, None], delta.sums.numpy()], axis=1)
    _check_range(entries, terms.cap, "a contributor")
    table = np.zeros(terms.shape, np.int64)
    table[[row[name] for name in delta.classes]] = entries
    return table.reshape(-1).view(np.uint64)


def from_words(words: Words, terms: Terms, contributors: int) -> PrototypeMemory:
    """Read the sum of so many tables.

    Raises:
        InvalidMessage: No contributors who kept to the cap can have this sum.
    """
    table = words.view(np.int64).reshape(terms.shape)
    _check_range(table, contributors * terms.cap, f"{contributors} contributors together")
    return PrototypeMemory.of(
        terms.classes,
        torch.from_numpy(table[:, 0].copy()),
        torch.from_numpy(table[:, 1:].copy()),
        terms.embedding_id,
    )


def _check_range(entries: NDArray[np.int64], cap: int, whose: str) -> None:
    for part, limit, what in (
        (entries[:, :1], cap, "counts"),
        (entries[:, 1:], cap * _LARGEST, "sums"),
    ):
        if part.size and not -limit <= int(part.min()) <= int(part.max()) <= limit:
            raise InvalidMessage(f"Expected {what} of {whose} within ±{limit:,}, got more.")
