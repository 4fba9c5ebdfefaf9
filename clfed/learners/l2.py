r"""Plain distance to the old weights (as compared by Smith et al. 2023, arXiv 2203.17269).

.. math:: L = L_{\mathrm{classification}} + \frac{\lambda}{2} \sum_j (\theta_j - \theta^-_j)^2

The anchor is the network of the previous experience, or the pre-trained one in the first. With
pre-trained weights this was the best of the compared regularisers; from random ones it is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from clfed.backbones.encoder import Transform
from clfed.learners.anchors import ANCHOR, Anchored, set_anchor, weights_of

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class L2(Anchored):
    r"""Pull every weight equally towards what it was.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda`.
        anchor_first: Anchor the first experience too, at the weights that the backbone came with.
        options: Options of :class:`~clfed.learners.anchors.Anchored`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 0.01,
        anchor_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, weight=weight, **options)
        self.anchor_first = anchor_first

    def begin_experience(self, experience: Experience) -> None:
        """Anchor ready weights, if they are to be kept from the start."""
        super().begin_experience(experience)
        if self.anchor_first and self.length and not any(n.startswith(ANCHOR) for n in self.kept):
            weights = weights_of(self)
            set_anchor(self, anchors={n: w for n, w in weights.items() if n.startswith("backbone")})

    def consolidate(self, experience: Experience) -> None:
        """Anchor the present weights."""
        set_anchor(self)
