r"""Losses of one episode that ask for more than the nearest prototype: margins, clean neighbours.

Proto-Triplet (SuSana Distancia, 2023) holds every query closer to its own prototype than to the
nearest wrong one. ICNN (an earlier score of its authors, arXiv 2107.06992) measures how well the
nearest neighbours of every image tell classes apart. All distances are
:math:`d(a, b) = \sqrt{\|a - b\|^2 + 10^{-6}}`, smooth where points meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 4
_SMOOTH, _EPSILON = 1e-6, 1e-8


def distances(left: Tensor, right: Tensor) -> Tensor:
    """Return the smoothed Euclidean distances of ``(M, D)`` and ``(N, D)`` as ``(M, N)``.

    Example:
        >>> round(distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).item(), 4)
        5.0
    """
    # Through one large product small distances would drown in rounding.
    exact = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    return (exact.square() + _SMOOTH).sqrt()


def proto_triplet(
    queries: Tensor, prototypes: Tensor, targets: Tensor, margin: float = 0.5
) -> Tensor:
    r"""Hinge on the gap between the right prototype and the nearest wrong one.

    .. math:: \frac1Q \sum_q \max\bigl(0,\; d(q, p_y) - \min_{k \ne y} d(q, p_k) + m\bigr)

    Args:
        queries: ``(Q, D)``.
        prototypes: ``(N, D)``.
        targets: ``(Q,)`` int64, each query's prototype.
        margin: :math:`m`.

    Returns:
        A scalar; 0 where there is no wrong prototype.

    Example:
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.2]])
        >>> round(proto_triplet(torch.zeros(1, 2), prototypes, torch.tensor([0])).item(), 4)
        0.3
    """
    table = distances(queries, prototypes)
    own = table.gather(1, targets[:, None]).squeeze(1)
    wrong = table.scatter(1, targets[:, None], torch.inf).amin(1)
    return (own - wrong + margin).clamp(min=0).mean()


def icnn(embeddings: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    r"""Minus the logarithm of the inter- and intra-class nearest-neighbour score.

    With the :math:`k` nearest :math:`N_i` of image :math:`i`, split by label into :math:`N_i^+` and
    :math:`N_i^-`, and the distance :math:`d_i^-` to the nearest image of another class:

    .. math::
        r_{ij} = \frac{d_{ij}}{d_i^-}, \quad
        s = 1 - \operatorname{mean}_i \operatorname{mean}_{j \in N_i^+}
            \frac{r_{ij}}{\max(1, \max_j r_{ij})}, \quad
        t = \operatorname{mean}_i \operatorname{mean}_{j \in N_i^-} \frac{d_{ij}}{\max d}, \quad
        \gamma = \operatorname{mean}_i \frac{|N_i^+|}{k}

    and the score :math:`\tfrac12 (\tfrac{s + t}{2} + \gamma)`. A mean over :math:`i` is over those
    whose set is not empty; :math:`t = 1` where every :math:`N_i^-` is empty, :math:`s = 0` where
    every :math:`N_i^+` is. The share :math:`\gamma` of right neighbours has no gradient.

    Args:
        embeddings: ``(n, D)``.
        labels: ``(n,)`` int64.
        neighbours: :math:`k`; fewer where there are fewer images.

    Returns:
        A scalar, 0 for perfectly separated classes (and for a single image).
    """
    if len(embeddings) < 2:
        return embeddings.sum() * 0
    table = distances(embeddings, embeddings)
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    nearest = table.detach().masked_fill(itself, torch.inf)
    nearest = nearest.topk(min(neighbours, len(labels) - 1), largest=False).indices
    near, alike = table.gather(1, nearest), same.gather(1, nearest)
    closest_other = table.masked_fill(same, torch.inf).amin(1, keepdim=True)
    ratios = torch.where(alike, near / (closest_other + _EPSILON), 0)
    ratios = ratios / ratios.amax(1, keepdim=True).clamp(min=1)
    intra = 1 - _mean_of_means(ratios, alike, empty=1.0)
    inter = _mean_of_means(near / table.amax(), ~alike, empty=1.0)
    purity = alike.to(table.dtype).mean()
    return -(((intra + inter) / 2 + purity) / 2).log()


def _mean_of_means(values: Tensor, chosen: Tensor, *, empty: float) -> Tensor:
    """Mean over rows of the mean of the chosen entries; rows without any do not count."""
    counts = chosen.sum(1)
    if not bool(counts.any()):
        return values.new_tensor(empty)
    means = torch.where(chosen, values, 0).sum(1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum()
