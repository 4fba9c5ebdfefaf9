r"""PRD, prototype-sample relation distillation (Asadi et al. 2023, arXiv 2303.14771).

Supervised contrast shapes the encoder with what is new, a prototype follows each class, and old
prototypes keep their similarities to the *new* images as they were before the experience:

.. math:: L = L_{SC}(g(h)) + \alpha\, \mathrm{mean}_i [1 - \cos(\mathrm{sg}[h_i], p_{y_i})]
    + \beta\, \mathrm{mean}_k \mathrm{KL}(a_k \,\|\, b_k),

.. math:: a_k = \mathrm{softmax}_i(\cos(p_k^-, h_i^-) / \kappa), \qquad
    b_k = \mathrm{softmax}_i(\cos(p_k, h_i) / \kappa),

with :math:`h^-, p^-` of the network before the experience. That is the paper's relation, over the
``samples`` of a batch for each old prototype. The code that was released compares, for each image,
the distributions over the ``classes`` of each earlier experience instead. No image is kept.

Published settings: SGD, lr 0.01, batch 128, 100 epochs an experience (+120 in the first), alpha 2,
beta 4 in the task-incremental setting; alpha 4 or 8, beta 4 to 12 in the class-incremental one.
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

RELATIONS = ("samples", "classes")


def tightness(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    r"""Mean of :math:`1 - \cos(h_i, p_{y_i})`; only the prototypes learn from it.

    Args:
        embeddings: ``(B, D)``.
        prototypes: ``(B, D)``, the prototype of each embedding's class.

    Example:
        >>> float(tightness(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])))
        1.0
    """
    return 1 - F.cosine_similarity(embeddings.detach(), prototypes).mean()


def relation_over_samples(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], temperature: float
) -> Tensor:
    r"""Mean over prototypes of :math:`\mathrm{KL}(a_k \| b_k)`, distributions over images.

    Args:
        old: :math:`h^-` ``(B, D)`` and :math:`p^-` ``(K, D)``.
        new: :math:`h` and :math:`p`, of the same shapes.
        temperature: :math:`\kappa`.

    Example:
        >>> h, p = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
        >>> float(relation_over_samples((h, p), (2 * h, 3 * p), 0.2))
        0.0
    """
    before, now = (F.normalize(p) @ F.normalize(h).T for h, p in (old, new))
    return soft_divergence(before, now, temperature)


def relation_over_classes(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], heads: Tensor, temperature: float
) -> Tensor:
    r"""Sum over earlier experiences of the divergence over their classes, mean over images.

    Scores are :math:`h_i^\top p_k / \|p_k\|`; an experience of one class adds nothing.

    Args:
        old: :math:`h^-` ``(B, D)`` and :math:`p^-` ``(K, D)``.
        new: :math:`h` and :math:`p`, of the same shapes.
        heads: ``(K,)`` int64, the experience that brought each class.
        temperature: :math:`T_d`.

    Example:
        >>> h, p = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
        >>> float(relation_over_classes((h, p), (5 * h, p), torch.tensor([0, 1]), 1.0))
        0.0
    """
    apart = torch.unique(heads)[:, None] != heads
    floor = torch.finfo(torch.float32).min / 2
    before, now = (
        (h @ F.normalize(p).T / temperature)[:, None].masked_fill(apart, floor).log_softmax(2)
        for h, p in (old, new)
    )
    divergence = (before.exp() * (before - now)).masked_fill(apart, 0.0)
    return divergence.sum() / len(divergence)


class PRD(ContinualLearner):
    """Contrast for the new, relations for the old; the nearest prototype by cosine answers.

    The rows of a cosine head are the prototypes, in the space of the encoder.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        dim: Length of an embedding.
        alpha: Weight of the prototypes' own loss.
        beta: Weight of the relations.
        relation: Over ``samples`` (the paper's) or ``classes`` (the released code's).
        kappa: Temperature of the relations over samples.
        relation_temperature: Temperature of the relations over classes.
        contrast_temperature: Temperature of the supervised contrast.
        base_temperature: The contrast is multiplied by ``contrast_temperature`` over this.
        projection: Length of the vectors that are contrasted.
        prototype_lr: Learning rate of the prototypes, without momentum or decay.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    merges = "approximate"
    needs_boundaries = True
    views: ClassVar[int] = 2
    snapshot_parts = ("backbone", "head")

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        dim: int,
        alpha: float = 4.0,
        beta: float = 8.0,
        relation: str = "samples",
        kappa: float = 0.2,
        relation_temperature: float = 1.0,
        contrast_temperature: float = 0.1,
        base_temperature: float = 0.07,
        projection: int = 128,
        prototype_lr: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, dim=dim, head="cosine", **options)
        if relation not in RELATIONS:
            raise ConfigError(f"Expected learner.relation of {RELATIONS}, got {relation!r}.")
        temperatures = (kappa, relation_temperature, contrast_temperature, base_temperature)
        if min(temperatures) <= 0 or prototype_lr <= 0 or projection < 1 or min(alpha, beta) < 0:
            raise ConfigError(
                "PRD needs temperatures > 0, prototype_lr > 0, projection >= 1, alpha >= 0 and "
                f"beta >= 0, got {temperatures}, {prototype_lr}, {projection}, {alpha} and {beta}."
            )
        self.relation, self.kappa, self.relation_temperature = relation, kappa, relation_temperature
        self.contrast_temperature = contrast_temperature
        self.prototype_lr = prototype_lr
        self.projector = nn.Sequential(
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, projection),
        )
        self.terms = (
            LossTerm(
                "contrast", contrast_temperature / base_temperature, ("backbone", "projector")
            ),
            LossTerm("prototype", alpha, ("head",)),
            LossTerm("relation", beta, ("backbone", "head")),
        )
        #: The experience that brought each class, for relations over classes.
        self.kept["heads"] = torch.empty(0, dtype=torch.int64)
        self.known = 0

    def begin_experience(self, experience: Experience) -> None:
        """Note which prototypes the frozen copy has, and which experience brings the new ones."""
        self.known = len(self.classes)
        super().begin_experience(experience)
        brought = torch.full((len(self.classes) - self.known,), experience.number)
        self.kept["heads"] = torch.cat([self.kept["heads"], brought])

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return contrast, tightness and relations of a batch of two views."""
        z = F.normalize(self.projector(step.h))
        prototypes = self.head.column("weight")
        return {
            "contrast": supervised_contrast(z, step.labels, temperature=self.contrast_temperature),
            "prototype": tightness(step.h, prototypes[step.labels]),
            "relation": self.relations(step) if self.teacher else step.h.new_zeros(()),
        }

    def relations(self, step: Step) -> Tensor:
        """Return how far images and old prototypes stand from one another otherwise than before."""
        with torch.no_grad():
            before = self.embed(step.images, self.teacher["backbone"])
        old = (before, self.teacher.get_parameter("head.weight")[: self.known])
        new = (step.h, self.head.column("weight")[: self.known])
        if self.relation == "samples":
            return relation_over_samples(old, new, self.kappa)
        heads = self.kept["heads"][: self.known].to(step.h.device)
        return relation_over_classes(old, new, heads, self.relation_temperature)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the network, and the prototypes with a rate of their own."""
        prototypes = [*self.head.parameters()]
        network = [*self.backbone.parameters(), *self.projector.parameters()]
        plain = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        if self.optimizer != "sgd":
            plain = {"weight_decay": 0.0}
        return [{"params": network}, {"params": prototypes, "lr": self.prototype_lr, **plain}]
