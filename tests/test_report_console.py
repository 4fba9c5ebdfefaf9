"""A report on the console: whole columns, as many as fit, and the names of the others."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_federated_report import LEAVES, method
from test_report import results, write

from clfed.reporting.cells import NOTHING
from clfed.reporting.report import tables
from clfed.reporting.report_console import NAME_WIDTH, console_tables, fitting
from clfed.reporting.run_groups import find_runs


def shown(folder, width):
    """What a console of some width shows of the report over a folder."""
    written = io.StringIO()
    for table in console_tables(tables(find_runs([folder])[0]), width):
        Console(file=written, width=width).print(table)
    return written.getvalue()


def test_a_narrow_console_shows_whole_cells_and_names_the_columns_that_are_left(tmp_path):
    for name in ("fedncm", "prototype_averaging"):
        for seed in (0, 1):
            write(tmp_path / name / str(seed), method(name, 0.8, seed=seed))
    narrow = shown(tmp_path, 60)
    assert "…" not in narrow and max(map(len, narrow.splitlines())) <= 60
    assert "80.00 ± 0.00" in narrow and "prototype_averaging" in narrow
    assert LEAVES not in narrow and "what leaves a node" in narrow.split("in the file:")[1]
    wide = shown(tmp_path, 200)
    assert LEAVES in wide and "in the file" not in wide
    assert "epsilon" not in wide  # no run has one


def test_each_protocol_has_a_table_and_warnings_stand_below_it(tmp_path):
    write(tmp_path / "a", results("ncm", seed=0))
    write(tmp_path / "b", results("slda", seed=1))
    write(tmp_path / "c", method())
    text = shown(tmp_path, 120)
    assert "Table 1: continual" in text and "Table 2: federated" in text
    assert text.count("Warning: the rows do not have the same seeds") == 1


def test_names_are_text_and_no_markup(tmp_path):
    write(tmp_path / "a", method("[red]method"))
    assert "[red]method" in shown(tmp_path, 100)


@pytest.mark.parametrize("width", [1, 20])
def test_a_name_and_a_number_are_shown_however_narrow_the_console_is(width):
    rows = [{"method": "x" * 50, "accuracy %": "90.00", "seeds": "0"}]
    assert fitting(rows, width) == (["method", "accuracy %"], ["seeds"])


CELLS = st.dictionaries(
    st.text("abc%", min_size=1, max_size=12), st.text("xyz -", max_size=30), min_size=2
)


@given(st.lists(CELLS, min_size=1, max_size=4), st.integers(40, 200))
def test_what_is_shown_fits_and_nothing_is_lost(rows, width):
    columns, left = fitting(rows, width)
    used = {column for row in rows for column, cell in row.items() if cell != NOTHING}
    assert {*columns, *left} == used and len(columns) + len(left) == len(used)
    widths = [max(len(str(row.get(c, ""))) for row in [*rows, {c: c}]) + 3 for c in columns]
    if len(columns) > 2:
        assert min(widths[0], NAME_WIDTH) + sum(widths[1:]) <= width - 1


def test_columns_keep_their_order():
    rows = [{"a": "1" * 5, "b": "1" * 5, "c": "1" * 90, "d": "1" * 5}, {"e": "2"}]
    assert fitting(rows, 50) == (["a", "b", "d", "e"], ["c"])
