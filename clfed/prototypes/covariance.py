"""Inverses, square roots and shrinkage of covariance matrices, in batches."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix**-1 @ right`` of a symmetric positive matrix; pseudo-inverse if it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
        return inverse @ right
    return torch.cholesky_solve(right, factor)


def whitening(covariance: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`A_c` with :math:`A_c^T A_c = \Sigma_c^{-1}`, and :math:`\log\det \Sigma_c`."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(covariance)
        # The cut-off of pinv: directions that carry only rounding are left out of the distance.
        cut = values.amax(-1, keepdim=True).clamp(min=1e-300) * values.shape[-1] * 2.2e-16
        kept = values > cut
        root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
        log_determinant = torch.where(kept, values.clamp(min=1e-300).log(), 0.0).sum(-1)
        return root[..., :, None] * vectors.mT, log_determinant
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype).expand_as(covariance)
    whitening = torch.linalg.solve_triangular(factor, eye, upper=False)
    return whitening, 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def correlation(covariance: Tensor, gammas: tuple[float, float], rounds: int) -> Tensor:
    """FeCAM's shrinkage, ``rounds`` times, then unit diagonal; ``(..., D, D)``."""
    dim = covariance.shape[-1]
    eye = torch.eye(dim, dtype=covariance.dtype)
    for _ in range(rounds):
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        across = (covariance.sum((-2, -1))[..., None, None] - trace) / max(dim * (dim - 1), 1)
        covariance = covariance + gammas[0] * trace / dim * eye + gammas[1] * across * (1 - eye)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    # No spread at all (single examples only) leaves the plain distance between unit vectors.
    flat = diagonal <= 0
    root = torch.where(flat, 1.0, diagonal).sqrt()
    return torch.where(
        torch.diag_embed(flat), 1.0, covariance / root[..., :, None] / root[..., None, :]
    )


def apply(whitening: Tensor, rows: Tensor) -> Tensor:
    """Each matrix times its own row, ``(C, D, D)`` and ``(C, D)`` to ``(C, D)``."""
    result: Tensor = (whitening @ rows[:, :, None])[:, :, 0]
    return result
