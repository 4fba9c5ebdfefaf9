"""CIFAR-10 (Krizhevsky 2009): photographs of ten kinds of animals and vehicles, 32 x 32 pixels."""

from __future__ import annotations

from clfed.data.benchmark import Benchmark
from clfed.data.cifar import load_cifar

PACK = "cifar10_subset.zip"
BATCHES = "cifar-10-batches-py"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def load(
    root: str | None = None,
    download: bool = False,
    *,
    base_classes: int = 5,
    validation_classes: int = 0,
    class_seed: int | None = None,
) -> Benchmark:
    """Load CIFAR-10.

    Args:
        root: Folder with ``cifar10_subset.zip`` (preferred) or torchvision's batches.
        download: Let torchvision fetch it when neither is there.
        base_classes: Classes to train an embedding on, those of validation among them.
        validation_classes: Base classes held out to pick checkpoints.
        class_seed: Seed of the order of classes; None keeps the order of the labels.

    Raises:
        ConfigError: The classes cannot be divided like this.
        MissingData: The data set is not there.
        CorruptData: A file cannot be read.
    """
    return load_cifar(
        "cifar10",
        root,
        download,
        pack=PACK,
        batches=BATCHES,
        base_classes=base_classes,
        validation_classes=validation_classes,
        class_seed=class_seed,
        mean=MEAN,
        std=STD,
    )
