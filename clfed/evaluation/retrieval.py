"""Recall at K: whether an image's nearest other images show its class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError, InvalidEmbedding


def recall_at(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int], *, block: int = 1024
) -> dict[int, float]:
    r"""Share of images with at least one image of their class among their K nearest others.

    Every image is asked in turn and all others are the gallery; the similarity is the cosine. This
    is the measure of Barletti et al. 2022 (arXiv 2205.05476). With :math:`s^+_i` the similarity of
    the nearest image of the same class,

    .. math:: \text{R@}K = \frac1N \sum_i \left[\#\{j : y_j \ne y_i,\; s_{ij} \ge s^+_i\} < K\right]

    so that ties count against the method: embeddings that all coincide retrieve nothing. An image
    that is alone in its class is never found.

    Args:
        embeddings: ``(N, D)``, floating point, N at least 2, on any device.
        labels: ``(N,)`` int64.
        ks: Whole numbers from 1 to N - 1.
        block: Rows compared with all others at once; memory is ``block * N``.

    Raises:
        ConfigError: A K or the block is out of range.
        InvalidEmbedding: Shapes do not fit, or embeddings are not finite.

    Example:
        >>> angles = torch.deg2rad(torch.tensor([0.0, 6, 60, 66]))
        >>> points = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> recall_at(points, torch.tensor([0, 1, 0, 1]), [1, 2, 3])
        {1: 0.0, 2: 0.5, 3: 1.0}
    """
    _check(embeddings, labels, ks, block)
    unit = F.normalize(embeddings.double(), dim=1)
    ranks = [
        _ranks(unit, labels, torch.arange(start, min(start + block, len(unit))))
        for start in range(0, len(unit), block)
    ]
    rank = torch.cat(ranks)
    return {int(k): float((rank < k).double().mean()) for k in ks}


def _ranks(unit: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Images of other classes at least as near as the nearest of the own; N where there is none."""
    rows = rows.to(unit.device)
    similarity = unit[rows] @ unit.T
    same = labels[rows, None] == labels
    other = similarity.masked_fill(same, -torch.inf)
    # An image is not its own neighbour.
    same[torch.arange(len(rows)), rows] = False
    nearest = similarity.masked_fill(~same, -torch.inf).amax(dim=1)
    closer = (other >= nearest[:, None]).sum(dim=1)
    return torch.where(same.any(dim=1), closer, len(unit))


def _check(embeddings: Tensor, labels: Tensor, ks: Sequence[int], block: int) -> None:
    fits = embeddings.ndim == 2 and labels.shape == embeddings.shape[:1] and len(embeddings) > 1
    if not fits or not embeddings.is_floating_point() or labels.dtype != torch.int64:
        raise InvalidEmbedding(
            "Expected embeddings (N, D) and int64 labels (N,) of at least two images, got "
            f"{embeddings.dtype} {tuple(embeddings.shape)} and {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    if not bool(torch.isfinite(embeddings).all()):
        raise InvalidEmbedding("Expected finite embeddings, got NaN or infinity.")
    for name, value, most in (*(("K", k, len(labels) - 1) for k in ks), ("block", block, None)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole or (most is not None and value > most):
            upper = "" if most is None else f" and at most {most}"
            raise ConfigError(f"Expected {name} of at least 1{upper}, got {value!r}.")
