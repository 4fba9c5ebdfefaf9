r"""Datamodel matching: predict what a retrained model would answer, then train towards it.

Georgiev et al. 2024, arXiv 2410.23232. With :math:`\tau_F(x)` the part of an answer that the
forget set is responsible for,

.. math:: \hat f(x) = f_{\theta_o}(x) - \kappa\, \alpha\, \tau_F(x), \qquad
          L = \mathbb{E}_{D_f \cup S} \lVert f_\theta(x) - \hat f(x) \rVert^2 / K
          + \lambda \lVert \theta - \theta_o \rVert^2

on the forget set and a random sample :math:`S \subset D_r`, a few times as large.

The paper estimates :math:`\tau` from thousands of trainings. We take the attribution that has a
closed form, see :mod:`clfed.unlearning.attribution`: a ridge head with and without the forget set,
exact for that head. The original's head is a softmax head instead, so the difference is turned into
logits by one number :math:`\alpha`, the least-squares slope of the original's logits on the ridge
head's outputs; a head that is that ridge regression on the embedding has :math:`\alpha = 1`, and
then :math:`\hat f` is its retrained output.

The original's embedding was trained on the forget set: it has put each of its images among those
of its class, and a head on it hardly misses a few of them. So by default the ridge heads see random
features of the images, which nothing was trained for, and which a model without the forget set
would have as well (``random_features=0`` takes the embedding). For a class both say the same; for
single samples only the former predict which of them a retrained model gets wrong.

The student stays in eval mode: without attribution the targets are its own outputs, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.prototypes.features import RandomProjection
from clfed.seeding import derive_seed, generator
from clfed.unlearning.attribution import Attribution, scale
from clfed.unlearning.base import Unlearner, named_weights
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import ById, Pool
from clfed.unlearning.schedules import Batches


class DMM(Unlearner):
    r"""Match predicted outputs of a retrained model.

    Args:
        learner: The original.
        strength: :math:`\kappa`; 1 is the prediction itself.
        ridge: Penalty of the ridge heads for each sample that stays.
        random_features: How many of them the ridge heads see; 0: the original's embedding.
        retain_multiple: Size of the sample of the rest, in sizes of the forget set.
        anchor: :math:`\lambda`, pull of the original's weights.
        oracles: Retrained models whose mean logits are matched instead of a prediction: oracle
            matching, the upper bound of the method.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN
    schedule = "concat"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        strength: float = 1.0,
        ridge: float = 2e-3,
        random_features: int = 2048,
        retain_multiple: float = 3.0,
        anchor: float = 0.0,
        oracles: Sequence[ContinualLearner] = (),
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if ridge <= 0 or retain_multiple <= 0 or min(anchor, strength, random_features) < 0:
            raise ConfigError(
                "unlearner=dmm needs ridge > 0, retain_multiple > 0, and anchor, strength and "
                f"random_features of at least 0, got {ridge}, {retain_multiple}, {anchor}, "
                f"{strength} and {random_features}."
            )
        self.strength, self.ridge, self.width = strength, ridge, random_features
        self.retain_multiple, self.anchor = retain_multiple, anchor
        # A tuple of modules is not registered, so no optimiser reaches them.
        self.oracles = tuple(oracles)

    def adapts(self, batch: Batches) -> bool:
        """Never: targets and outputs are compared in the same mode."""
        return False

    def drawn(self, pool: Pool) -> Pool:
        """Return the random sample of the images that stay."""
        rows = torch.randperm(len(pool), generator=generator(self.seed, "dmm retain"))
        return pool.part(rows[: self.sample_size].sort().values)

    def bind(self, context: Context) -> None:
        """Take a request; the sample is as large as the forget set says."""
        self.sample_size = max(1, round(self.retain_multiple * len(context.forget)))
        super().bind(context)

    def prepare(self, context: Context) -> None:
        """Predict what a retrained model would answer for everything that is trained on."""
        sample = self.drawn(context.retain)
        self.attribute(context)
        ids = torch.cat([context.forget.ids, sample.ids])
        targets = self.predicted(torch.cat([context.forget.images, sample.images]))
        self.targets = ById(ids, targets.float())

    def attribute(self, context: Context) -> None:
        """Solve the two ridge regressions."""
        forget, retain = (self.features(pool.images) for pool in (context.forget, context.retain))
        self.attribution = Attribution.of(
            (forget, context.forget.labels),
            (retain, context.retain.labels),
            classes=len(self.learner.classes),
            ridge=self.ridge,
        )
        answers = self.attribution.answers(torch.cat([forget, retain]))
        logits = [self.answers(pool.images) for pool in (context.forget, context.retain)]
        self.alpha = scale(torch.cat(logits), answers)
        self.lineage = {"alpha": self.alpha}

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Outputs ``(B, K)`` of the original, in eval mode."""
        return self.teacher.scores_of(images, closed=False)

    def features(self, images: Tensor) -> Tensor:
        r"""What ridge heads see, ``(B, D)``: random :math:`\mathrm{relu}(R x)`, or embeddings."""
        if not self.width:
            return self.teacher.embed_all(images)
        inputs = self.teacher.transform(images).flatten(1)
        size, seed = inputs.shape[1], derive_seed(self.seed, "dmm features")
        return RandomProjection(size, self.width, seed, scale=size**-0.5)(inputs)

    @torch.no_grad()
    def predicted(self, images: Tensor) -> Tensor:
        r"""Outputs :math:`\hat f`, ``(B, K)`` float64; as answers of their own, DM-Direct."""
        if self.oracles:
            answers = [oracle.scores_of(images, closed=False) for oracle in self.oracles]
            return torch.stack(answers).double().mean(0)
        part = self.attribution.contribution(self.features(images))
        return self.answers(images).double() - self.strength * self.alpha * part

    def loss(self, batch: Batches) -> Tensor:
        """Mean squared distance to the predicted logits, and to the original's weights."""
        images = torch.cat([part.images for part in batch.values()])
        ids = torch.cat([part.ids for part in batch.values()])
        # Batches come in an order of their own: targets are found by the ids of the samples.
        loss = F.mse_loss(self.logits(images), self.targets[ids])
        if self.anchor:
            old = named_weights(self.teacher)
            moved = [(w - old[n]).square().sum() for n, w in named_weights(self.learner).items()]
            loss = loss + self.anchor * torch.stack(moved).sum()
        return loss
