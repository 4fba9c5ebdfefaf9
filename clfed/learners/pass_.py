r"""Prototype augmentation and self-supervision, PASS (Zhu et al. 2021, CVPR).

.. math:: L = \mathrm{CE}\Big(\frac{o(h)}{\tau}, 4 y + r\Big) + \alpha \|h - h^-\|_2
    + \beta\, \mathrm{CE}\Big(\frac{o(\mu_c + \rho\, \varepsilon)}{\tau}, 4 c\Big), \qquad
    \varepsilon \sim N(0, I), \quad \rho^2 = \frac1C \sum_c \frac{\mathrm{tr}\, \Sigma_c}{D}

Every image comes in four rotations :math:`r` that count as classes of their own; predictions use
the unrotated ones. Old classes take part as noisy copies of their means, which are never corrected
for drift: the distillation of features is to keep them true. The radius :math:`\rho` is that of the
first experience. Published: :math:`\tau = 0.1, \alpha = \beta = 10`, Adam 0.001 with weight decay
0.0002, 101 epochs, divided by 10 after 45 and 90, batch 64. The distillation is the norm over a
whole batch, as in the published code, not a mean of norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import IterableDataset

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import Batch, ContinualLearner, LossTerm, Step
from clfed.learners.episodes import ROTATIONS
from clfed.learners.tables import Column, Head

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class PrototypeAugmentation(ContinualLearner):
    """Learn with rotated classes, noisy old prototypes and distilled features.

    Args:
        backbone: The network.
        transform: Its input transform.
        rotations: Whether rotated images are further classes; ready features have none.
        softmax_temperature: Divides all logits of the loss.
        distillation: Weight of the distillation of features.
        augmentation_weight: Weight of the noisy prototypes.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: A number is out of range, or the option of the loss does not fit.
    """

    needs_boundaries = True
    snapshot_parts = ("backbone",)
    head: RotationHead

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        rotations: bool = True,
        softmax_temperature: float = 0.1,
        distillation: float = 10.0,
        augmentation_weight: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, **{"moments": "none", **options})
        if not (softmax_temperature > 0 and distillation >= 0 and augmentation_weight >= 0):
            raise ConfigError(
                "Expected learner.softmax_temperature > 0, distillation >= 0 and "
                f"augmentation_weight >= 0, got {softmax_temperature}, {distillation} and "
                f"{augmentation_weight}."
            )
        if self.loss_kind == "bce" or self.trained_logits == "current" or self.feature_map:
            raise ConfigError(
                "pass needs a softmax over old and new classes and no feature map: learner.loss "
                "of softmax or cosine, learner.logits of seen or all."
            )
        self.turns = ROTATIONS if rotations else 1
        self.softmax_temperature = softmax_temperature
        self.head = RotationHead(self.head, self.turns)
        self.terms = (
            LossTerm("classification", 1.0, ("backbone", "head")),
            LossTerm("distillation", float(distillation), ("backbone",)),
            LossTerm("prototypes", float(augmentation_weight), ("head",)),
        )

    def begin_experience(self, experience: Experience) -> None:
        """Refuse images that cannot be turned."""
        shape = experience.train.images.shape
        if self.turns > 1 and len(shape) == 4 and shape[2] != shape[3]:
            raise ConfigError(
                f"Only square images can be rotated, got {shape[2]}x{shape[3]}.",
                remedy="Set learner.rotations=false.",
            )
        super().begin_experience(experience)

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> IterableDataset[Batch]:
        """Return the batches, every image in all its rotations."""
        upright = super().batches(images, seed=seed, start=start)
        return Turned(upright) if self.turns > 1 and images.images.dim() == 4 else upright

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Classification of rotated images, distillation, classification of prototypes."""
        turns = self.turns if step.images.dim() == 4 else 1
        turn = torch.arange(turns, device=step.h.device).repeat_interleave(len(step.h) // turns)
        zero = step.h.new_zeros(())
        values = {
            "classification": self.turned_loss(step.h, step.labels, turn, turns),
            "distillation": zero,
            "prototypes": zero,
        }
        if self.teacher and self.memory is not None:
            with torch.no_grad():
                before = self.embed(step.images, self.teacher["backbone"]).float()
            values["distillation"] = torch.linalg.vector_norm(step.h - before)
            old = self.rows(self.memory.classes)
            rng = self.rng("prototypes")
            drawn = torch.randint(len(old), (self.batch_size,), generator=rng)
            noise = torch.randn(self.batch_size, self.dim, generator=rng)
            features = self.memory.prototypes()[drawn] + self.kept["radius"] * noise
            features, labels = features.to(step.h), old[drawn].to(step.labels.device)
            upright = torch.zeros_like(labels)
            values["prototypes"] = self.turned_loss(features, labels, upright, turns)
        return values

    def turned_loss(self, h: Tensor, labels: Tensor, turn: Tensor, turns: int) -> Tensor:
        """Cross-entropy over pairs of a class and a turn.

        Args:
            h: ``(B, D)`` embeddings.
            labels: ``(B,)`` rows of classes.
            turn: ``(B,)`` quarter turns.
            turns: How many turns compete.
        """
        logits, place = self.restrict(self.head.turned(h)[:, :, :turns], labels)
        return F.cross_entropy(logits.flatten(1) / self.softmax_temperature, place * turns + turn)

    def finish(self, experience: Experience) -> None:
        """Measure the radius of the noise, once."""
        if "radius" not in self.kept:
            features = self.embed_all(experience.train.images)
            self.kept["radius"] = radius(class_variances(features, experience.train.labels))


class RotationHead(Head):
    """A head with a row for every turn of a class; the unturned rows make predictions.

    Args:
        like: An empty head of the kind that is wanted.
        turns: Turns of each class.
    """

    def __init__(self, like: Head, turns: int) -> None:
        dim = like.column("weight").shape[1]
        super().__init__(dim, like.kind, temperature=like.temperature, seed=like.seed)
        self.columns = {
            key: Column((turns, *column.shape), column.rule, column.initial)
            for key, column in self.columns.items()
        }
        for key, column in self.columns.items():
            self._set(key, torch.zeros(0, *column.shape))

    def turned(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to logits ``(B, C, turns)``."""
        weight = self.column("weight")
        rows = weight.flatten(0, 1)
        if self.kind == "linear":
            logits = F.linear(embeddings, rows, self.column("bias").flatten())
        else:
            logits = self.temperature * F.linear(F.normalize(embeddings), F.normalize(rows))
        return logits.view(len(embeddings), *weight.shape[:2])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to one logit for each class, as it stands."""
        return self.turned(embeddings)[:, :, 0]


class Turned(IterableDataset[Batch]):
    """Batches in which all images come again, turned by 90, 180 and 270 degrees.

    Args:
        batches: Images ``(B, C, H, H)`` and labels ``(B,)``.
    """

    def __init__(self, batches: IterableDataset[Batch]) -> None:
        self.upright = batches

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.upright:
            turned = [torch.rot90(images, turns, (-2, -1)) for turns in range(ROTATIONS)]
            yield torch.cat(turned), labels.repeat(ROTATIONS)


def class_variances(features: Tensor, labels: Tensor) -> Tensor:
    """Unbiased variance of each entry in each class, zero for a class of one example.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)``.

    Returns:
        ``(C, D)`` float64, of the ``C`` classes that occur.

    Example:
        >>> class_variances(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([0, 0, 4])).tolist()
        [[2.0], [0.0]]
    """
    _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    features = features.double()
    zero = torch.zeros(len(counts), features.shape[1], dtype=torch.float64)
    means = zero.index_add(0, places, features) / counts[:, None]
    squares = zero.index_add(0, places, (features - means[places]).square())
    variances: Tensor = squares / (counts[:, None] - 1).clamp(min=1)
    return variances


def radius(variances: Tensor) -> Tensor:
    r"""Radius of the noise, :math:`\sqrt{\frac1C \sum_c \mathrm{tr}\, \Sigma_c / D}`.

    Args:
        variances: Diagonals of :math:`\Sigma_c`, ``(C, D)``.

    Example:
        >>> round(radius(torch.tensor([[2.0, 1.0], [1.0, 1.0]])).item(), 6)
        1.118034
    """
    return variances.mean().sqrt().float()
