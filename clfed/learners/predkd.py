r"""Distillation of predictions by logistic outputs (Smith et al. 2023, arXiv 2203.17269; LwF.MC).

.. math:: L = \frac1B \sum_i \Big(
    \sum_{k \in \mathrm{current}} \mathrm{BCE}(\sigma(o_{ik}), [y_i = k])
    + \lambda \sum_{k \in \mathrm{old}} \mathrm{BCE}(\sigma(o_{ik}), \sigma(o^-_{ik})) \Big)
    + \lambda_F \frac1B \sum_i \|f(x_i) - f^-(x_i)\|^2
    + \frac{\lambda_2}{2} \|\theta - \theta^-\|^2
    + \frac{\lambda_E}{2} \sum_j F_j (\theta_j - \theta^-_j)^2

The paper compares the four regularisers and their pairs in one head that grows. From random
weights the first alone was best; from pre-trained ones it was best together with L2. Its weights
were not published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.anchors import accumulated, penalty, set_anchor
from clfed.learners.base import LossTerm, Step
from clfed.learners.ewc import fisher_diagonal
from clfed.learners.featkd import feature_distance
from clfed.learners.lwf import LearningWithoutForgetting

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


def binary_distillation(new: Tensor, old: Tensor) -> Tensor:
    r"""Mean over images of the sum over classes of logistic losses to a teacher.

    .. math:: \frac1B \sum_i \sum_k \mathrm{BCE}(\sigma(o_{ik}), \sigma(o^-_{ik}))

    At :math:`o = o^-` it is the entropy of the teacher and its gradient is zero.

    Args:
        new: Student's outputs :math:`o`, ``(B, K)``.
        old: Teacher's outputs :math:`o^-`, ``(B, K)``.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> round(float(binary_distillation(torch.zeros(1, 2), torch.zeros(1, 2))), 6)
        1.386294
    """
    return F.binary_cross_entropy_with_logits(new, old.sigmoid(), reduction="sum") / len(new)


class PredictionDistillation(LearningWithoutForgetting):
    r"""Logistic losses on current classes, and to the teacher's outputs on old ones.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda` of the distillation.
        featkd: :math:`\lambda_F` of the distance of features; 0 leaves the term out.
        l2: :math:`\lambda_2` of the distance of weights; 0 leaves the term out.
        ewc: :math:`\lambda_E` of the distance by importance, of one accumulated importance
            (:class:`~clfed.learners.ewc.ElasticWeightConsolidation` with ``mode="online"``); 0
            leaves the term out.
        samples: Images of an experience that the importance is computed from; None for all.
        loss: Kind of the classification loss.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: A negative weight or no samples.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 1.0,
        featkd: float = 0.0,
        l2: float = 0.0,
        ewc: float = 0.0,
        samples: int | None = 1000,
        loss: str = "bce",
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, weight=weight, loss=loss, **options)
        if not (featkd >= 0 and l2 >= 0 and ewc >= 0) or (samples is not None and samples < 1):
            raise ConfigError(
                "Expected learner.featkd, learner.l2 and learner.ewc >= 0 and learner.samples >= 1 "
                f"(or null), got {featkd}, {l2}, {ewc} and {samples}."
            )
        self.samples = samples
        everywhere = ("backbone", "head")
        further = (
            LossTerm("features", featkd, ("backbone",)),
            LossTerm("l2", l2 / 2, everywhere),
            LossTerm("ewc", ewc / 2, everywhere),
        )
        self.terms = (*self.terms, *(term for term in further if term.weight))
        self.further = {term.name for term in further if term.weight}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Add the penalties to the comparison with the teacher."""
        values = super().losses(step)
        for name in self.further & {"l2", "ewc"}:
            values[name] = penalty(self, weighted=name == "ewc")
        return values

    def compared(
        self, embeddings: Tensor, before: Tensor, logits: Tensor, old: Tensor
    ) -> dict[str, Tensor]:
        """Compare outputs and, where asked for, embeddings with the teacher's."""
        values = {"distillation": binary_distillation(logits, old)}
        if "features" in self.further:
            values["features"] = feature_distance(embeddings, before)
        return values

    def finish(self, experience: Experience) -> None:
        """Set the anchor of the penalties."""
        if not self.length or not self.further & {"l2", "ewc"}:
            return
        importances = None
        if "ewc" in self.further:
            importances = accumulated(self, fisher_diagonal(self, experience, self.samples))
        set_anchor(self, importances)
