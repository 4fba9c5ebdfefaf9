"""Where data files are looked for, and what is said when they are absent or damaged."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clfed.errors import CorruptData, MissingData

DEFAULT_ROOT = "data"
# What numpy, zipfile, lzma, PIL and torchvision were seen to raise on damaged content.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    AssertionError,
    SyntaxError,
    TypeError,
    struct.error,
    tokenize.TokenError,
    Image.DecompressionBombError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
)
T = TypeVar("T")


def root_folder(root: str | None) -> Path:
    """The folder that holds data sets: ``root``, or ``data`` in the working directory."""
    return Path(DEFAULT_ROOT if root is None else root).expanduser().absolute()


def missing(
    name: str, root: Path, looked: Sequence[Path], remedy: str | None = None
) -> MissingData:
    """The error for a data set of which nothing was found.

    Args:
        name: The data set, as in ``data=NAME``.
        root: Folder that was searched.
        looked: Paths that were looked at.
        remedy: What to do, where torchvision cannot download the set.
    """
    return MissingData(
        f"The data set {name} was looked for at {' and '.join(map(str, looked))}, "
        "but nothing is there.",
        remedy=remedy
        or f"Name the folder that holds it: clfed data={name} data.root=PATH, or fetch it: "
        f"clfed data={name} data.root={root} data.download=true",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into one sentence that names it.

    Raises:
        CorruptData: The body failed to read ``path``.
    """
    try:
        yield
    except DAMAGE as error:
        raise CorruptData(
            f"{path} cannot be read as what its name says: {type(error).__name__}: {error}."
        ) from error


def fetch(name: str, root: Path, download: Callable[[], object]) -> None:
    """Let torchvision download a data set into ``root``.

    Raises:
        MissingData: The download failed.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        download()
    except (OSError, RuntimeError) as error:
        raise MissingData(
            f"The data set {name} could not be downloaded to {root}: {error}.",
            remedy=f"Check the network and the free space, then repeat "
            f"clfed data={name} data.root={root} data.download=true",
        ) from error


def read_arrays(path: Path, *names: str) -> tuple[NDArray[np.generic], ...]:
    """Read arrays of an ``.npz`` file.

    Raises:
        CorruptData: The file cannot be read, or an array is absent.
    """
    with reading(path), np.load(path, allow_pickle=False) as archive:
        return tuple(archive[name] for name in names)


def open_picture(path: Path, mode: str, size: int) -> NDArray[np.uint8]:
    """Decode a picture file, as ``mode`` (``"L"`` or ``"RGB"``) of ``size`` x ``size`` pixels.

    Raises:
        CorruptData: The file cannot be decoded.
    """
    with reading(path), Image.open(path) as picture:
        return to_pixels(picture, mode, size)


def to_pixels(picture: Image.Image, mode: str, size: int) -> NDArray[np.uint8]:
    """Pixels ``(size, size)`` or ``(size, size, 3)``; another size is scaled with antialiasing."""
    converted = picture.convert(mode)
    if converted.size != (size, size):
        converted = converted.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(converted)


def decode_all(decode: Callable[[T], NDArray[np.uint8]], sources: Sequence[T]) -> Tensor:
    """Decode pictures of one size in threads; PIL frees the interpreter while it decodes.

    Args:
        decode: From a source to pixels ``(H, W)`` or ``(H, W, 3)``.
        sources: At least one source.

    Returns:
        ``(N, C, H, W)`` uint8.
    """
    first = decode(sources[0])
    pixels = np.empty((len(sources), *first.shape), np.uint8)

    def fill(start: int, block: int = 256) -> None:
        for index in range(start, min(start + block, len(sources))):
            pixels[index] = decode(sources[index])

    with ThreadPoolExecutor(cpu_count()) as threads:
        list(threads.map(fill, range(0, len(sources), 256)))
    return channels_first(pixels)


def channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """From ``(N, H, W)`` or ``(N, H, W, C)`` to a contiguous tensor ``(N, C, H, W)``."""
    images = torch.from_numpy(pixels)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
