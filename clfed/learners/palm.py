r"""PALM, a mixture of prototypes for each class (Lu et al. 2024, arXiv 2402.02653).

Unit vectors :math:`z` gather around :math:`K` prototypes of their class; such features are tight
enough for a Mahalanobis distance to tell what belongs to no class that was ever learned.

.. math:: L_{MLE} = -\mathrm{mean}_i \Big[\sum_j w_{ij} z_i^\top p_j / \tau
    - \log \sum_j \exp(z_i^\top p_j / \tau)\Big]

The weights :math:`w` are assignments by Sinkhorn, cut to the own class and to the ``top`` largest.
Prototypes are running averages, :math:`p_j \leftarrow \mathrm{norm}(m p_j + (1 - m) \sum_i u_{ij}
z_i)`, and a supervised contrast between them is the second loss: its gradient reaches the encoder
through the newest summand alone. A prototype without images stays, so old classes are frozen.

Published settings (CIFAR-100): ResNet-34, 500 epochs, batch 512, SGD 0.5 with a cosine schedule,
weight decay 1e-6, m = 0.999, assignments balanced over the prototypes of *all* classes, which takes
a batch of about their number. In the published code the weights reuse the indices of the largest
assignments before the update, and features are centred twice; here neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners import novelty
from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.losses import supervised_contrast
from clfed.learners.mixtures import (
    mixture_likelihood,
    moved_prototypes,
    own_shares,
    sinkhorn,
)
from clfed.learners.tables import ClassTable, Column
from clfed.prototypes import Moments

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

BALANCES = ("class", "all")
PREDICTORS = ("nearest", "mixture")
PLACING = 10  # rounds of assignments and means where the network is frozen


class PALM(ContinualLearner):
    """Prototypes of each class as running averages; the nearest one answers.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        dim: Length of an embedding.
        components: Prototypes of a class.
        top: Prototypes that a sample counts for.
        momentum: Weight of a prototype in its running average; 0.999 needs thousands of steps.
        epsilon: Smaller is sharper assignments.
        rounds: Of Sinkhorn.
        balance: Prototypes among which samples are spread evenly: those of their ``class``, for
            small or skewed batches, or ``all``, as published.
        mixture_temperature: Of the likelihood.
        contrast_temperature: Of the contrast between prototypes.
        contrast_weight: Its weight.
        projection: Length of :math:`z`.
        predictor: ``nearest`` prototype or ``mixture``, the sum over a class's prototypes.
        shrinkage: Share of the mean variance that is added to every variance of the detector.
        known_rate: Share of known images that :meth:`unknown` lets pass.
        moments: Second moments of the memory, ``shared`` or ``class``.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    merges = "approximate"
    views: ClassVar[int] = 2

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        dim: int,
        components: int = 6,
        top: int = 5,
        momentum: float = 0.99,
        epsilon: float = 0.05,
        rounds: int = 3,
        balance: str = "class",
        mixture_temperature: float = 0.1,
        contrast_temperature: float = 0.5,
        contrast_weight: float = 1.0,
        projection: int = 128,
        predictor: str = "nearest",
        shrinkage: float = 1e-3,
        known_rate: float = 0.95,
        moments: Moments = "shared",
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, dim=dim, moments=moments, **options)
        if balance not in BALANCES or predictor not in PREDICTORS or moments == "none":
            raise ConfigError(
                f"PALM needs balance of {BALANCES}, predictor of {PREDICTORS} and moments=shared "
                f"or class, got {balance!r}, {predictor!r} and {moments!r}."
            )
        numbers = (components, top, rounds, projection)
        positive = (epsilon, mixture_temperature, contrast_temperature)
        if min(numbers) < 1 or min(positive) <= 0 or min(contrast_weight, shrinkage) < 0:
            raise ConfigError(
                "PALM needs (components, top, rounds, projection) >= 1, (epsilon, "
                "mixture_temperature, contrast_temperature) > 0 and (contrast_weight, shrinkage) "
                f">= 0, got {numbers}, {positive} and {(contrast_weight, shrinkage)}."
            )
        if not 0 <= momentum < 1 or not 0 < known_rate < 1:
            raise ConfigError(
                f"PALM needs momentum in 0..1 below 1 and known_rate between 0 and 1, got "
                f"{momentum} and {known_rate}."
            )
        self.components, self.top, self.momentum = components, top, momentum
        self.epsilon, self.rounds, self.balance = epsilon, rounds, balance
        self.mixture_temperature = mixture_temperature
        self.contrast_temperature = contrast_temperature
        self.predictor, self.shrinkage, self.known_rate = predictor, shrinkage, known_rate
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, projection))
        self.mixture = ClassTable(
            {"prototypes": Column((components, projection), rule="mean", initial=1.0)},
            seed=self.seed,
            purpose="palm",
        )
        self.kept["quantiles"] = torch.empty(0, novelty.LEVELS, dtype=torch.float64)
        self.terms = (
            LossTerm("likelihood", 1.0, ("backbone", "projector")),
            LossTerm("contrast", contrast_weight, ("backbone", "projector")),
        )
        self._moved: Tensor | None = None

    def grow(self, names: Sequence[str]) -> None:
        """Append classes with their prototypes."""
        super().grow(names)
        self.mixture.grow(names)

    def prototypes(self) -> Tensor:
        """All prototypes, class by class, ``(C * K, M)`` with unit rows."""
        return F.normalize(self.mixture.column("prototypes").flatten(0, 1))

    def projected(self, embeddings: Tensor) -> Tensor:
        """Map embeddings ``(B, D)`` to unit vectors ``(B, M)``."""
        return F.normalize(self.projector(embeddings))

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return both losses of a batch, around prototypes that it has moved already."""
        z, prototypes = self.projected(step.h), self.prototypes()
        classes = torch.arange(len(prototypes), device=z.device) // self.components
        own = self.own(step.labels)
        shares = self.shares(z.detach(), prototypes, own)
        moved = moved_prototypes(prototypes, z, shares, self.momentum)
        self._moved = moved.detach()
        weights = self.shares(z.detach(), self._moved, own)
        return {
            "likelihood": mixture_likelihood(z, moved, weights, self.mixture_temperature),
            "contrast": supervised_contrast(moved, classes, temperature=self.contrast_temperature),
        }

    def shares(self, z: Tensor, prototypes: Tensor, own: Tensor) -> Tensor:
        """Return the weights of samples ``(N, J)`` for the prototypes of their own class."""
        allowed = own if self.balance == "class" else None
        assignments = sinkhorn(z @ prototypes.T / self.epsilon, allowed, self.rounds)
        return own_shares(assignments, own, self.top)

    def absorb(self, step: Step) -> None:
        """Keep the moved prototypes."""
        if self._moved is not None:
            table = self.mixture.column("prototypes")
            table.copy_(self._moved.view_as(table))
            self._moved = None

    def finish(self, experience: Experience) -> None:
        """Place the prototypes of new classes where nothing was trained."""
        if self.length:
            return
        with torch.no_grad():
            z = self.projected(self.embed_all(experience.train.images).to(self.device))
            labels = self.rows(experience.train.classes)[experience.train.labels].to(z.device)
            own, prototypes = self.own(labels), self.prototypes()
            for _ in range(PLACING):
                prototypes = moved_prototypes(prototypes, z, self.shares(z, prototypes, own), 0.0)
            table = self.mixture.column("prototypes")
            table.copy_(prototypes.view_as(table))

    def own(self, labels: Tensor) -> Tensor:
        """Tell which prototypes are of the class of each sample, ``(N, J)`` bool."""
        classes = torch.arange(len(self.classes), device=labels.device)
        return labels[:, None] == classes.repeat_interleave(self.components)

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score classes by their nearest prototype, or by all of theirs together."""
        if self.classifier is not None:
            return super().scores(embeddings)
        cosines = self.projected(embeddings) @ self.prototypes().T
        grouped = cosines.view(len(cosines), -1, self.components)
        if self.predictor == "nearest":
            return grouped.amax(2)
        return (grouped / self.mixture_temperature).logsumexp(2)

    def mapped(self, embeddings: Tensor) -> Tensor:
        """Give embeddings unit length: what is remembered and where distances are taken."""
        return super().mapped(F.normalize(embeddings))

    def observe(self, experience: Experience) -> None:
        """Add an experience to the memory, then take the quantiles of its distances.

        A class that comes back has the average of its quantiles, weighted by its images. Those of
        classes that do not come back are of the network and the memory of their last experience.
        """
        memory, before = self.memory, torch.zeros(len(self.classes), dtype=torch.int64)
        if memory is not None:
            before[self.rows(memory.classes)] = memory.counts
        super().observe(experience)
        labels = self.rows(experience.train.classes)[experience.train.labels]
        scores = self.ood_scores(experience.train.images)
        self.kept["quantiles"] = novelty.blended(
            self.kept["quantiles"],
            novelty.class_quantiles(scores, labels, len(self.classes)),
            before,
            torch.bincount(labels, minlength=len(self.classes)),
        )

    def ood_scores(self, images: Tensor) -> Tensor:
        """How far images lie from everything known, ``(N,)`` float64, larger is more unknown.

        Squared Mahalanobis distances of embeddings of unit length, by the memory's exact sums.

        Args:
            images: ``(N, ...)``.

        Raises:
            NotEnoughData: Nothing was learned yet.
        """
        embeddings = self.mapped(self.embed_all(images))
        return novelty.distances(self.memory, embeddings, self.shrinkage)

    def unknown(self, images: Tensor) -> Tensor:
        """Whether each image lies farther out than nearly all images of the class it is taken for.

        Args:
            images: ``(N, ...)``.

        Returns:
            ``(N,)`` bool.

        Raises:
            NotEnoughData: Nothing was learned yet.
        """
        far = self.ood_scores(images)
        limits = novelty.thresholds(self.kept["quantiles"], self.known_rate)
        return far > limits[self.scores_of(images).argmax(1)]
