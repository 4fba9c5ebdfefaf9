"""mini-ImageNet (Vinyals et al. 2016; classes of Ravi & Larochelle 2017): 84 x 84 photographs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clfed.data.benchmark import GROUPS, Benchmark, ImageSet
from clfed.data.files import (
    decode_all,
    missing,
    open_picture,
    read_arrays,
    reading,
    root_folder,
    to_pixels,
)
from clfed.data.grouping import leading_groups
from clfed.errors import ConfigError, CorruptData

SIDE = 84
# Of x / 255 over the training images of the 64 base classes of the pack, to four decimals.
MEAN, STD = (0.4708, 0.4494, 0.4042), (0.2708, 0.2640, 0.2774)
PARTS = ("train", "val", "test")  # Ravi's names of base, validation and field
RECON_BASE, RECON_VALIDATION = 50, 10
SPLITS = {
    "ravi": "Ravi and Larochelle's 64 base, 16 validation and 20 field classes",
    "recon": "the first 50 WordNet numbers in sorted order as base, its last 10 for validation, "
    "the other 50 in the field (the published 50/50 division is not known)",
}
REMEDY = (
    "It cannot be downloaded by a command: put mini_imagenet_subset.npz into data.root, or "
    "pictures as data.root/mini_imagenet/{train,val,test}/CLASS/*.jpg, one folder a class, "
    "then clfed data=mini_imagenet data.root=PATH"
)


def load(root: str | None = None, download: bool = False, *, split: str = "ravi") -> Benchmark:
    """Load mini-ImageNet; classes are named by their WordNet numbers.

    Args:
        root: Folder with ``mini_imagenet_subset.npz`` (preferred) or ``mini_imagenet/``.
        download: Not used: the images cannot be fetched without an agreement.
        split: ``"ravi"``: 64 base, 16 validation and 20 field classes, as published. ``"recon"``:
            50 base and 50 field classes, sorted by WordNet number, the last 10 of the base for
            validation.

    Returns:
        The pack's held-out images as test; the folders have no test images of the same classes.

    Raises:
        ConfigError: Another split was asked for.
        MissingData: The data set is not there.
        CorruptData: A file cannot be read.
    """
    if split not in SPLITS:
        raise ConfigError(f"data.split must be one of {', '.join(SPLITS)}, got {split!r}.")
    folder = root_folder(root)
    pack, tree = folder / "mini_imagenet_subset.npz", folder / "mini_imagenet"
    if pack.is_file():
        train, test, part_of_class = _from_pack(pack)
    elif tree.is_dir():
        train, part_of_class = _from_tree(tree)
        test = None
    else:
        raise missing("mini_imagenet", folder, (pack, tree), REMEDY)
    counts = f"{len(train):,} training and {len(test or ()):,} test images of 84 x 84 pixels"
    return Benchmark(
        name="mini_imagenet",
        train=train,
        test=test,
        groups=_groups(train.classes, part_of_class, split),
        mean=MEAN,
        std=STD,
        protocol=f"mini-ImageNet, {counts} (the complete set has 60,000); {SPLITS[split]}.",
    )


def _groups(
    classes: tuple[str, ...], part_of_class: Sequence[str], split: str
) -> dict[str, tuple[str, ...]]:
    if split == "recon":
        return leading_groups(sorted(classes), RECON_BASE, RECON_VALIDATION)
    return {
        group: tuple(name for name, own in zip(classes, part_of_class, strict=True) if own == part)
        for group, part in zip(GROUPS, PARTS, strict=True)
    }


def _from_pack(path: Path) -> tuple[ImageSet, ImageSet, Sequence[str]]:
    arrays = read_arrays(path, "jpeg", "offset", "label", "heldout", "wnid", "class_split")
    with reading(path):
        jpeg, offset, label, heldout, wnid, part_of_class = arrays
        files = jpeg.tobytes()
        spans = list(zip(offset[:-1].tolist(), offset[1:].tolist(), strict=True))

        def decode(span: tuple[int, int]) -> NDArray[np.uint8]:
            with Image.open(io.BytesIO(files[slice(*span)])) as picture:
                return to_pixels(picture, "RGB", SIDE)

        pool = ImageSet(
            decode_all(decode, spans),
            torch.from_numpy(label.astype(np.int64)),
            tuple(wnid.tolist()),
        )
        held_out = torch.from_numpy(heldout.astype(np.bool_))
        return pool.subset(~held_out), pool.subset(held_out), part_of_class.tolist()


def _from_tree(tree: Path) -> tuple[ImageSet, Sequence[str]]:
    folders = [
        (part, folder)
        for part in PARTS
        for folder in sorted((tree / part).glob("*"))
        if folder.is_dir()
    ]
    pictures = [sorted(folder.glob("*.jpg")) for _, folder in folders]
    files = [file for of_class in pictures for file in of_class]
    if not files:
        raise CorruptData(f"{tree} should hold {{train,val,test}}/CLASS/*.jpg, but does not.")
    counts = torch.tensor([len(of_class) for of_class in pictures])
    pool = ImageSet(
        decode_all(lambda file: open_picture(file, "RGB", SIDE), files),
        torch.arange(len(folders)).repeat_interleave(counts),
        tuple(folder.name for _, folder in folders),
    )
    return pool, [part for part, _ in folders]
