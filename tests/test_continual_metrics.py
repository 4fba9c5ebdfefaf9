"""Metrics of a stream, against slow loops, goldens and Avalanche's own classes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation import continual
from clfed.evaluation.continual import (
    all_accuracy,
    average_accuracy,
    bwt,
    class_balanced,
    drop,
    end_forgetting,
    forgetting,
    fwt,
    incremental_accuracy,
    intransigence,
    learning_accuracy,
    smith_forgetting,
    summary,
)

NAN = float("nan")
STEADY = [[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.4, 0.6, 0.7]]
RECOVERING = [[0.6, NAN, NAN], [0.7, 0.8, NAN], [0.4, 0.6, 0.7]]

fractions = st.floats(0, 1, allow_nan=False)


@st.composite
def streams(draw, least=2):
    """A full matrix of accuracies, with test images and classes of each experience."""
    size = draw(st.integers(least, 6))
    matrix = draw(st.lists(fractions, min_size=size**2, max_size=size**2))
    counts = st.lists(st.integers(1, 500), min_size=size, max_size=size)
    return np.array(matrix).reshape(size, size), draw(counts), draw(counts)


def masked(matrix):
    """The same matrix, as it is measured where experiences bring new classes."""
    return np.where(np.tri(len(matrix), dtype=bool), matrix, NAN)


def slow(matrix, images, classes):
    """Every definition, retyped as loops over plain numbers."""
    a, T = [list(map(float, row)) for row in matrix], len(matrix)
    last = T - 1
    seen = [sum(images[i] * a[t][i] for i in range(t + 1)) / sum(images[: t + 1]) for t in range(T)]
    best = [max(a[l][i] for l in range(i, last)) for i in range(last)]  # noqa: E741
    smith = 0.0
    for t in range(1, T):
        for i in range(t):
            smith += classes[i] / sum(classes[: t + 1]) * (a[i][i] - a[t][i])
    return {
        "acc/avg": sum(a[last]) / T,
        "acc/all": seen[-1],
        "acc/inc": sum(seen) / T,
        "learning": sum(a[i][i] for i in range(T)) / T,
        "forgetting/max": sum(best[i] - a[last][i] for i in range(last)) / last,
        "forgetting/end": sum(a[i][i] - a[last][i] for i in range(last)) / last,
        "bwt": sum(a[last][i] - a[i][i] for i in range(last)) / last,
        "drop": seen[0] - seen[-1],
        "forgetting/smith": smith / last,
    }


# --- goldens ----------------------------------------------------------------------------------


def test_golden_of_a_steadily_forgetting_learner():
    assert average_accuracy(STEADY) == pytest.approx([0.9, 0.65, 0.566667], abs=5e-7)
    assert incremental_accuracy(STEADY) == pytest.approx(0.705556, abs=5e-7)
    assert forgetting(STEADY) == pytest.approx(0.35)
    assert bwt(STEADY) == pytest.approx(-0.35)
    assert smith_forgetting(STEADY, [1, 1, 1]) == pytest.approx(0.216667, abs=5e-7)
    assert smith_forgetting(STEADY, [7, 7, 7]) == pytest.approx(0.216667, abs=5e-7)


def test_the_two_definitions_of_forgetting_differ_where_a_task_recovers():
    assert end_forgetting(RECOVERING) == pytest.approx(0.20)
    assert forgetting(RECOVERING) == pytest.approx(0.25)


def test_what_was_known_before_an_experience_is_not_its_best():
    # 0.9 above the diagonal was measured before experience 1 was learned.
    assert forgetting([[0.6, 0.9, 0.0], [0.6, 0.8, 0.0], [0.6, 0.7, 0.7]]) == pytest.approx(0.05)


def test_transfer_and_intransigence():
    matrix = [[0.9, 0.3, 0.1], [0.5, 0.8, 0.4], [0.4, 0.6, 0.7]]
    assert fwt(matrix, [0.5, 0.1, 0.2]) == pytest.approx(((0.3 - 0.1) + (0.4 - 0.2)) / 2)
    assert intransigence(matrix, [0.95, 0.9, 0.7]) == pytest.approx((0.05 + 0.1 + 0.0) / 3)
    assert learning_accuracy(matrix) == pytest.approx(0.8)


def test_images_weigh_what_is_over_all_images():
    assert all_accuracy(STEADY, [100, 100, 300]).tolist() == pytest.approx([0.9, 0.65, 0.62])
    assert drop(STEADY, [100, 100, 300]) == pytest.approx(0.28)
    assert drop(STEADY) == pytest.approx(0.9 - 1.7 / 3)
    assert summary(STEADY, images=[100, 100, 300])["acc/all"] == pytest.approx(0.62)


def test_class_balanced_leaves_out_classes_without_images():
    assert class_balanced([1.0, 0.0, NAN, 0.5]) == 0.5


# --- definitions ------------------------------------------------------------------------------


@given(streams())
def test_every_metric_equals_its_slow_loop(stream):
    matrix, images, classes = stream
    for given_matrix in (matrix, masked(matrix), torch.tensor(matrix), masked(matrix).tolist()):
        found = summary(given_matrix, images=images, class_counts=classes)
        assert found == pytest.approx(slow(matrix, images, classes), abs=1e-12)


@given(streams())
def test_values_of_earlier_moments_are_those_of_leading_blocks(stream):
    matrix, images, _ = stream
    trajectory = all_accuracy(matrix, images)
    for t in range(1, len(matrix) + 1):
        assert all_accuracy(matrix[:t, :t], images[:t])[-1] == pytest.approx(trajectory[t - 1])


@given(streams())
def test_relations_between_metrics(stream):
    matrix, images, _ = stream
    found = summary(masked(matrix), images=images)
    assert found["bwt"] == -found["forgetting/end"]
    assert found["forgetting/max"] >= found["forgetting/end"] - 1e-12
    assert summary(matrix, images=[7] * len(matrix))["acc/all"] == pytest.approx(found["acc/avg"])


def test_a_null_of_results_json_is_what_was_not_measured():
    rows = json.loads("[[0.9, null], [0.5, 0.8]]")
    assert summary(rows) == summary([[0.9, NAN], [0.5, 0.8]])


def test_a_stream_of_one_experience_has_no_forgetting():
    found = summary([[0.75]], images=[4], class_counts=[2], baselines=[0.5], joint=[0.8])
    assert found == pytest.approx(
        {"acc/avg": 0.75, "acc/all": 0.75, "acc/inc": 0.75, "learning": 0.75, "intransigence": 0.05}
    )


def test_what_lacks_its_ingredients_is_left_out():
    always = {
        *("acc/avg", "acc/all", "acc/inc", "learning", "forgetting/max", "forgetting/end"),
        *("bwt", "drop"),
    }
    assert set(summary(STEADY)) == always
    assert set(summary(STEADY, baselines=[0.1, 0.1, 0.1])) == always  # nothing above the diagonal
    full = [[0.9, 0.3], [0.5, 0.8]]
    found = summary(
        full, baselines=[0.5, 0.1], joint=[0.9, 0.9], class_counts=[2, 2], per_class=[1, 0]
    )
    assert set(found) == always | {"fwt", "intransigence", "forgetting/smith", "acc/balanced"}
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix, named",
    [
        ([], r"got shape \(0,\)"),
        ([0.5], r"got shape \(1,\)"),
        ([[0.5, 0.5]], r"got shape \(1, 2\)"),
        (np.zeros((0, 0)), r"got shape \(0, 0\)"),
        ([[0.5], [0.5, 0.5]], "got list"),
        ("high", "got str"),
        ([[0.5, 0.5], [NAN, 0.5]], "on or below the diagonal"),
        ([[50.0]], "got 50"),
        ([[-0.1]], "got -0.1"),
        ([[float("inf")]], "got inf"),
        ([[0.5, 7], [0.5, 0.5]], "got 7"),
    ],
)
@pytest.mark.parametrize("metric", [summary, average_accuracy, forgetting, learning_accuracy])
def test_bad_matrices_are_refused(metric, matrix, named):
    with pytest.raises(ConfigError, match=named):
        metric(matrix)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: all_accuracy(STEADY, [1, 2]), "3 test images"),
        (lambda: all_accuracy(STEADY, [1, 2, 0]), "1 or more"),
        (lambda: all_accuracy(STEADY, [1, 2, 2.5]), "whole numbers"),
        (lambda: all_accuracy(STEADY, [1, 2, NAN]), "whole numbers"),
        (lambda: smith_forgetting(STEADY, [1, 1]), "3 classes"),
        (lambda: fwt([[0.5, 0.5], [0.5, 0.5]], [0.1]), "2 accuracies before"),
        (lambda: fwt([[0.5, 0.5], [0.5, 0.5]], [0.1, NAN]), "got nan"),
        (lambda: intransigence(STEADY, [0.5, 0.5, 50]), "got 50"),
        (lambda: class_balanced([0.5, 2]), "got 2"),
    ],
)
def test_bad_ingredients_are_refused(call, named):
    with pytest.raises(ConfigError, match=named):
        call()


@pytest.mark.parametrize(
    "call",
    [
        *(lambda metric=metric: metric([[0.5]]) for metric in (forgetting, end_forgetting, bwt)),
        lambda: drop([[0.5]]),
        lambda: smith_forgetting([[0.5]], [2]),
        lambda: fwt([[0.5]], [0.5]),
        lambda: fwt(STEADY, [0.1, 0.1, 0.1]),
        lambda: class_balanced([NAN]),
        lambda: class_balanced([]),
    ],
)
def test_what_is_not_defined_is_refused(call):
    with pytest.raises(NotEnoughData):
        call()


def test_the_input_is_not_changed():
    matrix = np.array(STEADY)
    before = matrix.copy()
    summary(matrix, images=[1, 2, 3], class_counts=[1, 2, 3])
    assert np.array_equal(matrix, before, equal_nan=True)


def test_importing_the_metrics_imports_nothing_heavy():
    code = "import sys, clfed.evaluation.continual, clfed.evaluation.stability"
    heavy = "{'torch', 'lightning', 'matplotlib', 'avalanche'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"{code}\nassert not ({heavy}), {heavy}"], check=True, cwd=ROOT
    )


# --- Avalanche --------------------------------------------------------------------------------


@pytest.mark.slow
def test_avalanche_agrees_where_the_names_do():
    metrics = pytest.importorskip("avalanche.evaluation.metrics.forgetting_bwt")
    transfer = pytest.importorskip("avalanche.evaluation.metrics.forward_transfer")
    rng = np.random.default_rng(0)
    for size in (2, 3, 6):
        matrix, start = rng.random((size, size)), rng.random(size)
        theirs, backward, forward = metrics.Forgetting(), metrics.BWT(), transfer.ForwardTransfer()
        for i in range(size):
            for metric in (theirs, backward):
                metric.update(i, matrix[i, i], initial=True)
            forward.update(i, start[i], initial=True)
            if i:
                forward.update(i, matrix[i - 1, i])
        for i in range(size - 1):
            for metric in (theirs, backward):
                metric.update(i, matrix[-1, i])
        assert end_forgetting(matrix) == pytest.approx(np.mean([*theirs.result().values()]))
        assert bwt(matrix) == pytest.approx(np.mean([*backward.result().values()]))
        assert fwt(matrix, start) == pytest.approx(np.mean([*forward.result().values()]))


def test_the_documentation_names_every_metric():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    full = [[0.9, 0.3], [0.5, 0.8]]
    found = summary(
        full, baselines=[0.5, 0.1], joint=[0.9, 0.9], class_counts=[2, 2], per_class=[1, 0]
    )
    assert all(f"| `{name}` |" in text for name in found)
    assert continual.__doc__ and "docs/metrics.md" in continual.__doc__
