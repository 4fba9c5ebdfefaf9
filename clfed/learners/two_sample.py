r"""Do two samples come from one law? Three distances, and what they are where the answer is yes.

``mmd2`` is the squared maximum mean discrepancy without bias (Gretton et al. 2012), ``gauss_w2``
the squared Wasserstein distance of the Gaussians with the samples' moments, ``hsic`` the
Hilbert-Schmidt independence criterion as the evolved mixture model uses it (Ye & Bors 2022, arXiv
2207.05080). The last one measures whether *pairs* depend on each other. Samples that were drawn
separately are not paired, so its value stays where it is whatever the shift between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


def bandwidth(points: Tensor) -> Tensor:
    r"""Return :math:`\sqrt{m / 2}` with the median :math:`m` of the squared distances of pairs.

    Example:
        >>> round(bandwidth(torch.tensor([[0.0], [2.0]])).item(), 4)
        1.4142
    """
    if len(points) < 2:
        return points.new_ones(())
    median = torch.nn.functional.pdist(points).square().median()
    return (median / 2).sqrt() if median > 0 else points.new_ones(())


def gram(points: Tensor, width: Tensor) -> Tensor:
    """Return the Gaussian kernel of all pairs of ``(N, D)``, ``(N, N)``."""
    return torch.exp(-torch.cdist(points, points).square() / (2 * width.square()))


def mmd2(left: Tensor, right: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy without bias, by a kernel of the pooled median bandwidth.

    .. math:: \frac{1}{m(m-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{n(n-1)} \sum_{i \ne j}
        k(y_i, y_j) - \frac{2}{mn} \sum_{ij} k(x_i, y_j)

    Args:
        left: ``(m, D)``, two rows at least.
        right: ``(n, D)``, two rows at least.

    Returns:
        A scalar, about 0 for one law (it may be negative).
    """
    pooled = torch.cat([left, right])
    members = torch.arange(len(pooled)) < len(left)
    return _mmd2_of_splits(gram(pooled, bandwidth(pooled)), members[None]).squeeze(0)


def _mmd2_of_splits(kernel: Tensor, members: Tensor) -> Tensor:
    """The same for many splits ``(P, N)`` bool of one pooled sample at once, ``(P,)``."""
    one = members.to(kernel.dtype)
    m, n = one[0].sum(), (1 - one[0]).sum()
    toward = one @ kernel  # (P, N): each point's kernel mass on the left sample
    diagonal = kernel.diagonal()
    left = (toward * one).sum(1) - one @ diagonal
    cross = (toward * (1 - one)).sum(1)
    right = kernel.sum() - diagonal.sum() - left - 2 * cross
    return left / (m * (m - 1)) + right / (n * (n - 1)) - 2 * cross / (m * n)


def gauss_w2(left: Tensor, right: Tensor) -> Tensor:
    r"""Squared Wasserstein distance of two Gaussians with the samples' means and covariances.

    .. math:: \|\mu_1 - \mu_2\|^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2
        - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}\bigr)

    Args:
        left: ``(m, D)``, two rows at least.
        right: ``(n, D)``, two rows at least.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> round(gauss_w2(x, x + 3).item(), 4)
        9.0
    """
    one, two = _covariance(left), _covariance(right)
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    means = (left.mean(0) - right.mean(0)).square().sum().double()
    distance: Tensor = means + one.trace() + two.trace() - 2 * mixed
    return distance.to(left.dtype)


def _covariance(points: Tensor) -> Tensor:
    centred = (points - points.mean(0)).double()
    return centred.T @ centred / (len(points) - 1)


def hsic(left: Tensor, right: Tensor) -> Tensor:
    r"""Biased Hilbert-Schmidt independence criterion of pairs, each side's median bandwidth.

    .. math:: \frac1n \operatorname{tr}(K H L H), \qquad H = I - \tfrac1n \mathbf 1 \mathbf 1^\top

    Args:
        left: ``(n, D)``.
        right: ``(n, E)``, row by row the partner of ``left``.
    """
    one, two = (gram(points, bandwidth(points)) for points in (left, right))
    centred = one - one.mean(0) - one.mean(1, keepdim=True) + one.mean()
    return (centred * two).sum() / len(left)


CRITERIA: dict[str, Criterion] = {"mmd2": mmd2, "gauss_w2": gauss_w2, "hsic": hsic}


def permuted(
    criterion: str, left: Tensor, right: Tensor, permutations: int, rng: torch.Generator
) -> Tensor:
    """Return a criterion of random splits of the pooled sample, ``(permutations,)``.

    Under one law the true split is one of them; a quantile is the threshold of a test.

    Args:
        criterion: A name in ``CRITERIA``.
        left: ``(m, D)``.
        right: ``(n, D)``.
        permutations: Splits.
        rng: Draws them.
    """
    pooled = torch.cat([left, right])
    orders = torch.rand(permutations, len(pooled), generator=rng).argsort(1)
    if criterion == "mmd2":
        return _mmd2_of_splits(gram(pooled, bandwidth(pooled)), orders < len(left))
    of, m = CRITERIA[criterion], len(left)
    return torch.stack([of(pooled[order[:m]], pooled[order[m:]]) for order in orders])
