"""The classes of a data set in experiences: Split-MNIST, Split-CIFAR-100 and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import get_args

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError
from clfed.scenarios.avalanche_benchmarks import class_incremental
from clfed.scenarios.pools import Pool, chosen, ordered, pool, shown, sizes
from clfed.scenarios.streams import Experience, Setting, Stream

EXPERIENCES = 5


def split(
    benchmark: Benchmark,
    seed: int,
    *,
    setting: Setting = "class",
    experiences: int | None = None,
    classes_per_experience: int | None = None,
    first_classes: int | None = None,
    uneven: bool = False,
    class_order: str = "natural",
    class_seed: int | None = None,
    validation_share: float = 0.0,
    test_share: float = 0.25,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Stream:
    """Divide the classes of a data set into experiences.

    Args:
        benchmark: All its classes take part, whatever their group.
        seed: Of every draw.
        setting: ``class``; ``task``; or ``domain``, where a class is its place within the
            experience, so that one head of that size serves all of them.
        experiences: How many; None with ``classes_per_experience``, or for five.
        classes_per_experience: New classes of each.
        first_classes: Classes of the first experience (warm start), which ``experiences`` counts.
        uneven: Whether numbers of classes may differ where they do not divide.
        class_order: ``natural``, or ``seeded`` by ``class_seed``.
        class_seed: None takes the run's; 1993 is customary.
        validation_share: Part of the training images that is judged instead of the test images.
        test_share: Part of all images that is judged where the data set has no test split.
        train_images: Largest number of training images a class.
        test_images: Largest number of images a class to be judged by.

    Raises:
        ConfigError: A setting is out of range or contradicts another one.
        NotEnoughData: There are too few classes or images.
    """
    chosen("setting", setting, get_args(Setting))
    if experiences is None and classes_per_experience is None:
        experiences = EXPERIENCES
    images = pool(
        benchmark,
        seed,
        validation_share=validation_share,
        test_share=test_share,
        train_images=train_images,
        test_images=test_images,
    )
    names = images.train.classes
    parts = sizes(
        len(names),
        experiences=experiences,
        classes_per_experience=classes_per_experience,
        first_classes=first_classes,
        uneven=uneven,
    )
    if setting == "domain" and len(set(parts)) > 1:
        raise ConfigError(
            "scenario.setting=domain needs the same number of classes in each experience, got "
            f"{told(parts)}."
        )
    stream = divided(
        images.of_classes(ordered(names, class_order, class_seed, seed)),
        parts,
        f"{setting.capitalize()}-incremental: {len(names)} classes of {benchmark.name} in "
        f"{len(parts)} experiences ({told(parts)}), {shown(class_order, class_seed)}",
    )
    return places(stream) if setting == "domain" else replace(stream, setting=setting)


def divided(images: Pool, parts: Sequence[int], what: str) -> Stream:
    """Return the class-incremental stream of consecutive classes.

    Args:
        images: Classes in the order in which they come.
        parts: Classes of each experience; they add up to all.
        what: The beginning of the protocol's sentence.
    """
    names = images.train.classes
    train, test = class_incremental(images.train, images.test, parts)
    ends = list(accumulate(parts))
    met = [names[end - count : end] for end, count in zip(ends, parts, strict=True)]
    experiences = tuple(
        Experience(
            phase,
            images.train.subset(train[phase]).of_classes(met[phase]),
            phase,
            upcoming=len(names) - end,
        )
        for phase, end in enumerate(ends)
    )
    tests = tuple(
        images.test.subset(inside).of_classes(classes)
        for inside, classes in zip(test, met, strict=True)
    )
    return Stream(experiences, tests, "class", f"{what}; judged by {images.judged_by}.")


def places(stream: Stream) -> Stream:
    """Name each class by its place within its experience, which makes them shared domains."""
    names = tuple(map(str, range(len(stream.tests[0].classes))))

    def rename(images: ImageSet) -> ImageSet:
        return ImageSet(images.images, images.labels, names)

    return replace(
        stream,
        experiences=tuple(
            replace(e, train=rename(e.train), revisited=names if e.number else (), upcoming=0)
            for e in stream.experiences
        ),
        tests=tuple(map(rename, stream.tests)),
        setting="domain",
    )


def told(parts: Sequence[int]) -> str:
    """Return numbers of classes in short.

    Example:
        >>> told([50, 10, 10]), told([2, 2])
        ('50 + 2 x 10 classes', '2 x 2 classes')
    """
    first, rest = parts[0], parts[1:]
    if len(set(parts)) == 1:
        return f"{len(parts)} x {first} classes"
    if len(set(rest)) == 1:
        return f"{first} + {len(rest)} x {rest[0]} classes"
    return f"{' + '.join(map(str, parts))} classes"
