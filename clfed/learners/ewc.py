r"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3).

.. math:: L = \mathrm{CE} + \frac{\lambda}{2} \sum_t \sum_j F^{(t)}_j (\theta_j - \theta^{(t)}_j)^2,
    \qquad F_j = \frac1N \sum_i \Big(\frac{\partial \log p(y_i | x_i)}{\partial \theta_j}\Big)^2

:math:`F` is the diagonal of the empirical Fisher information, of squared gradients of single
examples; many programs square the mean gradient of a batch instead (``fisher="batch"``), which is
smaller by about the size of the batch where gradients point every way. They need another
:math:`\lambda` too where they leave out the ½.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.anchors import (
    ANCHOR,
    Anchored,
    Tensors,
    accumulated,
    grown,
    set_anchor,
    weights_of,
)
from clfed.learners.base import ContinualLearner
from clfed.learners.gradients import mean_over_gradients, some_of

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

FISHERS = ("sample", "batch")
MODES = ("separate", "online")


def fisher_diagonal(
    learner: ContinualLearner, experience: Experience, samples: int | None, group: int = 1
) -> Tensors:
    """Return the diagonal of the empirical Fisher information by name of the parameter.

    The log-likelihood is the learner's own classification loss, over the outputs that it trains.

    Args:
        learner: A trained one.
        experience: Whose images and labels.
        samples: Images that are drawn for it; None for all.
        group: Examples of which the gradients are averaged before they are squared; 1 is right.
    """

    def surprise(logits: Tensor, labels: Tensor) -> Tensor:
        return learner.classification(logits, labels) * len(labels)

    data = some_of(learner, experience, samples)
    return mean_over_gradients(learner, data, surprise, torch.square, group)


class ElasticWeightConsolidation(Anchored):
    r"""Pull weights towards old values, the more the surer the old classes were of them.

    ``separate`` is the sum above over all old experiences. A sum of parabolas is a parabola,

    .. math:: \sum_t F^{(t)} (\theta - \theta^{(t)})^2 = \bar F (\theta - \bar\theta)^2
        + \mathrm{const}, \qquad \bar F = \sum_t F^{(t)}, \quad
        \bar\theta = \sum_t F^{(t)} \theta^{(t)} / \bar F,

    so two tensors hold it however many experiences there were; the constant is left out.
    ``online`` (Schwarz et al. 2018, arXiv 1805.06370) anchors at the last weights instead, with
    :math:`\bar F = \gamma \bar F^- + F^{(t)}`.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda`. A network that is sure of its training images has next to no Fisher
            information, so it is large: some take 1e7 on Split MNIST.
        mode: ``separate`` or ``online``.
        decay: :math:`\gamma` of older importances, in either mode.
        fisher: ``sample`` or ``batch``, see above; batches are of ``batch_size``.
        samples: Images of an experience that the importance is computed from; None for all.
        options: Options of :class:`~clfed.learners.anchors.Anchored`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 1e5,
        mode: str = "separate",
        decay: float = 1.0,
        fisher: str = "sample",
        samples: int | None = 1000,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, weight=weight, **options)
        if mode not in MODES or fisher not in FISHERS:
            raise ConfigError(
                f"Expected learner.mode of {MODES} and learner.fisher of {FISHERS}, got "
                f"{mode!r} and {fisher!r}."
            )
        if not 0 <= decay <= 1 or (samples is not None and samples < 1):
            raise ConfigError(
                "Expected 0 <= learner.decay <= 1 and learner.samples >= 1 (or null), got "
                f"{decay} and {samples}."
            )
        self.mode, self.decay, self.samples = mode, decay, samples
        self.group = self.batch_size if fisher == "batch" else 1

    def consolidate(self, experience: Experience) -> None:
        """Add the information of this experience to that of the older ones."""
        weights = weights_of(self)
        fresh = fisher_diagonal(self, experience, self.samples, self.group)
        total = accumulated(self, fresh, self.decay)
        anchors = None
        if self.mode == "separate":
            anchors = grown(self, ANCHOR, weights)
            for name, anchor in anchors.items():
                # Where nothing is known yet, the share is 0/0 and the present weight the anchor.
                share = (fresh[name] / total[name]).nan_to_num(nan=1.0)
                anchor.lerp_(weights[name].detach(), share)
        set_anchor(self, total, anchors)
