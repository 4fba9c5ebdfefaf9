"""What CIFAR-10 and CIFAR-100 have in common (Krizhevsky 2009): 32 x 32 photographs."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.files import channels_first, fetch, missing, reading, root_folder
from clfed.data.grouping import leading_groups
from clfed.errors import CorruptData


def load_cifar(
    name: str,
    root: str | None,
    download: bool,
    *,
    pack: str,
    batches: str,
    base_classes: int,
    validation_classes: int,
    class_seed: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Benchmark:
    """Load either set, see its own module.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: Folder with the pack (preferred) or torchvision's folder of pickled batches.
        download: Let torchvision fetch it when neither is there.
        pack: File name of the pack.
        batches: Folder name of torchvision's batches.
        base_classes: See :func:`clfed.data.grouping.leading_groups`.
        validation_classes: See there.
        class_seed: See there.
        mean: Published mean of ``x / 255`` of the whole training set, a channel.
        std: Published standard deviation, a channel.
    """
    folder = root_folder(root)
    archive, tree = folder / pack, folder / batches
    if not archive.is_file() and not tree.is_dir() and download:
        fetch(name, folder, lambda: _dataset(name)(str(folder), download=True))
    if archive.is_file():
        train, test = _from_pack(archive)
    elif tree.is_dir():
        train, test = _from_batches(_dataset(name), tree)
    else:
        raise missing(name, folder, (archive, tree))
    groups = leading_groups(train.classes, base_classes, validation_classes, class_seed)
    return Benchmark(
        name=name,
        train=train,
        test=test,
        groups=groups,
        mean=mean,
        std=std,
        protocol=(
            f"CIFAR-{len(train.classes)}, {len(train):,} training and {len(test):,} test images, "
            f"all classes, exact duplicates included; {base_classes} base classes "
            + ("in label order." if class_seed is None else f"in the order of seed {class_seed}.")
        ),
    )


def _from_pack(path: Path) -> tuple[ImageSet, ImageSet]:
    """Read contact sheets: one lossless picture a split and class, tiles row by row."""
    with reading(path), zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read("index.json"))
        classes, side = tuple(index["classes"]), int(index["tile"])
        parts = []
        for split in ("train", "test"):
            columns, files = int(index["columns"][split]), index["files"][split]
            tiles = []
            for name in classes:
                with Image.open(io.BytesIO(archive.read(f"{split}/{name}.webp"))) as sheet:
                    pixels = np.asarray(sheet.convert("RGB"))
                grid = pixels.reshape(-1, side, columns, side, 3).swapaxes(1, 2)
                tiles.append(grid.reshape(-1, side, side, 3)[: len(files[name])])
            counts = torch.tensor([len(sheet) for sheet in tiles])
            labels = torch.arange(len(classes)).repeat_interleave(counts)
            parts.append(ImageSet(channels_first(np.concatenate(tiles)), labels, classes))
    return parts[0], parts[1]


def _dataset(name: str) -> Any:
    from torchvision import datasets

    return getattr(datasets, name.upper())


def _from_batches(dataset: Any, tree: Path) -> tuple[ImageSet, ImageSet]:
    """Read torchvision's pickled batches, none of which is opened before its md5 is right."""
    from torchvision.datasets.utils import check_integrity

    files = [*dataset.train_list, *dataset.test_list]
    for file, md5 in [*files, (dataset.meta["filename"], dataset.meta["md5"])]:
        if not check_integrity(str(tree / file), md5):
            raise CorruptData(f"{tree / file} is absent or not the published file (md5 {md5}).")
    parts = []
    for is_train in (True, False):
        with reading(tree):
            data = dataset(str(tree.parent), train=is_train)
        labels = torch.tensor(data.targets, dtype=torch.int64)
        parts.append(ImageSet(channels_first(data.data), labels, tuple(data.classes)))
    return parts[0], parts[1]
