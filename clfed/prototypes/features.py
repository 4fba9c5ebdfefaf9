"""Fixed feature maps that are applied before embeddings are summed, and again before scoring."""

from __future__ import annotations

import torch
from torch import Tensor

from clfed.errors import InvalidEmbedding


def tukey(embeddings: Tensor, beta: float = 0.5) -> Tensor:
    r"""Tukey's ladder of powers, :math:`\tilde z = z^\beta`, which makes skewed features rounder.

    Args:
        embeddings: Shape ``(..., D)``, floating point, nowhere negative (after a ReLU).
        beta: Exponent in ``(0, 1]``.

    Returns:
        The same shape and dtype.

    Raises:
        InvalidEmbedding: An entry is negative or not a number, or beta is out of range.

    Example:
        >>> tukey(torch.tensor([0.0, 4.0])).tolist()
        [0.0, 2.0]
    """
    if not 0 < beta <= 1:
        raise InvalidEmbedding(f"expected beta in (0, 1], got {beta}", remedy="beta=0.5 is usual.")
    if embeddings.numel() and not float(embeddings.amin()) >= 0:
        raise InvalidEmbedding(
            f"expected embeddings without negative entries, got {float(embeddings.amin()):g}",
            remedy="Use a backbone that ends in a ReLU, or leave the power transform out.",
        )
    return embeddings**beta


class RandomProjection:
    r"""Random hidden layer :math:`\phi(z) = s \max(z W, 0)`, :math:`W_{ij} \sim N(0, 1)`, fixed.

    RanPAC (McDonnell et al. 2023, arXiv 2307.02251): ridge regression on such features separates
    what the embedding itself does not separate linearly.

    Args:
        dim_in: Embedding size :math:`D`.
        dim_out: Number of random features :math:`M`.
        seed: Of the projection's own generator; all nodes must use the same.
        scale: :math:`s`, positive. Features of :math:`s` with penalty :math:`s^2 \lambda` are those
            of 1 with :math:`\lambda`; a small one leaves room for sums over many large embeddings.

    Raises:
        ValueError: The scale is not positive.
    """

    def __init__(self, dim_in: int, dim_out: int, seed: int, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ValueError(f"expected a positive scale, got {scale}")
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(dim_in, dim_out, generator=generator, dtype=torch.float64)
        self.weight = draws * scale

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Project ``(B, D)`` embeddings to ``(B, M)`` float64 features."""
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.weight):
            raise InvalidEmbedding(
                f"expected embeddings of shape (B, {len(self.weight)}), "
                f"got {tuple(embeddings.shape)}"
            )
        return (embeddings.to("cpu", torch.float64) @ self.weight).relu_()
