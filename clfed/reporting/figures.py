"""Figures of a run as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from clfed.reporting.canvas import canvas, save, style
from clfed.reporting.maps import prototype_map

__all__ = ["accuracy_curves", "bytes_curve", "prototype_map"]

WIDE = (8.0, 4.8)  # inches: 1200 x 720 pixels


def accuracy_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against the number of classes known, one line for each alternative.

    Where the number of classes never grows, the step takes its place. Bands are one spread to
    either side, where the results have spreads.

    Args:
        results: Valid results with at least one step, see :mod:`clfed.reporting.results`.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    steps = results["steps"]
    grows = len({step["classes"] for step in steps}) > 1
    figure, axes = canvas(
        WIDE,
        "How many test images are recognised as classes are added"
        if grows
        else "How many test images are recognised after each step",
        "classes known so far" if grows else "step",
        "accuracy over all classes known",
    )
    names = list(dict.fromkeys(name for step in steps for name in step["accuracy"]))
    ends = []
    for index, name in enumerate(names):
        own = [step for step in steps if name in step["accuracy"]]
        x = np.array([step["classes" if grows else "step"] for step in own], dtype=float)
        y = np.array([step["accuracy"][name] for step in own])
        colour = _line(axes, x, y, index)
        spread = np.array([step.get("spread", {}).get(name, 0.0) for step in own])
        if spread.any():
            low, high = np.clip(y - spread, 0, 1), np.clip(y + spread, 0, 1)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        ends.append((x[-1], y[-1], name, colour))
    if grows:
        known = np.array([step["classes"] for step in steps], dtype=float)
        axes.plot(known, 1 / known.clip(1), color="#777777", lw=1, ls=":", zorder=2)
        ends.append((known[-1], 1 / max(known[-1], 1), "chance", "#777777"))
    if any(any(step.get("spread", {}).values()) for step in steps):
        axes.set_xlabel(f"{axes.get_xlabel()} (shaded: one spread to either side)")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _end_labels(axes, ends)
    save(figure, path)


def bytes_curve(results: Mapping[str, Any], path: Path) -> None:
    """Draw the bytes sent so far, to and from the nodes, against the steps.

    Args:
        results: Valid results with at least one step, see :mod:`clfed.reporting.results`.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    steps = results["steps"]
    x = np.array([step["step"] for step in steps], dtype=float)
    totals = {way: np.cumsum([step["bytes"][way] for step in steps]) for way in ("up", "down")}
    divisor, unit = _unit(max(int(total[-1]) for total in totals.values()))
    figure, axes = canvas(
        WIDE, "What the nodes sent and received", "step", f"{unit} so far, all nodes together"
    )
    ends = []
    labels = {"up": "sent by the nodes", "down": "sent to the nodes"}
    for index, (way, total) in enumerate(totals.items()):
        y = total / divisor
        colour = _line(axes, x, y, index)
        ends.append((x[-1], y[-1], labels[way], colour))
    axes.set_ylim(0, 1.05 * max(end[1] for end in ends) or 1.0)
    _end_labels(axes, ends, unit=unit)
    save(figure, path)


def _line(axes: Any, x: NDArray[Any], y: NDArray[Any], index: int) -> str:
    """Draw one line, so that it can be seen under a later one of the same values; its colour."""
    colour, marker, dash = style(index)
    axes.plot(
        x,
        y,
        color=colour,
        ls=dash,
        lw=2.6 if index == 0 else 1.8,
        marker=marker,
        markersize=(5 if index == 0 else 7) if len(x) <= 40 else 0,
        markerfacecolor=colour if index == 0 else "none",
        markeredgewidth=1.4,
        clip_on=False,
        zorder=3,
    )
    return colour


def _unit(size: int) -> tuple[float, str]:
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= divisor:
            return divisor, unit
    return 1.0, "bytes"


def _end_labels(
    axes: Any, ends: Sequence[tuple[float, float, str, str]], *, unit: str = "%"
) -> None:
    """Write each line's name and last value at its end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [end[1] for end in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    # The push went upwards only; move down what left the axes.
    ceiling = high
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    last = max(end[0] for end in ends)
    axes.set_xlim(min(axes.get_xlim()[0], last - 0.5), max(axes.get_xlim()[1], last + 0.1))
    right = axes.get_xlim()[1]
    for (_, y, name, colour), height in zip(ordered, heights, strict=True):
        value = f"{y:.1%}" if unit == "%" else f"{y:.3g} {unit}"
        axes.annotate(
            f"{name}  {value}",
            (right, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            color=colour,
            annotation_clip=False,
        )
