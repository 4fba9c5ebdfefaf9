"""Cells of a report: means over the repetitions of one row, with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "-"


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation, None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def percent(values: Sequence[float], spread: float | None = None) -> str:
    """Fractions as percentages without the sign, which stands in the heading.

    Args:
        values: One a seed; a dash stands for none.
        spread: Of a single value, where it has one of its own.

    Example:
        >>> percent([0.25, 0.75]), percent([0.5]), percent([])
        ('50.00 ± 35.36', '50.00', '-')
    """
    if not values:
        return NOTHING
    told = spread if len(values) == 1 else deviation(values)
    return f"{100 * mean(values):.2f}" + ("" if told is None else f" ± {100 * told:.2f}")


def number(values: Sequence[float], form: str) -> str:
    """Mean of some values in a format; a dash where there are none."""
    return form.format(mean(values)) if values else NOTHING


def join(seeds: Iterable[int]) -> str:
    """Numbers as a list."""
    return ", ".join(map(str, seeds))


def bar(values: Sequence[float], spread: float | None = None) -> dict[str, Any]:
    """Mean and spread of a bar; the spread of a single value is the one that is given."""
    return {"accuracy": mean(values), "spread": deviation(values) if len(values) > 1 else spread}
