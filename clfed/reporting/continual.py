"""Figures of streams as PNG files: what was kept, what was lost, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from clfed.reporting.canvas import GREY, GRID, INK, PALETTE, canvas, save

WIDE = (8.0, 4.8)  # inches: 1200 x 720 pixels
SQUARE = (8.0, 7.0)  # 1200 x 1050 pixels
MOST_NUMBERS = 20  # experiences of which each cell carries its number
HIGHEST = 200  # inches of rows; an image of more than 65536 pixels cannot be written
BLUES = LinearSegmentedColormap.from_list("clfed", ["#F4F8FB", "#8FC1E0", PALETTE[0], "#00304F"])


def accuracy_matrix(results: Mapping[str, Any], path: Path) -> None:
    """Draw how well each experience is recognised after each one, as a map with numbers.

    Args:
        results: With ``accuracy_matrix``, rows of fractions or None.
        path: PNG file, 1200 x 1050 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    values = np.array(results["accuracy_matrix"], dtype=np.float64)
    count = len(values)
    figure, axes = canvas(
        SQUARE,
        "How many test images of each experience are recognised, as more are learned",
        "test images of experience",
        "after training on experience",
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=BLUES, vmin=0, vmax=1, aspect="auto")
    step = next(step for step in (1, 2, 5, 10, 20, 50, count) if count <= MOST_NUMBERS * step)
    shown = range(0, count, step)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(shown, [str(tick) for tick in shown])
    axes.tick_params(length=0)
    if count <= MOST_NUMBERS:
        # Lines between the cells; in a larger map they would hide them.
        axes.set_xticks(np.arange(1, count) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1.5)
        axes.tick_params(which="minor", length=0)
        _numbers(axes, values, min(13.0, 130 / count))
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.tick_params(labelsize=10, color=GRID, labelcolor=INK)
    bar.outline.set_visible(False)
    save(figure, path)


def stability_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy of every experience while the stream is learned.

    Args:
        results: With ``stability``, what
            :meth:`clfed.evaluation.callback.ContinualEvaluation.result` returns.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    found = results["stability"]
    values = np.array(found["accuracy"], dtype=np.float64)
    updates = np.array(found["updates"], dtype=np.float64)
    switches = updates[np.array(found["ends"], dtype=np.int64)]
    tasks = values.shape[1]
    figure, axes = canvas(
        WIDE,
        "What happens to each experience while later ones are learned",
        _caption(found),
        "accuracy on its test images",
    )
    # Room for the numbers of the phases between title and curves.
    axes.set_title(axes.get_title(loc="left"), fontsize=13, loc="left", pad=26, color=INK)
    colours = colormaps["viridis"](np.linspace(0, 0.85, tasks))
    marker = "o" if len(values) <= 40 else ""
    for task in range(tasks):
        met = ~np.isnan(values[:, task])
        axes.plot(
            updates[met],
            values[met, task],
            color=colours[task],
            lw=1.8,
            marker=marker,
            markersize=4,
            label=f"{task}   {values[-1, task]:.0%}",
            clip_on=False,
            zorder=3,
        )
    for switch in switches[: tasks - 1]:
        axes.axvline(switch, color="#999999", lw=0.9, ls=":", zorder=2)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    first, last = float(updates[0]), float(updates[-1])
    axes.set_xlim(first, max(last, first + 1))
    _phases(axes, np.unique([first, *switches, last]), tasks)
    figure.legend(
        loc="outside right upper",
        title="experience,\nat the end",
        title_fontsize=10,
        fontsize=9.5,
        frameon=False,
        handlelength=1.4,
        ncols=1 if tasks <= 20 else 2,
    )
    save(figure, path)


def learners_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the final accuracy of learners as bars, one block for each group.

    Args:
        rows: ``learner``, ``accuracy`` (a fraction), and optionally ``spread`` (None where there
            is one seed), ``marks`` (words that set a row apart; its bar is hatched) and ``group``
            (the heading of a block; rows of one group stand together).
        path: PNG file, 1200 pixels wide, as high as its rows need, at least 720.

    Raises:
        RunFolderError: The file cannot be written.
    """
    blocks = [(name, list(block)) for name, block in groupby(rows, lambda r: r.get("group", ""))]
    lines = len(rows) + sum(1.6 if name else 0.4 for name, _ in blocks)
    figure, axes = canvas(
        (WIDE[0], max(WIDE[1], 1.3 + min(0.33 * lines, HIGHEST))),
        "How many images are recognised at the end",
        "accuracy over all classes"
        + (" (whiskers: one standard deviation)" if any(r.get("spread") for r in rows) else ""),
        "",
    )
    axes.grid(False)
    axes.grid(color=GRID, lw=0.8, axis="x")
    place, places = 0.0, []
    for name, block in blocks:
        if name:
            axes.text(
                0,
                place + 0.4,
                name,
                transform=axes.get_yaxis_transform(),
                fontsize=10.5,
                color=GREY,
            )
        place += 1.2 if name else 0.0
        for row in block:
            _bar(axes, place, row)
            places.append(place)
            place += 1
        place += 0.4
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.set_ylim(place - 0.8, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="y", length=0)
    save(figure, path)


def _bar(axes: Any, place: float, row: Mapping[str, Any]) -> None:
    value, spread = row["accuracy"], row.get("spread")
    marked = bool(row.get("marks"))
    axes.barh(
        place,
        value,
        height=0.66,
        color="white" if marked else PALETTE[0],
        edgecolor=PALETTE[0],
        hatch="////" if marked else None,
        zorder=2,
    )
    if spread:
        axes.errorbar(value, place, xerr=spread, color=INK, lw=1.3, capsize=3, zorder=4)
    text = f"{value:.1%}" + ("" if spread is None else f" ± {spread:.1%}")
    end = value + (spread or 0.0)
    inside = end > 0.8
    axes.annotate(
        text,
        (value - (spread or 0.0) if inside else end, place),
        xytext=(-6 if inside else 6, 0),
        textcoords="offset points",
        ha="right" if inside else "left",
        va="center",
        fontsize=10,
        color=INK if marked or not inside else "white",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5} if marked and inside else None,
        zorder=5,
    )


def _label(row: Mapping[str, Any]) -> str:
    marks = row.get("marks") or ()
    return f"{row['learner']} ({', '.join(marks)})" if marks else str(row["learner"])


def _numbers(axes: Any, values: NDArray[np.float64], size: float) -> None:
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        axes.text(
            column,
            row,
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=size,
            color="white" if value > 0.55 else INK,
        )


def _caption(found: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {found[key]:.1%}"
        for name, key in (("min-ACC", "min_acc"), ("WC-ACC", "wc_acc"))
        if found.get(key) is not None
    ]
    return "updates (dotted: a new experience begins)" + (
        f"\nat the end: {', '.join(parts)}" if parts else ""
    )


def _phases(axes: Any, borders: NDArray[np.float64], tasks: int) -> None:
    """Write above the curves which experience is being learned."""
    every = 1 if tasks <= 20 else 5
    for number, (begin, end) in enumerate(pairwise(borders)):
        if number % every == 0:
            axes.annotate(
                f"{'learning ' if number == 0 and len(borders) <= 8 else ''}{number}",
                ((begin + end) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=GREY,
            )
