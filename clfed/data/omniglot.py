"""Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.files import (
    decode_all,
    fetch,
    missing,
    open_picture,
    read_arrays,
    reading,
    root_folder,
)
from clfed.data.pixels import channel_statistics
from clfed.errors import ConfigError, CorruptData

SIDE = 105  # pixels of the original drawings
PARTS = ("images_background", "images_evaluation")
CHUNK = 512  # drawings scaled at once: 23 MB as float32


def load(
    root: str | None = None,
    download: bool = False,
    *,
    image_size: int = 28,
    validation_alphabets: int = 5,
) -> Benchmark:
    """Load all 32,460 drawings.

    The background alphabets are the base, but for some, evenly spaced in alphabetical order,
    which pick checkpoints; all 659 characters of the evaluation alphabets are the field. There is
    no split into training and test images: 20 drawings a character are for the scenario to divide.

    Args:
        root: Folder with ``omniglot.npz`` (preferred) or torchvision's ``omniglot-py``.
        download: Let torchvision fetch it when neither is there.
        image_size: Side of the images; 105 keeps the original drawings. Scaling averages over
            areas (1 bit a pixel becomes grey), with the ink bright: 255.
        validation_alphabets: How many background alphabets are held out, 0..29.

    Raises:
        ConfigError: An option is out of its range.
        MissingData: The data set is not there.
        CorruptData: A file cannot be read.
    """
    if not 1 <= image_size <= SIDE:
        raise ConfigError(f"data.image_size must lie in 1..{SIDE}, got {image_size}.")
    folder = root_folder(root)
    pack, tree = folder / "omniglot.npz", folder / "omniglot-py"
    if not pack.is_file() and not tree.is_dir() and download:
        fetch("omniglot", folder, lambda: _download(folder))
    if pack.is_file():
        ink, labels, classes, background = _from_pack(pack)
    elif tree.is_dir():
        ink, labels, classes, background = _from_tree(tree)
    else:
        raise missing("omniglot", folder, (pack, tree))

    groups = _groups(classes, background, validation_alphabets)
    images = ImageSet(shrink(ink, image_size), labels, classes)
    mean, std = channel_statistics(images.of_classes(groups["base"] + groups["validation"]).images)
    return Benchmark(
        name="omniglot",
        train=images,
        test=None,
        groups=groups,
        mean=mean,
        std=std,
        protocol=(
            f"Omniglot, {len(images):,} drawings of {len(classes):,} characters at {image_size} x "
            f"{image_size} pixels; the field is the {len(groups['field'])} evaluation characters, "
            f"the base the background alphabets, of which {validation_alphabets} pick checkpoints; "
            "no rotated copies as further classes."
        ),
    )


def shrink(ink: Tensor, size: int) -> Tensor:
    r"""Scale drawings by averaging over exact areas.

    .. math:: y = \mathrm{round}\Bigl(\frac{255}{105^2} A x A^\top\Bigr), \qquad
        A_{jk} = \bigl|[105 j, 105 (j + 1)) \cap [\text{size}\, k, \text{size}\, (k + 1))\bigr|

    All terms are integers below 2**24, exact in float32 whatever the order of the sums.

    Args:
        ink: ``(N, 105, 105)`` uint8, 1 = ink.
        size: Side of the result, at most 105.

    Returns:
        ``(N, 1, size, size)`` uint8, ink = 255.

    Example:
        >>> shrink(torch.ones(1, 105, 105, dtype=torch.uint8), 28).unique().tolist()
        [255]
    """
    target, source = torch.arange(size)[:, None] * SIDE, torch.arange(SIDE)[None, :] * size
    overlap = torch.minimum(target + SIDE, source + size) - torch.maximum(target, source)
    weights = overlap.clamp(min=0).float()
    shrunk = torch.empty(len(ink), 1, size, size, dtype=torch.uint8)
    for drawings, images in zip(torch.split(ink, CHUNK), torch.split(shrunk, CHUNK), strict=True):
        area = (weights @ (drawings.float() @ weights.T)).to(torch.int32).unsqueeze(1)
        images.copy_((area * 255 + SIDE**2 // 2).div(SIDE**2, rounding_mode="floor"))
    return shrunk


def _groups(
    classes: tuple[str, ...], background: NDArray[np.bool_], held_out: int
) -> dict[str, tuple[str, ...]]:
    alphabet = [name.split("/")[0] for name in classes]
    alphabets = sorted({a for a, known in zip(alphabet, background, strict=True) if known})
    if not 0 <= held_out < len(alphabets):
        raise ConfigError(
            f"data.validation_alphabets must lie in 0..{len(alphabets) - 1}, got {held_out}."
        )
    chosen = {alphabets[i * len(alphabets) // held_out] for i in range(held_out)}
    groups: dict[str, list[str]] = {"base": [], "validation": [], "field": []}
    for name, letters, known in zip(classes, alphabet, background, strict=True):
        group = "field" if not known else "validation" if letters in chosen else "base"
        groups[group].append(name)
    return {group: tuple(names) for group, names in groups.items()}


def _from_pack(path: Path) -> tuple[Tensor, Tensor, tuple[str, ...], NDArray[np.bool_]]:
    packed, label, alphabet, character, background = read_arrays(
        path, "ink", "label", "class_alphabet", "class_character", "class_background"
    )
    with reading(path):
        ink = np.unpackbits(packed.astype(np.uint8, copy=False), axis=-1)[:, :, :SIDE]
        names = tuple(f"{a}/{c}" for a, c in zip(alphabet, character, strict=True))
        return (
            torch.from_numpy(ink),
            torch.from_numpy(label.astype(np.int64)),
            names,
            background.astype(np.bool_),
        )


def _from_tree(tree: Path) -> tuple[Tensor, Tensor, tuple[str, ...], NDArray[np.bool_]]:
    """Read torchvision's folders ``PART/ALPHABET/CHARACTER/NNNN_DD.png``.

    ``torchvision.datasets.Omniglot`` reads the same files, but only beside the two archives they
    came from.
    """
    characters = [
        (part, folder)
        for part in PARTS
        for folder in sorted((tree / part).glob("*/*"))
        if folder.is_dir()
    ]
    drawings = [sorted(folder.glob("*.png")) for _, folder in characters]
    filled = {part for (part, _), paths in zip(characters, drawings, strict=True) if paths}
    for part in PARTS:
        if part not in filled:
            raise CorruptData(f"{tree / part} should hold ALPHABET/CHARACTER/*.png, but does not.")

    def decode(path: Path) -> NDArray[np.uint8]:
        return (open_picture(path, "L", SIDE) < 128).astype(np.uint8)

    ink = decode_all(decode, [path for paths in drawings for path in paths])
    counts = torch.tensor([len(paths) for paths in drawings])
    return (
        ink.squeeze(1),
        torch.arange(len(characters)).repeat_interleave(counts),
        tuple(f"{folder.parent.name}/{folder.name}" for _, folder in characters),
        np.array([part == PARTS[0] for part, _ in characters]),
    )


def _download(folder: Path) -> None:
    from torchvision.datasets import Omniglot

    for background in (True, False):
        Omniglot(str(folder), background=background, download=True)
