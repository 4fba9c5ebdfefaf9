"""Online streams: one pass over the images in small portions, without a word about boundaries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.scenarios.avalanche_benchmarks import cut
from clfed.scenarios.pools import whole
from clfed.scenarios.split import split
from clfed.scenarios.streams import Experience, Stream
from clfed.seeding import derive_seed


def online(
    benchmark: Benchmark,
    seed: int,
    *,
    size: int = 100,
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
    """Show the images of a class-incremental stream once, ``size`` at a time.

    The learner is told neither where a phase ends nor how many classes are still to come. Tests
    are those of the phases, the experiences of the underlying stream.

    Args:
        benchmark: All its classes take part, whatever their group.
        seed: Of every draw, that of the order within a phase included.
        size: Images of an experience; the last one of a phase may be smaller.
        experiences: Phases, see :func:`~clfed.scenarios.split.split` for this and all that
            follows.
        classes_per_experience: New classes of a phase.
        first_classes: Classes of the first phase.
        uneven: Whether numbers of classes may differ where they do not divide.
        class_order: ``natural``, or ``seeded`` by ``class_seed``.
        class_seed: None takes the run's.
        validation_share: Part of the training images that is judged instead of the test images.
        test_share: Part of all images that is judged where the data set has no test split.
        train_images: Largest number of training images a class.
        test_images: Largest number of images a class to be judged by.

    Raises:
        ConfigError: A setting is out of range or contradicts another one.
        NotEnoughData: There are too few classes or images.
    """
    whole("size", size)
    phases = split(
        benchmark,
        seed,
        experiences=experiences,
        classes_per_experience=classes_per_experience,
        first_classes=first_classes,
        uneven=uneven,
        class_order=class_order,
        class_seed=class_seed,
        validation_share=validation_share,
        test_share=test_share,
        train_images=train_images,
        test_images=test_images,
    )
    small: list[Experience] = []
    met: dict[str, None] = {}
    for phase in phases.experiences:
        shuffle = derive_seed(seed, "stream", "online", phase.number)
        for inside in cut(len(phase.train), size, shuffle):
            train = portion(phase.train, inside)
            again = tuple(name for name in train.classes if name in met)
            small.append(Experience(len(small), train, phase.phase, False, again))
            met.update(dict.fromkeys(train.classes))
    what, rest = phases.protocol.split(";", 1)
    protocol = f"{what}, online: one pass in {len(small)} experiences of {size} images;{rest}"
    return replace(phases, experiences=tuple(small), protocol=protocol)


def portion(images: ImageSet, inside: Tensor) -> ImageSet:
    """Return the images at some positions with only those classes that they show."""
    labels = images.labels[inside]
    shown = torch.unique(labels)
    names = tuple(images.classes[c] for c in shown.tolist())
    return ImageSet(images.images[inside], torch.searchsorted(shown, labels), names)
