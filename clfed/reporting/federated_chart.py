"""Federated methods beside each other: how much is recognised, and for how many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, PercentFormatter

from clfed.reporting.canvas import GREY, GRID, INK, blank, dress, save, style
from clfed.reporting.maps import label_points

WIDE = (10.0, 4.8)  # inches: 1500 x 720 pixels
WHOLE = [1, 2, 5, 10]  # ticks at whole percentages
HIGHEST = 200  # inches of rows; an image of more than 65536 pixels cannot be written


def methods_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the accuracy of methods, and the bytes that they took for it.

    Args:
        rows: ``method``, ``accuracy`` (a fraction), ``spread`` of it or None, ``own`` (a fraction),
            ``bytes`` sent in both directions, and optionally ``group`` (the heading of a pair of
            panels; rows of one group stand together).
        path: PNG file, 1500 pixels wide, as high as its rows need, at least 720.

    Raises:
        RunFolderError: The file cannot be written.
    """
    blocks = [(name, list(block)) for name, block in groupby(rows, lambda r: r.get("group", ""))]
    heights = [max(WIDE[1], 1.6 + 0.32 * len(block)) for _, block in blocks]
    share = min(1.0, HIGHEST / sum(heights))
    figure = blank((WIDE[0], share * sum(heights)))
    grid = figure.subplots(len(blocks), 2, squeeze=False, height_ratios=heights)
    for (name, block), (left, right) in zip(blocks, grid, strict=True):
        dress(
            left,
            name or "How many test images are recognised at the end",
            "accuracy over all classes (stroke: on what is like a node's own)",
            "",
        )
        dress(right, "", "sent to and from all nodes", "accuracy over all classes")
        _accuracies(left, block)
        _costs(right, block)
    for (_, block), (_, axes) in zip(blocks, grid, strict=True):
        points = np.array([(_sent(row), row["accuracy"]) for row in block], dtype=np.float64)
        label_points(axes, points, [row["method"] for row in block])
    save(figure, path)


def _accuracies(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a method, the first row on top, with the mark that stands for it on the right."""
    for place, row in enumerate(rows):
        colour, marker, _ = style(place)
        axes.errorbar(
            *(row["accuracy"], place),
            xerr=row.get("spread") or np.nan,
            **_look(colour, marker),
            markerfacecolor=colour,
        )
        own = {"marker": "|", "markersize": 15, "color": GREY, "zorder": 3}
        axes.plot(row["own"], place, **own, markeredgewidth=2, clip_on=False)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(color=GRID, lw=0.8, axis="both")
    axes.set_xlim(0, _highest(rows, "own"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=WHOLE))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _costs(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Points, the best at the upper left."""
    for place, row in enumerate(rows):
        # Hollow, because methods that send the same may lie on each other.
        axes.errorbar(
            *(_sent(row), row["accuracy"]),
            yerr=row.get("spread") or np.nan,
            **_look(*style(place)[:2]),
            markerfacecolor="none",
        )
    axes.set_xscale("log")
    sent = [_sent(row) for row in rows]
    axes.set_xlim(min(sent) / 4, max(sent) * 4)  # at least one power of ten is between
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, _highest(rows))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=WHOLE))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _look(colour: str, marker: str) -> dict[str, Any]:
    return {
        "color": colour,
        "ecolor": INK,
        "elinewidth": 1.2,
        "capsize": 2.5,
        "marker": marker,
        "markersize": 8,
        "markeredgewidth": 1.8,
        "clip_on": False,
        "zorder": 4,
    }


def _highest(rows: Sequence[Mapping[str, Any]], *further: str) -> float:
    """Where an axis of accuracies ends that begins at 0: at the next tenth above all of them."""
    tops = [row["accuracy"] + (row.get("spread") or 0.0) for row in rows]
    tops += [row[key] for row in rows for key in further]
    tenths: int = math.ceil(10 * max(tops))
    return min(1.0, max(1, tenths) / 10)


def _sent(row: Mapping[str, Any]) -> float:
    """Bytes that can stand on a logarithmic axis."""
    return max(1.0, float(row["bytes"]))
