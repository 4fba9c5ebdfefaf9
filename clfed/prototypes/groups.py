"""Evidence before it is pooled: one row for each class of each contributor or message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from clfed.prototypes.memory import PrototypeMemory


class Groups(NamedTuple):
    """``G`` disjoint groups of examples, each of one class.

    Attributes:
        class_index: Row of the group's class in the pooled memory, shape ``(G,)`` int64.
        counts: Examples of the group, shape ``(G,)`` int64, at least 1.
        sums: Sum of its quantised embeddings, shape ``(G, D)`` int64, unit ``RESOLUTION``.
    """

    class_index: Tensor
    counts: Tensor
    sums: Tensor


def groups_of(pooled: PrototypeMemory, parts: Iterable[PrototypeMemory]) -> Groups:
    """The rows of all parts, numbered by the rows of the memory that they add up to.

    Args:
        pooled: Sum of the parts.
        parts: Memories of disjoint examples, in the order that the groups shall have.

    Returns:
        One group for each class of each part.

    Raises:
        UnknownClass: A part has a class that the pooled memory lacks.
    """
    parts = list(parts)
    none = torch.zeros(0, dtype=torch.int64)
    return Groups(
        torch.cat([none, *(pooled.rows(part.classes) for part in parts)]),
        torch.cat([none, *(part.counts for part in parts)]),
        torch.cat([none.reshape(0, pooled.dim), *(part.sums for part in parts)]),
    )
