"""A folder of one's own pictures: ``ROOT/CLASS/*.png``, one folder a class."""

from __future__ import annotations

import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clfed.data.benchmark import Benchmark, ImageSet, check_class_name
from clfed.data.files import decode_all, reading, root_folder, to_pixels
from clfed.data.grouping import leading_groups
from clfed.data.pixels import channel_statistics
from clfed.errors import ConfigError, CorruptData, MissingData, NotEnoughData

SUFFIXES = {".png", ".jpg", ".jpeg"}
MODES = {1: "L", 3: "RGB"}
NEUTRAL = 0.5  # mean and std where there is no base: nodes agree on it without talking


def load(
    root: str | None = None,
    download: bool = False,
    *,
    image_size: int = 28,
    channels: int = 1,
    base_classes: int = 0,
    validation_classes: int = 0,
    class_seed: int | None = None,
) -> Benchmark:
    """Load all pictures below a folder.

    Classes are the names of the folders in ROOT that hold a picture, sorted; in Unicode's
    composed form (NFC), so that the same name typed on two systems is one class. Hidden files and
    folders, deeper folders, and links back to ROOT or above are ignored.

    Args:
        root: The folder.
        download: Not used.
        image_size: Side to which each picture is scaled, whatever its proportions.
        channels: 1 for grey, 3 for colours.
        base_classes: Classes to train an embedding on, those of validation among them.
        validation_classes: Base classes held out to pick checkpoints.
        class_seed: Seed of the order of classes; None keeps them sorted.

    Raises:
        ConfigError: An option is out of its range.
        MissingData: There is no such folder.
        NotEnoughData: It holds no picture.
        CorruptData: A picture cannot be decoded, or a folder's name cannot be a class name.
    """
    if channels not in MODES or image_size < 1:
        raise ConfigError(
            "data.channels must be 1 or 3 and data.image_size at least 1, "
            f"got {channels} and {image_size}."
        )
    images = read_folder(root_folder(root), image_size, channels)
    groups = leading_groups(images.classes, base_classes, validation_classes, class_seed)
    known = groups["base"] + groups["validation"]
    neutral = (NEUTRAL,) * channels
    mean, std = channel_statistics(images.of_classes(known).images) if known else (neutral, neutral)
    return Benchmark(
        name="folder",
        train=images,
        test=None,
        groups=groups,
        mean=mean,
        std=std,
        protocol=(
            f"{len(images):,} pictures of {len(images.classes)} classes from a folder, scaled to "
            f"{image_size} x {image_size} pixels, {channels} channels; {base_classes} base classes."
        ),
    )


def read_folder(folder: Path, image_size: int, channels: int) -> ImageSet:
    """Read ``folder/CLASS/*.png`` (or jpg, jpeg), see :func:`load`."""
    if not folder.is_dir():
        raise MissingData(
            f"Expected pictures at {folder}/CLASS/*.png, but {folder} is no folder.",
            remedy="Make one folder a class, then: clfed data=folder data.root=PATH",
        )
    pictures: dict[str, list[Path]] = {}
    for name, files in class_folders(folder):
        check_class_name(name)
        if name in pictures:
            raise CorruptData(
                f"{folder} holds two folders named {name!r} in two Unicode forms.",
                remedy="Move the pictures of both into one folder.",
            )
        pictures[name] = files
    if not pictures:
        raise NotEnoughData(
            f"Expected pictures at {folder}/CLASS/*.png, .jpg or .jpeg, got none.",
            remedy="Make one folder a class and put its pictures into it.",
        )
    counts = torch.tensor([len(files) for files in pictures.values()])
    return ImageSet(
        decode_all(
            lambda file: read_picture(file, image_size, channels),
            [file for files in pictures.values() for file in files],
        ),
        torch.arange(len(pictures)).repeat_interleave(counts),
        tuple(pictures),
    )


def class_folders(folder: Path) -> list[tuple[str, list[Path]]]:
    """Return the name of each class folder that holds a picture, and its pictures, all sorted."""
    named = [(_name(entry), _pictures(entry)) for entry in sorted(_classes(folder), key=_name)]
    return [(name, files) for name, files in named if files]


def read_picture(
    path: Path, image_size: int, channels: int, data: bytes | None = None
) -> NDArray[np.uint8]:
    """Decode one picture the way :func:`load` does.

    Args:
        path: A picture file, upright or with the rotation that a camera notes.
        image_size: Side to which it is scaled, whatever its proportions.
        channels: 1 for grey, 3 for colours.
        data: Content of the file where it has been read already.

    Returns:
        Pixels ``(image_size, image_size)`` for 1 channel, ``(image_size, image_size, 3)`` for 3.

    Raises:
        CorruptData: The picture cannot be decoded.
    """
    with reading(path), Image.open(path if data is None else BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip, not scale
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        return to_pixels(picture, MODES[channels], image_size)


def _name(entry: Path) -> str:
    return unicodedata.normalize("NFC", entry.name)


def _classes(folder: Path) -> list[Path]:
    here = folder.resolve()
    return [
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".")
        and entry.is_dir()
        and entry.resolve() not in (here, *here.parents)
    ]


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
