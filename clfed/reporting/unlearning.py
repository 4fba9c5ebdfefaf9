"""Figures of unlearning as PNG files: what was forgotten, what was kept, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from clfed.reporting.canvas import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    above,
    canvas,
    panels,
    save,
    style,
)
from clfed.reporting.maps import label_points, principal_plane

if TYPE_CHECKING:
    from torch import Tensor

WIDE = (8.0, 4.8)  # inches: 1200 x 720 pixels
BINS = 10
LEAST = 0.002  # share of the images below which a bin is not seen
POOLS = {"forget": "to forget", "retain": "to keep", "test": "test"}
GROUPS = {
    "retain": "trained on",
    "test": "test",
    "forget": "to forget",
    "test_forget": "test, of what is to forget",
}
REQUESTS = {
    "forget": "forgotten just now",
    "earlier": "forgotten before",
    "retain": "to keep",
    "test": "test",
}


def accuracy_trace(results: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy on what goes, what stays and test images while a model forgets.

    Dashed lines are the levels of the oracle, the model that was trained without the forget set.

    Args:
        results: With ``unlearning.trace``, the first point before and the last one after, and
            ``unlearning.oracle``.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    found = results["unlearning"]
    trace, oracle = found["trace"], found["oracle"]
    mean = {name: oracle[name]["mean"] for name in ("ua", "ra", "ta") if name in oracle}
    # UA is the share of the forget set that is answered wrongly.
    levels = {
        "forget": 1 - mean["ua"] if "ua" in mean else None,
        "retain": mean.get("ra"),
        "test": mean.get("ta"),
    }
    steps = np.array([point["step"] for point in trace], dtype=np.float64)
    if len(trace) < 3 or steps[-1] == steps[0]:
        # A closed form takes no steps between before and after.
        steps = np.arange(len(trace), dtype=np.float64)
    figure, axes = canvas(
        WIDE,
        "What is forgotten and what is kept on the way",
        "steps (dashed: a model that never saw the forget set)",
        "accuracy",
    )
    # Room for the words above the curves.
    axes.set_title(axes.get_title(loc="left"), fontsize=13, loc="left", pad=26, color=INK)
    for index, (name, title) in enumerate(POOLS.items()):
        values = _column(trace, name)
        level = levels[name]
        told = "" if level is None else f", oracle {level:.0%}"
        _curve(axes, steps, values, index, f"{title}\n{values[-1]:.0%}{told}")
        if level is not None:
            axes.axhline(level, color=PALETTE[index], lw=1.2, ls="--", zorder=2)
    _fractions(axes)
    for place, name in ((steps[0], "before"), (steps[-1], "after")):
        axes.axvline(place, color="#999999", lw=0.9, ls=":", zorder=2)
        above(axes, place, name)
    if len(steps) < 3:
        axes.set_xticks([])
        axes.margins(x=0.15)
        axes.set_xlabel("dashed: a model that never saw the forget set")
    _legend(figure, "images, at the end")
    save(figure, path)


def attack_histograms(
    before: Mapping[str, NDArray[Any]],
    after: Mapping[str, NDArray[Any]],
    oracle: Mapping[str, NDArray[Any]],
    path: Path,
) -> None:
    """Draw what an attacker sees: the confidence in the true class, before, after and ideally.

    Who wants to know whether an image was trained on compares its confidence with that of members
    and of non-members; forgotten images should lie where those of the oracle lie.

    Args:
        before: Probabilities of the true classes by group, such as ``retain`` (members), ``test``
            (non-members) and ``forget``; each ``(N,)`` in ``[0, 1]``, and possibly empty.
        after: The same of the model that forgot.
        oracle: The same of a model that was trained without the forget set.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    models = {"before": before, "after": after, "trained without them": oracle}
    figure, row = panels(
        WIDE,
        "What an attacker sees: confidence in the true class",
        [*models],
        "confidence",
        "share of the images (logarithmic)",
    )
    edges = np.linspace(0, 1, BINS + 1)
    for axes, scores in zip(row, models.values(), strict=True):
        for index, (group, values) in enumerate(scores.items()):
            counts = np.histogram(np.asarray(values, dtype=np.float64), bins=edges)[0]
            axes.stairs(
                counts / max(int(counts.sum()), 1),
                edges,
                color=PALETTE[index % len(PALETTE)],
                ls=DASHES[index % len(DASHES)],
                # So that each can be seen under the later ones of the same shares.
                lw=max(3.6 - 0.8 * index, 1.2),
                fill=False,
                label=GROUPS.get(group, group),
                zorder=3,
            )
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        # What tells members apart are the few of low confidence.
        axes.set_yscale("log")
        axes.set_ylim(LEAST, 1.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles, names = row[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=10.5
    )
    save(figure, path)


def embedding_maps(
    before: Tensor | NDArray[Any],
    after: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any],
    forgotten: Tensor | NDArray[Any],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Draw embeddings before and after on one common plane; those to forget stand out.

    The plane is that of the first two principal axes of both together, so that a point which did
    not move stays where it was.

    Args:
        before: ``(N, D)``, on the CPU, finite; a few thousand points are drawn in seconds.
        after: ``(N, D)``, of the same images, finite.
        labels: ``(N,)`` positions in ``classes``.
        forgotten: ``(N,)`` booleans.
        classes: C names.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    both = np.concatenate((np.asarray(before), np.asarray(after))).astype(np.float64)
    plane, shares = principal_plane(both)
    labels, gone = np.asarray(labels), np.asarray(forgotten, dtype=bool)
    figure, row = panels(
        WIDE,
        "Where the images lie before and after",
        ["before", "after"],
        f"first principal axis of both ({shares[0]:.0%} of the variance)",
        f"second principal axis ({shares[1]:.0%})",
    )
    present = np.unique(labels)
    for axes, points in zip(row, np.split(plane, 2), strict=True):
        for index in present:
            colour, marker = style(int(index))[:2]
            for chosen, look in (
                (~gone, {"s": 12, "alpha": 0.55, "linewidths": 0}),
                (gone, {"s": 26, "alpha": 0.8, "edgecolors": INK, "linewidths": 0.7, "zorder": 3}),
            ):
                own = points[(labels == index) & chosen]
                axes.scatter(own[:, 0], own[:, 1], color=colour, marker=marker, **look)
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        axes.grid(False)
    row[0].scatter([], [], s=26, color="white", edgecolors=INK, label="to forget")
    figure.legend(loc="outside lower center", frameon=False, fontsize=10.5)
    for axes, points in zip(row, np.split(plane, 2), strict=True):
        centres = np.stack([points[labels == index].mean(axis=0) for index in present])
        label_points(axes, centres, [classes[index] for index in present])
    save(figure, path)


def sequence_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw what each of several requests leaves of the data that it, and earlier ones, named.

    Args:
        results: With ``unlearning.sequence``, one part a request.
        path: PNG file, 1200 x 720 pixels.

    Raises:
        RunFolderError: The file cannot be written.
    """
    sequence = results["unlearning"]["sequence"]
    figure, axes = canvas(
        WIDE, "What is left after one request after another", "request", "accuracy after it"
    )
    places = np.arange(1, len(sequence) + 1, dtype=np.float64)
    for index, (name, title) in enumerate(REQUESTS.items()):
        values = _column(sequence, name)
        if not np.isnan(values).all():
            last = values[~np.isnan(values)][-1]
            _curve(axes, places, values, index, f"{title}\n{last:.0%}")
    _fractions(axes)
    axes.set_xlim(0.8, len(sequence) + 0.2)
    if len(sequence) <= 8:
        axes.set_xticks(places, [str(part["id"]) for part in sequence])
    _legend(figure, "images, at the end")
    save(figure, path)


def _column(parts: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """Numbers of one name, NaN where there is none."""
    return np.array([part.get(name) for part in parts], dtype=np.float64)


def _curve(
    axes: Any, x: NDArray[np.float64], values: NDArray[np.float64], index: int, label: str
) -> None:
    axes.plot(
        x,
        values,
        color=PALETTE[index],
        marker=MARKERS[index],
        markersize=5,
        markevery=1 if len(x) <= 40 else [0, -1],
        lw=1.8,
        label=label,
        clip_on=False,
        zorder=3,
    )


def _fractions(axes: Any) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend(figure: Any, title: str) -> None:
    figure.legend(
        loc="outside right upper",
        title=title,
        title_fontsize=10,
        fontsize=9.5,
        frameon=False,
        labelspacing=0.8,
    )
