"""Scoring: a linear and a quadratic function of the embedding, one row a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clfed.errors import InvalidEmbedding
from clfed.finite import all_finite

_BLOCK_ENTRIES = 2**22


class Classifier(Protocol):
    """What every classifier offers; it is a value and knows nothing but its classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the score columns."""
        ...

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score of every class, ``(B, D)`` to ``(B, C)`` float64; the largest wins."""
        ...

    def predict(self, embeddings: Tensor) -> Tensor:
        """Index of the best class, ``(B, D)`` to ``(B,)`` int64; ties go to the first."""
        ...


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    r""":math:`score_c(z) = w_c^T z + b_c`, one matrix product.

    Attributes:
        classes: Names of the ``C`` rows.
        weight: Shape ``(C, D)`` float64.
        bias: Shape ``(C,)`` float64.
        normalise: Whether embeddings are scaled to unit length first.
    """

    classes: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    normalise: bool = False

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score of every class, ``(B, D)`` to ``(B, C)`` float64.

        Raises:
            InvalidEmbedding: Wrong shape, or values that are not finite.
        """
        z = _prepared(embeddings, self.weight.shape[1], self.normalise)
        return torch.addmm(self.bias, z, self.weight.T)

    def predict(self, embeddings: Tensor) -> Tensor:
        """Index of the best class, ``(B, D)`` to ``(B,)`` int64; ties go to the first."""
        return self.scores(embeddings).argmax(dim=1)


@dataclass(frozen=True, eq=False)
class QuadraticClassifier:
    r""":math:`score_c(z) = b_c - \|A_c z - t_c\|^2`, in blocks of bounded memory.

    Attributes:
        classes: Names of the ``C`` classes.
        whitening: :math:`A_c`, shape ``(C, D, D)`` float64.
        centres: :math:`t_c`, shape ``(C, D)`` float64.
        bias: :math:`b_c`, shape ``(C,)`` float64.
        normalise: Whether embeddings are scaled to unit length first.
    """

    classes: tuple[str, ...]
    whitening: Tensor
    centres: Tensor
    bias: Tensor
    normalise: bool = False

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score of every class, ``(B, D)`` to ``(B, C)`` float64.

        One product of ``2 B C D**2`` operations; the whitened embeddings are never held for more
        than a block of samples.

        Raises:
            InvalidEmbedding: Wrong shape, or values that are not finite.
        """
        count, dim = self.centres.shape
        z = _prepared(embeddings, dim, self.normalise)
        stacked = self.whitening.reshape(count * dim, dim).T
        scores = z.new_empty(len(z), count)
        step = max(1, _BLOCK_ENTRIES // (count * dim))
        for start in range(0, len(z), step):
            white = (z[start : start + step] @ stacked).view(-1, count, dim) - self.centres
            scores[start : start + step] = self.bias - white.square_().sum(dim=2)
        return scores

    def predict(self, embeddings: Tensor) -> Tensor:
        """Index of the best class, ``(B, D)`` to ``(B,)`` int64; ties go to the first."""
        return self.scores(embeddings).argmax(dim=1)


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to unit length; a zero row stays zero."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.clamp(min=1e-300)


def _prepared(embeddings: Tensor, dim: int, normalise: bool) -> Tensor:
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise InvalidEmbedding(
            f"expected embeddings of shape (B, {dim}), got {tuple(embeddings.shape)}"
        )
    z = embeddings.detach().to("cpu", torch.float64)
    if not all_finite(z):
        raise InvalidEmbedding("expected finite embeddings, got NaN or infinity")
    return unit(z) if normalise else z
