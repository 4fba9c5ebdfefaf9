r"""Semantic drift compensation (Yu et al. 2020, arXiv 2004.00440).

.. math:: \mu_k \leftarrow \mu_k + \frac{\sum_i w_{ik} (h_i - h_i^-)}{\sum_i w_{ik}}, \qquad
    w_{ik} = \exp\Big(-\frac{\|h_i^- - \mu_k\|^2}{2 \sigma^2}\Big) + 10^{-5}

Old class means move like the images of the present experience that lay near them. The published
:math:`\sigma = 0.3` is for embeddings of unit length; here it counts in root mean square lengths of
the older network's embeddings, which is the same for unit vectors and fits any scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.drifting import DistilledDrifting
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.drift import weighted_drift

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class SemanticDriftCompensation(DistilledDrifting):
    """Move each old class mean by the drift of the present images, near ones first.

    Args:
        backbone: The network.
        transform: Its input transform.
        sigma: Width of the neighbourhood, in root mean square lengths of the embeddings.
        options: Options of :class:`~clfed.learners.drifting.DistilledDrifting`.

    Raises:
        ConfigError: ``sigma`` is not positive.
    """

    def __init__(
        self, backbone: nn.Module, transform: Transform, *, sigma: float = 0.3, **options: Any
    ) -> None:
        super().__init__(backbone, transform, **options)
        if not sigma > 0:
            raise ConfigError(f"Expected learner.sigma > 0, got {sigma}.")
        self.sigma = sigma

    def drifted(
        self, memory: PrototypeMemory, experience: Experience, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add the weighted mean drift."""
        means = memory.means()
        return means + weighted_drift(means, before, after, self.sigma * length(before)), None


def length(embeddings: Tensor) -> float:
    r"""Root mean square length :math:`\sqrt{\frac1N \sum_i \|h_i\|^2}` of ``(N, D)`` embeddings.

    Example:
        >>> import torch
        >>> length(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        5.0
    """
    return max(float(embeddings.double().square().sum(1).mean().sqrt()), 1e-12)
