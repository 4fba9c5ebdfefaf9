r"""Models that answer together, and which sample each of them was trained on.

Exact unlearning by construction rests on two things: a sample has one place, which no other sample
has a say in; and every weight that answers is known to come from the samples of some places only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed

VOTES = ("mean", "vote")


@dataclass(frozen=True)
class Partition:
    """Which shard and slice each sample is in, by its id and a seed alone.

    Ids are taken in runs as long as there are cells; the samples of a run get one cell each, from
    a start that is drawn for the run. So cells are of nearly the same size, those of data that are
    sorted by class too, and no sample moves when others go or come.

    Args:
        shards: Parts that are trained apart.
        slices: Parts of a shard that come one after another.
        seed: Decides the starts.

    Raises:
        ConfigError: No shard or no slice.
    """

    shards: int
    slices: int
    seed: int

    def __post_init__(self) -> None:
        if self.shards < 1 or self.slices < 1:
            raise ConfigError(
                "Expected unlearner.shards and unlearner.slices of 1 or more, got "
                f"{self.shards} and {self.slices}."
            )

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return shard and slice ``(N,)`` int64 of the samples ``(N,)`` int64."""
        cells = self.shards * self.slices
        start = torch.from_numpy(_mixed(ids.numpy() // cells, self.seed) % np.uint64(cells))
        cell = (ids + start.to(torch.int64)) % cells
        return cell // self.slices, cell % self.slices


class Together(nn.Module):
    r"""Several models as the backbone of one, which outputs the log of their mean probability.

    .. math:: o(x) = \ln \frac1S \sum_s \mathrm{softmax}(f_s(x)) \quad\text{or}\quad
              o_k(x) = \ln \frac{v_k(x) + \bar p_k(x)}{S + 1}

    The second form counts votes :math:`v_k`; the mean probability :math:`\bar p` decides between
    equal counts and can never overrule a vote. Both are normalised: their softmax is themselves.
    Models without any image abstain.

    Args:
        partition: Of the samples.
        ids: ``(N,)`` int64 samples that the models were trained on.
        combine: ``mean`` or ``vote``.

    Attributes:
        ids: As above.
        shards: ``(N,)`` int64 shard of each.
        slices: ``(N,)`` int64 slice of each.
    """

    ids: Tensor
    shards: Tensor
    slices: Tensor

    def __init__(self, partition: Partition, ids: Tensor, combine: str) -> None:
        super().__init__()
        check_combine(combine)
        self.partition, self.combine = partition, combine
        self.record(ids)

    def record(self, ids: Tensor) -> None:
        """Note which samples the weights come from; others are known no longer."""
        shards, slices = self.partition.places(ids)
        for name, values in (("ids", ids), ("shards", shards), ("slices", slices)):
            self.register_buffer(name, values.clone())

    @property
    def sizes(self) -> Tensor:
        """Recorded samples in each cell, ``(shards, slices)`` int64."""
        shape = (self.partition.shards, self.partition.slices)
        cells = self.shards * self.partition.slices + self.slices
        return torch.bincount(cells, minlength=shape[0] * shape[1]).view(shape)

    def logits(self, inputs: Tensor) -> Tensor:
        """Outputs ``(S, B, K)`` of the models that have a say."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to log probabilities ``(B, K)``."""
        return combined(self.logits(inputs), self.combine)

    def check_without(self, gone: Tensor) -> None:
        """Make sure that no weight comes from samples that went."""
        left = self.ids[torch.isin(self.ids, gone)]
        assert not len(left), f"{len(left)} forgotten samples are still recorded"


Kind = TypeVar("Kind", bound=Together)


def combined(logits: Tensor, how: str) -> Tensor:
    """Combine outputs ``(S, B, K)`` into log probabilities ``(B, K)``, see :class:`Together`.

    Example:
        >>> logits = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]], [[0.45, 0.55]]]).log()
        >>> [round(share, 4) for share in combined(logits, "mean").exp()[0].tolist()]
        [0.55, 0.45]
        >>> combined(logits, "vote").argmax(1).tolist()
        [1]
    """
    models, _, classes = logits.shape
    mean: Tensor = logits.log_softmax(2).logsumexp(0) - math.log(models)
    if how == "mean":
        return mean
    votes = nn.functional.one_hot(logits.argmax(2), classes).sum(0)
    shares: Tensor = (votes + mean.exp()) / (models + 1)
    return shares.log()


def check_combine(combine: str) -> None:
    """Refuse an unknown way to combine.

    Raises:
        ConfigError: It is none of ``VOTES``.
    """
    if combine not in VOTES:
        raise ConfigError(f"Expected unlearner.combine of {VOTES}, got {combine!r}.")


@torch.no_grad()
def serving(
    backbone: Together, like: ContinualLearner, classes: tuple[str, ...], name: str, seed: int
) -> ContinualLearner:
    """Return a learner whose outputs are those of its backbone: its head is the identity.

    Args:
        backbone: What answers.
        like: Whose input transform is taken.
        classes: Names of the outputs.
        name: What tables call it.
        seed: Of the models.
    """
    learner = ContinualLearner(backbone, like.transform, name=name, seed=seed, dim=len(classes))
    learner.grow(classes)
    learner.head.column("weight").copy_(torch.eye(len(classes)))
    return learner.eval()


def together_of(learner: ContinualLearner, kind: type[Kind], method: str) -> Kind:
    """Return what answers in a learner.

    Raises:
        ConfigError: It is not of this kind.
    """
    if not isinstance(learner.backbone, kind):
        raise ConfigError(
            f"unlearner={method} forgets by how its own original was built, got a "
            f"{type(learner.backbone).__name__}.",
            remedy=f"Train the original with unlearner={method}, which job=unlearning does.",
        )
    return learner.backbone


def _mixed(numbers: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Return 64 well-mixed bits of each number: the finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) + np.uint64(derive_seed(seed, "partition"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
