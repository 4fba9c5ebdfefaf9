"""Accuracy over images: counts that add up, never averages of averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clfed.errors import NotEnoughData


@dataclass(frozen=True)
class Counts:
    """How many images were judged and how many of them correctly.

    Adding two counts gives the counts of both sets of images together, so an accuracy over
    batches, nodes or classes is that over their images.

    Args:
        correct: Images whose prediction is their label.
        total: Images judged.

    Example:
        >>> (Counts(9, 10) + Counts(0, 2)).fraction
        0.75
    """

    correct: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total:
            raise ValueError(f"Expected 0 <= correct <= total, got {self.correct}, {self.total}.")

    @classmethod
    def of(cls, predictions: Tensor, labels: Tensor) -> Self:
        """Count over one batch.

        Args:
            predictions: ``(N,)`` integers.
            labels: ``(N,)`` integers, numbered as the predictions are.
        """
        _check(predictions, labels)
        return cls(int((predictions == labels).sum()), len(labels))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.correct + other.correct, self.total + other.total)

    @property
    def fraction(self) -> float:
        """``correct / total``.

        Raises:
            NotEnoughData: No image was judged.
        """
        if not self.total:
            raise NotEnoughData("An accuracy needs at least one test image, got none.")
        return self.correct / self.total


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose prediction is their label.

    Args:
        predictions: ``(N,)`` integers.
        labels: ``(N,)`` integers, numbered as the predictions are.

    Raises:
        NotEnoughData: There is no image.

    Example:
        >>> accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
        0.75
    """
    return Counts.of(predictions, labels).fraction


def per_class_recall(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Accuracy over the images of each class.

    .. math:: r_c = \sum_i [\hat y_i = c][y_i = c] \,/\, \sum_i [y_i = c]

    Args:
        predictions: :math:`\hat y`, ``(N,)`` int64.
        labels: :math:`y`, ``(N,)`` int64 in ``[0, num_classes)``.
        num_classes: C.

    Returns:
        :math:`r`, ``(C,)`` float64; NaN for a class without an image.

    Raises:
        ValueError: A label is out of range.

    Example:
        >>> per_class_recall(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3).tolist()
        [0.5, 1.0, nan]
    """
    _check(predictions, labels)
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"Labels must lie in [0, {num_classes}), got {int(labels.min())}..{int(labels.max())}."
        )
    total = torch.bincount(labels, minlength=num_classes)
    correct = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return correct.double() / total.double()


def groupwise(
    predictions: Tensor, labels: Tensor, groups: Mapping[str, Tensor]
) -> dict[str, Counts]:
    """Count over the images of each group of classes, all predicted in the whole label space.

    With the groups ``base``, ``previous`` and ``mission`` this is Eval-0 (base alone, before the
    first mission), Eval-1 (all three, at a node before the merge) and Eval-2 (base and field,
    after the merge) of the federated reconnaissance paper (arXiv 2109.00150).

    Args:
        predictions: ``(N,)`` int64.
        labels: ``(N,)`` int64.
        groups: Classes (int64, any number, none included) by name of the group. Groups may
            overlap: a mission can bring back a class of an earlier one.

    Returns:
        Counts of every group, of zero images for a group that has none.

    Example:
        >>> groups = {"base": torch.tensor([0]), "mission": torch.tensor([1, 2])}
        >>> counts = groupwise(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), groups)
        >>> counts["base"].fraction, counts["mission"].fraction
        (1.0, 0.5)
    """
    _check(predictions, labels)
    correct = predictions == labels
    counts = {}
    for name, classes in groups.items():
        member = torch.isin(labels, classes.to(labels))
        counts[name] = Counts(int((correct & member).sum()), int(member.sum()))
    return counts


def unweighted_mean(counts: Mapping[str, Counts]) -> float:
    """Mean of the groups' accuracies, each group alike; groups without images are left out.

    This is the fourth number of Eval-1. It is not an accuracy over images: report it beside the
    groups, under a name of its own.

    Raises:
        NotEnoughData: No group has an image.
    """
    fractions = [group.fraction for group in counts.values() if group.total]
    if not fractions:
        raise NotEnoughData("A mean over groups needs at least one test image, got none.")
    return sum(fractions) / len(fractions)


def _check(predictions: Tensor, labels: Tensor) -> None:
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(
            "Expected one prediction and one label an image, got shapes "
            f"{tuple(predictions.shape)} and {tuple(labels.shape)}."
        )
    if predictions.is_floating_point() or labels.is_floating_point():
        raise ValueError(
            f"Expected class numbers, got {predictions.dtype} and {labels.dtype} for predictions "
            "and labels."
        )
