"""The base classes' images divided unevenly among nodes, to train an embedding in the federation.

Mission 1 of a node is its share of the base classes, drawn as in
:mod:`clfed.scenarios.dirichlet`; mission 2 its share of the images that make the prototypes of the
validation classes, which nobody trains on. What those prototypes are asked about is the test set of
the plan: the same images as in central base training. Field classes and the data set's own test
split take no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import NotEnoughData
from clfed.scenarios.dirichlet import divided, shares_of
from clfed.scenarios.missions import Mission, MissionPlan, positive
from clfed.seeding import generator

BASE, VALIDATION = 1, 2


def base_shares(
    benchmark: Benchmark,
    *,
    seed: int,
    nodes: int,
    beta: float | None,
    validation_shots: int,
) -> MissionPlan:
    """Draw the nodes' shares of the base and the validation classes.

    Args:
        benchmark: The data set; of its training images the groups ``base`` and ``validation``.
        seed: Seed of the shares, and of the validation split.
        nodes: Number of nodes.
        beta: Concentration of the shares, as in :func:`clfed.scenarios.dirichlet`.
        validation_shots: Images a validation class that make its prototype, as in
            :func:`validation_split`.

    Raises:
        ConfigError: A setting is out of range.
        NotEnoughData: There are no base classes, or a validation class has a single image.
    """
    positive(nodes=nodes, validation_shots=validation_shots)
    base, validation = benchmark.groups["base"], benchmark.groups["validation"]
    if not base:
        raise NotEnoughData(
            f"Training an embedding needs base classes, data set {benchmark.name!r} has none."
        )
    pool = benchmark.train.of_classes((*base, *validation))
    held_out = benchmark.train.of_classes(validation)
    asked = torch.zeros(len(pool), dtype=torch.bool)
    asked[pool.labels >= len(base)] = ~validation_split(held_out, validation_shots, seed)
    support, test = pool.subset(~asked), pool.subset(asked).of_classes(validation)
    shares = shares_of(len(pool.classes), nodes, beta, seed)
    holder = divided(support, shares, generator(seed, "base_shares"))
    of_base = support.labels < len(base)
    missions = []
    for number, part in ((BASE, of_base), (VALIDATION, ~of_base)):
        for node in range(nodes):
            indices = (part & (holder == node)).nonzero().flatten()
            if len(indices):
                met = torch.unique(support.labels[indices]).tolist()
                names = tuple(support.classes[c] for c in met)
                missions.append(Mission(node, number, names, indices))
    return MissionPlan(nodes, VALIDATION if validation else BASE, tuple(missions), support, test)


def validation_split(images: ImageSet, shots: int, seed: int) -> Tensor:
    """Return a mask ``(N,)`` of the images that make the prototypes; the others are classified.

    Each class gives ``shots`` images, but at most three quarters of what it has, drawn by seed.

    Raises:
        NotEnoughData: A class has a single image.
    """
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    if len(images.classes) and int(counts.min()) < 2:
        raise NotEnoughData(
            f"A validation class needs 2 images at least, {images.classes[int(counts.argmin())]!r} "
            f"has {int(counts.min())}."
        )
    shuffled = torch.randperm(len(images), generator=generator(seed, "validation"))
    grouped = shuffled[images.labels[shuffled].argsort(stable=True)]
    rank = torch.arange(len(images)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    wanted = torch.minimum(torch.tensor(shots), counts - (counts // 4).clamp(min=1))
    support = torch.empty(len(images), dtype=torch.bool)
    support[grouped] = rank < wanted.repeat_interleave(counts)
    return support
