r"""Concepts in an embedding, and which of them an answer rests on.

A concept is a direction :math:`c_j`, its activation the projection on it (post-hoc concept
bottleneck, Yuksekgonul, Wang and Zou 2023, arXiv 2205.15480),

.. math:: a_j(x) = \frac{\langle \Psi(x), c_j \rangle}{\lVert c_j \rVert^2}

and a sparse linear classifier on activations says what they mean for the classes. Concepts need
examples: the paper of the method that uses this takes the text vectors of an image-text model. We
have none, so images of one cluster of embeddings are the examples of a concept, and its direction
is a linear classifier of that cluster against all others (concept activation vector, Kim et al.
2018, arXiv 1711.11279), here by ridge regression. The concepts have no names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True, eq=False)
class ConceptBank:
    """Directions in an embedding.

    Attributes:
        directions: ``(J, D)`` float32.
        centre: ``(D,)``, the embedding at which all activations are zero.
    """

    directions: Tensor
    centre: Tensor

    @classmethod
    def of(
        cls, embeddings: Tensor, size: int, rng: torch.Generator, *, ridge: float = 1e-2
    ) -> ConceptBank:
        """Find clusters, and a direction for each.

        Args:
            embeddings: ``(N, D)``.
            size: :math:`J`; at most one for each embedding.
            rng: Of the first centres.
            ridge: Penalty of the linear classifiers for each embedding.
        """
        member = F.one_hot(clusters(embeddings, size, rng)).double()
        centre = embeddings.double().mean(0)
        z = embeddings.double() - centre
        gram = z.T @ z + ridge * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
        directions = torch.linalg.solve(gram, z.T @ (member - member.mean(0))).T
        # A cluster that nothing tells apart has no direction.
        directions = directions[directions.norm(dim=1) > 1e-12]
        return cls(directions.float(), centre.float())

    def activations(self, embeddings: Tensor) -> Tensor:
        r"""Return :math:`a`, ``(B, J)``, of embeddings ``(B, D)``."""
        lengths = self.directions.square().sum(1)
        return (embeddings - self.centre) @ self.directions.T / lengths


def clusters(embeddings: Tensor, size: int, rng: torch.Generator, rounds: int = 20) -> Tensor:
    """Number the clusters of some embeddings (k-means), ``(N,)`` int64 from 0, none empty.

    Args:
        embeddings: ``(N, D)``.
        size: Clusters, at most; centres that attract nothing vanish.
        rng: Draws the first centres among the embeddings.
        rounds: Of assignments and means.
    """
    centres = embeddings[torch.randperm(len(embeddings), generator=rng)[:size]]
    for _ in range(rounds):
        member = F.one_hot(_nearest(embeddings, centres)).to(embeddings.dtype)
        centres = member.T @ embeddings / member.sum(0)[:, None]
    return _nearest(embeddings, centres)


def sparse_classifier(
    activations: Tensor, labels: Tensor, classes: int, *, penalty: float = 1e-3, steps: int = 200
) -> tuple[Tensor, Tensor]:
    r"""Fit a softmax classifier with few weights, by proximal gradient descent.

    .. math:: \min_{W, b}\; \mathrm{CE}(W a + b, y) + \rho \lVert W \rVert_1

    Args:
        activations: ``(N, J)``.
        labels: ``(N,)`` int64.
        classes: :math:`K`.
        penalty: :math:`\rho`.
        steps: Of the descent, with momentum.

    Returns:
        Weights ``(K, J)`` and biases ``(K,)``, for activations as they come.
    """
    spread = activations.std(0).clamp(min=1e-12)
    a = F.pad(activations / spread, (0, 1), value=1.0)
    weight = ahead = a.new_zeros(classes, a.shape[1])
    targets = F.one_hot(labels, classes).to(a.dtype)
    # Half the largest curvature of a softmax bounds that of the mean loss.
    rate = 2 * len(a) / float(torch.linalg.matrix_norm(a, 2)) ** 2
    for step in range(steps):
        slope = (torch.softmax(a @ ahead.T, 1) - targets).T @ a / len(a)
        moved = ahead - rate * slope
        shrunk = moved.sign() * (moved.abs() - rate * penalty).clamp(min=0)
        now = torch.cat([shrunk[:, :-1], moved[:, -1:]], 1)
        ahead, weight = now + step / (step + 3) * (now - weight), now
    return weight[:, :-1] / spread, weight[:, -1]


def integrated_gradients(
    function: Callable[[Tensor], Tensor], inputs: Tensor, baseline: Tensor, steps: int = 64
) -> Tensor:
    r"""Share out the change of a function from a baseline among its inputs.

    .. math:: \mathrm{IG}_j = (a_j - a'_j) \int_0^1
              \frac{\partial F(a' + s (a - a'))}{\partial a_j}\, ds, \qquad
              \sum_j \mathrm{IG}_j = F(a) - F(a')

    by the midpoint rule (Sundararajan, Taly and Yan 2017, arXiv 1703.01365).

    Args:
        function: Of ``(B, J)``, gives ``(B,)``, each row on its own.
        inputs: :math:`a`, ``(B, J)``.
        baseline: :math:`a'`, ``(J,)``.
        steps: Points of the rule.

    Returns:
        ``(B, J)``.

    Example:
        >>> w = torch.tensor([2.0, -1.0])
        >>> integrated_gradients(lambda a: a @ w, torch.tensor([[1.0, 3.0]]), torch.zeros(2))
        tensor([[ 2., -3.]])
    """
    total = torch.zeros_like(inputs)
    for step in range(steps):
        at = baseline + (step + 0.5) / steps * (inputs - baseline)
        at = at.detach().requires_grad_(True)
        with torch.enable_grad():
            total += torch.autograd.grad(function(at).sum(), at)[0]
    return (inputs - baseline) * total / steps


def _nearest(embeddings: Tensor, centres: Tensor) -> Tensor:
    near = torch.cdist(embeddings, centres).argmin(1)
    places: Tensor = torch.unique(near, return_inverse=True)[1]
    return places
