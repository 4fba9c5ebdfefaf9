"""Nearest neighbours, and the graph that they make."""

from __future__ import annotations

import torch
from torch import Tensor

_BANDWIDTH_NEIGHBOURS = 5
_DENSE = 512  # points up to which all eigenvalues are computed
_BLOCK_ENTRIES = 2**22


def nearest_squares(points: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Squared distances to the nearest other points, and which they are.

    Args:
        points: Shape ``(P, D)``.
        neighbours: How many; fewer where there are fewer points.

    Returns:
        Both of shape ``(P, min(neighbours, P - 1))``, nearest first.
    """
    count = min(neighbours, len(points) - 1)
    block = max(1, _BLOCK_ENTRIES // max(len(points), 1))
    parts = []
    for start in range(0, len(points), block):
        rows = torch.arange(start, min(start + block, len(points)))
        squares = squared_distances(points[rows], points)
        squares[rows - start, rows] = torch.inf
        parts.append(squares.topk(count, dim=1, largest=False))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    r""":math:`\|x_p - c_k\|^2`, shape ``(P, K)``, never negative."""
    squares = points.square().sum(1, keepdim=True) - 2 * points @ centres.T
    return (squares + centres.square().sum(1)).clamp(min=0)


def affinity(points: Tensor, neighbours: int) -> Tensor:
    r"""Symmetric, positive semi-definite graph of nearest neighbours.

    .. math:: W = \tfrac12 (A + A^\top) + \delta I, \qquad
              \delta = \max(0, -\lambda_{\min}(\tfrac12 (A + A^\top)))

    with :math:`A_{pj} = 1` where :math:`j` is one of the nearest neighbours of :math:`p`. Without
    symmetry and shift the energy may rise.

    Args:
        points: Shape ``(P, D)`` float64.
        neighbours: Other points that each point is joined with.

    Returns:
        Shape ``(P, P)``, sparse.
    """
    _, near = nearest_squares(points, neighbours)
    size = len(points)
    rows = torch.arange(size).repeat_interleave(near.shape[1])
    there, loops = torch.stack([rows, near.flatten()]), torch.arange(size).expand(2, -1)
    edges = torch.cat([there, there.flip(0)], dim=1)
    halves = points.new_full((edges.shape[1],), 0.5)
    graph = _sparse(edges, halves, size)
    shift = points.new_full((size,), max(0.0, -_smallest_eigenvalue(graph)))
    return _sparse(
        torch.cat([graph.indices(), loops], dim=1), torch.cat([graph.values(), shift]), size
    )


def _sparse(places: Tensor, values: Tensor, size: int) -> Tensor:
    """A square matrix; values at one place are added."""
    graph = torch.sparse_coo_tensor(places, values, (size, size), check_invariants=True)
    return graph.coalesce()


def _smallest_eigenvalue(graph: Tensor) -> float:
    """A lower bound of the eigenvalues of a symmetric sparse matrix, tight up to rounding."""
    if len(graph) <= _DENSE:
        return float(torch.linalg.eigvalsh(graph.to_dense())[0])
    # A fixed start: without one, the ambient generator would be asked.
    begin = torch.rand(len(graph), 1, generator=torch.Generator().manual_seed(0)).double()
    values, vectors = torch.lobpcg(graph, X=begin, largest=False, niter=500, tol=1e-9)
    residual = torch.sparse.mm(graph, vectors) - values * vectors
    return float(values[0]) - float(residual.norm())


def bandwidth(points: Tensor) -> float:
    r"""Kernel width :math:`\sigma^2`: mean squared distance to the five nearest neighbours."""
    squares, _ = nearest_squares(points, _BANDWIDTH_NEIGHBOURS)
    return max(float(squares.mean()), 1e-12) if squares.numel() else 1.0
