"""What a piece of work takes: seconds, and memory on top of what the process held before."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

_SELF = Path("/proc/self")


class Gauge:
    """Measures what happens inside of a ``with``.

    Linux keeps the largest resident size of a process and lets it start again; elsewhere memory is
    not measured. Work of other threads of the process counts as well.

    Attributes:
        seconds: Wall-clock time; 0 until the block ends.
        peak: Largest resident memory within the block beyond that at its start, bytes; None where
            the system does not tell.

    Example:
        >>> with Gauge() as gauge:
        ...     _ = sum(range(1000))
        >>> gauge.seconds > 0
        True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak: int | None = None

    def __enter__(self) -> Gauge:
        self._before = _restart()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        if self._before is not None:
            self.peak = max(0, _resident("VmHWM") - self._before)


def _restart() -> int | None:
    """Let the largest size start again and return the present one, bytes."""
    try:
        (_SELF / "clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(entry: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == entry:
            return int(value.split()[0]) * 1024
    raise OSError(f"no {entry}")
