"""In which order an unlearner meets the images that go and those that stay."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from clfed.errors import ConfigError
from clfed.seeding import generator
from clfed.unlearning.pools import Batch, Pool

SCHEDULES = ("zip", "concat", "sequential", "nested", "none")

Batches = dict[str, Batch]


class Schedule(IterableDataset[Batches]):
    """One pass after another over some pools, each in an order of its own.

    A batch is a dictionary with the names of the pools it holds. With the pools ``forget`` and a
    companion (``retain`` or ``ood``):

    * ``zip``: one batch of each, until the shorter one ends;
    * ``concat``: both mixed, and a batch has a part of each;
    * ``sequential``: all of ``forget``, then all of the companion;
    * ``nested``: each batch of ``forget`` with ``ratio + 1`` fresh ones of the companion.

    A single pool is passed through on its own, whatever the kind.

    Args:
        pools: By name; ``forget`` first where it is there.
        kind: One of ``SCHEDULES`` but ``none``.
        batch_size: Images a batch.
        ratio: Of ``nested``.
        seed: Decides every order, together with the number of the pass.

    Attributes:
        passes: Passes that were begun.
    """

    def __init__(
        self, pools: dict[str, Pool], kind: str, *, batch_size: int, ratio: int = 0, seed: int = 0
    ) -> None:
        if kind not in SCHEDULES[:-1] or not 1 <= len(pools) <= 2:
            raise ConfigError(
                f"Expected a schedule of {SCHEDULES[:-1]} over one or two pools, got {kind!r} over "
                f"{list(pools)}."
            )
        self.pools, self.kind = pools, kind
        self.batch_size, self.ratio, self.seed = batch_size, ratio, seed
        self.passes = 0

    @property
    def steps(self) -> int:
        """Batches a pass."""
        batches = [math.ceil(len(pool) / self.batch_size) for pool in self.pools.values()]
        if len(batches) == 1:
            return batches[0]
        if self.kind == "zip":
            return min(batches)
        if self.kind == "concat":
            return math.ceil(sum(map(len, self.pools.values())) / self.batch_size)
        if self.kind == "nested":
            return batches[0] * (self.ratio + 1) if batches[1] else 0
        return sum(batches)

    def __iter__(self) -> Iterator[Batches]:
        number, self.passes = self.passes, self.passes + 1
        if len(self.pools) == 1 or self.kind == "sequential":
            for name in self.pools:
                for rows in self._orders(name, number):
                    yield {name: self.pools[name].batch(rows)}
        elif self.kind == "concat":
            yield from self._mixed(number)
        else:
            yield from self._pairs(number)

    def _orders(self, name: str, number: int, *more: int) -> tuple[Tensor, ...]:
        rng = generator(self.seed, "schedule", name, number, *more)
        order = torch.randperm(len(self.pools[name]), generator=rng)
        return torch.split(order, self.batch_size) if len(order) else ()

    def _mixed(self, number: int) -> Iterator[Batches]:
        (first, one), (second, other) = self.pools.items()
        rng = generator(self.seed, "schedule", "concat", number)
        order = torch.randperm(len(one) + len(other), generator=rng)
        for rows in torch.split(order, self.batch_size):
            mine = rows < len(one)
            parts = {first: one.batch(rows[mine]), second: other.batch(rows[~mine] - len(one))}
            yield {name: part for name, part in parts.items() if len(part.ids)}

    def _pairs(self, number: int) -> Iterator[Batches]:
        (first, one), (second, other) = self.pools.items()
        if not len(other):
            return
        repeats = self.ratio + 1 if self.kind == "nested" else 1
        fresh = self._endless(second, number)
        for index, rows in enumerate(self._orders(first, number)):
            if self.kind == "zip" and index * self.batch_size >= len(other):
                return
            batch = one.batch(rows)
            for _ in range(repeats):
                yield {first: batch, second: other.batch(next(fresh))}

    def _endless(self, name: str, number: int) -> Iterator[Tensor]:
        again = 0
        while True:
            yield from self._orders(name, number, again)
            again += 1
