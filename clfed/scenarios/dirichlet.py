r"""Federated class-incremental tasks whose images are divided unevenly among nodes.

Every class belongs to one task; of each class node :math:`k` gets the share :math:`p_k` of a draw

.. math:: p \sim \mathrm{Dirichlet}(\beta, \dots, \beta)

(Hsu et al. 2019, arXiv 1909.06335; with one task the customary label skew of federated learning).
The test images of a class are divided in the same shares, so that a node can be asked about images
that are distributed as its own are.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios.missions import Mission, MissionPlan, positive, split_support
from clfed.scenarios.pools import chosen
from clfed.seeding import generator

GroupsOf = Literal["field", "all"]


def dirichlet(
    benchmark: Benchmark,
    *,
    seed: int,
    nodes: int,
    tasks: int,
    beta: float | None,
    groups: GroupsOf = "all",
    train_images: int | None = None,
    test_images: int | None = None,
) -> MissionPlan:
    """Draw tasks and the nodes' shares of each class.

    Args:
        benchmark: The data set.
        seed: Seed of the order of classes, the images and the shares.
        nodes: Number of nodes.
        tasks: Number of tasks; the classes are divided among them as evenly as possible. A task is
            one mission of every node.
        beta: Concentration: the smaller, the fewer classes a node has most images of. None divides
            every class evenly.
        groups: ``field``: its field classes; ``all``: every class of the data set, where nothing is
            trained beforehand.
        train_images: Training images of a class, drawn by the seed; None takes all.
        test_images: Test images of a class; None takes the data set's own test split, or a quarter
            of the smallest class where there is none.

    Raises:
        ConfigError: A setting is out of range.
        NotEnoughData: The data set has too few classes or images for the settings.
    """
    positive(nodes=nodes, tasks=tasks)
    if test_images is not None:
        positive(test_images=test_images)
    chosen("groups", groups, ("field", "all"))
    rng = generator(seed, "dirichlet")
    known = benchmark.groups.get("field", ()) if groups == "field" else benchmark.train.classes
    names = sorted(known)
    if len(names) < tasks:
        raise NotEnoughData(
            f"The scenario asks for {tasks} tasks, but there are only {len(names)} classes."
        )
    support, test = split_support(benchmark, names, test_images, rng)
    if train_images is not None:
        support = _limited(support, train_images, rng)
    order = torch.randperm(len(names), generator=rng)
    task_of = torch.empty(len(names), dtype=torch.int64)
    task_of[order] = torch.arange(len(names)) * tasks // len(names) + 1
    shares = shares_of(len(names), nodes, beta, seed)
    holder = divided(support, shares, rng)
    tester = divided(test, shares, rng)
    missions = []
    for task in range(1, tasks + 1):
        now = task_of[support.labels] == task
        for node in range(nodes):
            indices = (now & (holder == node)).nonzero().flatten()
            if len(indices):
                met = torch.unique(support.labels[indices]).tolist()
                missions.append(Mission(node, task, tuple(names[c] for c in met), indices))
    parts = tuple((tester == node).nonzero().flatten() for node in range(nodes))
    return MissionPlan(nodes, tasks, tuple(missions), support, test, test_shares=parts)


def _limited(support: ImageSet, count: int, rng: torch.Generator) -> ImageSet:
    positive(train_images=count)
    smallest = min(map(len, support.indices_by_class()))
    if smallest < count:
        raise NotEnoughData(
            f"scenario.train_images asks for {count} images of each class, but one class has only "
            f"{smallest}."
        )
    drawn = [
        part[torch.randperm(len(part), generator=rng)[:count]]
        for part in support.indices_by_class()
    ]
    return support.subset(torch.cat(drawn).sort().values)


def shares_of(classes: int, nodes: int, beta: float | None, seed: int) -> Tensor:
    """Return the share of each class that each node gets, ``(classes, nodes)`` float64.

    Raises:
        ConfigError: The concentration is out of range.
    """
    if beta is not None and not (type(beta) in (int, float) and 0 < beta < math.inf):
        raise ConfigError(f"scenario.beta must be null or a number above 0, got {beta!r}.")
    if beta is None:
        return torch.full((classes, nodes), 1.0 / nodes, dtype=torch.float64)
    import numpy as np

    from clfed.seeding import derive_seed

    draw = np.random.default_rng(derive_seed(seed, "dirichlet", "shares"))
    return torch.from_numpy(draw.dirichlet([beta] * nodes, size=classes))


def divided(images: ImageSet, shares: Tensor, rng: torch.Generator) -> Tensor:
    """Return the node of each image, ``(N,)`` int64: whole numbers of images nearest to shares."""
    holder = torch.empty(len(images), dtype=torch.int64)
    ends = shares.cumsum(dim=1)
    for positions, end in zip(images.indices_by_class(), ends, strict=True):
        order = positions[torch.randperm(len(positions), generator=rng)]
        until = (end * len(order)).round()
        until[-1] = len(order)
        holder[order] = torch.searchsorted(until, torch.arange(len(order)).double(), right=True)
    return holder
