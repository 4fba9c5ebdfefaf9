"""Adapters and heads that are trained stage by stage, each on a longer prefix of some slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.optimisers import make_optimiser, rate_at
from clfed.seeding import generator
from clfed.unlearning.lora import LowRank, blocks, weight_layers
from clfed.unlearning.sequences import choose_orders, depths
from clfed.unlearning.shards import Partition, Together, check_combine


@dataclass(frozen=True)
class Plan:
    r"""What decides how the stages are trained, next to data and seed.

    Args:
        shards: Parts of the data with adapters of their own.
        slices: Parts of a shard, and stages.
        budget: Orders of the slices in each shard.
        selection: Which orders, see :mod:`clfed.unlearning.sequences`.
        risks: How likely each slice is hit, up to a factor; None: all alike.
        rank: :math:`r` of the adapters.
        alpha: Their products are scaled by :math:`\alpha / \sqrt r` (rank-stabilised).
        combine: How the shards answer together, ``mean`` or ``vote``.
        epochs: Passes of a stage over its slices.
        batch_size: Images a step.
        lr: Largest learning rate.
        optimizer: ``adam`` or ``sgd``.
        weight_decay: Decay of adapters and head.
        lr_schedule: ``constant`` or ``cosine``, over a stage.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    shards: int = 1
    slices: int = 4
    budget: int = 4
    selection: str = "cyclic"
    risks: tuple[float, ...] | None = None
    rank: int = 16
    alpha: float = 16.0
    combine: str = "mean"
    epochs: int = 3
    batch_size: int = 64
    lr: float = 0.005
    optimizer: str = "adam"
    weight_decay: float = 0.0
    lr_schedule: str = "cosine"

    def __post_init__(self) -> None:
        self.orders(0)
        check_combine(self.combine)
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(
                f"Expected unlearner.rank >= 1 and alpha > 0, got {self.rank} and {self.alpha}."
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Pick the plan out of an unlearner's settings."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    def partition(self, seed: int) -> Partition:
        """Return where the samples are."""
        return Partition(self.shards, self.slices, seed)

    def orders(self, seed: int) -> Tensor:
        """Return the orders of every shard, ``(m, B, L)`` int64."""
        self.partition(seed)
        args = (self.slices, self.budget, self.selection, self.risks)
        return torch.stack([choose_orders(*args, seed + shard) for shard in range(self.shards)])


class Stages(Together):
    """A frozen network, and for every order of slices adapters and the heads of all stages.

    What was never trained, or is switched off, is zero: adapters of zeros leave the network as it
    is, to the bit.

    Args:
        plan: Of the stages.
        seed: Of everything random.
        network: Maps inputs to embeddings; used as it is.
        classes: :math:`K`.
        dim: Length :math:`D` of an embedding.

    Attributes:
        orders: ``(m, B, L)`` int64.
        weights: Heads of all stages, ``(m B L, K, D)``.
        biases: The same, ``(m B L, K)``.

    Raises:
        ConfigError: The network has fewer blocks than there are slices.
    """

    orders: Tensor

    def __init__(self, plan: Plan, seed: int, network: nn.Module, classes: int, dim: int) -> None:
        partition = plan.partition(seed)
        super().__init__(partition, torch.empty(0, dtype=torch.int64), plan.combine)
        found = blocks(network)[::-1]
        if len(found) < plan.slices:
            raise ConfigError(
                f"Each slice trains blocks of its own, but the network has {len(found)} and there "
                f"are {plan.slices} slices.",
                remedy=f"Set unlearner.slices={len(found)}, or choose a deeper backbone.",
            )
        self.plan, self.seed = plan, seed
        self.network = network.requires_grad_(False).eval()
        parts = np.array_split(np.arange(len(found)), plan.slices)
        #: Names of the layers that each stage trains.
        self.groups = [[name for k in part for name in found[k]] for part in parts]
        self.register_buffer("orders", plan.orders(seed))
        scale, layers = plan.alpha / plan.rank**0.5, weight_layers(network)
        rng = generator(seed, "s3t")
        self.adapters = nn.ModuleList(
            nn.ModuleDict(
                {
                    _key(name): LowRank(layer.weight, plan.rank, scale=scale, rng=rng)
                    for name, layer in layers.items()
                }
            )
            for _ in range(plan.shards * plan.budget)
        )
        self.weights = nn.Parameter(torch.zeros(self.orders.numel(), classes, dim))
        self.biases = nn.Parameter(torch.zeros(self.orders.numel(), classes))
        self.settle()

    @property
    def depths(self) -> Tensor:
        """Stages that are left of every order, ``(m, B)`` int64."""
        return depths(self.orders, self.sizes > 0)

    def adapter(self, shard: int, order: int, layer: str) -> LowRank:
        """Return the adapter of a layer in one order of a shard."""
        group = cast(nn.ModuleDict, self.adapters[shard * self.plan.budget + order])
        return cast(LowRank, group[_key(layer)])

    def head_of(self, shard: int, order: int, stage: int) -> int:
        """Return the place of a head among all."""
        return (shard * self.plan.budget + order) * self.plan.slices + stage

    def changed(self, shard: int, order: int, layers: list[str]) -> dict[str, Tensor]:
        """Return the changed weights of some layers, by the name of the parameter."""
        found = weight_layers(self.network)
        return {f"{n}.weight": self.adapter(shard, order, n)(found[n].weight) for n in layers}

    def logits(self, inputs: Tensor) -> Tensor:
        """Outputs ``(S, B, K)`` of the deepest order of each shard that has one left."""
        left = self.depths
        # Among equals the first: later ones are a fraction less.
        best = (left * self.plan.budget - torch.arange(self.plan.budget)).argmax(1).tolist()
        layers = [name for group in self.groups for name in group]
        found = []
        for shard in left.any(1).nonzero().flatten().tolist():
            order = best[shard]
            weights = self.changed(shard, order, layers)
            embeddings = functional_call(self.network, weights, (inputs,)).float()
            at = self.head_of(shard, order, int(left[shard, order]) - 1)
            found.append(F.linear(embeddings, self.weights[at], self.biases[at]))
        return torch.stack(found)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode of all but the network, whose statistics are frozen."""
        super().train(mode)
        self.network.eval()
        return self

    # Training and forgetting --------------------------------------------------------------------

    def learn(self, like: ContinualLearner, images: ImageSet, ids: Tensor) -> int:
        """Train every order of every shard, up to its first slice without an image.

        Args:
            like: Whose input transform is taken.
            images: Labels are rows of the outputs.
            ids: ``(N,)`` int64 sample ids.

        Returns:
            Steps that were made.
        """
        self.record(ids)
        steps = 0
        for shard, order in np.ndindex(*self.orders.shape[:2]):
            for stage in range(int(self.depths[shard, order])):
                prefix = self.orders[shard, order, : stage + 1]
                mine = (self.shards == shard) & torch.isin(self.slices, prefix)
                steps += self._learn_stage(like, images.subset(mine), shard, order, stage)
        self.settle()
        return steps

    def forget(self, ids: Tensor) -> Tensor:
        """Switch off all stages that saw the slices of some samples.

        Returns:
            ``(m, L)`` bool, which slices were hit.
        """
        went = torch.isin(self.ids, ids)
        hit = torch.zeros_like(self.sizes, dtype=torch.bool)
        hit[self.shards[went], self.slices[went]] = True
        self.record(self.ids[~hit[self.shards, self.slices]])
        self.settle()
        return hit

    @torch.no_grad()
    def settle(self) -> None:
        """Put to zero what is switched off, and record only samples that some stage was made of."""
        left = self.depths
        dead = torch.arange(self.plan.slices) >= left[..., None]
        self.weights[dead.flatten()], self.biases[dead.flatten()] = 0, 0
        for shard, order in np.ndindex(*left.shape):
            for group in self.groups[int(left[shard, order]) :]:
                for layer in group:
                    for value in self.adapter(shard, order, layer).parameters():
                        value.zero_()
        used = torch.zeros_like(self.sizes, dtype=torch.bool)
        at = dead.logical_not().nonzero()
        used[at[:, 0], self.orders[~dead]] = True
        self.record(self.ids[used[self.shards, self.slices]])

    def _learn_stage(
        self, like: ContinualLearner, images: ImageSet, shard: int, order: int, stage: int
    ) -> int:
        """Train the group and the head of one stage; returns its steps."""
        plan, place = self.plan, ("s3t", shard, order, stage)
        rng = generator(self.seed, *place)
        group = self.groups[stage]
        layers = weight_layers(self.network)
        trained: list[Tensor] = []
        for name in group:
            fresh = LowRank(layers[name].weight, plan.rank, rng=rng)
            adapter = self.adapter(shard, order, name)
            adapter.load_state_dict(fresh.state_dict())
            trained += adapter.parameters()
        at = self.head_of(shard, order, stage)
        before = max(at - 1, at - stage)  # the first head starts from its own zeros
        weight = self.weights[before].detach().clone().requires_grad_()
        bias = self.biases[before].detach().clone().requires_grad_()
        rest = [name for k, g in enumerate(self.groups) if k != stage for name in g]
        fixed = {n: w.detach() for n, w in self.changed(shard, order, rest).items()}
        optimiser = make_optimiser(
            plan.optimizer, [{"params": [*trained, weight, bias]}], plan.lr, plan.weight_decay
        )
        length = plan.epochs * -(-len(images) // plan.batch_size)
        step = 0
        for _ in range(plan.epochs):
            for rows in torch.split(torch.randperm(len(images), generator=rng), plan.batch_size):
                rate = rate_at(step, plan.lr_schedule, warmup=0, halve_every=2000, length=length)
                for options in optimiser.param_groups:
                    options["lr"] = plan.lr * rate
                weights = {**fixed, **self.changed(shard, order, group)}
                inputs = like.transform(images.images[rows])
                embeddings = functional_call(self.network, weights, (inputs,)).float()
                logits = F.linear(embeddings, weight, bias)
                optimiser.zero_grad()
                torch.autograd.backward(F.cross_entropy(logits, images.labels[rows]))
                optimiser.step()
                step += 1
        with torch.no_grad():
            self.weights[at], self.biases[at] = weight, bias
        return step


def _key(layer: str) -> str:
    return layer.replace(".", "-")
