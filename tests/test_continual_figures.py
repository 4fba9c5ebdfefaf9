"""Figures of streams: what they write into their cells, curves and bars."""

import numpy as np
import pytest
from PIL import Image

from clfed.errors import RunFolderError
from clfed.evaluation import stability
from clfed.reporting import continual
from clfed.reporting.continual import accuracy_matrix, learners_chart, stability_curves


def matrix(size, full=False):
    rng = np.random.default_rng(size)
    return [
        [round(float(v), 3) if full or i <= t else None for i, v in enumerate(row)]
        for t, row in enumerate(rng.random((size, size)))
    ]


def watched(tasks, evaluations=4, unfinished=False):
    """What the continual evaluation of some tasks returns."""
    rng = np.random.default_rng(tasks)
    rows, ends = [[0.1]], []
    for task in range(tasks):
        rows += [rng.random(task + 1).round(3).tolist() for _ in range(evaluations)]
        ends.append(len(rows) - 1)
    ends = ends[:-1] if unfinished else ends
    updates = [10 * row for row in range(len(rows))]
    padded = [row + [float("nan")] * (tasks - len(row)) for row in rows]
    return {
        "accuracy": [row + [None] * (tasks - len(row)) for row in rows],
        "updates": updates,
        "ends": ends,
        **stability.summary(padded, ends, updates),
    }


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was drawn, before it became pixels."""
    figures = []
    save = continual.save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(continual, "save", keep)
    return figures


def size_of(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("size", [1, 2, 5, 20, 21, 60, 130])
def test_matrix_has_numbers_up_to_twenty_experiences(size, drawn, tmp_path):
    values = matrix(size)
    accuracy_matrix({"accuracy_matrix": values}, tmp_path / "m.png")
    assert size_of(tmp_path / "m.png") == (1200, 1050)
    cells = [f"{100 * v:.0f}" for row in values for v in row if v is not None]
    assert texts(drawn[0]) == (cells if size <= 20 else [])
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert labels[0] == "0" and len(labels) <= 20 and len(set(labels)) == len(labels)


def test_matrix_shows_what_lies_above_the_diagonal_where_it_was_measured(drawn, tmp_path):
    accuracy_matrix({"accuracy_matrix": matrix(4, full=True)}, tmp_path / "m.png")
    assert len(texts(drawn[0])) == 16


@pytest.mark.parametrize("tasks, unfinished", [(1, False), (2, True), (5, False), (25, False)])
def test_curves_are_those_of_the_results(tasks, unfinished, drawn, tmp_path):
    found = watched(tasks, unfinished=unfinished)
    stability_curves({"stability": found}, tmp_path / "s.png")
    assert size_of(tmp_path / "s.png") == (1200, 720)
    axes = drawn[0].axes[0]
    curves, switches = axes.lines[:tasks], axes.lines[tasks:]
    for task, line in enumerate(curves):
        pairs = [
            (u, row[task])
            for u, row in zip(found["updates"], found["accuracy"], strict=True)
            if row[task] is not None
        ]
        assert np.array_equal(line.get_xydata(), np.array(pairs, dtype=float))
    # Dotted lines where the next experience begins; nothing follows the last one.
    begins = [found["updates"][end] for end in found["ends"]][: tasks - 1]
    assert [line.get_xdata()[0] for line in switches] == begins
    assert f"WC-ACC {found['wc_acc']:.1%}" in axes.get_xlabel()
    assert ("min-ACC" in axes.get_xlabel()) == (tasks > 1)


def test_a_stream_without_updates_can_be_drawn(drawn, tmp_path):
    found = {"accuracy": [[0.5]], "updates": [0], "ends": [0], "wc_acc": 0.5}
    stability_curves({"stability": found}, tmp_path / "s.png")
    assert size_of(tmp_path / "s.png") == (1200, 720)


def test_chart_has_a_bar_for_each_row_and_marks_what_is_set_apart(drawn, tmp_path):
    rows = [
        {"learner": "slda", "accuracy": 0.94, "spread": 0.01, "group": "Table 1"},
        {"learner": "icarl", "accuracy": 0.5, "spread": None, "marks": ["buffer"], "group": "1"},
        {"learner": "naive", "accuracy": 0.0, "spread": 0.0, "group": "1"},
    ]
    learners_chart(rows, tmp_path / "c.png")
    assert size_of(tmp_path / "c.png") == (1200, 720)
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.94, 0.5, 0.0]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True, False]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["slda", "icarl (buffer)", "naive"]
    assert {"Table 1", "94.0% ± 1.0%", "50.0%", "0.0% ± 0.0%"} <= set(texts(drawn[0]))


def test_chart_grows_with_its_rows_up_to_what_can_be_written(tmp_path):
    row = {"learner": "ncm", "accuracy": 0.5}
    learners_chart([row] * 40, tmp_path / "c.png")
    width, height = size_of(tmp_path / "c.png")
    assert width == 1200 and 2000 < height < 2500


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in "ab":
        accuracy_matrix({"accuracy_matrix": matrix(3)}, tmp_path / f"m{name}.png")
        stability_curves({"stability": watched(3)}, tmp_path / f"s{name}.png")
    for kind in "ms":
        assert (tmp_path / f"{kind}a.png").read_bytes() == (tmp_path / f"{kind}b.png").read_bytes()


def test_a_figure_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match="Expected to write"):
        accuracy_matrix({"accuracy_matrix": [[0.5]]}, tmp_path / "absent" / "m.png")
