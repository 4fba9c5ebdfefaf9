"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8, embedded, no download."""

from __future__ import annotations

import torch

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.grouping import leading_groups
from clfed.data.pixels import channel_statistics

LARGEST = 16  # pixels are counts 0..16


def load(
    root: str | None = None,
    download: bool = False,
    *,
    base_classes: int = 5,
    validation_classes: int = 0,
    class_seed: int | None = None,
    as_features: bool = False,
) -> Benchmark:
    """Load the digits; images at even positions train, those at odd positions test.

    Args:
        root: Not used; every data set has it.
        download: Not used; every data set has it.
        base_classes: Classes to train an embedding on, those of validation among them.
        validation_classes: Base classes held out to pick checkpoints.
        class_seed: Seed of the order of classes; None keeps the order of the labels.
        as_features: Give pixels / 16 as ready float32 features ``(N, 64)``.

    Raises:
        ConfigError: The classes cannot be divided like this.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    counts = torch.from_numpy(bunch.images)
    labels = torch.from_numpy(bunch.target).long()
    classes = tuple(str(name) for name in bunch.target_names)
    if as_features:
        images = (counts / LARGEST).float().flatten(1)
    else:
        images = (counts * 255 / LARGEST).round().to(torch.uint8).unsqueeze(1)
    pool = ImageSet(images, labels, classes)
    train = pool.subset(torch.arange(0, len(pool), 2))
    mean, std = ((), ()) if as_features else channel_statistics(train.images)
    return Benchmark(
        name="digits",
        train=train,
        test=pool.subset(torch.arange(1, len(pool), 2)),
        groups=leading_groups(classes, base_classes, validation_classes, class_seed),
        mean=mean,
        std=std,
        protocol=(
            "Scikit-learn digits, all 1,797 images, "
            + ("64 pixels / 16 as features" if as_features else "8 x 8 pixels")
            + "; even positions train, odd positions test."
        ),
    )
