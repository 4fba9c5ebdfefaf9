"""Pictures of what a federation did, round by round, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from clfed.reporting.canvas import GREY, INK, PALETTE, blank, canvas, dress, save
from clfed.reporting.maps import short_label

WIDE = (8.0, 4.8)  # inches: 1200 x 720 pixels
MOST = 60  # bars; more rounds share bars
NAMED = 6  # nodes with a colour of their own
Rows = Sequence[Mapping[str, Any]]


def federation_charts(rounds: Rows, messages: Rows, folder: Path) -> list[Path]:
    """Draw classes and examples, bytes by node, seconds, and refused messages of all rounds.

    Args:
        rounds: Finished rounds, oldest first, at least one; see
            :func:`clfed.deploy.watching.history`.
        messages: All messages; those of a round that is not finished are left out.
        folder: Exists; takes ``known.png``, ``bytes.png``, ``seconds.png`` and ``refused.png``,
            1200 x 720 pixels each.

    Returns:
        The files.

    Raises:
        RunFolderError: A file cannot be written.
    """
    last = int(rounds[-1]["number"])
    done = [row for row in messages if row["round"] <= last]
    paths = [folder / f"{name}.png" for name in ("known", "bytes", "seconds", "refused")]
    _known(rounds, paths[0])
    volume = sums_by_node(
        ((row["node"], row["round"], (row["up"] + row["down"]) / 1000) for row in done), last
    )
    _bars(volume, last, "What each node sent and received", "kB", paths[1])
    _seconds(rounds, paths[2])
    refused = sums_by_node(((row["node"], row["round"], 1) for row in done if row["refused"]), last)
    _bars(refused, last, "Refused messages of each node", "messages", paths[3])
    return paths


def sums_by_node(
    amounts: Iterable[tuple[str, int, float]], last: int
) -> dict[str, NDArray[np.float64]]:
    """Sum amounts by node and bar, for rounds 1 to ``last`` in at most :data:`MOST` bars.

    Args:
        amounts: Node, round and amount.
        last: Number of the last round.

    Returns:
        ``(bars,)`` for each node, the largest total first; from the seventh on all nodes
        together, as ``others``.

    Example:
        >>> sums_by_node([("a", 1, 2.0), ("b", 2, 5.0), ("a", 1, 1.0)], last=3)
        {'b': array([0., 5., 0.]), 'a': array([3., 0., 0.])}
    """
    width = _width(last)
    sums: dict[str, NDArray[np.float64]] = {}
    for node, number, amount in amounts:
        bars = sums.setdefault(node, np.zeros(-(-last // width)))
        bars[(number - 1) // width] += amount
    ordered = sorted(sums, key=lambda node: (-sums[node].sum(), node))
    kept = {node: sums[node] for node in ordered[:NAMED]}
    if rest := ordered[NAMED:]:
        kept[f"{len(rest)} others"] = np.sum([sums[node] for node in rest], axis=0)
    return kept


def _width(last: int) -> int:
    """Rounds in one bar."""
    return -(-last // MOST)


def _known(rounds: Rows, path: Path) -> None:
    figure = blank(WIDE)
    upper, lower = figure.subplots(2, 1, sharex=True)
    numbers = [row["number"] for row in rounds]
    dots = "o" if len(rounds) <= MOST else ""
    for axes, key, colour in ((upper, "classes", PALETTE[0]), (lower, "examples", PALETTE[1])):
        dress(axes, "", "round" if axes is lower else "", key)
        values = [row[key] for row in rounds]
        axes.step(numbers, values, where="post", color=colour, lw=2.2, marker=dots, clip_on=False)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    upper.set_title("What the merged memory knows", fontsize=13, loc="left", pad=14, color=INK)
    save(figure, path)


def _seconds(rounds: Rows, path: Path) -> None:
    figure, axes = canvas(WIDE, "How long each round took", "round", "seconds")
    dots = "o" if len(rounds) <= MOST else ""
    numbers, seconds = zip(*((row["number"], row["seconds"]) for row in rounds), strict=True)
    axes.plot(numbers, seconds, color=PALETTE[0], lw=1.8, marker=dots)
    axes.set_ylim(bottom=0)
    save(figure, path)


def _bars(
    parts: Mapping[str, NDArray[np.float64]], last: int, title: str, unit: str, path: Path
) -> None:
    width = _width(last)
    of = f"round (each bar: {width} rounds)" if width > 1 else "round"
    figure, axes = canvas(WIDE, title, of, unit)
    middles = np.arange(1, last + 1, width) + (width - 1) / 2
    base = np.zeros(len(middles))
    for index, heights in enumerate(parts.values()):
        colour = PALETTE[index] if index < NAMED else GREY
        axes.bar(middles, heights, 0.8 * width, bottom=base, color=colour, label=str(index))
        base += heights
    if parts:
        texts = figure.legend(loc="outside right upper", frameon=False, fontsize=10).get_texts()
        for text, name in zip(texts, parts, strict=True):
            text.set_parse_math(False)  # a node may be called "$x$"
            text.set_text(short_label(name))
    else:
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xlim(0.4, middles[-1] + 0.6 * width)
    save(figure, path)
