"""Few-shot class-incremental streams: a base, then sessions of a few images of new classes."""

from __future__ import annotations

from dataclasses import replace

import torch

from clfed.data.benchmark import Benchmark
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios.pools import capped, ordered, pool, shown, whole
from clfed.scenarios.split import divided
from clfed.scenarios.streams import Stream
from clfed.seeding import generator


def few_shot(
    benchmark: Benchmark,
    seed: int,
    *,
    base_classes: int = 60,
    way: int = 5,
    shots: int = 5,
    sessions: int | None = None,
    class_order: str = "natural",
    class_seed: int | None = None,
    validation_share: float = 0.0,
    test_share: float = 0.25,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Stream:
    """Show base classes with all their images, then a few images of new ones in each session.

    The protocol of Tao et al. 2020 (arXiv 2004.10956): 60 base classes and eight sessions of five
    classes with five images each for CIFAR-100 and miniImageNet. The shots are drawn by the seed;
    published tables use one fixed list of images instead.

    Args:
        benchmark: All its classes can take part, whatever their group.
        seed: Of every draw, that of the shots included.
        base_classes: Classes of the first experience.
        way: New classes of a session.
        shots: Training images of a new class.
        sessions: How many; None for as many as the classes allow. Classes beyond them stay out.
        class_order: ``natural``, or ``seeded`` by ``class_seed``.
        class_seed: None takes the run's.
        validation_share: Part of the training images that is judged instead of the test images.
        test_share: Part of all images that is judged where the data set has no test split.
        train_images: Largest number of training images of a base class.
        test_images: Largest number of images a class to be judged by.

    Raises:
        ConfigError: A setting is out of range, or the classes do not divide into sessions.
        NotEnoughData: There are too few classes or images.
    """
    for name, value in (("base_classes", base_classes), ("way", way), ("shots", shots)):
        whole(name, value)
    if train_images is not None:
        whole("train_images", train_images)
    images = pool(
        benchmark,
        seed,
        validation_share=validation_share,
        test_share=test_share,
        test_images=test_images,
    )
    names = ordered(images.train.classes, class_order, class_seed, seed)
    count = _sessions(len(names), base_classes, way, sessions)
    images = images.of_classes(names[: base_classes + count * way])
    fewest = int(torch.bincount(images.train.labels)[base_classes:].min())
    if fewest < shots:
        raise NotEnoughData(
            f"scenario.shots asks for {shots} images of each new class, but one class has only "
            f"{fewest} to learn from."
        )
    stream = divided(
        images,
        [base_classes, *[way] * count],
        f"Few-shot class-incremental: {base_classes} base classes of {benchmark.name}"
        f"{f' ({train_images} images each)' if train_images else ''}, then {count} sessions of "
        f"{way} classes with {shots} images each, {shown(class_order, class_seed)}",
    )
    caps = [train_images, *[shots] * count]
    drawn = (
        capped(experience.train, cap, generator(seed, "stream", "shots", experience.number))
        for experience, cap in zip(stream.experiences, caps, strict=True)
    )
    return replace(
        stream,
        experiences=tuple(
            replace(experience, train=train)
            for experience, train in zip(stream.experiences, drawn, strict=True)
        ),
    )


def _sessions(classes: int, base: int, way: int, asked: int | None) -> int:
    """Return the number of sessions of ``way`` classes after the base."""
    most, left = divmod(classes - base, way)
    count = most if asked is None else whole("sessions", asked)
    if not 1 <= count <= most:
        raise NotEnoughData(
            f"The scenario asks for {base} base classes and {max(count, 1)} sessions of {way} "
            f"more, but there are only {classes} classes."
        )
    if asked is None and left:
        raise ConfigError(
            f"{classes - base} classes after the base do not divide into sessions of {way}: "
            f"{left} would be left.",
            remedy="Choose another scenario.way, or set scenario.sessions.",
        )
    return count
