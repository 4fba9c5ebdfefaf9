"""Second moments read off a memory in float64: Gram matrix and within-class scatter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clfed.errors import UnsupportedStatistics
from clfed.prototypes.fixed_point import RESOLUTION
from clfed.prototypes.memory import PrototypeMemory


def gram(memory: PrototypeMemory) -> Tensor:
    r"""Second moments about zero, :math:`\sum_i z_i z_i^T`, shape ``(D, D)`` float64.

    Raises:
        UnsupportedStatistics: The memory keeps no second moments.
    """
    if memory.outer is None:
        raise UnsupportedStatistics(
            "expected a memory with moments='shared' or 'class', got 'none'"
        )
    outer = memory.outer.double()
    return (outer.sum(0) if memory.moments == "class" else outer) * RESOLUTION**2


def scatter(memory: PrototypeMemory) -> Tensor:
    r"""Within-class scatter :math:`\sum_i z_i z_i^T - \sum_c s_c s_c^T / n_c`.

    Returns:
        Shape ``(D, D)`` float64. Divided by the number of examples it is the pooled within-class
        covariance. The subtraction loses about ``mean**2 / variance`` times 2e-16.

    Raises:
        UnsupportedStatistics: The memory keeps no second moments.
        InvalidMessage: A class has fewer examples than one.
    """
    total = gram(memory)
    means = memory.means()
    return total - means.T @ (means * memory.counts.double()[:, None])


def class_scatter(memory: PrototypeMemory, names: Sequence[str] | None = None) -> Tensor:
    """Scatter of each class about its own mean.

    Args:
        memory: With ``moments="class"``.
        names: Which classes, in this order; all when omitted.

    Returns:
        Shape ``(len(names), D, D)`` float64.

    Raises:
        UnknownClass: A name is not in the memory.
        UnsupportedStatistics: Second moments are not kept by class.
        InvalidMessage: A class has fewer examples than one.
    """
    if memory.outer is None or memory.moments != "class":
        raise UnsupportedStatistics(
            f"expected a memory with moments='class', got {memory.moments!r}",
            remedy="Keep more: memory.moments=class.",
        )
    rows = slice(None) if names is None else memory.rows(names)
    means = memory.means()[rows]
    weighted = means * memory.counts[rows].double()[:, None]
    return memory.outer[rows].double() * RESOLUTION**2 - weighted[:, :, None] * means[:, None, :]
