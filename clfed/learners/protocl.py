r"""ProtoCL: a Bayesian classifier on learned features (Kessler et al. 2023, arXiv 2301.01828).

Class prototypes have Gaussian posteriors and labels a Dirichlet one, both in closed form
(:mod:`clfed.prototypes.bayesian`); the encoder learns through what they predict,

.. math:: L = -\frac1B \sum_i \log \frac{p(h_i, y_i)}{\sum_k p(h_i, k)}, \qquad
          p(h, k) = N\!\big(h;\, m_k,\, v_k I\big)\, \frac{a_k}{\sum_j a_j}

with the posterior *before* a batch, which is then taken into it:
:math:`n_k \mathrel{+}= B_k,\; s_k \mathrel{+}= \sum_{i: y_i = k} h_i`.

The published method rehearses 1000 images and takes 50 epochs a task on MNIST with batches of 64
at a learning rate of 1e-4, :math:`\sigma^2 = 0.05`. Its posterior goes on from batch to batch, so
it counts an image once an epoch and remembers features of a network that has since changed. Here
that one serves for training alone: at the end of an experience every image is counted once, as the
final network sees it, in exact sums, and the means of old classes are taken anew from their
rehearsed images. Images are rehearsed by reservoir sampling. With ``memory_size=0`` no image is
kept, and the network is frozen after the first experience, since old sums would lose their meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import Batch, ContinualLearner, LossTerm, Step
from clfed.learners.buffer import ImageBuffer
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.bayesian import log_joint, predictive
from clfed.prototypes.drift import moved
from clfed.seeding import generator

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class ProtoCL(ContinualLearner):
    r"""Gaussian class prototypes with a Dirichlet prior, and an encoder that fits them.

    Args:
        backbone: The network.
        transform: Its input transform.
        memory_size: Images that are kept for rehearsal; 0 for none.
        classifier: ``bayes`` with ``noise`` :math:`\sigma^2`, ``precision`` :math:`\Lambda_0` and
            ``concentration`` :math:`a_0`.
        train: ``all``, ``first`` or ``none``; None: ``all`` where images are rehearsed.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: The network is to go on learning without rehearsal, another classifier, or an
            option is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        memory_size: int = 1000,
        classifier: Mapping[str, Any] | None = None,
        train: str | None = None,
        **options: Any,
    ) -> None:
        chosen: dict[str, Any] = {"name": "bayes", **(classifier or {})}
        if chosen["name"] != "bayes":
            raise ConfigError(f"protocl takes the classifier bayes, got {chosen['name']!r}.")
        if isinstance(memory_size, bool) or not isinstance(memory_size, int) or memory_size < 0:
            raise ConfigError(f"Expected learner.memory_size of 0 or more, got {memory_size!r}.")
        train = train or ("all" if memory_size else "first")
        if train == "all" and not memory_size:
            raise ConfigError(
                "Without rehearsed images the statistics of old classes lose their meaning when "
                "the network goes on learning, got learner.train=all learner.memory_size=0.",
                remedy="Set learner.train=first, or learner.memory_size=1000.",
            )
        super().__init__(backbone, transform, classifier=chosen, train=train, **options)
        self.terms = (LossTerm("predictive", 1.0, ("backbone",)),)
        self.prior: dict[str, float] = {
            key: value for key, value in chosen.items() if key != "name"
        }
        self.buffer = ImageBuffer(memory_size) if memory_size else None
        self.merges = "none" if train == "all" else "exact"
        self._counts, self._sums = torch.zeros(0), torch.zeros(0, 0)

    def begin_experience(self, experience: Experience) -> None:
        """Begin with the posterior of what was learned so far."""
        super().begin_experience(experience)
        self._counts = torch.zeros(len(self.classes), dtype=torch.float64)
        self._sums = torch.zeros(len(self.classes), self.dim, dtype=torch.float64)
        if self.memory is not None:
            rows = self.rows(self.memory.classes)
            self._counts[rows] = self.memory.counts.double()
            self._sums[rows] = self.memory.means() * self.memory.counts.double()[:, None]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the negative log predictive probability of the labels."""
        device = step.h.device
        of = predictive(self._counts.to(device), self._sums.to(device), **self.prior)
        return {"predictive": self.classification(log_joint(step.h, of), step.labels).float()}

    def absorb(self, step: Step) -> None:
        """Take a batch into the posterior, as the network saw it before its step."""
        labels = step.labels.cpu()
        self._counts += torch.bincount(labels, minlength=len(self._counts))
        self._sums.index_add_(0, labels, step.h.cpu().double())

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> IterableDataset[Batch]:
        """Return the steps' batches, each with as many rehearsed images as new ones."""
        new = super().batches(images, seed=seed, start=start)
        old = None if self.buffer is None else self.buffer.content()
        if old is None:
            return new
        rows = self.rows(old.classes)[old.labels]
        return Rehearsed(new, ImageSet(old.images, rows, self.classes), seed=seed, start=start)

    def finish(self, experience: Experience) -> None:
        """Offer the images of the experience for rehearsal."""
        if self.buffer is not None:
            self.buffer.reservoir(experience.train, self.rng("rehearsal"))

    def compensate(
        self, memory: PrototypeMemory, version: str, experience: Experience, after: Tensor
    ) -> PrototypeMemory:
        """Take the means of old classes anew from the images that are kept of them."""
        means, old = memory.means(), None if self.buffer is None else self.buffer.content()
        if old is not None:
            place = memory.index
            rows = torch.tensor([place.get(name, -1) for name in old.classes])[old.labels]
            known = rows >= 0
            z = self.mapped(self.embed_all(old.images[known])).double()
            counts = torch.bincount(rows[known], minlength=len(memory))
            sums = torch.zeros_like(means).index_add_(0, rows[known], z)
            fresh = sums / counts.clamp(min=1)[:, None]
            means = torch.where((counts > 0)[:, None], fresh, means)
        return moved(memory, means, version)


class Rehearsed(IterableDataset[Batch]):
    """Batches of new images, each followed by as many that are drawn from old ones.

    Args:
        new: Yields images and labels.
        old: Images drawn with replacement.
        seed: Decides the draws, together with the number of the batch.
        start: Number of the first batch.
    """

    def __init__(
        self, new: IterableDataset[Batch], old: ImageSet, *, seed: int, start: int
    ) -> None:
        self.new, self.old, self.seed, self.start = new, old, seed, start

    def __iter__(self) -> Iterator[Batch]:
        for step, (images, labels) in enumerate(self.new, self.start):
            rng = generator(self.seed, "rehearsal", step)
            drawn = torch.randint(len(self.old), (len(labels),), generator=rng)
            yield (
                torch.cat([images, self.old.images[drawn]]),
                torch.cat([labels, self.old.labels[drawn]]),
            )
