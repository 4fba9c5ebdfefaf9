"""Progress of a run: bars in a terminal, one line at each end of a phase elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from clfed.reporting.console import console as shared_console

if TYPE_CHECKING:
    from rich.console import Console

_LOCK = threading.Lock()
_ACTIVE: list[Track] = []


class Phase:
    """One phase of a run, made by :meth:`Track.phase`; also a context manager.

    Args:
        name: What is being done, such as ``base training``.
        total: Number of steps, or None where nobody knows.
        bars: The live bars, or None where lines are printed.
        console: Where lines go.
    """

    def __init__(self, name: str, total: int | None, bars: Any, console: Console) -> None:
        self.name, self.total, self.step, self.text = name, total, 0, ""
        self._bars, self._console, self._open = bars, console, True
        self._begin = time.perf_counter()
        if bars is None:
            self._say("started" if total is None else f"started, {total} steps")
        else:
            self._task = bars.add_task(name, total=total, text="")

    def update(self, step: int, text: str = "") -> None:
        """Say how far the phase is; the last step ends it.

        Args:
            step: Steps done so far.
            text: What to show beside the bar, such as the loss; the last text stays when empty.
        """
        if not self._open:
            return
        self.step, self.text = step, text or self.text
        if self._bars is not None:
            self._bars.update(self._task, completed=step, text=self.text)
        if self.total is not None and step >= self.total:
            self.close()

    def close(self, *, failed: bool = False) -> None:
        """End the phase; a second call does nothing.

        Args:
            failed: Whether it stopped because of an error.
        """
        if not self._open:
            return
        self._open = False
        if self._bars is not None:
            if not failed:
                end = self.total if self.total is not None else max(self.step, 1)
                self._bars.update(self._task, total=end, completed=end)
            self._bars.stop_task(self._task)
            return
        seconds = time.perf_counter() - self._begin
        of = f" after {self.step} of {self.total} steps" if self.total is not None else ""
        how = f"stopped{of}, {seconds:.1f} s" if failed else f"done in {seconds:.1f} s"
        self._say(f"{how}, {self.text}" if self.text else how)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def _say(self, text: str) -> None:
        self._console.print(f"{self.name}: {text}", markup=False, soft_wrap=True)


class Track:
    """Makes the phases of a run, see :func:`progress`."""

    def __init__(self, bars: Any, console: Console) -> None:
        self._bars, self._console = bars, console
        self._phases: list[Phase] = []

    def phase(self, name: str, total: int | None = None) -> Phase:
        """Begin a phase; it ends with its last step, with ``close()``, or with the progress.

        Args:
            name: What is being done.
            total: Number of steps, or None where nobody knows.
        """
        phase = Phase(name, total, self._bars, self._console)
        self._phases.append(phase)
        return phase

    def _close(self, first: int, *, failed: bool) -> None:
        for phase in self._phases[first:]:
            phase.close(failed=failed)


@contextmanager
def progress(console: Console | None = None) -> Iterator[Track]:
    """Show the phases of a run while the block lasts.

    A block inside another one, in any thread, adds its phases to the outer one's display.

    Args:
        console: Where to show them; the shared console when omitted. Inner blocks use the outer
            one's.

    Example:
        >>> from rich.console import Console
        >>> with progress(Console(quiet=True)) as track:
        ...     bar = track.phase("base training", total=2)
        ...     bar.update(1, "loss 0.7")
    """
    with _LOCK:
        outer = _ACTIVE[0] if _ACTIVE else None
        if outer is None:
            console = console or shared_console()
            bars = _bars(console) if console.is_terminal else None
            track = Track(bars, console)
            _ACTIVE.append(track)
            if bars is not None:
                bars.start()
        else:
            track = outer
    first = len(track._phases)
    failed = True
    try:
        yield track
        failed = False
    finally:
        track._close(first, failed=failed)
        if outer is None:
            with _LOCK:
                _ACTIVE.remove(track)
                if track._bars is not None:
                    track._bars.stop()


def _bars(console: Console) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
        console=console,
    )
