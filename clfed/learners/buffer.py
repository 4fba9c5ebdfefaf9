"""Images that a learner keeps for replay; only methods that say so have one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError


class ImageBuffer:
    """At most ``capacity`` images of named classes.

    Args:
        capacity: Largest number of images; None for no limit.

    Raises:
        ConfigError: A negative capacity.
    """

    def __init__(self, capacity: int | None) -> None:
        if capacity is not None and capacity < 0:
            raise ConfigError(f"A buffer holds 0 images or more, got {capacity}.")
        self.capacity, self.offered = capacity, 0
        self.images: Tensor | None = None
        self.labels = torch.empty(0, dtype=torch.int64)
        self.classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return 0 if self.images is None else self.images.numel() * self.images.element_size()

    def reservoir(self, data: ImageSet, rng: torch.Generator) -> None:
        """Offer images one after another, so that each image ever offered is kept equally often.

        Reservoir sampling (Vitter 1985): image number :math:`n` takes a random place of
        :math:`1..n` if that lies within the capacity.

        Args:
            data: What is offered, in this order.
            rng: Draws the places.
        """
        if self.capacity is None:
            self.append(data)
            return
        order = torch.arange(self.offered, self.offered + len(data))
        draws = (torch.rand(len(data), generator=rng, dtype=torch.float64) * (order + 1)).long()
        places = torch.where(order < self.capacity, order, draws)
        self.offered += len(data)
        taken = (places < self.capacity).nonzero().flatten()
        if not len(taken):
            return
        # Of several images that take one place, the last one stays.
        last = torch.full((self.capacity,), -1, dtype=torch.int64)
        last = last.scatter_reduce(0, places[taken], taken, "amax")
        filled = (last >= 0).nonzero().flatten()
        labels = self._relabelled(data)
        size = min(self.capacity, self.offered)
        grown = torch.zeros(size, *data.images.shape[1:], dtype=data.images.dtype)
        names = torch.zeros(size, dtype=torch.int64)
        if self.images is not None:
            grown[: len(self)], names[: len(self)] = self.images, self.labels
        grown[filled], names[filled] = data.images[last[filled]], labels[last[filled]]
        self.images, self.labels = grown, names

    def append(self, data: ImageSet) -> None:
        """Keep all of these images.

        Raises:
            ConfigError: They are more than the capacity leaves room for.
        """
        if self.capacity is not None and len(self) + len(data) > self.capacity:
            raise ConfigError(
                f"Expected at most {self.capacity} images, got {len(self) + len(data)}."
            )
        labels = self._relabelled(data)
        self.offered += len(data)
        self.images = data.images if self.images is None else torch.cat([self.images, data.images])
        self.labels = torch.cat([self.labels, labels])

    def clear(self) -> None:
        """Forget all images; the count of what was offered starts anew."""
        self.images, self.labels, self.classes = None, self.labels[:0], ()
        self.offered = 0

    def keep(self, positions: Tensor) -> None:
        """Keep only the images at these positions, int64 or bool."""
        if self.images is not None:
            self.images, self.labels = self.images[positions], self.labels[positions]

    def content(self) -> ImageSet | None:
        """The images with their class names; None when there is none."""
        return None if self.images is None else ImageSet(self.images, self.labels, self.classes)

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "images": self.images,
            "labels": self.labels,
            "classes": list(self.classes),
            "offered": self.offered,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        self.images, self.labels = state["images"], state["labels"]
        self.classes, self.offered = tuple(state["classes"]), state["offered"]

    def _relabelled(self, data: ImageSet) -> Tensor:
        self.classes = tuple(dict.fromkeys((*self.classes, *data.classes)))
        place = {name: row for row, name in enumerate(self.classes)}
        rows = torch.tensor([place[name] for name in data.classes], dtype=torch.int64)
        return rows[data.labels]
