r"""Sharded, isolated, sliced and aggregated training (Bourtoule et al. 2021, arXiv 1912.03817).

The data are divided into :math:`m` shards, each with a model of its own that all answer together,
and each shard into :math:`L` slices. The model of a shard is trained on slice 1, then on slices 1
and 2, and so on, and every state on the way is kept. When samples go, the models of their shards go
back to before the first slice that held one of them, and are trained from there without them.
Nothing else ever saw them, so the result is that of a training from scratch without them, bit for
bit: same seeds, same places of all other samples.

A slice takes :math:`2 e / (L + 1)` of the recipe's :math:`e` epochs, as in the paper, so that a
shard costs what one training on its images costs.

What it saves depends on how few shards and late slices a request meets. One sample costs a part of
:math:`1 / m` of a training. Ten percent of all samples drawn at random, a class, or a contributor
whose samples lie everywhere meet every first slice, and then SISA costs what training again costs,
with less accurate models, each of which saw :math:`1 / m` of the data. The account says how much
was done again.

The paper's models vote; where classes are many it averages outputs. Both are there, and averaged
probabilities are the default, as votes of few models are coarse.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context, History
from clfed.unlearning.needs import Need
from clfed.unlearning.shards import Partition, Together, check_combine, serving, together_of


class Checkpoints(Together):
    """All states of all shards' models; the last of each answers.

    Args:
        partition: As in :class:`~clfed.unlearning.shards.Together`.
        ids: As there.
        combine: As there.
        states: The models of each shard, one after each slice.
    """

    def __init__(
        self,
        partition: Partition,
        ids: Tensor,
        combine: str,
        states: Sequence[Sequence[ContinualLearner]],
    ) -> None:
        super().__init__(partition, ids, combine)
        self.states = nn.ModuleList(nn.ModuleList(row) for row in states)

    def of_shard(self, shard: int) -> list[ContinualLearner]:
        """Return the models of a shard, one after each slice."""
        return [cast(ContinualLearner, model) for model in cast(nn.ModuleList, self.states[shard])]

    def logits(self, inputs: Tensor) -> Tensor:
        """Outputs ``(S, B, K)`` of the last model of each shard that has images."""
        alive = self.sizes.sum(1).nonzero().flatten().tolist()
        last = [self.of_shard(shard)[-1] for shard in alive]
        return torch.stack([model.scores(model.backbone(inputs).float()) for model in last])


class Sisa(Unlearner):
    """Train the shards again that held what goes, from the last state that did not know it.

    Args:
        learner: An original of :meth:`original`.
        shards: :math:`m`.
        slices: :math:`L`.
        combine: ``mean`` of the probabilities, or ``vote``.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.RETAIN | Need.HISTORY
    schedule = "none"
    exact = True
    scope = "every model of the ensemble and every state kept, by the recipe of the original"
    own_original: ClassVar[bool] = True

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        shards: int = 3,
        slices: int = 4,
        combine: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        Partition(shards, slices, 0)
        check_combine(combine)

    @classmethod
    def original(cls, history: History, settings: Mapping[str, Any]) -> ContinualLearner:
        """Train all shards through all slices.

        Raises:
            ConfigError: The recipe's learner answers from something else than a head.
        """
        partition = Partition(settings["shards"], settings["slices"], history.seed)
        states = [train_shard(history, partition, shard)[0] for shard in range(partition.shards)]
        together = Checkpoints(partition, history.ids, settings["combine"], states)
        return serving(together, states[0][-1], history.images.classes, "sisa", history.seed)

    def bind(self, context: Context) -> None:
        """Take a request for a model of :meth:`original`."""
        together_of(self.learner, Checkpoints, "sisa")
        super().bind(context)

    def solve(self, context: Context) -> None:
        """Go back and train again, shard by shard.

        Raises:
            ConfigError: The model comes without its recipe.
        """
        history = context.history
        if history is None:
            raise ConfigError("unlearner=sisa needs the recipe of the original, got none.")
        together = together_of(self.learner, Checkpoints, "sisa")
        partition, gone = together.partition, context.forget.ids
        stays = torch.isin(history.ids, together.ids) & ~torch.isin(history.ids, gone)
        kept = History(
            history.train, history.images.subset(stays), history.ids[stays], history.seed
        )
        went = torch.isin(together.ids, gone)
        first = torch.full((partition.shards,), partition.slices).scatter_reduce(
            0, together.shards[went], together.slices[went], "amin"
        )
        seen = [kept.ids[:0]]
        for shard in (first < partition.slices).nonzero().flatten().tolist():
            states = together.of_shard(shard)[: int(first[shard])]
            states, steps = train_shard(kept, partition, shard, states)
            together.states[shard] = nn.ModuleList(states)
            self.step_number += steps
            seen.append(kept.ids[partition.places(kept.ids)[0] == shard])
        for need in (Need.RETAIN_X, Need.RETAIN_Y):
            context.guard.touch(need, torch.cat(seen))
        together.record(kept.ids)
        together.check_without(gone)
        self.lineage = redone(first, together.sizes)


def train_shard(
    history: History, partition: Partition, shard: int, states: Sequence[ContinualLearner] = ()
) -> tuple[list[ContinualLearner], int]:
    """Train the model of a shard through the slices that it has not seen.

    Args:
        history: Recipe, images, ids and seed; the images of other shards are left out.
        partition: Of the samples.
        shard: Which one.
        states: Its models after the slices that it has seen.

    Returns:
        Its models after every slice, and the steps that were made.
    """
    shards, slices = partition.places(history.ids)
    seed = derive_seed(history.seed, "shard", shard)
    found, steps = [*states], 0
    for number in range(len(found), partition.slices):
        start = found[-1] if found else _blank(history, partition, seed)
        images = history.images.subset((shards == shard) & (slices <= number))
        start = copy.deepcopy(start)
        start.number = number - 1  # decides the order of the images
        model = history.train(images, seed, start=start)
        found.append(_bare(model))
        steps += model.length
    return found, steps


def redone(first: Tensor, sizes: Tensor) -> dict[str, Any]:
    """Return what was trained again, as plain values.

    Args:
        first: ``(m,)`` int64 first slice of each shard that was trained again; ``L`` for none.
        sizes: ``(m, L)`` int64 images that stay in each slice.

    Example:
        >>> sizes = torch.tensor([[4, 4], [4, 4]])
        >>> redone(torch.tensor([2, 1]), sizes)["share of the training"]
        0.3333333333333333
    """
    passes = sizes.cumsum(1)  # a slice is trained with all before it
    again = torch.arange(sizes.shape[1]) >= first[:, None]
    return {
        "shards": again.any(1).nonzero().flatten().tolist(),
        "slices": int(again.sum()),
        "share of the training": int(passes[again].sum()) / int(passes.sum()),
    }


def _blank(history: History, partition: Partition, seed: int) -> ContinualLearner:
    """Return an untrained model of the recipe, its training cut to that of one slice."""
    nothing = torch.zeros(0, dtype=torch.int64)
    model = history.train(history.images.subset(nothing), seed)
    if model.classifier is not None or type(model).scores is not ContinualLearner.scores:
        raise ConfigError(
            f"unlearner=sisa keeps weights, but learner={model.method or type(model).__name__} "
            "answers from something else than a head.",
            remedy="Choose a learner with a head such as learner=naive.",
        )
    model.epochs = math.ceil(2 * model.epochs / (partition.slices + 1))
    if model.steps is not None:
        model.steps = math.ceil(model.steps / (partition.shards * partition.slices))
    return model


def _bare(model: ContinualLearner) -> ContinualLearner:
    """Drop all but the weights, so that what is kept of a slice is what a checkpoint holds."""
    model.memory, model.buffer = None, None
    model.kept, model.optimiser_state, model.teacher = {}, {}, nn.ModuleDict()
    return model
