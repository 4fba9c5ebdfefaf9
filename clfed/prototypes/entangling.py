"""Random mixtures of embeddings and of their labels (Yao et al. 2025, arXiv 2511.22265)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MECHANISMS = ("rap", "rar", "rsp", "rsr", "vap", "var")


@dataclass(frozen=True, eq=False)
class Entangled:
    """One mixture.

    Attributes:
        classes: Class names of the label weights.
        representation: ``(width,)`` float32.
        weights: ``(classes,)`` float32, at least 0, of sum 1.
    """

    classes: tuple[str, ...]
    representation: Tensor
    weights: Tensor


def entangle(
    features: Tensor, labels: Sequence[str], mechanism: str, rng: torch.Generator
) -> Entangled:
    """Mix embeddings and their labels alike.

    The mechanisms are the paper's: RAP, its choice, is random weights on class means. What we could
    read decodes no other one, so they are reconstructions of ours from the letters: ``r`` random or
    ``v`` equal weights; ``a`` of all or ``s`` of a single one, drawn by chance; ``p`` class means
    (prototypes) or ``r`` the images' representations. A summary of the paper describes RSR as
    random weights on raw representations, which is ``rar`` here; that RSR is reported far below VAR
    does not fit such a mixture, which hardly differs from a mean.

    Args:
        features: ``(N, width)``, ``N`` of at least 1.
        labels: ``N`` class names.
        mechanism: One of ``MECHANISMS``.
        rng: Decides everything random.

    Returns:
        The mixture over the sorted classes; sums are taken in float64.
    """
    weighting, which, of = tuple(mechanism)
    classes = sorted(set(labels))
    place = {name: row for row, name in enumerate(classes)}
    rows = torch.tensor([*map(place.__getitem__, labels)], dtype=torch.int64)
    values, owners = features.double(), rows
    if of == "p":
        counts = torch.bincount(rows).double()
        sums = values.new_zeros(len(classes), values.shape[1]).index_add_(0, rows, values)
        values, owners = sums / counts[:, None], torch.arange(len(classes))
    count = len(values)
    if which == "s":
        weights = F.one_hot(torch.randint(count, (), generator=rng), count).double()
    elif weighting == "r":
        weights = 1 - torch.rand(count, generator=rng, dtype=torch.float64)  # never all zero
        weights = weights / weights.sum()
    else:
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
    label = weights.new_zeros(len(classes)).index_add_(0, owners, weights)
    return Entangled(tuple(classes), (weights @ values).float(), label.float())
