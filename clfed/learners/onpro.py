r"""OnPro, online prototype learning (Wei et al. 2023, arXiv 2308.00301); OnPro-0 without replay.

A stream is seen once. Prototypes made of nothing but a batch are contrasted (the equilibrium loss,
over the normalised class means :math:`q_k, q'_k` of two views), and tell which classes are
confused, so that images of those are mixed:

.. math:: L = \mathrm{CE} + L_{ins} + L_{OPE}, \qquad
    L_{OPE} = -\mathrm{mean}_k \log \frac{\exp(q_k^\top q'_k / T)}
    {\sum_{r \ne q_k} \exp(q_k^\top r / T)}, \qquad
    P(i, j) \propto \exp(1 / \|\mu_i - \mu_j\|)

:math:`L_{ins}` contrasts images, each turn of a class being a class of its own. As soon as a class
is old the cross-entropy learns from mixed images of the buffer alone, and the other losses from
both batches; before, the buffer is filled and not read.

``memory_size=0`` is OnPro-0, ours and not the paper's: the same losses on the present batch, the
cross-entropy over its own classes alone, and the nearest of the exact class means answers.

Published settings: batches of 10 with up to 64 images from the buffer, Adam 5e-4, weight decay
1e-4; CIFAR-10: ``mixup=0.6, base_rate=0.75, feature_factor=0.5``; CIFAR-100 and TinyImageNet: 0.2,
0.9 and 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.buffer import ImageBuffer
from clfed.learners.episodes import ROTATIONS, Augmentation
from clfed.learners.losses import contrast, supervised_contrast
from clfed.learners.mixing import blend, mixing_plan, pair_law

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

PER_CLASS = 7  # a batch from the buffer holds at most so many images for each class seen


def online_prototypes(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Normalised class means of a batch.

    Args:
        embeddings: ``(B, D)``.
        labels: ``(B,)`` int64 in ``0..K-1``, each at least once.

    Returns:
        ``(K, D)``, unit rows.

    Example:
        >>> online_prototypes(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])).tolist()
        [[1.0, 0.0]]
    """
    return F.normalize(F.one_hot(labels).to(embeddings.dtype).T @ embeddings)


def equilibrium(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Contrast the prototypes of two views: each finds itself among all others.

    Args:
        first: ``(K, D)``, unit rows.
        second: ``(K, D)``, unit rows, of the same classes.
        temperature: What cosines are divided by.

    Example:
        >>> round(float(equilibrium(torch.eye(2), torch.eye(2))), 6)
        0.239545
    """
    classes = torch.arange(len(first), device=first.device).repeat(2)
    return supervised_contrast(torch.cat([first, second]), classes, temperature=temperature)


class OnPro(ContinualLearner):
    """Learn in one pass; a linear head answers, or for OnPro-0 what ``classifier`` names.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        dim: Length of an embedding.
        memory_size: Images that are kept for replay; 0 keeps none and is OnPro-0.
        replay_size: Largest number of images from the buffer in a step.
        mixup: Chance that an image of the random part is mixed with another one.
        base_rate: Share of the random part; the rest mixes confused classes.
        mixing: Both parameters of the beta distribution of the mixing weight.
        rotations: Whether turned images are contrasted too; ready features have no turns.
        projection: Largest length of the vectors that are contrasted.
        feature_factor: Weight of the similarities to slices of the features themselves.
        contrast_temperature: Of the contrast of images.
        prototype_temperature: Of the contrast of prototypes.
        augmentation: Options of :class:`~clfed.learners.episodes.Augmentation` of the second view.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        dim: int,
        memory_size: int = 1000,
        replay_size: int = 64,
        mixup: float = 0.6,
        base_rate: float = 0.75,
        mixing: float = 0.4,
        rotations: bool = True,
        projection: int = 128,
        feature_factor: float = 1.0,
        contrast_temperature: float = 0.07,
        prototype_temperature: float = 0.5,
        augmentation: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, dim=dim, **options)
        sizes, shares = (replay_size, projection), (mixup, base_rate)
        positive = (mixing, contrast_temperature, prototype_temperature)
        if min(memory_size, feature_factor) < 0 or min(sizes) < 1 or min(positive) <= 0:
            raise ConfigError(
                "OnPro needs memory_size and feature_factor >= 0, (replay_size, projection) >= 1 "
                "and (mixing, contrast_temperature, prototype_temperature) > 0, got "
                f"{memory_size}, {feature_factor}, {sizes} and {positive}."
            )
        if min(shares) < 0 or max(shares) > 1 or self.loss_kind == "bce":
            raise ConfigError(
                "OnPro needs mixup and base_rate in 0..1 and loss=softmax or cosine, got "
                f"{mixup}, {base_rate} and {self.loss_kind!r}."
            )
        # Batches come unchanged: the second view is made beside the first one, not instead of it.
        self.second_view = None if augmentation is None else Augmentation(**augmentation)
        self.replay_size, self.turned = replay_size, rotations
        self.mixup, self.base_rate, self.mixing = mixup, base_rate, mixing
        self.feature_factor = feature_factor
        self.contrast_temperature = contrast_temperature
        self.prototype_temperature = prototype_temperature
        self.width = min(projection, dim)
        self.projector = nn.Linear(dim, self.width)
        self.buffer = ImageBuffer(memory_size) if memory_size else None
        self.terms = (
            LossTerm("classification", 1.0, ("backbone", "head")),
            LossTerm("instance", 1.0, ("backbone", "projector")),
            LossTerm("prototype", 1.0, ("backbone", "projector")),
        )

    def begin_experience(self, experience: Experience) -> None:
        """Refuse images that cannot be turned before anything changes.

        Raises:
            ConfigError: The images are not square.
        """
        shape = experience.train.images.shape
        if self.turned and len(shape) == 4 and shape[2] != shape[3]:
            raise ConfigError(
                f"Only square images can be rotated, got {shape[2]}x{shape[3]}.",
                remedy="Set learner.rotations=false.",
            )
        super().begin_experience(experience)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the three losses of a batch and of what is drawn from the buffer."""
        others = self.copies(step.images, "present")[len(step.h) :]
        h = torch.cat([step.h, self.embed(others).float()])
        blocks = [(h, step.labels)]
        prototype, _ = self.equilibrium_of(h, step.labels)
        drawn = self.draw()
        if drawn is None:
            classification = self.loss(step.h, step.labels)
        else:
            images, labels = (part.to(step.h.device) for part in drawn)
            h = self.embed(self.copies(images, "replay")).float()
            blocks.append((h, labels))
            seen, means = self.equilibrium_of(h, labels)
            prototype = prototype + seen
            plan = mixing_plan(
                labels.cpu(),
                pair_law(means).cpu(),
                mixup=self.mixup,
                base_rate=self.base_rate,
                mixing=self.mixing,
                rng=self.rng("mix"),
            )
            mixed = blend(images.float(), *plan)
            targets = blend(F.one_hot(labels, len(self.classes)).float(), *plan)
            logits = self.head(self.embed(mixed).float())[:, : len(self.classes)]
            classification = F.cross_entropy(logits, targets)
        return {
            "classification": classification,
            "instance": self.instance_contrast(blocks),
            "prototype": prototype,
        }

    def copies(self, images: Tensor, purpose: str) -> Tensor:
        """Return each turn of all images, then a random view of each of those."""
        turns = ROTATIONS if self.turned and images.dim() == 4 else 1
        turned = torch.cat([images.rot90(k, (-2, -1)) if k else images for k in range(turns)])
        rng = self.rng("view", purpose)
        if images.dim() == 2:
            noise = torch.randn(turned.shape, generator=rng).to(turned)
            return torch.cat([turned, turned + self.feature_noise * noise])
        if self.second_view is None:
            return torch.cat([turned, turned])
        view = self.second_view(turned.cpu(), rng).to(turned.device)
        return torch.cat([turned.float(), view])

    def projected(self, h: Tensor) -> Tensor:
        """Map embeddings to unit vectors to be contrasted."""
        return F.normalize(self.projector(h))

    def equilibrium_of(self, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the equilibrium loss of two views, and the mean of their prototypes.

        Args:
            h: ``(2 * turns * B, D)``, in the order of :meth:`copies`; unturned images count.
            labels: ``(B,)``.
        """
        batch, half = len(labels), len(h) // 2
        _, places = torch.unique(labels, return_inverse=True)
        first = online_prototypes(self.projected(h[:batch]), places)
        second = online_prototypes(self.projected(h[half : half + batch]), places)
        loss = equilibrium(first, second, self.prototype_temperature)
        return loss, ((first + second) / 2).detach()

    def instance_contrast(self, blocks: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Contrast all copies of all images, each turn of a class being a class.

        Similarities of projections, and of projections to a random slice of the features.
        """
        names = [
            labels
            + len(self.classes) * torch.arange(len(h) // len(labels) // 2)[:, None].to(labels)
            for h, labels in blocks
        ]
        labels = torch.cat([name.flatten().repeat(2) for name in names])
        h = torch.cat([h for h, _ in blocks])
        z = self.projected(h)
        start = int(torch.randint(self.dim - self.width + 1, (1,), generator=self.rng("slice")))
        features = F.normalize(h)[:, start : start + self.width]
        scores = z @ z.T + self.feature_factor * z @ features.T
        candidates = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        positives = (labels[:, None] == labels) & candidates
        return contrast(scores / self.contrast_temperature, positives, candidates)

    def draw(self) -> tuple[Tensor, Tensor] | None:
        """Return images from the buffer and their rows, None where there is nothing to replay."""
        content = None if self.buffer is None else self.buffer.content()
        if content is None or not len(self.old):
            return None
        size = min(self.replay_size, PER_CLASS * len(self.classes))
        chosen = torch.randperm(len(content), generator=self.rng("replay"))[:size]
        rows = self.rows(content.classes)
        return content.images[chosen], rows[content.labels[chosen]]

    def absorb(self, step: Step) -> None:
        """Offer the batch to the buffer, each image in the first pass alone."""
        first_pass = self.steps is not None or self.step_number <= math.ceil(
            self.length / max(self.epochs, 1)
        )
        if self.buffer is not None and first_pass:
            batch = ImageSet(step.images.cpu(), step.labels.cpu(), self.classes)
            self.buffer.reservoir(batch, self.rng("reservoir"))
