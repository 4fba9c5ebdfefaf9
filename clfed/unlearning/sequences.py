r"""In which orders slices are learned, and how many deletions such orders outlive.

A model that learned slices one after another can go back to before any of them, so it loses the
slice that went and all after it. Several models that learned the same slices in different orders
lose different parts (Basu Roy Chowdhury et al. 2024, arXiv 2406.16257).

An order dies when its first slice is hit. With :math:`m` shards of :math:`L` slices and :math:`B`
orders that begin with :math:`\min(B, L)` different slices, all orders of all shards are dead after
as many uniform deletions as it takes to collect :math:`n = m \min(B, L)` given ones among
:math:`mL` slices:

.. math:: E = \sum_{k=1}^{n} \frac{mL}{k} = mL\, H_n

(Public code counts otherwise: there a shard without orders dies at its first hit, :math:`m H_m`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.seeding import generator


def depths(orders: Tensor, intact: Tensor) -> Tensor:
    """Return how many slices each order can still use.

    Args:
        orders: ``(m, B, L)`` int64 permutations of the slices.
        intact: ``(m, L)`` bool, which slices lost nothing.

    Returns:
        ``(m, B)`` int64, length of the prefix that is intact.

    Example:
        >>> orders = torch.tensor([[[0, 1, 2], [1, 2, 0]]])
        >>> depths(orders, torch.tensor([[True, True, False]])).tolist()
        [[2, 1]]
    """
    there = intact[:, None].expand(orders.shape).gather(2, orders)
    return there.long().cumprod(2).sum(2)


def expected_deletions(shards: int, slices: int, budget: int) -> float:
    """Mean number of uniform deletions until no order is left, see the head of this module.

    Example:
        >>> round(expected_deletions(5, 6, budget=4), 1)
        107.9
    """
    firsts = shards * min(budget, slices)
    return shards * slices * sum(1 / k for k in range(1, firsts + 1))


def survival(orders: Tensor, risks: Tensor, deletions: int = 100) -> Tensor:
    r"""Score orders by the slices that they can be expected to keep.

    .. math:: \mathrm{score}(\pi) = \sum_k k \Bigl(1 - \sum_{i \le k} p_{\pi_i}\Bigr)^t

    Args:
        orders: ``(..., L)`` int64, or the first slices of orders.
        risks: :math:`p`, ``(L,)`` probabilities that a deletion hits a slice.
        deletions: :math:`t`.

    Example:
        >>> survival(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.25, 0.75]), 1).tolist()
        [0.75, 0.25]
    """
    safe = (1 - risks.double()[orders].cumsum(-1)).clamp(min=0)
    return (torch.arange(1, orders.shape[-1] + 1) * safe**deletions).sum(-1)


def rotations(slices: int, budget: int, risks: Tensor, seed: int) -> Tensor:
    """Return ``(B, L)`` rotations of one order: all begin with different slices."""
    steps = torch.arange(slices)
    return (steps[:budget, None] + steps) % slices


def matched(slices: int, budget: int, risks: Tensor, seed: int) -> Tensor:
    """Assemble ``(B, L)`` orders so that slices which are rarely hit come first.

    ``L`` orders begin with one slice each. Then one slice is added to every order, a different one
    to each, by the assignment with the highest sum of :func:`survival`; as each order lacks as many
    slices as each slice lacks orders, there always is one. The best ``B`` orders are kept.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    orders = torch.arange(slices)[:, None]
    for _ in range(1, slices):
        longer = torch.cat(
            [
                orders[:, None].expand(-1, slices, -1),
                torch.arange(slices).expand(slices, -1)[..., None],
            ],
            dim=2,
        )
        gains = survival(longer, risks)
        taken = (orders[:, :, None] == torch.arange(slices)).any(1)
        gains[taken] = -slices * gains.max() - 1  # worse than any assignment without it
        _, added = linear_sum_assignment(gains.numpy(), maximize=True)
        orders = torch.cat([orders, torch.from_numpy(np.asarray(added))[:, None]], 1)
    best = survival(orders, risks).argsort(descending=True, stable=True)
    return orders[best[:budget]]


def sampled(slices: int, budget: int, risks: Tensor, seed: int) -> Tensor:
    r"""Draw ``(B, L)`` orders, the next slice with a probability that falls with its risk.

    The chance of slice :math:`i` is proportional to :math:`1 - p_i` among those not yet taken. Two
    orders may begin alike.
    """
    chances = (1 - risks.double()).clamp(min=1e-12).expand(budget, -1)
    return torch.multinomial(chances, slices, generator=generator(seed, "orders"))


SELECTIONS: dict[str, Callable[[int, int, Tensor, int], Tensor]] = {
    "cyclic": rotations,
    "bipartite": matched,
    "conditional": sampled,
}


def choose_orders(
    slices: int, budget: int, selection: str, risks: Sequence[float] | None, seed: int
) -> Tensor:
    """Return ``(B, L)`` orders of the slices.

    Args:
        slices: :math:`L`.
        budget: :math:`B`, 1 to L.
        selection: One of ``SELECTIONS``.
        risks: How likely each slice is hit, up to a factor; None: all alike.
        seed: Of the draws.

    Raises:
        ConfigError: An option is out of range.
    """
    if selection not in SELECTIONS or not 1 <= budget <= slices:
        raise ConfigError(
            f"Expected unlearner.selection of {tuple(SELECTIONS)} and unlearner.budget in "
            f"1..{slices}, the number of slices, got {selection!r} and {budget}."
        )
    weights = torch.ones(slices) if risks is None else torch.tensor([float(r) for r in risks])
    if len(weights) != slices or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
        raise ConfigError(
            f"Expected unlearner.risks of {slices} numbers, none negative, not all zero, got "
            f"{risks}."
        )
    return SELECTIONS[selection](slices, budget, weights / weights.sum(), seed)
