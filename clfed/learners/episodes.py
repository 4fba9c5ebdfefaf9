"""What a step of base training learns from, drawn without a loop over images or classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import IterableDataset

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.seeding import generator

ROTATIONS = 4
PADDINGS = ("zeros", "border", "reflection")


@dataclass(frozen=True)
class Augmentation:
    """Small random affine changes of every image.

    Args:
        rotation: Largest angle in degrees, either way.
        scale: Largest relative change of width and of height.
        shear: Largest horizontal shear.
        shift: Largest shift as a fraction of half the image.
        flip: Mirror every second image.
        padding: What lies outside: ``zeros`` (black), ``border`` or ``reflection``.
    """

    rotation: float = 10.0
    scale: float = 0.15
    shear: float = 0.15
    shift: float = 0.1
    flip: bool = False
    padding: str = "zeros"

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise ConfigError(f"Expected padding of {PADDINGS}, got {self.padding!r}.")

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Change images ``(B, C, H, W)`` of any type; returns float32 of the same range."""
        draws = torch.rand(7, len(images), generator=rng)
        turn, wide, high, shear, right, down = 2 * draws[:6] - 1
        angle = turn * math.radians(self.rotation)
        mirror = torch.where(draws[6] < 0.5 * self.flip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        rows = (
            torch.stack(
                [
                    (1 + self.scale * wide) * cos * mirror,
                    self.shear * shear - sin,
                    self.shift * right,
                ]
            ),
            torch.stack([sin * mirror, (1 + self.scale * high) * cos, self.shift * down]),
        )
        grid = F.affine_grid(
            torch.stack(rows).permute(2, 0, 1), list(images.shape), align_corners=False
        )
        return F.grid_sample(images.float(), grid, padding_mode=self.padding, align_corners=False)


class _Steps(IterableDataset[tuple[Tensor, Tensor]]):
    """One batch a step, each from a generator of its own."""

    def __init__(
        self,
        images: ImageSet,
        *,
        steps: range,
        seed: int,
        rotations: bool,
        augmentation: Augmentation | None,
    ) -> None:
        shape = images.images.shape
        if (rotations or augmentation) and len(shape) != 4:
            raise ConfigError(
                "Ready features can be neither rotated nor augmented.",
                remedy="Set learner.rotations=false learner.augmentation=null.",
            )
        if rotations and shape[2] != shape[3]:
            raise ConfigError(f"Only square images can be rotated, got {shape[2]}x{shape[3]}.")
        self.data, self.steps, self.seed = images, steps, seed
        self.rotations, self.augmentation = rotations, augmentation

    @property
    def num_classes(self) -> int:
        """Classes to draw from, rotated ones included."""
        return len(self.data.classes) * (ROTATIONS if self.rotations else 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in self.steps:
            rng = generator(self.seed, "base training", step)
            indices, quarter_turns = self.draw(rng)
            images = rotate(self.data.images[indices], quarter_turns)
            if self.augmentation:
                images = self.augmentation(images, rng)
            labels = self.data.labels[indices] + quarter_turns * len(self.data.classes)
            yield images, labels

    def draw(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return positions of images and their quarter turns, both ``(B,)`` int64."""
        raise NotImplementedError


class Episodes(_Steps):
    """Episodes of ``way`` classes with the same number of images each, support before query.

    Yields images ``(way * (shot + query), C, H, W)``, class by class, and their labels.

    Args:
        images: The classes to draw from.
        way: Classes an episode.
        per_class: Support and query images of a class; they are distinct.
        steps: The episodes' numbers.
        seed: Decides all draws, together with the number of the episode.
        rotations: Rotated classes are further classes.
        augmentation: Random change of every image.

    Raises:
        NotEnoughData: Fewer classes than ``way``, or a class with fewer images than
            ``shot + query``.
        ConfigError: The numbers are not positive, or the images cannot be rotated.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        way: int,
        per_class: tuple[int, int],
        steps: range,
        seed: int,
        rotations: bool = False,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            images, steps=steps, seed=seed, rotations=rotations, augmentation=augmentation
        )
        shot, query = per_class
        if way < 2 or min(per_class) < 1:
            raise ConfigError(
                f"An episode needs way >= 2, shot >= 1 and query >= 1, got {way}, {shot}, {query}."
            )
        if way > self.num_classes:
            raise NotEnoughData(
                f"An episode of {way} classes needs as many base classes, there are "
                f"{self.num_classes}."
            )
        self.way, self.per_class = way, shot + query
        counts = torch.bincount(images.labels, minlength=len(images.classes))
        if int(counts.min()) < self.per_class:
            raise NotEnoughData(
                f"An episode needs {shot} + {query} = {self.per_class} images of a class, but "
                f"{images.classes[int(counts.argmin())]!r} has {int(counts.min())}."
            )
        self._counts = counts
        self._table = torch.nn.utils.rnn.pad_sequence(images.indices_by_class(), batch_first=True)

    def draw(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw classes, then images without replacement within each."""
        drawn = torch.randperm(self.num_classes, generator=rng)[: self.way]
        base = drawn % len(self.data.classes)
        keys = torch.rand(self.way, self._table.shape[1], generator=rng)
        absent = torch.arange(self._table.shape[1]) >= self._counts[base, None]
        places = keys.masked_fill(absent, 2.0).argsort(1)[:, : self.per_class]
        indices = self._table[base].gather(1, places).flatten()
        return indices, (drawn // len(self.data.classes)).repeat_interleave(self.per_class)


class Shuffled(_Steps):
    """Batches of images drawn with equal chance, with replacement.

    Yields images ``(batch_size, C, H, W)`` and labels; the label of class ``c`` rotated by ``r``
    quarter turns is ``c + r * len(classes)``.

    Args:
        images: The images to draw from.
        batch_size: Images a batch.
        steps: The batches' numbers.
        seed: Decides all draws, together with the number of the batch.
        rotations: Rotated classes are further classes.
        augmentation: Random change of every image.

    Raises:
        ConfigError: The images cannot be rotated.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        steps: range,
        seed: int,
        rotations: bool = False,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            images, steps=steps, seed=seed, rotations=rotations, augmentation=augmentation
        )
        self.batch_size = batch_size

    def draw(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw images and quarter turns independently."""
        turns = ROTATIONS if self.rotations else 1
        drawn = torch.randint(len(self.data) * turns, (self.batch_size,), generator=rng)
        return drawn % len(self.data), drawn // len(self.data)


class Epochs(IterableDataset[tuple[Tensor, Tensor]]):
    """Whole passes over a set of images, each in an order of its own.

    Batches of a pass differ in size by one image at most, so that none is too small for batch
    normalisation. Yields images ``(views * B, ...)``, view after view, and labels ``(views * B,)``.

    Args:
        images: The images.
        batch_size: Largest number of images a batch.
        steps: The batches' numbers over all passes.
        seed: Decides orders and views, together with the number of the pass or batch.
        views: Copies of each image, each changed on its own.
        augmentation: Random change of every image.
        noise: Standard deviation of what is added to ready features.

    Raises:
        ConfigError: Ready features were to be augmented.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        steps: range,
        seed: int,
        views: int = 1,
        augmentation: Augmentation | None = None,
        noise: float = 0.0,
    ) -> None:
        features = images.images.dim() == 2
        if features and augmentation:
            raise ConfigError(
                "Ready features cannot be augmented.",
                remedy="Set learner.augmentation=null; learner.feature_noise makes their views.",
            )
        self.data, self.steps, self.seed, self.views = images, steps, seed, views
        self.batches = math.ceil(len(images) / batch_size)
        self.augmentation, self.noise = augmentation, noise if features else 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = -1
        order: tuple[Tensor, ...] = ()
        images, labels = self.data.images, self.data.labels
        for step in self.steps:
            if step // self.batches != epoch:
                epoch = step // self.batches
                rng = generator(self.seed, "order", epoch)
                shuffled = torch.randperm(len(images), generator=rng)
                order = shuffled.tensor_split(self.batches)
            chosen = order[step % self.batches]
            batch, names = images[chosen], labels[chosen]
            if self.views > 1:
                batch, names = torch.cat([batch] * self.views), names.repeat(self.views)
            if self.augmentation or self.noise:
                batch = self._changed(batch, generator(self.seed, "views", step))
            yield batch, names

    def _changed(self, batch: Tensor, rng: torch.Generator) -> Tensor:
        if self.augmentation:
            return self.augmentation(batch, rng)
        return batch + self.noise * torch.randn(batch.shape, generator=rng)


def with_rotations(images: ImageSet) -> ImageSet:
    """Return four times the classes: class ``c`` turned ``r`` times is ``c + r * len(classes)``."""
    turned = [torch.rot90(images.images, turns, (-2, -1)) for turns in range(ROTATIONS)]
    labels = [images.labels + turns * len(images.classes) for turns in range(ROTATIONS)]
    names = [f"{number}" for number in range(ROTATIONS * len(images.classes))]
    return ImageSet(torch.cat(turned), torch.cat(labels), tuple(names))


def rotate(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Rotate each image of ``(B, C, H, W)`` by its own number of quarter turns ``(B,)``."""
    if not bool(quarter_turns.any()):
        return images
    rotated = images.clone()
    for turns in range(1, ROTATIONS):
        chosen = quarter_turns == turns
        rotated[chosen] = torch.rot90(images[chosen], turns, (-2, -1))
    return rotated
