"""What learning cost: bytes on the wire, seconds, images, arithmetic and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    """The cost of some work; adding two accounts gives the cost of both works.

    Args:
        uplink: Bytes sent by nodes.
        downlink: Bytes sent to nodes.
        seconds: Time of computation.
        images: Images embedded.
        macs: Multiplications with addition, or None where nobody counted them; the sum with an
            unknown number is unknown.
        peak_memory: Most bytes that the process held at once; of a sum the larger one.

    Example:
        >>> total = Account(uplink=300, seconds=0.5) + Account(uplink=20, images=4)
        >>> total.uplink, total.seconds, total.images
        (320, 0.5, 4)
    """

    uplink: int = 0
    downlink: int = 0
    seconds: float = 0.0
    images: int = 0
    macs: int | None = 0
    peak_memory: int = 0

    def __post_init__(self) -> None:
        parts = (self.uplink, self.downlink, self.seconds, self.images, self.macs or 0)
        if min(*parts, self.peak_memory) < 0:
            raise ValueError(f"A cost cannot be negative, got {self}.")

    def __add__(self, other: Account) -> Account:
        unknown = self.macs is None or other.macs is None
        return Account(
            uplink=self.uplink + other.uplink,
            downlink=self.downlink + other.downlink,
            seconds=self.seconds + other.seconds,
            images=self.images + other.images,
            macs=None if unknown else (self.macs or 0) + (other.macs or 0),
            peak_memory=max(self.peak_memory, other.peak_memory),
        )


class Accounts:
    """The accounts of all nodes and rounds of a run."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], Account] = {}

    def add(self, node: str, round_: int, account: Account) -> None:
        """Add a cost to what one node did in one round."""
        before = self._entries.get((node, round_), Account())
        self._entries[node, round_] = before + account

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, sorted."""
        return tuple(sorted({node for node, _ in self._entries}))

    @property
    def rounds(self) -> tuple[int, ...]:
        """Numbers of the rounds, ascending."""
        return tuple(sorted({round_ for _, round_ in self._entries}))

    def total(self, *, node: str | None = None, round_: int | None = None) -> Account:
        """The cost of everything, or of one node, one round, or one node in one round.

        Args:
            node: Only this node's.
            round_: Only this round's.
        """
        # Sorted, because the sum of floating point seconds depends on the order.
        chosen = (
            account
            for (owner, number), account in sorted(self._entries.items())
            if node in (None, owner) and round_ in (None, number)
        )
        return sum(chosen, Account())


class Stopwatch:
    """Seconds since it was started, until it was stopped; made by :func:`stopwatch`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far, or of the whole block once that has ended."""
        return (time.perf_counter() if self._end is None else self._end) - self._begin

    def stop(self) -> None:
        """Stop counting; a second call does nothing."""
        self._end = time.perf_counter() if self._end is None else self._end


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measure the wall time of a block.

    Example:
        >>> with stopwatch() as watch:
        ...     pass
        >>> 0 <= watch.seconds < 1
        True
    """
    watch = Stopwatch()
    try:
        yield watch
    finally:
        watch.stop()


def peak_memory() -> int:
    """Most bytes that this process has held at once since it began; 0 where nobody can say.

    It is the whole process's: nodes that share a process cannot be told apart by it.
    """
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
