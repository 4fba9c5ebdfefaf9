"""A map of the classes: their prototypes on the plane in which they differ most."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from clfed.reporting.canvas import DPI, GRID, INK, canvas, save, style

if TYPE_CHECKING:
    from torch import Tensor

SQUARE = (8.0, 7.0)  # inches: 1200 x 1050 pixels
SEVERAL = "several"  # the group of classes that more than one node has seen
MOST_LABELS = 40
LONGEST_LABEL = 16


def prototype_map(
    prototypes: Tensor | NDArray[Any], labels: Sequence[str], groups: Sequence[str], path: Path
) -> None:
    """Draw the prototypes on the plane in which they differ most.

    The plane is that of the first two principal axes, found exactly; each axis points where its
    largest coefficient is positive, so the same prototypes always give the same map.

    Args:
        prototypes: ``(C, D)``, on the CPU, finite, C at least 1.
        labels: C class names; up to 40, spread over the map, are written beside their points.
        groups: C names of who saw the class: a node, or ``several``.
        path: PNG file, 1200 x 1050 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    points, shares = principal_plane(np.asarray(prototypes, dtype=np.float64))
    figure, axes = canvas(
        SQUARE,
        f"Map of {len(labels)} {'class' if len(labels) == 1 else 'classes'}: the farther apart, "
        "the easier to tell apart",
        f"first principal axis ({shares[0]:.0%} of the variance)",
        f"second principal axis ({shares[1]:.0%})",
    )
    members = np.array(groups)
    for index, group in enumerate(sorted(set(groups), key=lambda name: (name == SEVERAL, name))):
        several = group == SEVERAL
        colour, marker = (INK, "*") if several else style(index)[:2]
        chosen = points[members == group]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=110 if several else 48,
            color=colour,
            marker=marker,
            label=group,
            edgecolors="white",
            linewidths=0.7,
            zorder=3,
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    # Coordinates in an embedding have no unit, so numbers at the axes would say nothing.
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(False)
    axes.axhline(0, color=GRID, lw=0.8, zorder=1)
    axes.axvline(0, color=GRID, lw=0.8, zorder=1)
    figure.legend(
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=10.5,
        handletextpad=0.3,
        title="class seen by",
        title_fontsize=10.5,
    )
    label_points(axes, points, labels)
    save(figure, path)


def principal_plane(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    r"""Project points on the plane of their two largest variances.

    .. math:: X - \bar X = U S V^\top, \qquad P = U_{:2} S_{:2}

    Args:
        points: :math:`X`, shape ``(C, D)``, finite.

    Returns:
        :math:`P`, shape ``(C, 2)``, and the shares of the total variance that the two axes hold.

    Example:
        >>> plane, shares = principal_plane(np.array([[0.0, 0, 1], [0, 4, 1]]))
        >>> np.abs(plane.round(6)).tolist(), shares
        ([[2.0, 0.0], [2.0, 0.0]], (1.0, 0.0))
    """
    centred = points - points.mean(axis=0)
    left, scale, axes = np.linalg.svd(centred, full_matrices=False)
    # An axis is defined up to its sign, and libraries differ in which they return.
    sign = np.where(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)] < 0, -1.0, 1.0)
    plane = np.zeros((len(points), 2))
    kept = min(2, len(scale))
    plane[:, :kept] = (left * scale * sign)[:, :kept]
    share = np.zeros(2)
    share[:kept] = (scale**2 / max(float((scale**2).sum()), 1e-300))[:kept]
    return plane, (float(share[0]), float(share[1]))


def short_label(name: str) -> str:
    """A class name that fits on a map; Unicode's name of a letter becomes the letter.

    Example:
        >>> short_label("GREEK SMALL LETTER OMEGA"), short_label("a_very_long_class_name")
        ('ω', 'a_very_lo…s_name')
    """
    try:
        letter = unicodedata.lookup(name)
    except KeyError:
        letter = ""
    # Lookup ignores case and knows pictures: "dog" is a word here, and "DOG" is not in the font.
    if letter.isalpha() and unicodedata.name(letter, "") == name and _in_font(ord(letter)):
        return letter
    # The middle goes: numbered classes differ at their end.
    return name if len(name) <= LONGEST_LABEL else f"{name[:9]}…{name[10 - LONGEST_LABEL :]}"


@cache
def _font() -> FT2Font:
    return FT2Font(findfont("DejaVu Sans"))


def _in_font(code: int) -> bool:
    return bool(_font().get_char_index(code))


def label_points(axes: Any, points: NDArray[np.float64], labels: Sequence[str]) -> None:
    """Write labels beside points, only where they cover neither another label nor a point.

    Args:
        axes: Where the points are drawn; nothing may change its layout afterwards.
        points: ``(C, 2)``, in the units of the axes.
        labels: C texts; the longer ones are cut.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that pixels are final
    pixels = axes.transData.transform(points)
    frame = axes.get_window_extent()
    margin = 0.055 * DPI  # half a marker
    taken = np.empty((0, 4))
    for index in _spread_out(points):
        for x, y, side in ((6, 4, "left"), (-6, 4, "right"), (6, -11, "left"), (-6, -11, "right")):
            text = axes.annotate(
                short_label(labels[index]),
                points[index],
                xytext=(x, y),
                textcoords="offset points",
                ha=side,
                fontsize=9.5,
                color=INK,
                zorder=4,
                in_layout=False,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
            low_x, low_y, high_x, high_y = box = text.get_window_extent().extents
            covered = (
                (pixels > (low_x - margin, low_y - margin))
                & (pixels < (high_x + margin, high_y + margin))
            ).all(axis=1)
            covered[index] = False
            overlap = ((taken[:, :2] < (high_x, high_y)) & (taken[:, 2:] > (low_x, low_y))).all(1)
            inside = frame.x0 <= low_x and high_x <= frame.x1 and frame.y0 <= low_y
            if inside and high_y <= frame.y1 and not covered.any() and not overlap.any():
                taken = np.vstack((taken, box))
                break
            text.remove()
        if len(taken) == MOST_LABELS:
            return


def _spread_out(points: NDArray[np.float64]) -> list[int]:
    """Positions of up to 120 points, each as far as can be from those chosen before."""
    chosen = [int(np.abs(points).sum(axis=1).argmax())]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < min(3 * MOST_LABELS, len(points)):
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen
