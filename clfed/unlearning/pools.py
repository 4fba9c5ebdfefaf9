"""Images that an unlearner may look at, behind a guard that knows what it declared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clfed.errors import UndeclaredData
from clfed.unlearning.needs import Need, names


class Batch(NamedTuple):
    """Some images of a pool.

    Attributes:
        images: ``(B, C, H, W)`` uint8, or ``(B, D)`` float32 for ready features.
        labels: ``(B,)`` int64, rows of the learner's classes; None where no labels are declared.
        ids: ``(B,)`` int64, the sample ids: positions in the training images.
    """

    images: Tensor
    labels: Tensor | None
    ids: Tensor


class Guard:
    """Refuses what was not declared, and remembers what was touched.

    Args:
        allowed: The declared needs.
    """

    def __init__(self, allowed: Need) -> None:
        self.allowed = allowed
        self.touched: dict[Need, set[int]] = {}

    def touch(self, need: Need, ids: Tensor | None = None) -> None:
        """Note that data are looked at.

        Args:
            need: One kind of data.
            ids: Which samples; None where there are none.

        Raises:
            UndeclaredData: The kind was not declared.
        """
        if need not in self.allowed:
            raise UndeclaredData(
                f"Expected an unlearner to touch only what it declares "
                f"({', '.join(names(self.allowed)) or 'nothing'}), got {names(need)[0]}."
            )
        self.touched.setdefault(need, set()).update([] if ids is None else ids.tolist())

    def counts(self) -> dict[str, int]:
        """Return how many distinct samples of each kind were touched, by name."""
        return {names(need)[0]: len(self.touched[need]) for need in Need if need in self.touched}


class Pool:
    """Labelled images of one kind.

    Its length may always be asked for; everything else is guarded.

    Args:
        images: As in :class:`Batch`.
        labels: As in :class:`Batch`; None where there are none at all.
        ids: As in :class:`Batch`.
        guard: Who may look; None: everybody.
        needs: What looking at the images and at the labels takes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        ids: Tensor,
        *,
        guard: Guard | None = None,
        needs: tuple[Need, Need] = (Need.NOTHING, Need.NOTHING),
    ) -> None:
        self._images, self._labels, self._ids = images, labels, ids
        self._guard, self._needs = guard, needs

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def images(self) -> Tensor:
        """All images.

        Raises:
            UndeclaredData: The unlearner did not declare them.
        """
        self._touch(self._needs[0], self._ids)
        return self._images

    @property
    def labels(self) -> Tensor:
        """All labels, ``(N,)`` int64.

        Raises:
            UndeclaredData: The unlearner did not declare them, or there are none.
        """
        self._touch(self._needs[1], self._ids)
        if self._labels is None:
            raise UndeclaredData("Expected labels, but these images have none.")
        return self._labels

    @property
    def ids(self) -> Tensor:
        """The sample ids, ``(N,)`` int64."""
        return self._ids

    @property
    def has_labels(self) -> bool:
        """Whether labels exist and may be looked at."""
        declared = self._guard is None or self._needs[1] in self._guard.allowed
        return declared and self._labels is not None

    def batch(self, rows: Tensor) -> Batch:
        """Return some of the images, with labels where these are declared.

        Args:
            rows: ``(B,)`` int64 positions in this pool.

        Raises:
            UndeclaredData: The unlearner did not declare the images.
        """
        ids = self._ids[rows]
        self._touch(self._needs[0], ids)
        labels = None
        if self.has_labels and self._labels is not None:
            self._touch(self._needs[1], ids)
            labels = self._labels[rows]
        return Batch(self._images[rows], labels, ids)

    def part(self, rows: Tensor) -> Pool:
        """Return a pool of some of the images, behind the same guard."""
        labels = None if self._labels is None else self._labels[rows]
        return Pool(
            self._images[rows], labels, self._ids[rows], guard=self._guard, needs=self._needs
        )

    def guarded(self, guard: Guard, needs: tuple[Need, Need]) -> Pool:
        """Return the same pool behind a guard."""
        return Pool(self._images, self._labels, self._ids, guard=guard, needs=needs)

    def _touch(self, need: Need, ids: Tensor) -> None:
        if self._guard is not None:
            self._guard.touch(need, ids)


def pool_of(images: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> Pool:
    """Return an unguarded pool; ids count from 0 where none are given."""
    return Pool(images, labels, torch.arange(len(images)) if ids is None else ids)


class ById:
    """Rows of a table, found by sample id.

    Args:
        ids: ``(N,)`` int64, in any order.
        values: ``(N, ...)``.

    Example:
        >>> ById(torch.tensor([7, 3]), torch.tensor([70, 30]))[torch.tensor([3, 7, 3])].tolist()
        [30, 70, 30]
    """

    def __init__(self, ids: Tensor, values: Tensor) -> None:
        self._ids, order = ids.sort()
        self._values = values[order]

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self._values[torch.searchsorted(self._ids, ids.cpu())].to(ids.device)
