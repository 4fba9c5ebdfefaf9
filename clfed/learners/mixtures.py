r"""Several prototypes a class: who belongs to which, and how they move.

The pieces of PALM (Lu et al. 2024, arXiv 2402.02653), after the balanced assignments of Cuturi 2013
(arXiv 1306.0895). ``N`` samples, ``J`` prototypes of all classes together, ``M`` columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# The images of a class with a single one in the batch go to all its prototypes alike; which of
# them are the largest would be a matter of rounding.
TIE = 1e-3


def sinkhorn(scores: Tensor, allowed: Tensor | None = None, rounds: int = 3) -> Tensor:
    r"""Assign samples to prototypes so that each prototype gets about the same share.

    Scales :math:`\exp s` in turn: every prototype to equal mass, every sample to mass 1.

    Args:
        scores: :math:`s`, ``(N, J)``.
        allowed: ``(N, J)`` bool; where False the assignment is 0, which makes blocks of classes
            that are balanced each on its own. Every sample needs one True.
        rounds: Times of both.

    Returns:
        ``(N, J)``; rows sum to 1, columns only about to equal values.

    Example:
        >>> z, p = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.eye(2)
        >>> [round(x, 6) for x in sinkhorn(z @ p.T / 0.05)[1].tolist()]
        [0.016503, 0.983497]
    """
    logs = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    for _ in range(rounds):
        mass = logs.logsumexp(0, keepdim=True)
        # A prototype that no sample may take keeps its zeros.
        logs = logs - mass.masked_fill(mass.isneginf(), 0.0)
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


def own_shares(assignments: Tensor, own: Tensor, top: int) -> Tensor:
    """Cut assignments to the own class and the largest ones; rows sum to 1 again.

    Args:
        assignments: ``(N, J)``.
        own: ``(N, J)`` bool, prototypes of each sample's class.
        top: Number of the largest that remain, and with the last of them all that tie with it.

    Example:
        >>> own = torch.tensor([[True, True, False]])
        >>> own_shares(torch.tensor([[0.1, 0.3, 0.6]]), own, top=1).tolist()
        [[0.0, 1.0, 0.0]]
    """
    cut = assignments.masked_fill(~own, 0.0)
    last = cut.topk(min(top, cut.shape[1]), dim=1).values[:, -1:]
    return F.normalize(cut.masked_fill(cut < (1 - TIE) * last, 0.0), p=1, dim=1)


def moved_prototypes(prototypes: Tensor, z: Tensor, shares: Tensor, momentum: float) -> Tensor:
    """Let prototypes follow their samples; those without any stay.

    Args:
        prototypes: ``(J, M)``, unit rows.
        z: ``(N, M)``, unit rows.
        shares: ``(N, J)``.
        momentum: Weight of the old prototype.

    Returns:
        ``(J, M)``, unit rows, with gradient to ``z``.
    """
    mass = shares.sum(0)
    means = F.normalize(shares, p=1, dim=0).T @ z
    moved = F.normalize(momentum * prototypes + (1 - momentum) * means)
    return torch.where(mass[:, None] > 0, moved, prototypes)


def mixture_likelihood(
    z: Tensor, prototypes: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """Mean negative log-likelihood of a mixture; no gradient to the prototypes.

    Args:
        z: ``(N, M)``, unit rows.
        prototypes: ``(J, M)``, unit rows.
        weights: ``(N, J)``, rows sum to 1.
        temperature: What cosines are divided by.

    Example:
        >>> round(float(mixture_likelihood(torch.eye(2), torch.eye(2), torch.eye(2), 1.0)), 4)
        0.3133
    """
    scores = z @ prototypes.detach().T / temperature
    return (scores.logsumexp(1) - (weights * scores).sum(1)).mean()
