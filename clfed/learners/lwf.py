r"""Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282).

.. math:: L = \mathrm{CE}(o_{\mathrm{current}}, y)
    - \lambda \frac1B \sum_i \sum_{k \in \mathrm{old}} p^-_{ik} \log p_{ik}, \qquad
    p = \mathrm{softmax}(o_{\mathrm{old}} / T), \quad
    p^- = \mathrm{softmax}(o^-_{\mathrm{old}} / T)

The frozen network of the previous experience says what the outputs of old classes were on the
images of today; nothing else of the past is kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.tables import RESERVED, Head


def soft_cross_entropy(new: Tensor, old: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Mean cross-entropy of softened outputs to the softened outputs of a teacher.

    .. math:: -\frac1B \sum_i \sum_k \mathrm{softmax}(o^-_i / T)_k \log \mathrm{softmax}(o_i / T)_k

    It exceeds the Kullback-Leibler divergence by the teacher's entropy, which has no gradient.

    Args:
        new: Student's outputs :math:`o`, ``(B, K)``.
        old: Teacher's outputs :math:`o^-`, ``(B, K)``.
        temperature: :math:`T`; the gradient shrinks as :math:`1 / T^2`.

    Returns:
        A scalar.

    Example:
        >>> round(float(soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 2)), 6)
        0.693147
    """
    return F.cross_entropy(new / temperature, (old / temperature).softmax(1))


class LearningWithoutForgetting(ContinualLearner):
    r"""Cross-entropy on the current classes, distillation on the classes of the teacher.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda` of the distillation.
        distillation_temperature: :math:`T`.
        squared_temperature: Multiply the distillation by :math:`T^2`, as Hinton et al. 2015
            (arXiv 1503.02531) advise; here the weight alone decides.
        logits: Outputs of the classification loss.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: A negative weight, or a temperature that is not positive.
    """

    needs_boundaries = True
    snapshot_parts = ("backbone", "head")

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 1.0,
        distillation_temperature: float = 2.0,
        squared_temperature: bool = False,
        logits: str = "current",
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, logits=logits, **options)
        if not weight >= 0 or not distillation_temperature > 0:
            raise ConfigError(
                "Expected learner.weight >= 0 and learner.distillation_temperature > 0, got "
                f"{weight} and {distillation_temperature}."
            )
        self.distillation_temperature = distillation_temperature
        factor = distillation_temperature**2 if squared_temperature else 1.0
        self.terms = (
            *self.terms,
            LossTerm("distillation", weight * factor, ("backbone", "head")),
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the classification loss and what the comparison with the teacher gives."""
        logits = self.head(step.h)
        values = {term.name: step.h.new_zeros(()) for term in self.terms}
        values["classification"] = self.classification(logits, step.labels)
        if self.teacher:
            with torch.no_grad():
                before = self.embed(step.images, self.teacher["backbone"]).float()
                old = self.teacher["head"](before)[:, : self.taught]
            values |= self.compared(step.h, before, logits[:, : self.taught], old)
        return values

    def compared(
        self, embeddings: Tensor, before: Tensor, logits: Tensor, old: Tensor
    ) -> dict[str, Tensor]:
        """Compare the network with its teacher.

        Args:
            embeddings: ``(B, D)``, with gradient.
            before: ``(B, D)``, the teacher's.
            logits: ``(B, K)`` of the teacher's classes, with gradient.
            old: ``(B, K)``, the teacher's.
        """
        return {"distillation": soft_cross_entropy(logits, old, self.distillation_temperature)}

    @property
    def taught(self) -> int:
        """Classes that the teacher knows; they are the first rows of the head."""
        head = cast(Head, self.teacher["head"])
        return sum(not name.startswith(RESERVED) for name in head.classes)
