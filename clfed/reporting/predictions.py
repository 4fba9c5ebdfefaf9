"""Answers to pictures: as rows for programs, as a table and sentences for people."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clfed.reporting.tables import console_table

if TYPE_CHECKING:
    from rich.table import Table

    from clfed.federated.bundle import Bundle, Prediction


@dataclass(frozen=True)
class Answer:
    """What became of one picture.

    Attributes:
        path: The file.
        prediction: What is said of it, or None where it cannot be read.
        error: Why it cannot be read.
    """

    path: Path
    prediction: Prediction | None
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The class; None where nothing fits or the picture cannot be read."""
        return self.prediction.label if self.prediction else None

    @property
    def truth(self) -> str:
        """Name of the folder that the picture lies in, as :mod:`clfed.data.folder` reads it."""
        return unicodedata.normalize("NFC", self.path.absolute().parent.name)


def prediction_rows(answers: Sequence[Answer], top: int, *, truth: bool) -> list[dict[str, Any]]:
    """One row a picture, all with the same keys: for JSON and CSV.

    Args:
        answers: Any number.
        top: How many nearest classes each names; from the second on as ``nearest_2``, ``score_2``.
        truth: Whether to add the name of each picture's own folder.

    Returns:
        ``path``, ``class`` (None for unknown), ``nearest``, ``score``, ``error`` (None if the
        picture could be read; all but ``path`` are None if not), and ``truth``.
    """
    rows = []
    for answer in answers:
        ranking = answer.prediction.ranking if answer.prediction else ((None, None),) * top
        row: dict[str, Any] = {"path": _valid(str(answer.path)), "class": answer.label}
        for rank, (name, score) in enumerate(ranking, start=1):
            number = f"_{rank}" if rank > 1 else ""
            row |= {f"nearest{number}": name, f"score{number}": score}
        row["error"] = answer.error and _valid(answer.error)
        if truth:
            row["truth"] = _valid(answer.truth)
        rows.append(row)
    return rows


def prediction_notes(bundle: Bundle, answers: Sequence[Answer], *, truth: bool) -> list[str]:
    """Sentences below the answers: how many are called unknown, and how many are right.

    Args:
        bundle: What gave the answers.
        answers: Those of pictures that cannot be read are not counted.
        truth: Whether the folders of the pictures say what they show.
    """
    said = [answer for answer in answers if answer.prediction]
    notes = ["nothing is called unknown: there is no threshold"]
    if bundle.threshold is not None:
        notes = [f"{_unknown(said)} called unknown: score below {bundle.threshold:.2f}"]
    known = [answer for answer in said if answer.truth in bundle.memory]
    other = [answer for answer in said if answer.truth not in bundle.memory]
    if truth and known:
        right = sum(answer.label == answer.truth for answer in known) / len(known)
        notes.append(f"of known classes: accuracy {right:.1%}, {_unknown(known)} called unknown")
    if truth and other:
        notes.append(f"of other classes: {_unknown(other)} called unknown")
    return notes


def prediction_table(bundle: Bundle, answers: Sequence[Answer], notes: Sequence[str]) -> Table:
    """The answers for people; the nearest classes are shown where they are not the answer.

    Args:
        bundle: What gave the answers.
        answers: One row each.
        notes: Sentences for the foot of the table.
    """
    rows = []
    for answer in answers:
        path = "".join(c if c.isprintable() else "?" for c in str(answer.path))
        if answer.prediction is None:
            rows.append((path, "cannot be read", "-", "-"))
            continue
        others = answer.prediction.ranking[answer.label is not None :]
        nearest = "\n".join(f"{name} {score:.2f}" for name, score in others)
        score = f"{answer.prediction.score:.2f}"
        rows.append((path, answer.label or "unknown", score, nearest or "-"))
    of = f" of {bundle.federation}, round {bundle.round}" if bundle.federation else ""
    known = (
        f"{len(bundle.memory)} classes known{of}; memory {bundle.memory.sha256()[:12]}, "
        f"embedding {bundle.encoder.embedding_id[:12]}"
    )
    title = f"{len(answers)} picture{'s' if len(answers) > 1 else ''}"
    columns = ("picture", "class", "score", "nearest")
    table = console_table(title, columns, rows, "\n".join([*notes, known]))
    for column in table.columns:
        if column.header != "score":  # names may be long, and none may be cut
            column.no_wrap, column.overflow, column.justify = False, "fold", "left"
    return table


def _unknown(answers: Sequence[Answer]) -> str:
    return f"{sum(answer.label is None for answer in answers)} of {len(answers)} pictures"


def _valid(text: str) -> str:
    """Valid Unicode, which names of files need not be."""
    return text.encode(errors="replace").decode()
