"""Labelled images in memory, and the benchmark that groups their classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clfed.errors import CorruptData, NotEnoughData, UnknownClass
from clfed.finite import all_finite

GROUPS = ("base", "validation", "field")
LONGEST_NAME = 128


def check_class_name(name: str) -> None:
    """Refuse a class name that could not travel or be printed.

    Args:
        name: A class name; identity is compared letter by letter.

    Raises:
        CorruptData: The name is empty, longer than 128 characters or holds unprintable ones.

    Example:
        >>> check_class_name("GREEK SMALL LETTER OMEGA")
    """
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise CorruptData(
            f"A class name must be 1 to {LONGEST_NAME} printable characters, got "
            f"{name[: LONGEST_NAME + 1]!r} ({len(name)} characters).",
            remedy="Rename the class (for a folder of images: the folder of that class).",
        )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, or ready features, held in memory.

    Args:
        images: ``(N, C, H, W)`` uint8, or ``(N, D)`` float32 for ready features.
        labels: ``(N,)`` int64, index into ``classes``.
        classes: Distinct class names; a class may have no image.

    Raises:
        CorruptData: A shape, a dtype, a label or a class name breaks this description.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_images(self.images)
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise CorruptData(
                f"Expected one int64 label for each of {len(self.images)} images, got "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )
        for name in self.classes:
            check_class_name(name)
        if len(set(self.classes)) != len(self.classes):
            raise CorruptData(f"Class names must be distinct, got {_repeated(self.classes)} twice.")
        if len(self.labels) and not (
            int(self.labels.min()) >= 0 and int(self.labels.max()) < len(self.classes)
        ):
            raise CorruptData(
                f"Labels must lie in 0..{len(self.classes) - 1}, got "
                f"{int(self.labels.min())}..{int(self.labels.max())}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at some positions, with the same classes.

        Args:
            indices: ``(M,)`` int64 positions, or ``(N,)`` bool mask.
        """
        return ImageSet(self.images[indices], self.labels[indices], self.classes)

    def of_classes(self, names: Sequence[str]) -> ImageSet:
        """The images of some classes, in their present order, relabelled by ``names``.

        Args:
            names: Classes to keep; they become ``classes`` of the result, in this order.

        Raises:
            UnknownClass: A name is not among the classes.
        """
        number = {name: index for index, name in enumerate(self.classes)}
        unknown = [name for name in names if name not in number]
        if unknown:
            raise UnknownClass(
                f"Expected classes among the {len(self.classes)} of this set, got "
                f"{unknown[0]!r}" + (f" and {len(unknown) - 1} more." if unknown[1:] else ".")
            )
        renumbered = torch.full((len(self.classes),), -1, dtype=torch.int64)
        renumbered[[number[name] for name in names]] = torch.arange(len(names))
        labels = renumbered[self.labels]
        kept = (labels >= 0).nonzero().squeeze(1)
        return ImageSet(self.images[kept], labels[kept], tuple(names))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, labels and class names."""
        header = {
            "dtype": str(self.images.dtype),
            "shape": list(self.images.shape),
            "classes": self.classes,
        }
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def indices_by_class(self) -> list[Tensor]:
        """Ascending positions of the images of each class, in the order of ``classes``.

        Example:
            >>> images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
            >>> pool = ImageSet(images, torch.tensor([1, 0, 1]), ("a", "b", "c"))
            >>> [positions.tolist() for positions in pool.indices_by_class()]
            [[1], [0, 2], []]
        """
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        order = torch.argsort(self.labels, stable=True)
        return list(torch.split(order, counts.tolist()))


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A data set with its classes divided into what is known beforehand and what is met later.

    Args:
        name: Short name, as in ``data=NAME``.
        train: Images to learn from.
        test: Images to be judged by, of the same classes in the same order; None where the set
            has no split of its own and the scenario must draw one.
        groups: Disjoint class names: ``base`` (to train an embedding), ``validation`` (held out
            of the base, only to pick checkpoints) and ``field`` (met by the nodes).
        mean: Mean of ``x / 255`` for each channel; empty for ready features.
        std: Standard deviation of ``x / 255`` for each channel; empty for ready features.
        protocol: One sentence: what this is and how it differs from the full data set.

    Raises:
        CorruptData: The parts contradict each other.
        NotEnoughData: There is no class at all, or a grouped class has no image.
        UnknownClass: A group names a class that the images do not have.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    groups: Mapping[str, tuple[str, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    protocol: str

    def __post_init__(self) -> None:
        self._check_test()
        self._check_groups()
        channels = self.train.images.shape[1] if self.train.images.ndim == 4 else 0
        if not len(self.mean) == len(self.std) == channels or min(self.std, default=1.0) <= 0:
            raise CorruptData(
                f"{self.name}: expected a mean and a positive std for each of {channels} "
                f"channels, got {self.mean} and {self.std}."
            )

    def _check_test(self) -> None:
        if self.test is None:
            return
        if self.test.classes != self.train.classes:
            raise CorruptData(f"{self.name}: train and test images name different classes.")
        mine, theirs = self.train.images, self.test.images
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
            raise CorruptData(
                f"{self.name}: train images are {mine.dtype} {tuple(mine.shape[1:])}, "
                f"test images {theirs.dtype} {tuple(theirs.shape[1:])}."
            )

    def _check_groups(self) -> None:
        if set(self.groups) != set(GROUPS):
            raise CorruptData(
                f"{self.name}: expected the groups {', '.join(GROUPS)}, got {sorted(self.groups)}."
            )
        names = tuple(name for group in GROUPS for name in self.groups[group])
        if not names:
            raise NotEnoughData(f"{self.name}: no class is in any group.")
        if len(set(names)) != len(names):
            raise CorruptData(f"{self.name}: class {_repeated(names)} is in two groups.")
        number = {name: index for index, name in enumerate(self.train.classes)}
        unknown = [name for name in names if name not in number]
        if unknown:
            raise UnknownClass(f"{self.name}: no image set has the grouped class {unknown[0]!r}.")
        for part, images in (("train", self.train), ("test", self.test)):
            if images is None:
                continue
            counts = torch.bincount(images.labels, minlength=len(number)).tolist()
            empty = [name for name in names if not counts[number[name]]]
            if empty:
                raise NotEnoughData(
                    f"{self.name}: {len(empty)} classes have no {part} image, "
                    f"the first is {empty[0]!r}."
                )


def _check_images(images: Tensor) -> None:
    is_pictures = images.ndim == 4 and images.dtype == torch.uint8
    is_features = images.ndim == 2 and images.dtype == torch.float32
    if not (is_pictures or is_features) or 0 in images.shape[1:]:
        raise CorruptData(
            "Expected images (N, C, H, W) uint8 or features (N, D) float32, got "
            f"{tuple(images.shape)} {images.dtype}."
        )
    if is_features and not all_finite(images):
        raise CorruptData("Ready features must be finite, got NaN or infinity.")


def _repeated(names: Sequence[str]) -> str:
    return repr(next(name for index, name in enumerate(names) if name in names[:index]))
