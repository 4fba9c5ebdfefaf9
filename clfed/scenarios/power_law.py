"""Naturalistic streams: what was met before comes back, the more rarely the older it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError
from clfed.scenarios.online import portion
from clfed.scenarios.pools import chosen
from clfed.scenarios.split import split
from clfed.scenarios.streams import Experience, Stream
from clfed.seeding import generator

CONTROLS = ("power", "exponential", "uniform", "none")
AGES = ("onset", "last_seen")


def rehearsal_probabilities(ages: Tensor, control: str = "power", a: float = 1.0) -> Tensor:
    r"""Return how probable it is that each earlier phase comes back.

    The power law of Gandhi et al. 2024 (arXiv 2401.10393),
    :math:`P(j) \propto \mathrm{age}_j^{-a}`; for comparison
    :math:`P(j) \propto e^{-b\,\mathrm{age}_j}` with :math:`b` such that the mean age is that of
    the power law, and equal probabilities.

    Args:
        ages: ``(J,)`` positive ages, 1 for the phase just before.
        control: ``power``, ``exponential`` or ``uniform``.
        a: Exponent of the power law, at least 0; infinity leaves the youngest alone.

    Returns:
        ``(J,)`` float64, of sum 1.

    Raises:
        ConfigError: There is no such control, or the exponent is negative.

    Example:
        >>> rehearsal_probabilities(torch.arange(1, 5))
        tensor([0.4800, 0.2400, 0.1600, 0.1200], dtype=torch.float64)
    """
    chosen("control", control, CONTROLS[:3])
    _at_least_zero("a", a)
    ages = ages.double()
    if control == "uniform":
        return torch.full_like(ages, 1.0 / len(ages))
    # Relative to the youngest, so that a large exponent does not make every weight zero.
    power = (ages / ages.min()).pow(-a)
    power = power / power.sum()
    if control == "power":
        return power
    older = ages - ages.min()
    low, high = 0.0, 1e3
    for _ in range(64):  # the mean age falls with b
        middle = (low + high) / 2
        mean = (torch.softmax(-middle * older, 0) * ages).sum()
        low, high = (middle, high) if mean > (power * ages).sum() else (low, middle)
    return torch.softmax(-high * older, 0)


def power_law(
    benchmark: Benchmark,
    seed: int,
    *,
    rho: float = 0.2,
    a: float = 1.0,
    age: str = "onset",
    control: str = "power",
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
    """Mix images of earlier experiences into a class-incremental stream.

    An experience of n new images brings ``round(rho n)`` old ones besides. Each of them first
    draws an earlier experience, see :func:`rehearsal_probabilities`, then images of it without
    repetition (until all have come once). The paper fixes neither the exponent nor the amount;
    these are ours. The old images are the world's, not a memory of the learner, which is why
    results on this stream are not free of replay.

    Args:
        benchmark: All its classes take part, whatever their group.
        seed: Of every draw.
        rho: Old images for each new one; 0 is exactly :func:`~clfed.scenarios.split.split`.
        a: Exponent of the power law.
        age: ``onset``: experiences since a phase first appeared; ``last_seen``: since any image
            of it last did, which with many old images soon makes all ages 1.
        control: ``power``; or, with as many old images, ``exponential`` or ``uniform``; ``none``
            shows no old image.
        experiences: See :func:`~clfed.scenarios.split.split` for this and all that follows.
        classes_per_experience: New classes of each.
        first_classes: Classes of the first experience.
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
    chosen("control", control, CONTROLS)
    chosen("age", age, AGES)
    _at_least_zero("a", a)
    if _at_least_zero("rho", rho) == torch.inf:
        raise ConfigError("scenario.rho must be finite, got infinity.")
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
    trains = [phase.train for phase in phases.experiences]
    last = torch.zeros(len(trains), dtype=torch.int64)
    mixed: list[Experience] = []
    for phase in phases.experiences:
        now = last[phase.number] = phase.number
        extra = 0 if control == "none" or not now else round(rho * len(phase.train))
        if not extra:
            mixed.append(phase)
            continue
        rng = generator(seed, "stream", "power_law", now)
        since = last[:now] if age == "last_seen" else torch.arange(now)
        weights = rehearsal_probabilities(now - since, control, a)
        which = torch.multinomial(weights, extra, replacement=True, generator=rng)
        counts = torch.bincount(which, minlength=now)
        last[:now][counts > 0] = now
        old = [_some(trains[j], int(counts[j]), rng) for j in counts.nonzero().flatten().tolist()]
        again = tuple(name for part in old for name in part.classes)
        mixed.append(replace(phase, train=_joined([phase.train, *old]), revisited=again))
    return replace(
        phases,
        experiences=tuple(mixed),
        protocol=_protocol(phases.protocol, rho, a, age, control),
        replay_free=not any(experience.revisited for experience in mixed),
    )


def _protocol(split_protocol: str, rho: float, a: float, age: str, control: str) -> str:
    what, judged = split_protocol.split(";", 1)
    if control == "none" or not rho:
        return split_protocol
    since = "first appearance" if age == "onset" else "last appearance"
    law = {
        "power": f"with probabilities that fall as (time since {since})^-{a:g}",
        "exponential": f"with probabilities that fall exponentially with time since {since}, at "
        f"the mean age of the power {a:g}",
        "uniform": "all with the same probability",
    }[control]
    return (
        f"{what}, a naturalistic stream that is not free of replay: {rho:g} old images for each "
        f"new one, {law};{judged}"
    )


def _some(images: ImageSet, count: int, rng: torch.Generator) -> ImageSet:
    """Draw images, each once before any comes again."""
    passes = -(-count // len(images))
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(passes)])
    return portion(images, order[:count])


def _joined(parts: Sequence[ImageSet]) -> ImageSet:
    """Put sets of different classes together."""
    names = tuple(name for part in parts for name in part.classes)
    before = accumulate((len(part.classes) for part in parts[:-1]), initial=0)
    labels = [part.labels + start for part, start in zip(parts, before, strict=True)]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat(labels), names)


def _at_least_zero(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigError(f"scenario.{name} must be a number of at least 0, got {value!r}.")
    return float(value)
