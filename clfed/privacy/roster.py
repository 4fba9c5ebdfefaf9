"""The public keys of one round, and what follows from them: seals and masks."""

from __future__ import annotations

from collections.abc import Mapping

from clfed.errors import InvalidMessage
from clfed.privacy.masking import KEY, agree, derive, digest, expand, new_key
from clfed.privacy.terms import Terms, Words
from clfed.prototypes.tables import checked_names

ADVERTISEMENT = 3 * KEY  # public key for masks, public key for seals, digest of the seed


class Roster:
    """Who takes part in a round, with which keys.

    Every seal and mask depends on all of it: two clients that were shown different rosters cannot
    read each other's shares, so a server that deals them out is noticed before a table is sent.

    Args:
        keys: ``ADVERTISEMENT`` bytes of each contributor, by name.
        terms: Of the round.

    Raises:
        InvalidMessage: Too few or too many, a name that cannot be printed, or keys that are of
            another length or doubled. Weak ones are refused where they are used.
    """

    def __init__(self, keys: Mapping[str, bytes], terms: Terms) -> None:
        if not terms.threshold <= len(keys) <= terms.members:
            raise InvalidMessage(
                f"Expected keys of {terms.threshold} to {terms.members} nodes, got {len(keys)}."
            )
        names = sorted(checked_names([*keys], "contributor name"))
        for name in names:
            _check_length(name, keys[name])
        for start in (0, KEY, 2 * KEY):
            if len({keys[name][start : start + KEY] for name in names}) < len(names):
                raise InvalidMessage("Expected keys that no two nodes share, got doubled ones.")
        self.keys = {name: keys[name] for name in names}
        parts = [part for name in names for part in (name.encode(), keys[name])]
        self._digest = digest(terms.digest, *parts)
        self._words = terms.words

    def mask_key(self, name: str) -> bytes:
        """Public key for masks, 32 bytes."""
        return self.keys[name][:KEY]

    def seed_digest(self, name: str) -> bytes:
        """Digest of the seed of a contributor's own mask, 32 bytes."""
        return self.keys[name][2 * KEY :]

    def seal_key(self, private: bytes, peer: str) -> bytes:
        """The key under which two contributors seal their shares for each other.

        Raises:
            InvalidMessage: The peer's public key is weak.
        """
        return agree(private, self.keys[peer][KEY : 2 * KEY], "seal", self._digest)

    def envelope(self, sender: str, recipient: str) -> bytes:
        """What a sealed share is bound to: the round, its sender and its recipient."""
        return digest(self._digest, sender.encode(), recipient.encode())

    def self_mask(self, seed: bytes) -> Words:
        """The mask that only its owner puts in, shape ``(terms.words,)`` uint64."""
        return expand(derive(seed, "self", self._digest), self._words)

    def add_pair_mask(self, table: Words, private: bytes, owner: str, peer: str) -> None:
        r"""Add to a table, in place, the mask that one contributor puts in for another.

        It is :math:`+PRG(s)` for the one whose name comes first and :math:`-PRG(s)` for the other,
        modulo :math:`2^{64}`, so that the two cancel.

        Args:
            table: Shape ``(terms.words,)`` uint64.
            private: The owner's private key for masks.
            owner: Who puts the mask in.
            peer: For whom.

        Raises:
            InvalidMessage: The peer's public key is weak.
        """
        mask = expand(agree(private, self.mask_key(peer), "mask", self._digest), self._words)
        if owner < peer:
            table += mask
        else:
            table -= mask


def check_advertisement(name: str, keys: bytes) -> None:
    """Refuse keys of a wrong length, and weak ones, which give one secret to everybody.

    Raises:
        InvalidMessage: They are such.
    """
    _check_length(name, keys)
    for start in (0, KEY):
        agree(new_key(), keys[start : start + KEY], "check", b"")


def _check_length(name: str, keys: bytes) -> None:
    if type(keys) is not bytes or len(keys) != ADVERTISEMENT:
        raise InvalidMessage(f"Expected {ADVERTISEMENT} bytes of keys of {name!r}, got others.")
