"""IDX files, the format of MNIST: big-endian sizes, then bytes; plain or compressed."""

from __future__ import annotations

import gzip
import lzma
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clfed.data.files import reading
from clfed.errors import CorruptData

OPENERS: dict[str, Callable[[Path], bytes]] = {
    "": Path.read_bytes,
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}
UNSIGNED_BYTES = 0x08
STEMS = tuple(
    f"{split}-{part}-ubyte"
    for split in ("train", "t10k")
    for part in ("images-idx3", "labels-idx1")
)


def find(folder: Path, stem: str) -> Path | None:
    """The file of this name in a folder, plain or with ``.xz`` or ``.gz``, or None."""
    candidates = (folder / (stem + suffix) for suffix in OPENERS)
    return next((path for path in candidates if path.is_file()), None)


def read(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        CorruptData: The file is no such file, or its length contradicts its header.
    """
    with reading(path):
        content = OPENERS.get(path.suffix, Path.read_bytes)(path)
        zero, kind, dimensions = struct.unpack_from(">HBB", content)
        if zero != 0 or kind != UNSIGNED_BYTES:
            raise CorruptData(f"{path} does not start as an IDX file of unsigned bytes.")
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    start = 4 + 4 * dimensions
    if len(content) - start != math.prod(shape):
        raise CorruptData(
            f"{path} states {' x '.join(map(str, shape))} bytes of data but holds "
            f"{len(content) - start}."
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).view(shape)


def read_pair(folder: Path, images: str, labels: str) -> tuple[Tensor, Tensor]:
    """Read images ``(N, 1, H, W)`` uint8 and their labels ``(N,)`` int64.

    Raises:
        CorruptData: A file is absent or damaged, or the two do not belong together.
    """
    tensors = []
    for stem in (images, labels):
        path = find(folder, stem)
        if path is None:
            raise CorruptData(
                f"{folder} lacks {stem} (also with .xz or .gz) beside the other files."
            )
        tensors.append(read(path))
    pixels, numbers = tensors
    if pixels.ndim != 3 or numbers.ndim != 1 or len(pixels) != len(numbers):
        raise CorruptData(
            f"In {folder}, {images} and {labels} do not belong together: "
            f"{tuple(pixels.shape)} and {tuple(numbers.shape)}."
        )
    return pixels.unsqueeze(1), numbers.long()
