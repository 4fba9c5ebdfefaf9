r"""CSD, contrastive supervised distillation (Barletti et al. 2022, arXiv 2205.05476).

Features that were searched yesterday stay searchable: while new classes are learned, each image's
new feature :math:`s_i` is drawn to the old network's features :math:`u_j` of its class.

.. math:: L = \mathrm{CE}_{\text{new}} + L_{\text{triplet}} + L_{KD} + L_{CSD}

.. math:: L_{CSD} = -\mathrm{mean}_i \frac{1}{|P(i)|} \sum_{c \in P(i)}
    \log \frac{\exp(s_i^\top c / \tau)}{\sum_{a \in S \cup U,\, a \ne s_i} \exp(s_i^\top a / \tau)},

all of unit length, :math:`P(i)` the features of the label of :math:`i` by either network. The
cross-entropy trains the outputs of the present classes alone, :math:`L_{KD}` keeps the older ones.

Published settings: ResNet-32 with 64 features, Adam with rate 1e-3, then 1e-5 from the second
experience on, weight decay 5e-4, 800 epochs, batch 128, every weight 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.losses import soft_divergence, supervised_contrast

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


def batch_hard_triplet(embeddings: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    r"""Farthest image of the same class against the nearest of another one, by cosine distance.

    .. math:: \mathrm{mean}_i \max\big(0,\; m + \max_{y_j = y_i} d_{ij}
        - \min_{y_j \ne y_i} d_{ij}\big), \qquad d_{ij} = 1 - \cos(h_i, h_j)

    Args:
        embeddings: :math:`h`, ``(B, D)``.
        labels: ``(B,)`` int64.
        margin: :math:`m`.

    Returns:
        A scalar, the mean over the images that have both a positive and a negative; 0 without any.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> float(batch_hard_triplet(h, torch.tensor([0, 0, 1, 1]), margin=1.5))
        0.5
    """
    unit = F.normalize(embeddings)
    distance = 1 - unit @ unit.T
    negative = labels[:, None] != labels
    positive = ~negative
    positive.fill_diagonal_(False)
    complete = positive.any(1) & negative.any(1)
    # Cosine distances lie in [0, 2], so these fillings never win against a real one.
    farthest = distance.masked_fill(~positive, -1.0).amax(1)
    nearest = distance.masked_fill(~negative, 3.0).amin(1)
    each = (margin + farthest - nearest).clamp(min=0).masked_fill(~complete, 0.0)
    return each.sum() / complete.sum().clamp(min=1)


class CSD(ContinualLearner):
    r"""Learn new classes beside the old network's features; a cosine head answers.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        temperature: Factor of the head's cosines.
        logits: The outputs that the cross-entropy trains; the paper's ``current`` spares the rows
            of old classes.
        margin: Margin of the triplet loss.
        distillation_temperature: Temperature of the old outputs.
        contrast_temperature: :math:`\tau` of the contrast.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`;
            ``classifier={"name": "ncm_cosine"}`` answers by class means instead.

    Raises:
        ConfigError: An option is out of range.
    """

    needs_boundaries = True
    snapshot_parts = ("backbone", "head")
    recall_at: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        temperature: float = 16.0,
        logits: str = "current",
        margin: float = 1.0,
        distillation_temperature: float = 2.0,
        contrast_temperature: float = 0.07,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone, transform, head="cosine", temperature=temperature, logits=logits, **options
        )
        if min(margin, distillation_temperature, contrast_temperature, temperature) <= 0:
            raise ConfigError(
                "CSD needs temperatures and a margin above 0, got "
                f"{temperature}, {distillation_temperature}, {contrast_temperature} and {margin}."
            )
        self.margin = margin
        self.distillation_temperature = distillation_temperature
        self.contrast_temperature = contrast_temperature
        self.terms = (
            LossTerm("classification", 1.0, ("backbone", "head")),
            LossTerm("triplet", 1.0, ("backbone",)),
            LossTerm("distillation", 1.0, ("backbone", "head")),
            LossTerm("contrast", 1.0, ("backbone",)),
        )
        self.known = 0

    def begin_experience(self, experience: Experience) -> None:
        """Note how many outputs the frozen copy has."""
        self.known = len(self.classes)
        super().begin_experience(experience)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the four losses of a batch; those that need an older network begin at 0."""
        logits = self.head(step.h)
        values = {
            "classification": self.classification(logits, step.labels),
            "triplet": batch_hard_triplet(step.h, step.labels, self.margin),
            "distillation": step.h.new_zeros(()),
            "contrast": step.h.new_zeros(()),
        }
        if self.teacher:
            with torch.no_grad():
                before = self.embed(step.images, self.teacher["backbone"]).float()
                old = self.teacher["head"](before)
            values["distillation"] = soft_divergence(
                old[:, : self.known], logits[:, : self.known], self.distillation_temperature
            )
            values["contrast"] = supervised_contrast(
                F.normalize(step.h),
                step.labels,
                temperature=self.contrast_temperature,
                others=F.normalize(before),
                other_labels=step.labels,
            )
        return values
