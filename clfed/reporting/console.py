"""The one console of a process, so that bars, tables and messages do not tangle."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """The console that tables, bars and messages share; it writes to standard output."""
    from rich.console import Console

    return Console(highlight=False)
