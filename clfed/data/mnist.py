"""MNIST (LeCun et al. 1998): 70,000 handwritten digits, 28 x 28 pixels."""

from __future__ import annotations

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.files import fetch, missing, root_folder
from clfed.data.grouping import leading_groups
from clfed.data.idx import STEMS, find, read_pair

CLASSES = tuple("0123456789")
MEAN, STD = (0.1307,), (0.3081,)


def load(
    root: str | None = None,
    download: bool = False,
    *,
    base_classes: int = 5,
    validation_classes: int = 0,
    class_seed: int | None = None,
) -> Benchmark:
    """Load MNIST.

    Args:
        root: Folder with torchvision's ``MNIST/raw``, its files plain, ``.xz`` or ``.gz``.
        download: Let torchvision fetch it when it is not there.
        base_classes: Classes to train an embedding on, those of validation among them.
        validation_classes: Base classes held out to pick checkpoints.
        class_seed: Seed of the order of classes; None keeps the order of the labels.

    Raises:
        ConfigError: The classes cannot be divided like this.
        MissingData: The data set is not there.
        CorruptData: A file cannot be read.
    """
    groups = leading_groups(CLASSES, base_classes, validation_classes, class_seed)
    folder = root_folder(root)
    raw = folder / "MNIST" / "raw"
    if not any(find(raw, stem) for stem in STEMS) and download:
        from torchvision.datasets import MNIST

        fetch("mnist", folder, lambda: MNIST(str(folder), download=True))
    if not any(find(raw, stem) for stem in STEMS):
        raise missing("mnist", folder, (raw,))
    train = ImageSet(*read_pair(raw, *STEMS[:2]), CLASSES)
    test = ImageSet(*read_pair(raw, *STEMS[2:]), CLASSES)
    return Benchmark(
        name="mnist",
        train=train,
        test=test,
        groups=groups,
        mean=MEAN,
        std=STD,
        protocol=(
            f"MNIST, {len(train):,} training and {len(test):,} test images of ten digits; "
            f"{base_classes} base classes."
        ),
    )
