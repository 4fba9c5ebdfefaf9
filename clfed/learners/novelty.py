r"""What belongs to no class that was ever learned: distances from a memory, and how far is too far.

.. math:: s(h) = (h - \mu)^\top (\Sigma + \varepsilon \bar\sigma^2 I)^{-1} (h - \mu)

with one mean and one covariance over the images of all classes, read off exact sums (SSD+, Sehwag
et al. 2021, arXiv 2103.12051). How far known images lie is kept as quantiles of each class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clfed.errors import NotEnoughData
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.covariance import whitening
from clfed.prototypes.fixed_point import RESOLUTION
from clfed.prototypes.moments import gram

LEVELS = 101  # quantiles at 0, 1, ... 100 %


def distances(memory: PrototypeMemory | None, embeddings: Tensor, shrinkage: float) -> Tensor:
    r"""Squared Mahalanobis distance from everything in a memory.

    Args:
        memory: With shared or class second moments.
        embeddings: :math:`h`, ``(N, D)``.
        shrinkage: :math:`\varepsilon`, share of the mean variance that each direction gets.

    Returns:
        ``(N,)`` float64; directions without any variance are left out.

    Raises:
        NotEnoughData: There is no memory.
    """
    if memory is None:
        raise NotEnoughData("Expected a memory of at least one class, got none.")
    number = memory.total_count
    mean = memory.sums.double().sum(0) * RESOLUTION / number
    covariance = gram(memory) / number - mean[:, None] * mean
    extra = shrinkage * covariance.diagonal().mean().clamp(min=0)
    root, _ = whitening(covariance + extra * torch.eye(len(mean), dtype=torch.float64))
    return ((embeddings.double() - mean) @ root.T).square().sum(1)


def class_quantiles(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Quantiles at 0, 1, ... 100 % of the values of each class, linear between neighbours.

    Args:
        values: ``(N,)``.
        labels: ``(N,)`` int64 in ``0..classes-1``.
        classes: :math:`C`.

    Returns:
        ``(C, 101)``; infinity for a class without values.

    Example:
        >>> found = class_quantiles(torch.tensor([3.0, 1.0]), torch.tensor([0, 0]), classes=2)
        >>> found[0, [0, 50, 100]].tolist(), found[1, 0].item()
        ([1.0, 2.0, 3.0], inf)
    """
    counts = torch.bincount(labels, minlength=classes)
    order = values.argsort(stable=True)
    ranked = values[order[labels[order].argsort(stable=True)]]
    place = torch.linspace(0, 1, LEVELS, dtype=torch.float64) * (counts[:, None] - 1).clamp(min=0)
    starts = (counts.cumsum(0) - counts)[:, None]
    low, high = ((starts + p.long()).clamp(max=len(values) - 1) for p in (place, place.ceil()))
    found = torch.lerp(ranked[low], ranked[high], place.frac().to(values))
    return found.masked_fill(counts[:, None] == 0, float("inf"))


def blended(old: Tensor, new: Tensor, before: Tensor, present: Tensor) -> Tensor:
    """Average of the quantiles of classes that come back, weighted by their images.

    Args:
        old: ``(C, 101)``, or fewer rows where classes are new.
        new: ``(C, 101)``.
        before: ``(C,)``, images of each class before.
        present: ``(C,)``, images of each class now.
    """
    padded = torch.full_like(new, float("inf"))
    padded[: len(old)] = old
    share = (present / (present + before).clamp(min=1))[:, None].to(new)
    mixed = share * new + (1 - share) * padded
    mixed = torch.where(before[:, None] > 0, mixed, new)
    return torch.where(present[:, None] > 0, mixed, padded)


def thresholds(quantiles: Tensor, rate: float) -> Tensor:
    """The quantile at a rate in ``0..1``, ``(C,)``, linear between those that are kept."""
    place = rate * (quantiles.shape[1] - 1)
    low = min(int(place), quantiles.shape[1] - 2)
    below, above = quantiles[:, low], quantiles[:, low + 1]
    return torch.where(below.isinf(), below, torch.lerp(below, above, place - low))
