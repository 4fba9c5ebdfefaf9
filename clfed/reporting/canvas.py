"""The look that all figures share, drawn without any global state of Matplotlib.

Colours are those of Okabe and Ito, which people with colour-blindness can tell apart; lines also
differ in their markers and dashes. Every figure has a fixed size, so that two runs can be laid side
by side.
"""

from __future__ import annotations

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
    figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13, loc="left", pad=14, color=INK)
    axes.set_xlabel(x, fontsize=11, color=INK)
    axes.set_ylabel(y, fontsize=11, color=INK)
    axes.tick_params(labelsize=10, color=GRID, labelcolor=INK)
    axes.grid(color=GRID, lw=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        RunFolderError: The file cannot be written.
    """
    buffer = BytesIO()
    # Without the version of Matplotlib in it the file depends on the numbers alone.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
