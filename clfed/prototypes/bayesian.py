r"""Bayesian class prototypes: exact posteriors of class means, and what they predict.

Model (Kessler et al. 2023, arXiv 2301.01828; the recursion is that of Harrison et al. 2019, arXiv
1912.08866): labels :math:`y \sim \mathrm{Cat}(\pi)` with :math:`\pi \sim \mathrm{Dir}(a_0)`,
embeddings :math:`h \mid y = k \sim N(\mu_k, \sigma^2 I)` with :math:`\mu_k \sim N(0, I/\Lambda_0)`.
After counts :math:`n_k` and sums :math:`s_k`

.. math:: \Lambda_k = \Lambda_0 + n_k / \sigma^2, \qquad
          m_k = \frac{s_k / \sigma^2}{\Lambda_k}, \qquad
          v_k = \frac{1}{\Lambda_k} + \sigma^2, \qquad a_k = a_0 + n_k

so a posterior is a function of the memory: it merges and forgets exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from clfed.errors import ConfigError, NotEnoughData
from clfed.prototypes.heads import LinearClassifier
from clfed.prototypes.memory import PrototypeMemory


class Predictive(NamedTuple):
    r"""What is expected of the next embedding, class by class.

    Attributes:
        means: :math:`m_k`, shape ``(C, D)``.
        variances: :math:`v_k`, shape ``(C,)``.
        log_priors: :math:`\log(a_k / \sum_j a_j)`, shape ``(C,)``.
    """

    means: Tensor
    variances: Tensor
    log_priors: Tensor


def predictive(
    counts: Tensor,
    sums: Tensor,
    *,
    noise: float = 0.05,
    precision: float = 1.0,
    concentration: float = 1.0,
) -> Predictive:
    r"""Read the predictive distribution off counts and sums of embeddings.

    Args:
        counts: :math:`n_k`, shape ``(C,)``; zeros leave the prior.
        sums: :math:`s_k`, shape ``(C, D)``.
        noise: :math:`\sigma^2`, positive.
        precision: :math:`\Lambda_0` of a class mean, positive.
        concentration: :math:`a_0` of the Dirichlet prior, positive.

    Raises:
        ConfigError: An option is not positive.

    Example:
        >>> import torch
        >>> p = predictive(torch.tensor([1.0]), torch.tensor([[2.0]]))
        >>> round(float(p.means), 6), round(float(p.variances), 6)
        (1.904762, 0.097619)
    """
    if not min(noise, precision, concentration) > 0:
        raise ConfigError(
            "expected positive noise, precision and concentration, got "
            f"{noise}, {precision} and {concentration}"
        )
    posterior = precision + counts / noise
    weights = concentration + counts
    return Predictive(
        sums / noise / posterior[:, None], 1 / posterior + noise, (weights / weights.sum()).log()
    )


def log_joint(embeddings: Tensor, of: Predictive) -> Tensor:
    r"""Log density of embeddings together with each class.

    .. math:: \log p(h, k) = -\tfrac12 \Big[\frac{\|h - m_k\|^2}{v_k} + D \log 2 \pi v_k\Big]
              + \log \frac{a_k}{\sum_j a_j}

    Written as a linear function of :math:`h` less :math:`\|h\|^2 / 2 v_k`, in float64, where the
    difference of large squares costs nothing.

    Args:
        embeddings: :math:`h`, shape ``(B, D)``.
        of: The predictive distribution of ``C`` classes.

    Returns:
        Shape ``(B, C)`` float64.
    """
    h, (means, variances, log_priors) = embeddings.double(), (part.double() for part in of)
    squares = h.square().sum(1, keepdim=True) - 2 * h @ means.T + means.square().sum(1)
    normaliser = 0.5 * h.shape[1] * (2 * math.pi * variances).log()
    return log_priors - normaliser - 0.5 * squares / variances


@dataclass(frozen=True, eq=False)
class PredictiveClassifier:
    """Scores are log densities of the embedding together with each class.

    Attributes:
        linear: The part that is linear in the embedding.
        variances: :math:`v_k`, shape ``(C,)`` float64, for the part that is not.
    """

    linear: LinearClassifier
    variances: Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the score columns."""
        return self.linear.classes

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score of every class, ``(B, D)`` to ``(B, C)`` float64; the largest wins.

        Raises:
            InvalidEmbedding: Wrong shape, or values that are not finite.
        """
        linear = self.linear.scores(embeddings)
        lengths = embeddings.detach().to("cpu").double().square().sum(1, keepdim=True)
        return linear - 0.5 * lengths / self.variances

    def predict(self, embeddings: Tensor) -> Tensor:
        """Index of the best class, ``(B, D)`` to ``(B,)`` int64; ties go to the first."""
        return self.scores(embeddings).argmax(dim=1)


def bayes(
    memory: PrototypeMemory,
    *,
    noise: float = 0.05,
    precision: float = 1.0,
    concentration: float = 1.0,
    classes: Sequence[str] | None = None,
) -> PredictiveClassifier:
    r"""Posterior predictive of Gaussian class prototypes with a Dirichlet prior over labels.

    Args:
        memory: At least one class, any moments.
        noise: :math:`\sigma^2`, the variance of an embedding about its class mean.
        precision: :math:`\Lambda_0`, prior precision of a class mean.
        concentration: :math:`a_0`, prior count of a class.
        classes: Label space; all classes when omitted.

    Raises:
        ConfigError: An option is not positive.
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
    """
    names = memory.classes if classes is None else tuple(classes)
    if not names:
        raise NotEnoughData(
            "expected at least one class to choose from, got none",
            remedy="Observe some labelled examples first.",
        )
    rows = memory.rows(names)
    counts = memory.counts[rows].double()
    of = predictive(
        counts,
        memory.means()[rows] * counts[:, None],
        noise=noise,
        precision=precision,
        concentration=concentration,
    )
    bias = log_joint(of.means.new_zeros(1, memory.dim), of)[0]
    linear = LinearClassifier(names, of.means / of.variances[:, None], bias)
    return PredictiveClassifier(linear, of.variances)
