r"""Metrics of a stream, from the matrix of accuracies that all of them share.

:math:`a_{t,i}` is the accuracy on the test images of experience :math:`i` after training on
experience :math:`t`, both from 0; :math:`T` experiences, the last one is :math:`T - 1`. What was
not measured is ``nan`` or None; where experiences bring new classes that is everything above the
diagonal. Answers compete over all classes seen so far, unless the stream names the task of each
question.

Every function takes a whole stream. The value after an earlier experience ``t`` is that of the
leading block ``matrix[: t + 1, : t + 1]``. ``docs/metrics.md`` compares the names with Avalanche's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from clfed.errors import NotEnoughData
from clfed.evaluation.matrix import Array, as_array, check_counts, check_fractions, check_matrix

_TWO = "A stream of one experience has no such number."


def summary(
    matrix: ArrayLike,
    *,
    images: ArrayLike | None = None,
    class_counts: ArrayLike | None = None,
    baselines: ArrayLike | None = None,
    joint: ArrayLike | None = None,
    per_class: ArrayLike | None = None,
) -> dict[str, float]:
    """Compute every metric that is defined for a stream, under the name that all reports use.

    A metric that is not defined (forgetting after a single experience) or whose ingredients are
    missing is left out, so that no value is ever ``nan``.

    Args:
        matrix: ``(T, T)``, see the head of this module.
        images: ``(T,)`` test images of each experience; equal numbers when omitted.
        class_counts: ``(T,)`` classes that each experience brings, for ``forgetting/smith``.
        baselines: ``(T,)`` accuracies before any training, for ``fwt``.
        joint: ``(T,)`` accuracies on experience i of a model trained on all of 0..i at once, for
            ``intransigence``.
        per_class: Accuracy of each class at the end, for ``acc/balanced``.

    Raises:
        ConfigError: An array has another shape or holds values that are none of its kind.

    Example:
        >>> nan = float("nan")
        >>> found = summary([[0.9, nan], [0.5, 0.8]])
        >>> round(found["acc/inc"], 4), round(found["forgetting/max"], 4)
        (0.775, 0.4)
    """
    accuracies = check_matrix(matrix)
    seen = all_accuracy(accuracies, images)
    found = {
        "acc/avg": float(average_accuracy(accuracies)[-1]),
        "acc/all": float(seen[-1]),
        "acc/inc": incremental_accuracy(accuracies, images),
        "learning": learning_accuracy(accuracies),
    }
    several = len(accuracies) > 1
    if several:
        found["forgetting/max"] = forgetting(accuracies)
        found["forgetting/end"] = end_forgetting(accuracies)
        found["bwt"] = bwt(accuracies)
        found["drop"] = drop(accuracies, images)
    if several and class_counts is not None:
        found["forgetting/smith"] = smith_forgetting(accuracies, class_counts)
    if several and baselines is not None and np.isfinite(np.diagonal(accuracies, 1)).all():
        found["fwt"] = fwt(accuracies, baselines)
    if joint is not None:
        found["intransigence"] = intransigence(accuracies, joint)
    if per_class is not None:
        found["acc/balanced"] = class_balanced(per_class)
    return found


def average_accuracy(matrix: ArrayLike) -> Array:
    r"""Mean over experiences of the accuracy after each of them.

    .. math:: A_t = \frac{1}{t+1} \sum_{i \le t} a_{t,i}

    Returns:
        ``(T,)``; the last value is what tables call average accuracy.
    """
    accuracies = check_matrix(matrix)
    return _seen_mean(accuracies, np.ones(len(accuracies)))


def all_accuracy(matrix: ArrayLike, images: ArrayLike | None = None) -> Array:
    r"""Accuracy over all test images of the experiences so far, after each of them.

    .. math:: \frac{\sum_{i \le t} n_i a_{t,i}}{\sum_{i \le t} n_i}

    Args:
        matrix: :math:`a`, shape ``(T, T)``.
        images: :math:`n`, shape ``(T,)``; equal numbers, which give :math:`A_t`, when omitted.

    Returns:
        ``(T,)``.
    """
    accuracies = check_matrix(matrix)
    if images is None:
        return average_accuracy(accuracies)
    return _seen_mean(accuracies, check_counts(images, len(accuracies), "test images"))


def incremental_accuracy(matrix: ArrayLike, images: ArrayLike | None = None) -> float:
    r"""Mean over time of :func:`all_accuracy`, the average incremental accuracy.

    Example:
        >>> round(incremental_accuracy([[0.9, 0, 0], [0.5, 0.8, 0], [0.4, 0.6, 0.7]]), 6)
        0.705556
    """
    return float(all_accuracy(matrix, images).mean())


def forgetting(matrix: ArrayLike) -> float:
    r"""Mean distance from the best past accuracy (Chaudhry et al. 2018, arXiv 1801.10112).

    .. math:: \frac{1}{T-1} \sum_{i < T-1} \left[\max_{i \le l < T-1} a_{l,i} - a_{T-1,i}\right]

    Raises:
        NotEnoughData: There is one experience only.
    """
    accuracies = _several(matrix)
    learned = np.where(np.tri(len(accuracies), dtype=bool), accuracies, -np.inf)
    return float((learned[:-1, :-1].max(axis=0) - accuracies[-1, :-1]).mean())


def end_forgetting(matrix: ArrayLike) -> float:
    r"""Mean distance from the accuracy just after learning, which Avalanche calls forgetting.

    .. math:: \frac{1}{T-1} \sum_{i < T-1} \left(a_{i,i} - a_{T-1,i}\right)

    Raises:
        NotEnoughData: There is one experience only.
    """
    accuracies = _several(matrix)
    return float((np.diagonal(accuracies) - accuracies[-1])[:-1].mean())


def bwt(matrix: ArrayLike) -> float:
    """Backward transfer (Lopez-Paz and Ranzato 2017, arXiv 1706.08840): minus the end forgetting.

    Raises:
        NotEnoughData: There is one experience only.
    """
    return -end_forgetting(matrix)


def fwt(matrix: ArrayLike, baselines: ArrayLike) -> float:
    r"""Forward transfer (Lopez-Paz and Ranzato 2017, arXiv 1706.08840).

    .. math:: \frac{1}{T-1} \sum_{i \ge 1} \left(a_{i-1,i} - b_i\right)

    Args:
        matrix: :math:`a`, measured one place above the diagonal too.
        baselines: :math:`b`, shape ``(T,)``, accuracies at the random start; the first is unused.

    Raises:
        NotEnoughData: There is one experience only, or the next experience was not measured.
    """
    accuracies = _several(matrix)
    before = np.diagonal(accuracies, 1)
    if not np.isfinite(before).all():
        raise NotEnoughData(
            "Forward transfer needs the accuracy on each experience before it is learned, got nan.",
            remedy="Measure the test images of the next experience too.",
        )
    start = check_fractions(baselines, len(accuracies), "accuracies before training")
    return float((before - start[1:]).mean())


def intransigence(matrix: ArrayLike, joint: ArrayLike) -> float:
    r"""What is missing to joint training (Chaudhry et al. 2018, arXiv 1801.10112), a mean.

    .. math:: \frac1T \sum_i \left(a^*_i - a_{i,i}\right)

    Args:
        matrix: :math:`a`, shape ``(T, T)``.
        joint: :math:`a^*`, shape ``(T,)``, accuracies on experience i of a model trained on the
            images of all of 0..i at once.
    """
    accuracies = check_matrix(matrix)
    best = check_fractions(joint, len(accuracies), "accuracies of joint training")
    return float((best - np.diagonal(accuracies)).mean())


def learning_accuracy(matrix: ArrayLike) -> float:
    r"""Mean accuracy on each experience just after learning it: :math:`\frac1T \sum_i a_{i,i}`."""
    return float(np.diagonal(check_matrix(matrix)).mean())


def drop(matrix: ArrayLike, images: ArrayLike | None = None) -> float:
    """Performance drop of few-shot streams: :func:`all_accuracy` at the start minus at the end.

    Raises:
        NotEnoughData: There is one experience only.
    """
    seen = all_accuracy(_several(matrix), images)
    return float(seen[0] - seen[-1])


def smith_forgetting(matrix: ArrayLike, class_counts: ArrayLike) -> float:
    r"""Global forgetting (Smith et al. 2022, arXiv 2203.17269): over time, weighted by classes.

    .. math:: \frac{1}{T-1} \sum_{t \ge 1} \sum_{i < t} \frac{c_i}{\sum_{j \le t} c_j}
        \left(a_{i,i} - a_{t,i}\right)

    Args:
        matrix: :math:`a`, shape ``(T, T)``, answered over all classes seen.
        class_counts: :math:`c`, shape ``(T,)``, classes that each experience brings.

    Raises:
        NotEnoughData: There is one experience only.
    """
    accuracies = _several(matrix)
    classes = check_counts(class_counts, len(accuracies), "classes")
    lost = np.tril(np.diagonal(accuracies) - np.nan_to_num(accuracies), -1)
    return float(((lost @ classes) / classes.cumsum())[1:].mean())


def class_balanced(accuracies: ArrayLike) -> float:
    """Mean of the accuracies of the classes; ``nan`` stands for a class without a test image.

    Raises:
        NotEnoughData: No class has an accuracy.

    Example:
        >>> class_balanced([1.0, 0.5, float("nan")])
        0.75
    """
    values = as_array(accuracies, "accuracies of classes")
    measured = values[~np.isnan(values)]
    if not len(measured):
        raise NotEnoughData("Expected the accuracy of at least one class, got none.")
    return float(check_fractions(measured, len(measured), "accuracies of classes").mean())


def _several(matrix: ArrayLike) -> Array:
    accuracies = check_matrix(matrix)
    if len(accuracies) < 2:
        raise NotEnoughData("Expected at least two experiences, got one.", remedy=_TWO)
    return accuracies


def _seen_mean(accuracies: Array, weights: Array) -> Array:
    weighted = np.tril(np.nan_to_num(accuracies)) @ weights
    seen: Array = weighted / weights.cumsum()
    return seen
