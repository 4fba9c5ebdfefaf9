r"""Statistics that follow a network which goes on learning.

When the network changes, the sums of old classes belong to the old one. What moves them is a guess
of a method; here is the bookkeeping that keeps the counts and the spread, and the identity of the
embedding that the result claims to be of, and two guesses that are plain formulas.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clfed.errors import InvalidEmbedding, UnsupportedStatistics
from clfed.prototypes.covariance import solve
from clfed.prototypes.fixed_point import RANGE, RESOLUTION
from clfed.prototypes.memory import PrototypeMemory
from clfed.prototypes.moments import class_scatter


def readdressed(memory: PrototypeMemory, embedding_id: str) -> PrototypeMemory:
    """Return the same statistics under the name of another embedding.

    Args:
        memory: Of an older network.
        embedding_id: Identity of the network that they are used with from now on.
    """
    return replace(memory, embedding_id=embedding_id)


def moved(
    memory: PrototypeMemory,
    means: Tensor,
    embedding_id: str,
    covariances: Tensor | None = None,
) -> PrototypeMemory:
    r"""Return statistics with other class means: :math:`s_c = n_c \mu_c`, the counts stay.

    Second moments by class move along, :math:`Q_c = n_c (\Sigma_c + \mu_c \mu_c^\top)`, with the
    covariances given, or else with those that the memory holds.

    Args:
        memory: Of an older network; second moments ``none`` or ``class``.
        means: :math:`\mu`, ``(C, D)``, in the order of ``memory.classes``.
        embedding_id: Identity of the network that they are used with from now on.
        covariances: :math:`\Sigma`, biased, ``(C, D, D)``.

    Raises:
        InvalidEmbedding: The means are not finite, out of range or of the wrong shape.
        UnsupportedStatistics: The memory holds one matrix for all classes, which cannot be moved.
    """
    if memory.moments == "shared":
        raise UnsupportedStatistics(
            "expected a memory with second moments by class or none, got shared ones"
        )
    expected = (len(memory), memory.dim)
    if tuple(means.shape) != expected or not bool((means.abs() <= RANGE).all()):
        raise InvalidEmbedding(
            f"expected finite class means of shape {expected} within ±{RANGE:g}, got shape "
            f"{tuple(means.shape)}"
        )
    means = means.double()
    counts = memory.counts.double()
    sums = (means * counts[:, None] / RESOLUTION).round().long()
    outer = memory.outer
    if outer is not None:
        spread = (
            class_scatter(memory)
            if covariances is None
            else covariances.double() * counts[:, None, None]
        )
        about_zero = spread + (means * counts[:, None])[:, :, None] * means[:, None, :]
        # Products in either order differ in the last bit; the sums must be symmetric exactly.
        symmetric = (about_zero + about_zero.mT) / (2 * RESOLUTION**2)
        outer = symmetric.round().to(torch.int64)
    return PrototypeMemory.of(
        memory.classes, memory.counts, sums, embedding_id, moments=memory.moments, outer=outer
    )


def weighted_drift(
    prototypes: Tensor, before: Tensor, after: Tensor, sigma: float, floor: float = 1e-5
) -> Tensor:
    r"""Semantic drift compensation (Yu et al. 2020, arXiv 2004.00440).

    .. math:: \Delta_k = \frac{\sum_i w_{ik} (h_i - h_i^-)}{\sum_i w_{ik}}, \qquad
        w_{ik} = \exp\Big(-\frac{\|h_i^- - \mu_k\|^2}{2 \sigma^2}\Big) + \varepsilon

    A prototype moves like the present examples near it moved; where none is near, the floor makes
    it the plain mean. Exact where all of space is translated alike.

    Args:
        prototypes: :math:`\mu`, ``(C, D)``, of the older network.
        before: :math:`h^-`, ``(N, D)``, by the older network.
        after: :math:`h`, ``(N, D)``, by the present one.
        sigma: :math:`\sigma`, positive, in the unit of the embeddings.
        floor: :math:`\varepsilon`, positive.

    Returns:
        ``(C, D)`` float64, what is to be added to the prototypes.

    Example:
        >>> before, after = torch.tensor([[0.0], [9.0]]), torch.tensor([[2.0], [4.0]])
        >>> weighted_drift(torch.tensor([[0.0]]), before, after, sigma=1.0).round().tolist()
        [[2.0]]
    """
    old = before.double()
    squares = torch.cdist(prototypes.double(), old).square()
    weights = (-squares / (2 * sigma**2)).exp() + floor
    drift: Tensor = weights @ (after.double() - old) / weights.sum(1, keepdim=True)
    return drift


def linear_map(cross: Tensor, gram: Tensor, penalty: float, *, identity: bool = True) -> Tensor:
    r"""The matrix that best takes older embeddings to present ones, from sums over the examples.

    .. math:: C = \sum_i h_i h_i^{-\top}, \quad G = \sum_i h_i^- h_i^{-\top}, \qquad
        A = C (G + \lambda I)^{-1} \quad\text{or}\quad A = I + (C - G) (G + \lambda I)^{-1}

    Learnable drift compensation (Gomez-Villa et al. 2024, arXiv 2407.08536) in closed form; both
    sums of several nodes add up. The first form shrinks the map towards zero, which deletes what
    old prototypes have in directions that no present example shows; the second one shrinks the
    *drift* towards zero and leaves such directions alone. Without a penalty they agree wherever
    there are examples, and a linear drift is found exactly.

    Args:
        cross: :math:`C`, ``(D, D)``.
        gram: :math:`G`, ``(D, D)``.
        penalty: :math:`\lambda` as a fraction of the mean diagonal entry of :math:`G`, >= 0.
        identity: Which form: the second one, or the first.

    Returns:
        :math:`A`, ``(D, D)`` float64.

    Example:
        >>> old = torch.eye(2)
        >>> new = old @ torch.tensor([[2.0, 0.0], [1.0, 1.0]]).T
        >>> linear_map(new.T @ old, old.T @ old, 0.0).tolist()
        [[2.0, 0.0], [1.0, 1.0]]
    """
    cross, gram = cross.double(), gram.double()
    eye = torch.eye(len(gram), dtype=torch.float64)
    known = gram + penalty * gram.trace() / len(gram) * eye
    if identity:
        return eye + solve(known, (cross - gram).T).T
    return solve(known, cross.T).T


def through(memory: PrototypeMemory, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Class means and covariances sent through a linear map, :math:`A\mu` and :math:`A\Sigma A^T`.

    Args:
        memory: Second moments ``none`` or ``class``.
        matrix: :math:`A`, ``(D, D)`` float64.

    Returns:
        ``(C, D)`` and, where second moments by class are kept, ``(C, D, D)``, both float64.
    """
    covariances = None
    if memory.outer is not None:
        spread = class_scatter(memory) / memory.counts.double()[:, None, None]
        covariances = matrix @ spread @ matrix.T
    return memory.means() @ matrix.T, covariances
