"""CIFAR-100 (Krizhevsky 2009): photographs of a hundred kinds of things, 32 x 32 pixels."""

from __future__ import annotations

from clfed.data.benchmark import Benchmark
from clfed.data.cifar import load_cifar

PACK = "cifar100.zip"
BATCHES = "cifar-100-python"
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)


def load(
    root: str | None = None,
    download: bool = False,
    *,
    base_classes: int = 50,
    validation_classes: int = 10,
    class_seed: int | None = None,
) -> Benchmark:
    """Load CIFAR-100.

    Args:
        root: Folder with ``cifar100.zip`` (preferred) or torchvision's batches.
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
        "cifar100",
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
