r"""Mixed images of classes that are easily confused.

Adaptive prototypical feedback of OnPro (Wei et al. 2023, arXiv 2308.00301): the nearer the
prototypes of two classes, the more often their images are mixed (mixup, Zhang et al. 2018, arXiv
1710.09412).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEAREST = 1e-6  # coinciding prototypes would have an infinite weight


def pair_law(prototypes: Tensor) -> Tensor:
    r"""How often two classes are mixed: softmax over pairs of one over their distance.

    Args:
        prototypes: :math:`\mu`, ``(K, D)``.

    Returns:
        ``(K, K)``, symmetric with a zero diagonal; sums to 1, or to 0 where there is no pair.
    """
    size = len(prototypes)
    if size < 2:
        return prototypes.new_zeros(size, size)
    distance = (prototypes[:, None] - prototypes).norm(dim=2).clamp(min=NEAREST)
    same = torch.eye(size, dtype=torch.bool, device=prototypes.device)
    closeness = distance.reciprocal().masked_fill(same, float("-inf"))
    law: Tensor = closeness.flatten().softmax(0).view(size, size)
    return law


def mixing_plan(
    labels: Tensor,
    law: Tensor,
    *,
    mixup: float,
    base_rate: float,
    mixing: float,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide which images are mixed, and with which shares.

    Args:
        labels: ``(B,)`` int64.
        law: ``(K, K)``, see :func:`pair_law`, of the classes of the batch in ascending order.
        mixup: Chance that an image of the random part is mixed with another one.
        base_rate: Share of the random part; the rest are pairs drawn by the law.
        mixing: Both parameters of the beta distribution of the share.
        rng: Decides all draws.

    Returns:
        Positions of the first and of the second images, int64, and the first one's share, ``(B,)``
        each; images of the rest stay as they are where the law knows no pair.
    """
    size = len(labels)
    plain = round(base_rate * size)
    first, second = torch.arange(size), torch.randint(size, (size,), generator=rng)
    seed = int(torch.randint(2**62, (1,), generator=rng))
    share = torch.from_numpy(np.random.default_rng(seed).beta(mixing, mixing, size)).float()
    share[:plain][torch.rand(plain, generator=rng) >= mixup] = 1.0
    # Pairs of images rather than of classes are drawn, so the order of classes has no say.
    _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    chances = (law / counts[:, None] / counts)[places][:, places].flatten()
    if plain < size and float(chances.sum()) > 0:
        pairs = torch.multinomial(chances, size - plain, replacement=True, generator=rng)
        first[plain:], second[plain:] = pairs // size, pairs % size
    else:
        share[plain:] = 1.0
    return first, second, share


def blend(rows: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Weighted sums of pairs of rows.

    Args:
        rows: ``(B, ...)``, floating point.
        first: ``(B,)`` int64, positions.
        second: ``(B,)`` int64, positions.
        share: ``(B,)``, weight of the first.

    Example:
        >>> blend(torch.eye(2), torch.tensor([0]), torch.tensor([1]), torch.tensor([0.75])).tolist()
        [[0.75, 0.25]]
    """
    weight = share.to(rows.device).view(-1, *[1] * (rows.dim() - 1))
    return weight * rows[first] + (1 - weight) * rows[second]
