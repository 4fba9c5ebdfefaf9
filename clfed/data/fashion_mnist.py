"""Fashion-MNIST (Xiao et al. 2017): 70,000 pictures of clothes, 28 x 28 pixels."""

from __future__ import annotations

from pathlib import Path

import torch

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.files import fetch, missing, read_arrays, reading, root_folder
from clfed.data.grouping import leading_groups
from clfed.data.idx import STEMS, find, read_pair

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = (0.2860,), (0.3530,)


def load(
    root: str | None = None,
    download: bool = False,
    *,
    base_classes: int = 5,
    validation_classes: int = 0,
    class_seed: int | None = None,
) -> Benchmark:
    """Load Fashion-MNIST.

    Args:
        root: Folder with ``fashion_mnist_subset.npz`` (preferred) or torchvision's
            ``FashionMNIST/raw``, its files plain, ``.xz`` or ``.gz``.
        download: Let torchvision fetch it when neither is there.
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
    pack, raw = folder / "fashion_mnist_subset.npz", folder / "FashionMNIST" / "raw"
    there = pack.is_file() or any(find(raw, stem) for stem in STEMS)
    if not there and download:
        from torchvision.datasets import FashionMNIST

        fetch("fashion_mnist", folder, lambda: FashionMNIST(str(folder), download=True))
        there = True
    if not there:
        raise missing("fashion_mnist", folder, (pack, raw))
    if pack.is_file():
        train, test = _from_pack(pack)
    else:
        train = ImageSet(*read_pair(raw, *STEMS[:2]), CLASSES)
        test = ImageSet(*read_pair(raw, *STEMS[2:]), CLASSES)
    return Benchmark(
        name="fashion_mnist",
        train=train,
        test=test,
        groups=groups,
        mean=MEAN,
        std=STD,
        protocol=(
            f"Fashion-MNIST, {len(train):,} of 60,000 training and {len(test):,} test images of "
            f"ten kinds of clothes; {base_classes} base classes."
        ),
    )


def _from_pack(path: Path) -> tuple[ImageSet, ImageSet]:
    arrays = read_arrays(path, "train_x", "train_y", "test_x", "test_y")
    with reading(path):
        train_x, train_y, test_x, test_y = map(torch.from_numpy, arrays)
        return (
            ImageSet(train_x.unsqueeze(1), train_y.long(), CLASSES),
            ImageSet(test_x.unsqueeze(1), test_y.long(), CLASSES),
        )
