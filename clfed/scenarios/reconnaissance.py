"""The two protocols of federated reconnaissance (Hendryx et al. 2021, arXiv 2109.00150).

Many nodes that meet classes on their own, and one node that meets them step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios.missions import Mission, MissionPlan, positive, split_support
from clfed.seeding import generator


def expected_coverage(classes: int, classes_per_mission: int, missions: int) -> float:
    """Expected number of distinct classes met after independent uniform missions.

    Each mission misses a class with probability ``1 - k / C``, so after ``m`` missions
    ``C (1 - (1 - k / C)^m)`` classes are known.

    Args:
        classes: Number of field classes ``C``.
        classes_per_mission: Distinct classes drawn in each mission ``k``.
        missions: Missions of all nodes and rounds together, ``m``.

    Example:
        >>> round(expected_coverage(50, 5, 5 * 2), 1)
        32.6
    """
    return float(classes * (1.0 - (1.0 - classes_per_mission / classes) ** missions))


def multi_client(
    benchmark: Benchmark,
    *,
    seed: int,
    nodes: int,
    rounds: int | None,
    classes_per_mission: int,
    shots: int,
    replacement: bool,
    overlap: float | None = None,
    field_classes: int | None = None,
    test_images: int | None = None,
    include_base: bool = False,
) -> MissionPlan:
    """Draw missions of many nodes that meet classes on their own.

    Args:
        benchmark: The data set; its field classes are met, its base classes stay at home.
        seed: Seed of classes, images and missions.
        nodes: Number of nodes; all of them go on every mission.
        rounds: Number of rounds; ``None`` goes on until every image is consumed, which needs
            ``replacement=False``.
        classes_per_mission: Distinct classes that a node draws for each mission.
        shots: Images of each class in each mission.
        replacement: ``False`` (mode A of the paper): an image is met once in the whole federation,
            and the last mission of a class may be smaller. ``True`` (mode B): every mission draws
            anew, distinct images within it.
        overlap: ``None`` (the paper): every mission draws its classes uniformly from the field,
            independently. A fraction: the field is divided among the nodes, and this part of each
            mission is drawn from the other nodes' territory, the rest from the node's own.
        field_classes: Number of field classes, drawn by the seed; ``None`` takes all.
        test_images: Test images a class; ``None`` takes the data set's own test split, or
            a quarter of the smallest class where there is none.
        include_base: Whether every node starts with prototypes of the base classes, and answers
            compete with them.

    Raises:
        ConfigError: A setting is out of range.
        NotEnoughData: The data set has too few classes or images for the settings.
    """
    positive(nodes=nodes, classes_per_mission=classes_per_mission, shots=shots)
    if rounds is not None:
        positive(rounds=rounds)
    elif replacement:
        raise ConfigError("scenario.rounds may be null only with scenario.replacement=false.")
    if overlap is not None and not 0.0 <= overlap <= 1.0:
        raise ConfigError(f"scenario.overlap must be null or between 0 and 1, got {overlap!r}.")
    rng = generator(seed, "missions")
    names = _field(benchmark, field_classes, rng)
    if classes_per_mission > len(names):
        raise NotEnoughData(
            f"scenario.classes_per_mission is {classes_per_mission}, but there are only "
            f"{len(names)} field classes."
        )
    support, test = split_support(benchmark, names, test_images, rng)
    pool = _Pool(support, shots, replacement, rng)
    owner = torch.arange(len(names))[torch.randperm(len(names), generator=rng)] % nodes
    unmet = [[c for c in range(len(names)) if owner[c] == node] for node in range(nodes)]

    def choose(node: int) -> list[int]:
        available = pool.available()
        if overlap is None:
            return _draw(available, classes_per_mission, rng)
        own = [c for c in available if owner[c] == node]
        others = [c for c in available if owner[c] != node]
        chosen = _draw(others, round(overlap * classes_per_mission), rng)
        fresh = _draw([c for c in own if c in unmet[node]], classes_per_mission - len(chosen), rng)
        chosen += fresh
        again = [c for c in own if c not in chosen]
        chosen += _draw(again, classes_per_mission - len(chosen), rng)
        unmet[node] = [c for c in unmet[node] if c not in fresh]
        return chosen

    missions: list[Mission] = []
    round_ = 0
    while pool.available() and (rounds is None or round_ < rounds):
        round_ += 1
        for node in range(nodes):
            chosen = choose(node)
            if chosen:
                taken = torch.cat([pool.take(c) for c in chosen])
                missions.append(Mission(node, round_, tuple(names[c] for c in chosen), taken))
    base_support, base_test = _base(benchmark) if include_base else (None, None)
    return _compact(nodes, round_, missions, support, test, base_support, base_test)


def class_incremental(
    benchmark: Benchmark,
    *,
    seed: int,
    classes: int,
    shots: int,
    test_images: int | None,
    classes_per_step: int = 1,
) -> MissionPlan:
    """Draw the single-client stream: one node meets new classes step by step, each once.

    The protocol of Javed & White (2019, arXiv 1905.12588) as federated reconnaissance uses it:
    for Omniglot 600 evaluation characters, 15 training and 5 test drawings, one class a step.

    Args:
        benchmark: The data set; only its field classes are used.
        seed: Seed of the class draw, their order and the images.
        classes: Number of classes of the whole stream.
        shots: Training images of each class.
        test_images: Test images of each class; ``None`` takes the data set's own test split, or
            a quarter of the smallest class where there is none.
        classes_per_step: New classes a step.

    Raises:
        ConfigError: A setting is out of range.
        NotEnoughData: The data set has too few classes or images for the settings.
    """
    positive(classes=classes, shots=shots, classes_per_step=classes_per_step)
    rng = generator(seed, "missions")
    names = _field(benchmark, classes, rng)
    support, test = split_support(benchmark, names, test_images, rng)
    pool = _Pool(support, shots, False, rng)
    order = torch.randperm(len(names), generator=rng).tolist()
    steps = [order[i : i + classes_per_step] for i in range(0, len(order), classes_per_step)]
    missions = [
        Mission(0, t, tuple(names[c] for c in step), torch.cat([pool.take(c) for c in step]))
        for t, step in enumerate(steps, start=1)
    ]
    return _compact(1, len(steps), missions, support, test, None, None)


def _draw(items: Sequence[int], count: int, rng: torch.Generator) -> list[int]:
    order = torch.randperm(len(items), generator=rng)[:count].tolist()
    return [items[i] for i in order]


def _field(benchmark: Benchmark, limit: int | None, rng: torch.Generator) -> list[str]:
    names = list(benchmark.groups.get("field", ()))
    if not names:
        raise NotEnoughData(f"Data set {benchmark.name!r} has no field classes to meet.")
    if limit is None:
        return names
    positive(field_classes=limit)
    if limit > len(names):
        raise NotEnoughData(
            f"The scenario asks for {limit} field classes, but data set {benchmark.name!r} has "
            f"{len(names)}."
        )
    return sorted(names[i] for i in torch.randperm(len(names), generator=rng)[:limit].tolist())


def _base(benchmark: Benchmark) -> tuple[ImageSet, ImageSet]:
    names = (*benchmark.groups.get("base", ()), *benchmark.groups.get("validation", ()))
    if not names or benchmark.test is None:
        raise ConfigError(
            f"scenario.include_base=true needs base classes and a test split, which data set "
            f"{benchmark.name!r} does not have."
        )
    return benchmark.train.of_classes(names), benchmark.test.of_classes(names)


class _Pool:
    """Images still to be drawn, class by class."""

    def __init__(
        self, support: ImageSet, shots: int, replacement: bool, rng: torch.Generator
    ) -> None:
        self._images = support.indices_by_class()
        smallest = min(map(len, self._images))
        if smallest < shots:
            raise NotEnoughData(
                f"scenario.shots asks for {shots} images of each class, but one class has only "
                f"{smallest} beside its test images."
            )
        self._shots, self._replacement, self._rng = shots, replacement, rng
        self._left = [i[torch.randperm(len(i), generator=rng)] for i in self._images]

    def available(self) -> list[int]:
        return [c for c, left in enumerate(self._left) if len(left)]

    def take(self, cls: int) -> Tensor:
        if self._replacement:
            images = self._images[cls]
            return images[torch.randperm(len(images), generator=self._rng)[: self._shots]]
        taken = self._left[cls][: self._shots]
        self._left[cls] = self._left[cls][self._shots :]
        return taken


def _compact(
    nodes: int,
    rounds: int,
    missions: Sequence[Mission],
    support: ImageSet,
    test: ImageSet,
    base_support: ImageSet | None,
    base_test: ImageSet | None,
) -> MissionPlan:
    """Keep only the support images that some mission uses, so that nothing else is embedded."""
    used = torch.unique(torch.cat([m.indices for m in missions]))
    renumbered = tuple(
        Mission(m.node, m.round, m.classes, torch.searchsorted(used, m.indices)) for m in missions
    )
    return MissionPlan(
        nodes, rounds, renumbered, support.subset(used), test, base_support, base_test
    )
