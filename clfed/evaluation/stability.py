r"""Stability during training: how far old tasks fall just after a switch.

The metrics of De Lange et al. 2023 (arXiv 2205.13452), which looks at every task after every few
updates and not only where tasks end. Two arrays hold everything:

``accuracy``
    ``(N, T)``: row :math:`n` is one evaluation, column :math:`i` one task; ``nan`` before a task
    is met. The first row may lie before the first update.
``ends``
    The row at which each task ended, ascending. It may be one shorter than the tasks: then the
    last task is still being learned.

While task :math:`k` (from 0) is learned, the tasks before it are the old ones. A window is counted
in evaluations, not in updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from clfed.errors import ConfigError

Array = NDArray[np.float64]


def summary(
    accuracy: ArrayLike,
    ends: Sequence[int],
    updates: Sequence[int],
    windows: Sequence[int] = (10,),
) -> dict[str, float]:
    """Compute every number of this module at the last evaluation.

    Args:
        accuracy: ``(N, T)``.
        ends: Rows at which the tasks ended.
        updates: ``(N,)`` updates since the start of the stream at each evaluation.
        windows: Windows of ``wf`` and ``wp``, which end in their size: ``wf10``.

    Returns:
        ``wc_acc``, ``wf10``, ``wp10`` and, where defined, ``min_acc`` and ``lca``.
    """
    found = {"wc_acc": float(worst_case_accuracy(accuracy, ends)[-1])}
    for window in windows:
        found[f"wf{window}"] = float(windowed_forgetting(accuracy, window)[-1])
        found[f"wp{window}"] = float(windowed_plasticity(accuracy, window)[-1])
    lowest = float(min_accuracy(accuracy, ends)[-1])
    if not np.isnan(lowest):
        found["min_acc"] = lowest
    area = learning_curve_area(accuracy, ends, updates)
    if area is not None:
        found["lca"] = area
    return found


def min_accuracy(accuracy: ArrayLike, ends: Sequence[int]) -> Array:
    r"""Mean over old tasks of the lowest accuracy since they ended, at every evaluation.

    .. math:: \frac1k \sum_{i < k} \min_{e_i < m \le n} a_{m,i}

    The row at which a task ends is not yet part of its minimum, and neither is the task that is
    being learned.

    Args:
        accuracy: :math:`a`, shape ``(N, T)``.
        ends: :math:`e`.

    Returns:
        ``(N,)``; ``nan`` while the first task is learned.
    """
    values, last = check(accuracy, ends)
    over = np.arange(len(values))[:, None] > last
    since = np.where(over, values[:, : len(last)], np.inf)
    lowest = np.minimum.accumulate(since, axis=0)
    old = _current(values, last)
    total = np.where(np.arange(len(last)) < old[:, None], lowest, 0.0).sum(axis=1)
    return np.where(old > 0, total / np.maximum(old, 1), np.nan)


def worst_case_accuracy(accuracy: ArrayLike, ends: Sequence[int]) -> Array:
    r"""WC-ACC at every evaluation: the present task as it is, each old task at its lowest.

    .. math:: \frac{1}{k+1} a_{n,k} + \left(1 - \frac{1}{k+1}\right) \text{min-ACC}_n

    It is a lower bound of the average accuracy of every model since the last switch.

    Args:
        accuracy: :math:`a`, shape ``(N, T)``.
        ends: Rows at which the tasks ended.

    Returns:
        ``(N,)``.

    Example:
        >>> nan = float("nan")
        >>> curves = [[0.9, nan], [0.6, 0.3], [0.4, 0.6], [0.5, 0.7], [0.7, 0.8]]
        >>> worst_case_accuracy(curves, [0, 4]).round(3).tolist()
        [0.9, 0.45, 0.5, 0.55, 0.6]
    """
    values, last = check(accuracy, ends)
    rows = np.arange(len(values))
    old = _current(values, last)
    share = 1 / (old + 1)
    lowest = np.nan_to_num(min_accuracy(values, ends))
    worst: Array = share * values[rows, old] + (1 - share) * lowest
    return worst


def windowed_forgetting(accuracy: ArrayLike, window: int) -> Array:
    r"""WF of a window, at every evaluation: the largest fall so far, averaged over tasks met.

    .. math:: \Delta_{n,i} = \max_{n - w < l < m \le n} (a_{l,i} - a_{m,i}), \qquad
        \frac{1}{|\text{met}|} \sum_i \max(0, \max_{m \le n} \Delta_{m,i})

    Args:
        accuracy: :math:`a`, shape ``(N, T)``; ``nan`` only before a task is met.
        window: :math:`w`, at least 2 evaluations.

    Returns:
        ``(N,)``, never below 0 and never falling with the window.

    Example:
        >>> fall = [[0.9], [0.6], [0.4], [0.5], [0.7]]
        >>> round(float(windowed_forgetting(fall, 2)[-1]), 3)
        0.3
        >>> round(float(windowed_forgetting(fall, 3)[-1]), 3)
        0.5
    """
    return _largest_change(_trajectories(accuracy), check_window(window))


def windowed_plasticity(accuracy: ArrayLike, window: int) -> Array:
    """WP of a window: as :func:`windowed_forgetting`, with the largest rise.

    Args:
        accuracy: ``(N, T)``; ``nan`` only before a task is met.
        window: At least 2 evaluations.

    Returns:
        ``(N,)``.
    """
    return _largest_change(-_trajectories(accuracy), check_window(window))


def learning_curve_area(
    accuracy: ArrayLike, ends: Sequence[int], updates: Sequence[int], beta: int = 10
) -> float | None:
    r"""LCA: mean accuracy on the present task over its first updates (arXiv 1812.00420).

    Evaluations at update 1 to :math:`\beta` of each task count, then tasks are averaged. The
    original also takes the accuracy before the first update, which is measured here for the first
    task alone and therefore left out.

    Args:
        accuracy: ``(N, T)``.
        ends: Rows at which the tasks ended.
        updates: ``(N,)`` updates since the start of the stream at each evaluation.
        beta: :math:`\beta`, at least 1.

    Returns:
        None where no task was evaluated during its first ``beta`` updates.

    Raises:
        ConfigError: ``updates`` fall, are not one a row, or ``beta`` is below 1.
    """
    values, last = check(accuracy, ends)
    when = np.asarray(updates)
    if when.shape != (len(values),) or (np.diff(when) < 0).any():
        raise ConfigError(
            f"Expected {len(values)} numbers of updates, ascending, got {list(updates)[:8]}."
        )
    if isinstance(beta, bool) or not isinstance(beta, int) or beta < 1:
        raise ConfigError(f"Expected a whole number of at least 1 as beta, got {beta!r}.")
    rows = np.arange(len(values))
    task = _current(values, last)
    begin = np.concatenate([[0], when[last]])[task]
    early = (when > begin) & (when <= begin + beta)
    if not early.any():
        return None
    tasks = values.shape[1]
    counts = np.bincount(task[early], minlength=tasks)
    sums = np.bincount(task[early], values[rows, task][early], minlength=tasks)
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def check(accuracy: ArrayLike, ends: Sequence[int]) -> tuple[Array, NDArray[np.int64]]:
    """Return trajectories as float64 and the ends as int64.

    Raises:
        ConfigError: Shapes, ends or values contradict the description at the head of this module.
    """
    values = _trajectories(accuracy)
    last = np.asarray(ends)
    rows, tasks = values.shape
    whole = last.size == 0 or np.issubdtype(last.dtype, np.integer)
    ascending = (
        whole
        and last.ndim == 1
        and (np.diff(last, prepend=-1) > 0).all()
        and (last < rows).all()
        and tasks - 1 <= len(last) <= tasks
    )
    if not ascending:
        raise ConfigError(
            f"Expected ascending rows below {rows} at which {tasks} tasks ended (one fewer while "
            f"the last is learned), got {list(ends)[:8]}."
        )
    last = last.astype(np.int64)
    begins = np.concatenate([[0], last + 1])[:tasks]
    if np.isnan(values[np.arange(rows)[:, None] >= begins]).any():
        raise ConfigError(
            "Expected the accuracy of every task from its first evaluation on, got nan."
        )
    return values, last


def check_window(window: int) -> int:
    """Return a window.

    Raises:
        ConfigError: It is not a whole number of at least 2; one evaluation holds no change.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ConfigError(f"Expected a window of at least 2 evaluations, got {window!r}.")
    return window


def _trajectories(accuracy: ArrayLike) -> Array:
    values = np.asarray(accuracy, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ConfigError(
            f"Expected accuracies (evaluations, tasks), at least one, got shape {values.shape}."
        )
    known = ~np.isnan(values)
    if not ((values[known] >= 0) & (values[known] <= 1)).all():
        raise ConfigError("Expected accuracies from 0 to 1.")
    if (known[:-1] & ~known[1:]).any():
        raise ConfigError("Expected the accuracy of every task from the first one on, got a gap.")
    return values


def _current(values: Array, last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the task that is learned at each row; the last one after all have ended."""
    rows, tasks = values.shape
    learned: NDArray[np.int64] = np.searchsorted(last, np.arange(rows), side="left")
    return learned.clip(max=tasks - 1)


def _largest_change(values: Array, window: int) -> Array:
    """Largest fall within a window, at least 0, up to each row; mean over tasks met."""
    met = ~np.isnan(values)
    seen = np.where(met, values, -np.inf)[:-1]
    # A pair lies in some window exactly when its rows are fewer than ``window`` apart, so the
    # highest of the ``window - 1`` rows before each row is all that is needed.
    if window > len(values):
        highest = np.maximum.accumulate(seen, axis=0)
    else:
        padding = np.full((window - 2, values.shape[1]), -np.inf)
        padded = np.concatenate([padding, seen])
        highest = sliding_window_view(padded, window - 1, axis=0).max(axis=-1)
    falls = np.zeros_like(values)
    falls[1:] = np.maximum(highest - np.where(met, values, np.inf)[1:], 0.0)
    largest = np.maximum.accumulate(falls, axis=0)
    mean: Array = np.where(met, largest, 0.0).sum(axis=1) / np.maximum(met.sum(axis=1), 1)
    return mean
