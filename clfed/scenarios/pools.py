"""What all streams share: the images that take part, the order of classes, and their division."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clfed.data.benchmark import GROUPS, Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.seeding import derive_seed, generator

ORDERS = ("natural", "seeded")


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of a stream before they are divided.

    Attributes:
        train: To learn from.
        test: To be judged by, of the same classes in the same order.
        judged_by: What the test images are, as a part of a sentence.
    """

    train: ImageSet
    test: ImageSet
    judged_by: str

    def of_classes(self, names: Sequence[str]) -> Pool:
        """The images of some classes, relabelled by their order."""
        return Pool(self.train.of_classes(names), self.test.of_classes(names), self.judged_by)


def whole(name: str, value: object, least: int = 1) -> int:
    """Return ``scenario.NAME`` if it is a whole number of at least ``least``.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"scenario.{name} must be a whole number of at least {least}, got {value!r}."
        )
    return value


def chosen(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a ``scenario.NAME`` that is not among the known choices."""
    if value not in known:
        raise ConfigError(f"Expected scenario.{name} of {', '.join(known)}, got {value!r}.")


def share(name: str, value: object) -> None:
    """Refuse a ``scenario.NAME`` that is no number of at least 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"scenario.{name} must be at least 0 and below 1, got {value!r}.")


def pool(
    benchmark: Benchmark,
    seed: int,
    *,
    validation_share: float = 0.0,
    test_share: float = 0.25,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Pool:
    """Draw the images of a stream; the same ones whatever the order of classes.

    Args:
        benchmark: All its grouped classes take part, in the order of its training set.
        seed: Of every draw.
        validation_share: Part of each class's training images that is judged instead of the test
            images, which then nobody looks at; 0 judges the test images.
        test_share: Part of each class that becomes its test images where the data set has no
            test split; it is set aside first, so validation never sees it.
        train_images: Largest number of training images a class, None for all.
        test_images: Largest number of images a class to be judged by, None for all.

    Raises:
        ConfigError: A setting is out of range.
        NotEnoughData: A class has too few images to be divided.
    """
    share("validation_share", validation_share)
    share("test_share", test_share)
    caps = {"train_images": train_images, "test_images": test_images}
    for name, cap in caps.items():
        if cap is not None:
            whole(name, cap)
    grouped = {name for group in GROUPS for name in benchmark.groups[group]}
    names = [name for name in benchmark.train.classes if name in grouped]
    train = benchmark.train.of_classes(names)
    if benchmark.test is not None:
        test, judged_by = benchmark.test.of_classes(names), "the test images of the data set"
    else:
        test, train = divide(train, "test_share", test_share, seed)
        judged_by = f"{test_share:.0%} of each class, drawn by the seed"
    if validation_share:
        test, train = divide(train, "validation_share", validation_share, seed)
        judged_by = (
            f"{validation_share:.0%} of each class's training images (validation; "
            "the test images were not looked at)"
        )
    train = capped(train, train_images, generator(seed, "stream", "train_images"))
    test = capped(test, test_images, generator(seed, "stream", "test_images"))
    limits = [
        f"at most {cap} {name.replace('_', ' ')} a class" for name, cap in caps.items() if cap
    ]
    return Pool(train, test, ", ".join([judged_by, *limits]))


def divide(images: ImageSet, name: str, part: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return a share of each class, drawn by the seed, and the rest.

    Raises:
        NotEnoughData: A class would have no image on one of the two sides.
    """
    held = torch.bincount(images.labels, minlength=len(images.classes))
    counts = torch.round(held * part).long()
    bad = ((counts < 1) | (counts >= held)).nonzero().flatten().tolist()
    if bad:
        raise NotEnoughData(
            f"scenario.{name}={part} leaves class {images.classes[bad[0]]!r} with "
            f"{int(counts[bad[0]])} of its {int(held[bad[0]])} images on one side."
        )
    taken, rest = draw(images, counts, generator(seed, "stream", name))
    return images.subset(taken), images.subset(rest)


def capped(images: ImageSet, cap: int | None, rng: torch.Generator) -> ImageSet:
    """Return at most ``cap`` images of each class, drawn at random."""
    if cap is None:
        return images
    return images.subset(draw(images, torch.full((len(images.classes),), cap), rng)[0])


def draw(images: ImageSet, counts: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions of ``counts[c]`` images of each class c, or all where there are fewer.

    Returns:
        Drawn positions and the others, both ascending.
    """
    shuffled = torch.randperm(len(images), generator=rng)
    order = shuffled[torch.argsort(images.labels[shuffled], stable=True)]
    labels = images.labels[order]
    rank = torch.arange(len(order)) - torch.searchsorted(labels, labels)
    taken = rank < counts[labels]
    return order[taken].sort().values, order[~taken].sort().values


def ordered(names: Sequence[str], order: str, class_seed: int | None, seed: int) -> tuple[str, ...]:
    """Return class names in the order in which a stream shows them.

    Args:
        names: In the order of the data set.
        order: ``natural``: as they are; ``seeded``: permuted by NumPy's Mersenne twister, so that
            1993 gives the order of the published CIFAR-100 tables.
        class_seed: Of the permutation; None derives it from ``seed``.
        seed: Of the run.

    Raises:
        ConfigError: There is no such order, or a seed has nothing to decide.

    Example:
        >>> ordered("abcde", "seeded", 1993, seed=0)
        ('a', 'c', 'd', 'e', 'b')
    """
    chosen("class_order", order, ORDERS)
    if order == "natural":
        if class_seed is not None:
            raise ConfigError("scenario.class_seed has no meaning with class_order=natural.")
        return tuple(names)
    if class_seed is not None:
        whole("class_seed", class_seed, 0)
    start = derive_seed(seed, "stream", "classes") if class_seed is None else class_seed
    permutation = np.random.RandomState(start % 2**32).permutation(len(names))
    return tuple(names[i] for i in permutation)


def shown(order: str, class_seed: int | None) -> str:
    """Return the order of classes as a part of a sentence."""
    if order == "natural":
        return "in natural order"
    seed = "the run's seed" if class_seed is None else f"seed {class_seed}"
    return f"in an order drawn by {seed}"


def sizes(
    classes: int,
    *,
    experiences: int | None,
    classes_per_experience: int | None,
    first_classes: int | None,
    uneven: bool,
) -> list[int]:
    """Return the number of classes of each experience; they add up to all.

    Args:
        classes: Of the whole stream.
        experiences: How many, the first one included; None with ``classes_per_experience``.
        classes_per_experience: Of each one (after the first, if ``first_classes`` is given).
        first_classes: Of the first experience (warm start); None: as many as of the others.
        uneven: Whether experiences may differ by a class (the larger ones come first, and the
            last one may be smaller with ``classes_per_experience``) where the numbers do not
            divide.

    Raises:
        ConfigError: The settings contradict each other, or do not divide the classes.

    Example:
        >>> equal = {"classes_per_experience": None, "first_classes": None}
        >>> sizes(10, experiences=4, uneven=True, **equal)
        [3, 3, 2, 2]
    """
    if (experiences is None) == (classes_per_experience is None):
        raise ConfigError(
            "Expected one of scenario.experiences and scenario.classes_per_experience, got "
            f"{experiences!r} and {classes_per_experience!r}."
        )
    first = [] if first_classes is None else [whole("first_classes", first_classes)]
    rest = classes - sum(first)
    if classes_per_experience is not None:
        each = whole("classes_per_experience", classes_per_experience)
        count, left = divmod(rest, each)
        divided = [each] * count + [left] * bool(left)
    else:
        count = whole("experiences", experiences, 1 + len(first)) - len(first)
        each, left = divmod(rest, count)
        divided = [each + 1] * left + [each] * (count - left)
    if rest < 1 or not all(divided):
        raise NotEnoughData(
            f"The scenario asks for {len(first) + len(divided)} experiences, "
            f"{sum(first)} classes in the first, but there are only {classes} classes."
        )
    if left and not uneven:
        raise ConfigError(
            f"{rest} classes do not divide into equal experiences of {each}: {left} would be left.",
            remedy="Choose numbers that divide, or scenario.uneven=true.",
        )
    return first + divided
