"""Who holds which training images, and what is held out: the data of unlearning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.seeding import derive_seed, generator


@dataclass(frozen=True, eq=False)
class Holdings:
    """Training images with their ids and owners, held-out images, test images.

    Attributes:
        train: What models are trained on.
        ids: ``(N,)`` int64 sample ids: positions in the training images of the data set, which no
            seed changes.
        owners: ``(N,)`` int64, index into ``contributors``.
        contributors: Names.
        validation: Held out of the training images, to choose and to stop by.
        test: What models are judged by.
        protocol: One sentence.
    """

    train: ImageSet
    ids: Tensor
    owners: Tensor
    contributors: tuple[str, ...]
    validation: ImageSet
    test: ImageSet
    protocol: str


def load(
    *,
    benchmark: Benchmark,
    seed: int,
    train_images: int | None = None,
    test_images: int | None = None,
    validation: float = 0.1,
    contributors: int = 10,
    concentration: float | None = 0.5,
) -> Holdings:
    """Divide the training images of all classes of a data set.

    Args:
        benchmark: The data set.
        seed: Of the draws.
        train_images: Images a class, held-out ones included; None: all.
        test_images: Test images a class; None: all.
        validation: Share of each class that is held out of the training.
        contributors: Number of owners.
        concentration: Of the Dirichlet draw of the owners of each class: small values give most of
            a class to one owner. None: each class belongs to one owner.

    Raises:
        ConfigError: A number is out of range.
        NotEnoughData: No test images, or a class with too few images.
    """
    if not 0 <= validation < 1 or contributors < 1 or (concentration or 1) <= 0:
        raise ConfigError(
            "scenario=holdings needs 0 <= validation < 1, contributors >= 1 and concentration > 0 "
            f"or null, got {validation}, {contributors} and {concentration}."
        )
    if benchmark.test is None:
        raise NotEnoughData(
            f"data={benchmark.name} has no test images of its own, which unlearning is judged by.",
            remedy="Choose glyphs, digits, mnist, fashion_mnist, cifar10, cifar100 or folder.",
        )
    for key, most, part in (
        ("train_images", train_images, benchmark.train),
        ("test_images", test_images, benchmark.test),
    ):
        fewest = int(torch.bincount(part.labels, minlength=len(part.classes)).min())
        if most is not None and fewest < most:
            raise NotEnoughData(
                f"scenario.{key}={most} asks for more than the {fewest} images that some class has."
            )
    held, kept = [], []
    for number, rows in enumerate(benchmark.train.indices_by_class()):
        # The split is another one for each seed, so that its luck is part of the spread.
        order = torch.randperm(len(rows), generator=generator(seed, "holdings", number))
        chosen = rows[order[:train_images]]
        out = round(validation * len(chosen))
        held.append(chosen[:out])
        kept.append(chosen[out:])
    ids = torch.cat(kept).sort().values
    train = benchmark.train.subset(ids)
    names = tuple(f"contributor{number:02d}" for number in range(contributors))
    owners = _owners(train, contributors, concentration, seed)
    return Holdings(
        train=train,
        ids=ids,
        owners=owners,
        contributors=names,
        validation=benchmark.train.subset(torch.cat(held).sort().values),
        test=_test(benchmark.test, test_images, seed),
        protocol=(
            f"{len(ids):,} training images, {sum(map(len, held)):,} held out of them, "
            f"{len(train.classes)} classes, {contributors} contributors "
            + (
                "with classes of their own."
                if concentration is None
                else f"(Dirichlet {concentration:g})."
            )
        ),
    )


def _owners(train: ImageSet, contributors: int, concentration: float | None, seed: int) -> Tensor:
    owners = torch.empty(len(train), dtype=torch.int64)
    # Torch has no Dirichlet draw that takes a generator.
    rng = np.random.default_rng(derive_seed(seed, "owners"))
    for number, rows in enumerate(train.indices_by_class()):
        if concentration is None:
            owners[rows] = number % contributors
            continue
        shares = rng.dirichlet([concentration] * contributors)
        owners[rows] = torch.from_numpy(rng.choice(contributors, size=len(rows), p=shares))
    return owners


def _test(test: ImageSet, per_class: int | None, seed: int) -> ImageSet:
    if per_class is None:
        return test
    chosen = []
    for number, rows in enumerate(test.indices_by_class()):
        order = torch.randperm(len(rows), generator=generator(seed, "holdings test", number))
        chosen.append(rows[order[:per_class]])
    return test.subset(torch.cat(chosen).sort().values)
