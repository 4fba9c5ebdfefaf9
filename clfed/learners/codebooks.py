r"""Codebooks of keys with values: fetching, laying keys, merging what several owners learned.

The arithmetic of the discrete key-value bottleneck (Träuble et al. 2023, arXiv 2207.11240): for
each of :math:`C` codebooks a point fetches the value of its nearest of :math:`P` keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_CHUNK = 2**24  # distances that are held at once
_EPSILON = 1e-5


def project(embeddings: Tensor, projections: Tensor) -> Tensor:
    """Map ``(B, D)`` by ``(C, D, d)`` to ``(C, B, d)``."""
    return torch.einsum("bd,cdk->cbk", embeddings, projections)


def nearest_keys(points: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the nearest key of each point in each codebook, ``(B, C)`` int64.

    Args:
        points: ``(C, B, d)``.
        keys: ``(C, P, d)``.
        allowed: ``(C, P)`` bool, the keys that may be taken; a codebook without any takes all.

    Example:
        >>> keys = torch.tensor([[[0.0], [1.0], [5.0]]])
        >>> nearest_keys(torch.tensor([[[0.9], [4.0]]]), keys).tolist()
        [[1], [2]]
    """
    offset = keys.square().sum(2)[:, None]
    if allowed is not None:
        usable = allowed | ~allowed.any(1, keepdim=True)
        offset = offset.masked_fill(~usable[:, None], torch.inf)
    rows = max(1, _CHUNK // (keys.shape[0] * keys.shape[1]))
    parts = [
        torch.baddbmm(offset, part, keys.mT, alpha=-2).argmin(2).T
        for part in torch.split(points, rows, dim=1)
    ]
    return torch.cat(parts)


def voted(values: Tensor, codes: Tensor) -> Tensor:
    """Return the mean of the fetched values.

    Args:
        values: ``(K, C, P)``.
        codes: ``(B, C)`` int64.

    Returns:
        ``(B, K)``.
    """
    codebooks, keys = values.shape[1:]
    cells = codes + keys * torch.arange(codebooks, device=codes.device)
    fetched = values.flatten(1).index_select(1, cells.flatten())
    return fetched.view(len(values), *codes.shape).mean(2).T


def lay_keys(
    points: Tensor,
    keys: int,
    *,
    decay: float,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
) -> Tensor:
    r"""Lay keys over points by running means of what is nearest to them.

    .. math:: n_j \leftarrow \gamma n_j + (1 - \gamma) |B_j|, \quad
        S_j \leftarrow \gamma S_j + (1 - \gamma) \sum_{z \in B_j} z, \quad k_j = S_j / \tilde n_j

    with counts :math:`\tilde n` that are smoothed so that none is zero. A key that gets less than
    a tenth of its fair share of a batch moves to a random point of the batch.

    Args:
        points: ``(C, N, d)``.
        keys: :math:`P`.
        decay: :math:`\gamma`.
        epochs: Passes.
        batch_size: Points a step.
        rng: Draws orders and the new places of keys.

    Returns:
        ``(C, P, d)``.
    """
    codebooks, number, length = points.shape
    start = torch.randint(number, (codebooks, keys), generator=rng)
    laid = points.gather(1, start[:, :, None].expand(-1, -1, length))
    counts = points.new_zeros(codebooks, keys)
    sums = torch.zeros_like(laid)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(number, generator=rng), batch_size):
            batch = points[:, chosen]
            laid, counts, sums = update_keys(laid, counts, sums, batch, decay)
            least = 0.1 * len(chosen) / keys
            places = torch.randint(len(chosen), (codebooks, keys), generator=rng)
            unused = (counts < least)[:, :, None]
            moved = batch.gather(1, places[:, :, None].expand(-1, -1, length))
            laid = torch.where(unused, moved, laid)
            sums = torch.where(unused, moved * least, sums)
            counts = counts.clamp(min=least)
    return laid


def update_keys(
    keys: Tensor, counts: Tensor, sums: Tensor, batch: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys ``(C, P, d)``, counts ``(C, P)`` and sums after a batch ``(C, B, d)``."""
    codes = nearest_keys(batch, keys).T
    fresh = torch.zeros_like(counts).scatter_add_(1, codes, torch.ones_like(batch[:, :, 0]))
    gathered = torch.zeros_like(sums).scatter_add_(
        1, codes[:, :, None].expand(-1, -1, keys.shape[2]), batch
    )
    counts = decay * counts + (1 - decay) * fresh
    sums = decay * sums + (1 - decay) * gathered
    total = counts.sum(1, keepdim=True)
    smooth = (counts + _EPSILON) / (total + keys.shape[1] * _EPSILON) * total
    return sums / smooth[:, :, None], counts, sums


def merged(
    owners: Sequence[tuple[Sequence[str], Mapping[str, Tensor]]], names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    r"""Average values cell by cell, weighted by the owners' fetches of the cell.

    .. math:: v_{kcj} = \sum_o n_{ocj} v_{okcj} / \sum_o n_{ocj}, \qquad
        n_{ocj} = \sum_k n_{okcj}

    over the owners that know class :math:`k`: who does not has no say in it, and neither has who
    never fetched the cell. Fetches are summed.

    Args:
        owners: Class names and the columns ``values`` and ``fetches``, each ``(K_o, C, P)``.
        names: Classes of the result; every owner's are among them.

    Returns:
        Values and fetches, each ``(K, C, P)`` float32.
    """
    place = {name: row for row, name in enumerate(names)}
    shape = (len(names), *owners[0][1]["values"].shape[1:])
    total, weight, fetches = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for classes, columns in owners:
        rows = torch.tensor([place[name] for name in classes], dtype=torch.int64)
        own = columns["fetches"].double()
        used = own.sum(0).expand_as(own)
        total.index_add_(0, rows, columns["values"].double() * used)
        weight.index_add_(0, rows, used)
        fetches.index_add_(0, rows, own)
    return (total / weight.clamp(min=1)).float(), fetches.float()
