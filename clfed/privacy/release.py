r"""Differentially private release of class statistics over a fixed public list of classes.

Every slot gets noise, also those of classes that nobody has seen: a slot without noise would say
so. What is released are integers, like the statistics themselves:

.. math:: \tilde s = s + round(2^{16} \sigma \xi), \qquad
          \tilde n = n + 2^{-16} round(2^{16} \xi' \sigma / \lambda),
          \qquad \xi, \xi' \sim N(0, 1)

Since :math:`s` and :math:`n` are integers in these units, this is the Gaussian mechanism on
:math:`(s, \lambda n)` followed by rounding, which is post-processing: the analytic noise holds,
with no allowance for rounding. :mod:`clfed.privacy.noise` says what randomness it needs and where a
computer's noise falls short of a Gaussian.

Every release spends: note it in :class:`clfed.privacy.accountant.GaussianAccount`. Noise for a sum
of :math:`K` tables that nobody sees one by one may be shared: each adds :math:`\sigma / \sqrt K`,
:math:`K` being the smallest number of tables that can end up in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import ndtri  # type: ignore[import-untyped]
from torch import Tensor

from clfed.errors import ConfigError, EmbeddingMismatch, UnknownClass
from clfed.privacy.gaussian import check_positive
from clfed.privacy.noise import Entropy, integer_gaussian
from clfed.privacy.sensitivity import Bounds, check_clip_norm
from clfed.prototypes.fixed_point import RESOLUTION, SCALE, checked_sum
from clfed.prototypes.memory import PrototypeMemory
from clfed.prototypes.tables import checked_names

_MARGIN = 1 + 2.0**-40  # more than the float64 rounding of a norm


@dataclass(frozen=True, eq=False)
class SlotTable:
    """Statistics with one slot for each class of a public list, whether anybody has seen it or not.

    Tables over the same list add; the noise of independent ones adds up in variance.

    Attributes:
        classes: The list, sorted.
        counts: Shape ``(C,)`` int64, unit ``RESOLUTION``; anything once noise is in, also negative.
        sums: Shape ``(C, D)`` int64, unit ``RESOLUTION``.
        embedding_id: Identity of the embedding.
        sum_variance: Variance of the noise in each entry of the sums, in embedding units squared.
        count_variance: Variance of the noise in each count, in examples squared.
    """

    classes: tuple[str, ...]
    counts: Tensor
    sums: Tensor
    embedding_id: str
    sum_variance: float = 0.0
    count_variance: float = 0.0

    @classmethod
    def of(cls, memory: PrototypeMemory, labels: Sequence[str]) -> SlotTable:
        """Lay a memory out over a list of labels; without noise, not to be shown to anybody.

        Raises:
            InvalidMessage: The list holds a name twice or one that is none.
            UnknownClass: The memory has a class outside the list.
        """
        classes = tuple(sorted(set(checked_names(labels, "public label"))))
        if not classes or len(classes) < len(labels):
            raise ConfigError(f"expected different public labels, at least one, got {len(labels)}")
        outside = sorted(set(memory.classes) - set(classes))
        if outside:
            some = ", ".join(map(repr, outside[:5]))
            raise UnknownClass(
                f"expected only classes of the public list, got {some}",
                remedy="Make the name public first (clfed.privacy.class_names), or leave the class "
                "out; its name alone would already tell that somebody has seen it.",
            )
        place = dict(zip(classes, range(len(classes)), strict=True))
        rows = torch.tensor([place[name] for name in memory.classes], dtype=torch.int64)
        counts = torch.zeros(len(classes), dtype=torch.int64)
        sums = torch.zeros(len(classes), memory.dim, dtype=torch.int64)
        counts[rows], sums[rows] = memory.counts * int(SCALE), memory.sums
        return cls(classes, counts, sums, memory.embedding_id)

    def __add__(self, other: SlotTable) -> SlotTable:
        if (self.embedding_id, self.classes) != (other.embedding_id, other.classes):
            raise EmbeddingMismatch(
                "expected tables of one embedding over one list of labels, got two different ones",
                remedy="Give every node the same encoder and the same public list of labels.",
            )
        return replace(
            self,
            counts=checked_sum(self.counts, other.counts),
            sums=checked_sum(self.sums, other.sums),
            sum_variance=self.sum_variance + other.sum_variance,
            count_variance=self.count_variance + other.count_variance,
        )

    def clipped(self, norm: float, count_scale: float) -> SlotTable:
        r"""Shrink counts and sums together until :math:`\|(s, \lambda n)\| \le B`.

        Class means stay where they are, up to the resolution; the client only weighs less.

        Args:
            norm: :math:`B`, in embedding units.
            count_scale: :math:`\lambda`.
        """
        check_positive("message norm", norm)
        check_positive("count scale", count_scale)
        parts = (self.sums.double().ravel(), self.counts.double() * count_scale)
        length = float(torch.linalg.vector_norm(torch.cat(parts))) * RESOLUTION * _MARGIN
        if length <= norm:
            return self
        factor = norm / length
        # Rounding towards zero keeps the vector inside the ball.
        counts = (self.counts.double() * factor).trunc().long()
        return replace(self, counts=counts, sums=(self.sums.double() * factor).trunc().long())

    def noised(self, sigma: float, count_scale: float, entropy: Entropy) -> SlotTable:
        r"""Add independent noise to every entry.

        Args:
            sigma: Standard deviation on the vector :math:`(s, \lambda n)`, in embedding units.
            count_scale: :math:`\lambda`: counts get :math:`\sigma / \lambda` examples.
            entropy: Source of randomness, see :mod:`clfed.privacy.noise`.

        Raises:
            ConfigError: ``sigma`` or ``count_scale`` is out of range.
        """
        check_positive("sigma", sigma)
        check_positive("count scale", count_scale)
        noisy_counts = integer_gaussian(self.counts.shape, sigma / count_scale * SCALE, entropy)
        noisy_sums = integer_gaussian(self.sums.shape, sigma * SCALE, entropy)
        return replace(
            self,
            counts=checked_sum(self.counts, noisy_counts),
            sums=checked_sum(self.sums, noisy_sums),
            sum_variance=self.sum_variance + sigma**2,
            count_variance=self.count_variance + (sigma / count_scale) ** 2,
        )

    def means(self, least: float = 1.0) -> Tensor:
        r""":math:`\tilde\mu_c = \tilde s_c / \max(\tilde n_c, n_{min})`.

        Args:
            least: :math:`n_{min}` above 0; no mean is divided by less.

        Returns:
            Shape ``(C, D)`` float64.
        """
        check_positive("least count", least)
        return self.sums.double() / self.counts.double().clamp(min=least * SCALE)[:, None]

    def threshold(self, mistakes: float = 0.01) -> float:
        """Count that noise alone reaches in so many slots on average, were all of them empty.

        Args:
            mistakes: Expected number of empty classes taken for seen ones, below the number of
                classes; 0.01 is one in a hundred releases.
        """
        check_positive("number of mistakes", mistakes)
        if not self.count_variance:
            raise ConfigError(
                "expected a noised table for a threshold, got exact counts",
                remedy="Add the noise first, or give a threshold.",
            )
        share = mistakes / len(self.classes)
        if share >= 1:
            raise ConfigError(
                f"expected fewer mistakes than {len(self.classes)} classes, got {mistakes:g}"
            )
        return -float(ndtri(share)) * math.sqrt(self.count_variance)

    def memory(
        self, *, clip_norm: float, threshold: float | None = None, least: float = 1.0
    ) -> PrototypeMemory:
        """The classes that stand out from the noise, in a form that every classifier reads.

        Post-processing: it looks at the noised table alone and costs no privacy. Means longer than
        ``clip_norm`` are shortened to it, since true ones are not, which never moves one away from
        the truth. Counts become whole numbers of at least 1.

        Args:
            clip_norm: The norm that embeddings were clipped to.
            threshold: Classes with a smaller noised count are left out; by default what
                :meth:`threshold` says.
            least: No mean is divided by less, at least 1.
        """
        check_clip_norm(clip_norm)
        if not least >= 1:
            raise ConfigError(f"expected a least count of at least 1, got {least!r}")
        limit = self.threshold() if threshold is None else threshold
        if not math.isfinite(limit):
            raise ConfigError(f"expected a finite threshold, got {limit!r}")
        kept = (self.counts.double() * RESOLUTION >= limit).nonzero().ravel()
        means = self.means(least)[kept]
        lengths = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        means = means * (clip_norm / lengths.clamp(min=clip_norm))
        counts = (self.counts[kept].double() * RESOLUTION).clamp(min=least).round()
        return PrototypeMemory.of(
            [self.classes[row] for row in kept.tolist()],
            counts.long(),
            (means * counts[:, None] * SCALE).round().long(),
            self.embedding_id,
        )


def release(
    memory: PrototypeMemory,
    labels: Sequence[str],
    *,
    bounds: Bounds,
    sigma: float,
    entropy: Entropy,
) -> SlotTable:
    r"""One client's statistics with noise: :math:`(\varepsilon, \delta)`-private towards everybody.

    The vector :math:`(s, \lambda n)` has sensitivity ``bounds.sensitivity``; take ``sigma`` from
    :func:`clfed.privacy.gaussian.gaussian_sigma`. A server that is trusted with the true statistics
    adds ``SlotTable.of(...)`` of all clients and calls :meth:`SlotTable.noised` once on the sum.

    Args:
        memory: The client's own evidence; embeddings clipped by
            :func:`clfed.privacy.sensitivity.clip`. If earlier releases carried some of the same
            examples, their accounts add.
        labels: The public list, the same for every client, made without looking at the data.
        bounds: Neighbouring relation, clipping and scale of counts.
        sigma: Standard deviation of the noise, in embedding units.
        entropy: Source of randomness, see :mod:`clfed.privacy.noise`.

    Raises:
        ConfigError: ``sigma`` or the list is out of range.
        InvalidEmbedding: The embeddings were not clipped.
        InvalidMessage: The client contributes more than ``bounds`` allow.
        UnknownClass: The memory has a class outside the list.
        UnsupportedStatistics: The memory keeps second moments.

    Example:
        >>> import os
        >>> seen = PrototypeMemory.empty(1, "demo").observe(torch.ones(900, 1), ["owl"] * 900)
        >>> bounds = Bounds("example", clip_norm=1.0, count_scale=1.0)
        >>> table = release(seen, ["owl", "fox"], bounds=bounds, sigma=5.0, entropy=os.urandom)
        >>> table.classes, table.memory(clip_norm=1.0, threshold=200.0).classes
        (('fox', 'owl'), ('owl',))
    """
    bounds.check_clipped(memory)
    bounds.check_client(memory)
    table = SlotTable.of(memory, labels)
    if bounds.message_norm is not None:
        table = table.clipped(bounds.message_norm, bounds.count_scale)
    return table.noised(sigma, bounds.count_scale, entropy)
