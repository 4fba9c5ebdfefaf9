r"""Memory aware synapses (Aljundi et al. 2018, arXiv 1711.09601, eq. 2 to 4).

.. math:: L = \mathrm{CE} + \frac{\lambda}{2} \sum_j \Omega_j (\theta_j - \theta^-_j)^2, \qquad
    \Omega_j = \frac1N \sum_i \Big| \frac{\partial \|o(x_i)\|^2}{\partial \theta_j} \Big|

How much a weight would change the outputs, whatever the labels say. :math:`o` are the outputs of
all classes seen so far. The paper and Avalanche write the penalty without the ½.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.anchors import (
    Anchored,
    accumulated,
    set_anchor,
)
from clfed.learners.gradients import mean_over_gradients, some_of

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class MemoryAwareSynapses(Anchored):
    r"""Pull weights towards old values, the more the outputs depend on them.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda`.
        alpha: None sums the importances of all experiences, as the paper does; a number mixes
            them, :math:`\Omega \leftarrow \alpha \Omega^- + (1 - \alpha) \Omega`, as Avalanche
            does with ½.
        samples: Images of an experience that the importance is computed from; None for all.
        options: Options of :class:`~clfed.learners.anchors.Anchored`.

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 1.0,
        alpha: float | None = None,
        samples: int | None = 1000,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, weight=weight, **options)
        if (alpha is not None and not 0 <= alpha <= 1) or (samples is not None and samples < 1):
            raise ConfigError(
                "Expected 0 <= learner.alpha <= 1 (or null) and learner.samples >= 1 (or null), "
                f"got {alpha} and {samples}."
            )
        self.alpha, self.samples = alpha, samples

    def consolidate(self, experience: Experience) -> None:
        """Add how sensitive the outputs are now to what was kept."""

        def length(logits: Tensor, labels: Tensor) -> Tensor:
            return logits[:, : len(self.classes)].square().sum()

        data = some_of(self, experience, self.samples)
        fresh = mean_over_gradients(self, data, length, torch.abs)
        if self.alpha is None or not self.kept:  # nothing to mix with after the first experience
            set_anchor(self, accumulated(self, fresh))
            return
        share = {name: (1 - self.alpha) * value for name, value in fresh.items()}
        set_anchor(self, accumulated(self, share, self.alpha))
