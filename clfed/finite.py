"""Whether numbers are numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Return whether no entry is NaN or infinite.

    One sum tells, many times faster than a look at each entry, unless the sum itself overflows.

    Example:
        >>> import torch
        >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
