r"""Distillation of features (as compared by Smith et al. 2023, arXiv 2203.17269).

.. math:: L = L_{\mathrm{classification}} + \lambda \frac1B \sum_i \|f(x_i) - f^-(x_i)\|^2

:math:`f` ends at the penultimate layer; the head of old classes is not held by anything but the
choice of outputs that the classification loss trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm, Step


def feature_distance(embeddings: Tensor, before: Tensor) -> Tensor:
    r"""Mean squared Euclidean distance of embeddings to older ones of the same images.

    .. math:: \frac1B \sum_i \|h_i - h^-_i\|^2

    Args:
        embeddings: ``(B, D)``.
        before: ``(B, D)``.

    Returns:
        A scalar.

    Example:
        >>> float(feature_distance(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)))
        5.0
    """
    return (embeddings - before).square().sum(1).mean()


class FeatureDistillation(ContinualLearner):
    r"""Keep embeddings where the network of the previous experience had them.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda`.
        logits: Outputs of the classification loss.
        loss: Kind of the classification loss.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: A negative weight.
    """

    needs_boundaries = True
    snapshot_parts = ("backbone",)

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 0.01,
        logits: str = "current",
        loss: str = "bce",
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, logits=logits, loss=loss, **options)
        if not weight >= 0:
            raise ConfigError(f"Expected learner.weight >= 0, got {weight}.")
        self.terms = (*self.terms, LossTerm("features", weight, ("backbone",)))

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the classification loss and the distance to the teacher's embeddings."""
        values = {**super().losses(step), "features": step.h.new_zeros(())}
        if self.teacher:
            with torch.no_grad():
                before = self.embed(step.images, self.teacher["backbone"]).float()
            values["features"] = feature_distance(step.h, before)
        return values
