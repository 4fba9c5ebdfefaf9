"""A report on the console: the columns that fit, whole; all of it is in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from clfed.reporting.cells import NOTHING
from clfed.reporting.report import Table
from clfed.reporting.tables import console_table

if TYPE_CHECKING:
    from rich import table

#: What a name may take of the console's width before it is broken into lines.
NAME_WIDTH = 26
GAP = 3  # characters between columns, and beside the first and the last one


def console_tables(found: Sequence[Table], width: int) -> Iterator[table.Table]:
    """Make a table for the console of each table of a report.

    Args:
        found: From :func:`clfed.reporting.report.tables`.
        width: Characters of a line of the console.
    """
    for number, one in enumerate(found, 1):
        shown, left = fitting(one.rows, width)
        rows = [[str(row.get(column, NOTHING)) for column in shown] for row in one.rows]
        notes = [f"Warning: {warning}" for warning in one.warnings]
        notes += [f"in the file: {', '.join(left)}"] if left else []
        title = f"Table {number}: {one.title}"
        yield console_table(title, shown, rows, "\n".join(notes))


def fitting(rows: Sequence[Mapping[str, object]], width: int) -> tuple[list[str], list[str]]:
    """Divide the columns of a table into those that fit beside each other and the others.

    Args:
        rows: Cells by column.
        width: Characters of a line.

    Returns:
        Headings in their order: the first two and each further one for which there is still room;
        and those that are left. Columns without a single cell are in neither.

    Example:
        >>> fitting([{"method": "ncm", "accuracy %": "90.00", "why": "a" * 60, "seeds": "0"}], 40)
        (['method', 'accuracy %', 'seeds'], ['why'])
    """
    cells: dict[str, list[str]] = {}
    for row in rows:
        for column, cell in row.items():
            cells.setdefault(column, []).append(str(cell))
    shown: list[str] = []
    left: list[str] = []
    room = width - 1
    for column, texts in cells.items():
        if all(text == NOTHING for text in texts):
            continue
        wide = max(map(len, [column, *texts])) + GAP
        wide = wide if shown else min(wide, NAME_WIDTH)
        if len(shown) < 2 or wide <= room:
            shown.append(column)
            room -= wide
        else:
            left.append(column)
    return shown, left
