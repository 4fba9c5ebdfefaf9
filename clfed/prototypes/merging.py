"""Ways to merge what nodes send: the exact sum, and the rule of the published code beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from clfed.errors import UnsupportedStatistics
from clfed.prototypes.fixed_point import SCALE
from clfed.prototypes.memory import PrototypeMemory

Merge = Callable[[PrototypeMemory, Sequence[PrototypeMemory]], PrototypeMemory]


def pooled(state: PrototypeMemory, deltas: Sequence[PrototypeMemory]) -> PrototypeMemory:
    """``state + sum(deltas)``: the memory of all examples, whoever saw them.

    Args:
        state: What the server knew.
        deltas: New evidence of each node.

    Raises:
        EmbeddingMismatch: Memories of different embeddings.
        UnsupportedStatistics: Memories with different second moments.
    """
    return sum(deltas, start=state)


def legacy_double_shrink(
    state: PrototypeMemory, deltas: Sequence[PrototypeMemory]
) -> PrototypeMemory:
    r"""The rule of the code published with Hendryx et al. 2021 (arXiv 2109.00150).

    A client starts from the broadcast :math:`(n_0, \mu_0)`, merges its own :math:`(m, \bar x)` into
    it and sends that merged vector with weight :math:`m`; the server folds them in turn:

    .. math:: \nu = \frac{n_0 \mu_0 + m \bar x}{n_0 + m}, \qquad
              \mu \leftarrow \mu + \frac{m}{n + m} (\nu - \mu), \quad n \leftarrow n + m

    So a class that was known moves by :math:`(m / (n_0 + m))^2` instead of
    :math:`m / (n_0 + m)`: with :math:`n_0 = m = 30, \mu_0 = 0, \bar x = 1` to 0.25, not 0.5. For
    classes new to the server it is the pooled mean, exactly. Kept for comparison only; the result
    depends on the order of the clients.

    Args:
        state: What was broadcast, counts of at least 1.
        deltas: New evidence of each client, counts of at least 1, in the order of arrival.

    Returns:
        The merged means times their counts, rounded to the resolution of the memory.

    Raises:
        UnsupportedStatistics: Second moments are kept; this rule has none.
        InvalidMessage: A count below 1.
    """
    exact = pooled(state, deltas)
    if exact.moments != "none":
        raise UnsupportedStatistics(
            f"expected memories with moments='none', got {exact.moments!r}",
            remedy="Use merge=pooled, or memory.moments=none.",
        )
    known = exact.rows(state.classes)
    start = torch.zeros(len(exact), dtype=torch.float64)
    start[known] = state.counts.double()
    broadcast = torch.zeros(len(exact), exact.dim, dtype=torch.float64)
    broadcast[known] = state.means()
    counts, means = start.clone(), broadcast.clone()
    for delta in deltas:
        rows = exact.rows(delta.classes)
        new = delta.counts.double()
        step = (new / (start[rows] + new))[:, None]
        merged = broadcast[rows] + step * (delta.means() - broadcast[rows])
        counts[rows] += new
        means[rows] += (new / counts[rows])[:, None] * (merged - means[rows])
    sums = (means * counts[:, None] * SCALE).round().long()
    sums = torch.where((start > 0)[:, None], sums, exact.sums)
    return replace(exact, sums=sums)


MERGES: Mapping[str, Merge] = MappingProxyType(
    {"pooled": pooled, "legacy_double_shrink": legacy_double_shrink}
)
