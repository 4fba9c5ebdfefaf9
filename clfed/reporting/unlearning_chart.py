"""Unlearners beside each other: how near to the oracle, and for what share of its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from clfed.reporting.canvas import GREY, GRID, INK, PALETTE, above, blank, dress, save
from clfed.reporting.maps import label_points

WIDE = (8.0, 4.8)  # inches: 1200 x 720 pixels
HIGHEST = 200  # inches of rows; an image of more than 65536 pixels cannot be written


def evidence_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how near methods come to the oracle, and for what share of its time.

    Args:
        rows: ``method``, ``avg_gap`` (a fraction), ``spread`` of it or None, ``ratio`` (seconds
            over those of the oracle; None of the original, which costs nothing), optionally
            ``reference`` (true of oracle and original, which are no methods) and ``group`` (the
            heading of a pair of panels; rows of one group stand together).
        path: PNG file, 1200 pixels wide, as high as its rows need, at least 720.

    Raises:
        RunFolderError: The file cannot be written.
    """
    blocks = [(name, list(block)) for name, block in groupby(rows, lambda r: r.get("group", ""))]
    heights = [max(WIDE[1], 1.6 + 0.3 * len(block)) for _, block in blocks]
    share = min(1.0, HIGHEST / sum(heights))
    figure = blank((WIDE[0], share * sum(heights)))
    grid = figure.subplots(len(blocks), 2, squeeze=False, height_ratios=heights)
    for (name, block), (left, right) in zip(blocks, grid, strict=True):
        dress(left, name or "How near to a model that never saw the data", "average gap", "")
        dress(right, "", "time, as a share of training again", "average gap")
        _gaps(left, block)
        _costs(right, block)
    for (_, block), (_, axes) in zip(blocks, grid, strict=True):
        timed = _timed(block)
        if timed:
            points = np.array([(row["ratio"], row["avg_gap"]) for row in timed])
            label_points(axes, points, [row["method"] for row in timed])
    save(figure, path)


def _gaps(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars, the first row on top; oracle and original are outlines."""
    places = np.arange(len(rows))
    axes.barh(
        places,
        [row["avg_gap"] for row in rows],
        xerr=[row.get("spread") or np.nan for row in rows],
        height=0.66,
        color=["white" if row.get("reference") else PALETTE[0] for row in rows],
        edgecolor=PALETTE[0],
        error_kw={"ecolor": INK, "lw": 1.2, "capsize": 2.5},
        zorder=2,
    )
    axes.set_yticks(places, [row["method"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False)
    axes.grid(color=GRID, lw=0.8, axis="x")
    axes.set_xlim(0, _most(rows))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _costs(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Points, the best at the lower left; a line at a tenth of the oracle's time."""
    for row in _timed(rows):
        look = (INK, "*", 90) if row.get("reference") else (PALETTE[0], "o", 42)
        axes.scatter(
            row["ratio"],
            row["avg_gap"],
            color=look[0],
            marker=look[1],
            s=look[2],
            edgecolors="white",
            linewidths=0.7,
            clip_on=False,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.axvline(0.1, color=GREY, lw=1, ls="--", zorder=1)
    above(axes, 0.1, "a tenth")
    ratios = [row["ratio"] for row in _timed(rows)]
    axes.set_xlim(min([0.05, *ratios]) / 3, max([1.0, *ratios]) * 2)
    axes.set_ylim(0, _most(rows))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _timed(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that can stand on a logarithmic axis of times."""
    return [row for row in rows if row.get("ratio")]


def _most(rows: Sequence[Mapping[str, Any]]) -> float:
    """The end of an axis that holds all gaps with their whiskers; never 0."""
    ends = [float(row["avg_gap"] + (row.get("spread") or 0.0)) for row in rows]
    return 1.1 * max(0.01, *ends)
