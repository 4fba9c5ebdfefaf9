"""The weakest defence against differencing: a class's row waits until enough of it has changed."""

from __future__ import annotations

from clfed.errors import InvalidMessage
from clfed.prototypes import PrototypeMemory


def held_back(sent: PrototypeMemory, now: PrototypeMemory, least: int) -> PrototypeMemory:
    """What a receiver knows if a row waits until its count has changed by a minimum.

    A difference of two releases then mixes at least ``least`` examples. It does not bound what
    these reveal: whoever knows all but one of them subtracts them. Examples that are to be
    forgotten stay with the receiver until enough have gone.

    Args:
        sent: What the receiver had.
        now: What the sender holds, without shared second moments.
        least: Smallest change of a count that is released, at least 1.

    Raises:
        InvalidMessage: The minimum is below 1.
        EmbeddingMismatch: The two are of different embeddings.
        UnsupportedStatistics: Shared second moments cannot be divided among classes.

    Example:
        >>> import torch
        >>> zero = PrototypeMemory.empty(1, "demo")
        >>> two = zero.observe(torch.tensor([[1.0], [2.0]]), ["owl", "owl"])
        >>> held_back(zero, two, 3) == zero, held_back(zero, two, 2) == two
        (True, True)
    """
    if least < 1:
        raise InvalidMessage(
            f"Expected a minimum count of at least 1, got {least}.",
            remedy="1 sends every change; 5 hides single examples among others.",
        )
    change = now - sent
    ripe = [
        name
        for name, count in zip(change.classes, change.counts.tolist(), strict=True)
        if abs(count) >= least
    ]
    return sent + change.select(ripe)
