"""The server's side of secure aggregation: it carries sealed shares and learns one sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares

from clfed.errors import FederationError, InvalidMessage
from clfed.privacy.masking import KEY, digest, public_key
from clfed.privacy.roster import Roster, check_advertisement
from clfed.privacy.secure_aggregation import SEALED, SHARE
from clfed.privacy.terms import Terms, Words, from_words
from clfed.prototypes import PrototypeMemory

T = TypeVar("T")


class Aggregator:
    """The server in one round of :mod:`clfed.privacy.secure_aggregation`.

    Each step takes the replies that came, by name, and returns what is sent next. A reply that
    breaks a rule counts as one that did not come.

    Args:
        terms: Of the round.

    Attributes:
        terms: As given.
        refused: Reason by name, for replies that broke a rule.
        contributors: Whose tables are in the sum, sorted; empty before the third step.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.refused: dict[str, str] = {}
        self.contributors: tuple[str, ...] = ()
        self._roster: Roster | None = None
        self._active: tuple[str, ...] = ()
        self._total: Words = np.zeros(terms.words, np.uint64)

    def take_keys(self, replies: Mapping[str, bytes]) -> dict[str, bytes]:
        """Step 1: return the keys of all, to be sent to each of them.

        Args:
            replies: What :meth:`Client.advertise` returned.

        Raises:
            FederationError: Too few nodes, or more than the terms allow.
            InvalidMessage: The step was taken before.
        """
        self._expect(self._roster is None)
        good = self._sound(replies, replies, check_advertisement)
        for start in (0, KEY, 2 * KEY):
            parts = [keys[start : start + KEY] for keys in good.values()]
            for name, keys in [*good.items()]:
                if parts.count(keys[start : start + KEY]) > 1:
                    self.refused[name] = "Expected keys of its own, got those of another node."
                    del good[name]
        self._enough(good, "keys")
        if len(good) > self.terms.members:
            raise FederationError(
                f"Expected at most {self.terms.members} nodes in the sum, got {len(good)}.",
                remedy="Ask fewer nodes, or make the terms for more of them.",
            )
        self._roster = Roster(good, self.terms)
        return self._roster.keys

    def take_shares(
        self, replies: Mapping[str, Mapping[str, bytes]]
    ) -> dict[str, dict[str, bytes]]:
        """Step 2: return, for each contributor that is left, the shares sealed for it.

        Args:
            replies: What :meth:`Client.share` returned.

        Raises:
            FederationError: Too few nodes.
            InvalidMessage: Not the step.
        """
        self._expect(self._roster is not None and not self._active)
        members = self._members()

        def check(name: str, sealed: Mapping[str, bytes]) -> None:
            _check_parts(sealed, set(members) - {name}, SEALED)

        good = self._sound(replies, members, check)
        self._enough(good, "shares")
        self._active = tuple(good)
        return {name: {peer: good[peer][name] for peer in good if peer != name} for name in good}

    def take_masked(self, replies: Mapping[str, Words]) -> dict[str, bool]:
        """Step 3: add the tables that came; return whose they are, to be sent to each of these.

        Args:
            replies: What :meth:`Client.mask` returned, shape ``(terms.words,)`` uint64.

        Raises:
            FederationError: Too few nodes.
            InvalidMessage: Not the step.
        """
        self._expect(bool(self._active) and not self.contributors)
        good = self._sound(replies, self._active, self._check_table)
        self._enough(good, "masked tables")
        self.contributors = tuple(good)
        for table in good.values():
            self._total += table
        return {name: name in good for name in self._active}

    def take_unmasked(self, replies: Mapping[str, Mapping[str, bytes]]) -> PrototypeMemory:
        """Step 4: return the sum of what the contributors put in, exactly.

        Args:
            replies: What :meth:`Client.unmask` returned.

        Raises:
            FederationError: Too few nodes, or one of them sent false shares.
            InvalidMessage: Not the step, or no honest contributors can have this sum.
        """
        self._expect(bool(self.contributors))

        def check(name: str, shares: Mapping[str, bytes]) -> None:
            _check_parts(shares, set(self._active), SHARE)

        good = self._sound(replies, self.contributors, check)
        self._enough(good, "answers for unmasking")
        roster = Roster(self._members(), self.terms)
        total = self._total.copy()
        answers = [*good.values()][: self.terms.threshold]
        for name in self._active:
            secret = _combine(name, [shares[name] for shares in answers])
            if name in self.contributors:
                _same(name, digest(secret), roster.seed_digest(name))
                total -= roster.self_mask(secret)
            else:
                _same(name, public_key(secret), roster.mask_key(name))
                # What the lost one would have put in, to cancel what its peers did.
                for peer in self.contributors:
                    roster.add_pair_mask(total, secret, name, peer)
        return from_words(total, self.terms, len(self.contributors))

    def _members(self) -> dict[str, bytes]:
        return {} if self._roster is None else self._roster.keys

    def _check_table(self, name: str, table: Words) -> None:
        if not isinstance(table, np.ndarray) or (table.dtype, table.shape) != (
            np.dtype(np.uint64),
            (self.terms.words,),
        ):
            raise InvalidMessage(f"Expected a table of {self.terms.words:,} 64-bit words.")

    def _sound(
        self, replies: Mapping[str, T], expected: Iterable[str], check: Callable[[str, T], None]
    ) -> dict[str, T]:
        """The replies that pass a check, sorted by name; the others are noted as refused."""
        good = {}
        known = set(expected)
        for name in sorted(replies):
            try:
                if name not in known:
                    raise InvalidMessage("Expected nobody who was lost before, or a stranger.")
                check(name, replies[name])
                good[name] = replies[name]
            except InvalidMessage as error:
                self.refused[name] = str(error)
        return good

    def _enough(self, good: Mapping[str, object], what: str) -> None:
        if len(good) < self.terms.threshold:
            refused = f" Refused: {'; '.join(self.refused.values())}" if self.refused else ""
            raise FederationError(
                f"Expected {what} of at least {self.terms.threshold} nodes, got {len(good)}."
                + refused,
                remedy="Nothing was added. Start a new round when more nodes are there.",
            )

    def _expect(self, right: bool) -> None:
        if not right:
            raise InvalidMessage("Expected the steps of a secure sum in order, each once.")


def _check_parts(parts: Mapping[str, bytes], names: set[str], size: int) -> None:
    if set(parts) != names or any(
        type(part) is not bytes or len(part) != size for part in parts.values()
    ):
        raise InvalidMessage(f"Expected {size} bytes for each of {len(names)} contributors.")


def _combine(name: str, shares: list[bytes]) -> bytes:
    try:
        return combine_shares(shares)
    except ValueError as error:  # doubled numbers, or padding that is none
        raise _false_shares(name) from error


def _same(name: str, got: bytes, promised: bytes) -> None:
    if got != promised:
        raise _false_shares(name)


def _false_shares(name: str) -> FederationError:
    return FederationError(
        f"Expected shares that give back the secret of {name!r}, got others: it dealt out false "
        "shares, or a node that answered has changed one.",
        remedy="Nothing was added. Start a new round, and leave out nodes until one succeeds.",
    )
