"""The look that all figures share, drawn without any global state of Matplotlib.

Colours are those of Okabe and Ito, which people with colour-blindness can tell apart; lines also
differ in their markers and dashes. Every figure has a fixed size, so that two runs can be laid side
by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from clfed.reporting.run_folder import write_atomic

DPI = 150
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
DASHES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # two more than colours
INK = "#222222"
GREY = "#777777"
GRID = "#DDDDDD"


def style(index: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of the line or group of a number."""
    return (
        PALETTE[index % len(PALETTE)],
        MARKERS[index % len(MARKERS)],
        DASHES[index % len(DASHES)],
    )


def canvas(size: tuple[float, float], title: str, x: str, y: str) -> tuple[Figure, Any]:
    """An empty figure with one pair of axes.

    Args:
        size: Width and height in inches.
        title: What a newcomer sees here.
        x: What the horizontal axis shows.
        y: What the vertical axis shows.
    """
    figure = blank(size)
    axes = figure.add_subplot()
    dress(axes, title, x, y)
    return figure, axes


def panels(
    size: tuple[float, float], title: str, names: Sequence[str], x: str, y: str
) -> tuple[Figure, Sequence[Any]]:
    """An empty figure with several pairs of axes side by side, which share both scales.

    Args:
        size: Width and height in inches.
        title: What a newcomer sees here.
        names: What each pair is of.
        x: What the horizontal axes show.
        y: What the vertical axes show.
    """
    figure = blank(size)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", color=INK)
    row = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for index, (axes, name) in enumerate(zip(row, names, strict=True)):
        dress(axes, name, x, "" if index else y)
        axes.set_title(name, fontsize=11, loc="left", color=INK)
    return figure, tuple(row)


def blank(size: tuple[float, float]) -> Figure:
    """A figure without axes, of a width and height in inches."""
    figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Any, title: str, x: str, y: str) -> None:
    """Give axes their texts and the look that all share."""
    axes.set_title(title, fontsize=13, loc="left", pad=14, color=INK)
    axes.set_xlabel(x, fontsize=11, color=INK)
    axes.set_ylabel(y, fontsize=11, color=INK)
    axes.tick_params(labelsize=10, color=GRID, labelcolor=INK)
    axes.grid(color=GRID, lw=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def above(axes: Any, place: float, text: str) -> None:
    """Write a word above the axes at a place of the horizontal one."""
    axes.annotate(
        text,
        (place, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=9.5,
        color=GREY,
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        RunFolderError: The file cannot be written.
    """
    buffer = BytesIO()
    # Without the version of Matplotlib in it the file depends on the numbers alone.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
