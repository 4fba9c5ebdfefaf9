"""Domain-incremental streams: the same classes again and again, seen in another way each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError
from clfed.scenarios.pools import pool, whole
from clfed.scenarios.streams import Experience, Stream
from clfed.seeding import generator

CHUNK = 4096  # images rotated at once, which bounds the memory of the intermediate floats


def permuted(
    benchmark: Benchmark,
    seed: int,
    *,
    experiences: int = 10,
    validation_share: float = 0.0,
    test_share: float = 0.25,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Stream:
    """Shuffle the pixels of all images in one fixed way an experience; the first stays as it is.

    Permuted MNIST (Goodfellow et al. 2013, arXiv 1312.6211) for any data set: colours of a pixel
    stay together, and of ready features the numbers change places. Every experience holds a copy
    of all images.

    Args:
        benchmark: All its classes take part, whatever their group.
        seed: Of the permutations and every draw.
        experiences: How many.
        validation_share: Part of the training images that is judged instead of the test images.
        test_share: Part of all images that is judged where the data set has no test split.
        train_images: Largest number of training images a class.
        test_images: Largest number of images a class to be judged by.

    Raises:
        ConfigError: A setting is out of range.
        NotEnoughData: There are too few images.
    """
    whole("experiences", experiences)
    shape = benchmark.train.images.shape[2:] or benchmark.train.images.shape[1:]
    pixels = shape.numel()
    orders = [torch.arange(pixels)]
    for number in range(1, experiences):
        orders.append(torch.randperm(pixels, generator=generator(seed, "stream", "pixels", number)))
    images = pool(
        benchmark,
        seed,
        validation_share=validation_share,
        test_share=test_share,
        train_images=train_images,
        test_images=test_images,
    )
    what = f"{experiences} fixed permutations of the pixels, the first of which changes nothing"
    return _stream(
        images.train,
        images.test,
        [partial(shuffled, order=order) for order in orders],
        f"Domain-incremental: {len(images.train.classes)} classes of {benchmark.name} under {what}"
        f"; judged by {images.judged_by}.",
    )


def rotated(
    benchmark: Benchmark,
    seed: int,
    *,
    experiences: int = 10,
    largest: float = 180.0,
    validation_share: float = 0.0,
    test_share: float = 0.25,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Stream:
    """Turn all images by one angle an experience, from 0 to ``largest`` in equal steps.

    Rotated MNIST (Lopez-Paz & Ranzato 2017, arXiv 1706.08840) for any pictures. Every experience
    holds a copy of all images.

    Args:
        benchmark: All its classes take part, whatever their group.
        seed: Of every draw.
        experiences: How many.
        largest: Angle of the last experience in degrees, counter-clockwise.
        validation_share: Part of the training images that is judged instead of the test images.
        test_share: Part of all images that is judged where the data set has no test split.
        train_images: Largest number of training images a class.
        test_images: Largest number of images a class to be judged by.

    Raises:
        ConfigError: A setting is out of range, or the data are no pictures.
        NotEnoughData: There are too few images.
    """
    whole("experiences", experiences)
    if isinstance(largest, bool) or not isinstance(largest, int | float) or not 0 < largest <= 360:
        raise ConfigError(f"scenario.largest must be an angle up to 360 degrees, got {largest!r}.")
    if benchmark.train.images.dim() != 4:
        raise ConfigError(
            f"scenario=rotated needs pictures, but {benchmark.name} holds ready features.",
            remedy="Use scenario=permuted, or another data set.",
        )
    images = pool(
        benchmark,
        seed,
        validation_share=validation_share,
        test_share=test_share,
        train_images=train_images,
        test_images=test_images,
    )
    angles = torch.linspace(0, largest, experiences).tolist()
    return _stream(
        images.train,
        images.test,
        [partial(turned, angle=angle) for angle in angles],
        f"Domain-incremental: {len(images.train.classes)} classes of {benchmark.name} turned by "
        f"{experiences} angles from 0 to {largest:g} degrees; judged by {images.judged_by}.",
    )


def shuffled(images: Tensor, order: Tensor) -> Tensor:
    """Put pixel ``order[p]`` of each image at place p.

    Args:
        images: ``(N, C, H, W)``, or ``(N, D)`` ready features.
        order: ``(H * W,)`` or ``(D,)`` int64, a permutation.
    """
    if torch.equal(order, torch.arange(len(order))):
        return images
    if images.dim() == 2:
        return images[:, order]
    return images.flatten(2)[:, :, order].reshape(images.shape)


def turned(images: Tensor, angle: float) -> Tensor:
    """Turn pictures counter-clockwise, bilinearly; black comes in at the corners.

    Args:
        images: ``(N, C, H, W)`` uint8.
        angle: In degrees.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate

    if angle == 0:
        return images
    parts = torch.split(images, CHUNK)
    return torch.cat([rotate(part, angle, InterpolationMode.BILINEAR) for part in parts])


def _stream(
    train: ImageSet, test: ImageSet, views: list[Callable[[Tensor], Tensor]], protocol: str
) -> Stream:
    def seen(images: ImageSet, view: Callable[[Tensor], Tensor]) -> ImageSet:
        return ImageSet(view(images.images), images.labels, images.classes)

    again = train.classes
    experiences = tuple(
        Experience(n, seen(train, view), n, revisited=again if n else (), upcoming=0)
        for n, view in enumerate(views)
    )
    return Stream(experiences, tuple(seen(test, view) for view in views), "domain", protocol)
