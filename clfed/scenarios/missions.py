"""Reconnaissance missions: which node meets which images of which classes in which round.

A *mission* is what one node sees between two merges (federated reconnaissance, Hendryx et al.
2021, arXiv 2109.00150). Each scenario of missions is a module beside this one; nothing here trains
or embeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData


@dataclass(frozen=True)
class Mission:
    """What one node meets in one round.

    Attributes:
        node: Number of the node, from 0.
        round: Number of the round, from 1.
        classes: Names of the classes met.
        indices: Positions in the plan's support set, int64.
    """

    node: int
    round: int
    classes: tuple[str, ...]
    indices: Tensor


@dataclass(frozen=True, eq=False)
class MissionPlan:
    """All missions of one draw, with the images they need.

    Attributes:
        nodes: Number of nodes.
        rounds: Number of rounds.
        missions: One entry a node and round, ordered by round, then node.
        support: Labelled images that missions refer to.
        test: Test images of the field classes, never seen in a mission.
        base_support: Images of the base classes that every node starts with, or ``None``.
        base_test: Test images of the base classes, or ``None``.
        test_shares: Positions in ``test`` that are distributed as each node's own images are, one
            entry a node; ``None``: those of the classes that the node has met.
    """

    nodes: int
    rounds: int
    missions: tuple[Mission, ...]
    support: ImageSet
    test: ImageSet
    base_support: ImageSet | None = None
    base_test: ImageSet | None = None
    test_shares: tuple[Tensor, ...] | None = None

    @cached_property
    def _by_key(self) -> dict[tuple[int, int], Mission]:
        return {(mission.round, mission.node): mission for mission in self.missions}

    def mission(self, node: int, round_: int) -> Mission | None:
        """Return the mission of a node in a round, ``None`` where it meets nothing."""
        return self._by_key.get((round_, node))

    def met(self, round_: int, node: int | None = None) -> Tensor:
        """Return the support positions met up to and including a round, by one node or by all."""
        parts = [m.indices for m in self.missions if m.round <= round_ and node in (None, m.node)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def known(self, round_: int) -> tuple[str, ...]:
        """Return the sorted names of all field classes met by any node up to a round."""
        names = (m.classes for m in self.missions if m.round <= round_)
        return tuple(sorted(set().union(*names)))

    def asked(self, round_: int) -> Tensor:
        """Return the test positions of all classes met by any node up to a round, ascending."""
        return self._tested(self.known(round_)).nonzero().flatten()

    def own_test(self, node: int, round_: int) -> Tensor:
        """Return those of :meth:`asked` that are like what a node has met itself, ascending."""
        if self.test_shares is not None:
            share = self.test_shares[node]
            return share[self._tested(self.known(round_))[share]]
        names = (m.classes for m in self.missions if m.round <= round_ and m.node == node)
        return self._tested(set().union(*names)).nonzero().flatten()

    def _tested(self, classes: Iterable[str]) -> Tensor:
        """Return for each test image whether it is of one of these classes, bool."""
        place = {name: index for index, name in enumerate(self.test.classes)}
        chosen = torch.zeros(len(self.test.classes), dtype=torch.bool)
        chosen[[place[name] for name in classes]] = True
        return chosen[self.test.labels]


def positive(**values: int) -> None:
    """Refuse settings of a scenario that are not whole numbers of at least 1.

    Raises:
        ConfigError: Names the first one.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"scenario.{name} must be a whole number of at least 1, got {value!r}."
            )


def split_support(
    benchmark: Benchmark, classes: Sequence[str], test_images: int | None, rng: torch.Generator
) -> tuple[ImageSet, ImageSet]:
    """Return support pool and test set of some classes, disjoint.

    A data set with its own test split keeps it; of one without, ``test_images`` random images a
    class become the test set and never enter a mission; by default a quarter of the smallest class.
    """
    pool = benchmark.train.of_classes(classes)
    if benchmark.test is not None:
        test = benchmark.test.of_classes(classes)
        if test_images is None:
            return pool, test
        return pool, test.subset(_per_class(test, test_images, rng)[0])
    if test_images is None:
        test_images = max(1, int(torch.bincount(pool.labels).min()) // 4)
    test_index, rest = _per_class(pool, test_images, rng)
    return pool.subset(rest), pool.subset(test_index)


def _per_class(images: ImageSet, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split positions into ``count`` random ones of each class and the others, both sorted."""
    smallest = int(torch.bincount(images.labels, minlength=len(images.classes)).min())
    if smallest < count:
        raise NotEnoughData(
            f"scenario.test_images asks for {count} images of each class, but one class has only "
            f"{smallest}."
        )
    shuffled = torch.randperm(len(images), generator=rng)
    order = shuffled[torch.argsort(images.labels[shuffled], stable=True)]
    labels = images.labels[order]
    first = torch.searchsorted(labels, labels)
    chosen = torch.arange(len(order)) - first < count
    return order[chosen].sort().values, order[~chosen].sort().values
