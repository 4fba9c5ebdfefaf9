r"""Low-rank changes of the weights of any network.

A low-rank adapter (Hu et al. 2022, arXiv 2106.09685) adds a product of two thin matrices to a
frozen weight,

.. math:: W' = W + s\, B A, \qquad A \in \mathbb{R}^{r \times m},\ B \in \mathbb{R}^{n \times r}

with ``B = 0`` at the start, so that nothing changes before the first step. The weight of a
convolution is seen as a matrix of one row an output channel, ``m = in * kh * kw``: a convolution
is linear in its weight, so the same sum of weights serves linear layers and convolutions, grouped
ones too. Adding up the weights once a batch costs less than a second pass through a layer, needs
nothing of the network but its names, and makes folding an adapter into the weight exact to the bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Layer = nn.Linear | nn.Conv2d
_CONTAINERS = (nn.Sequential, nn.ModuleList)


class LowRank(nn.Module):
    """The change of one weight.

    Args:
        weight: ``(n, ...)``, seen as a matrix ``(n, m)``.
        rank: Largest rank; never more than the matrix has.
        scale: Factor of the product.
        rng: Of the first values of ``a`` (Kaiming uniform); ``b`` starts at zero.
    """

    def __init__(
        self, weight: Tensor, rank: int, *, scale: float = 1.0, rng: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        size = min(rank, rows, columns)
        first = weight.new_empty(size, columns)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=rng)
        self.a = nn.Parameter(first)
        self.b = nn.Parameter(weight.new_zeros(rows, size))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight, of the same shape."""
        return weight + self.scale * (self.b @ self.a).view_as(weight)


def weight_layers(network: nn.Module) -> dict[str, Layer]:
    """Return the linear layers and convolutions of a network by name, in order of definition."""
    return {name: m for name, m in network.named_modules() if isinstance(m, Layer)}


def blocks(network: nn.Module) -> list[list[str]]:
    """Group the names of :func:`weight_layers` by block, from the input to the output.

    Sequences of modules are opened, and so are modules that hold a sequence of blocks (the encoder
    of a vision transformer); whatever they hold that has weights is a block. In a plain stack each
    layer is a block of its own. Order of definition is taken for depth.

    Example:
        >>> blocks(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        [['0'], ['2']]
    """
    names = list(weight_layers(network))
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_block_of(network, name), []).append(name)
    return list(found.values())


def attach(
    network: nn.Module, rank: int, rng: torch.Generator, *, scale: float = 1.0
) -> dict[str, LowRank]:
    """Give every layer of :func:`weight_layers` an adapter, and return these by layer.

    Outputs stay as they are, bit for bit, until an adapter learns.
    """
    adapters: dict[str, LowRank] = {}
    for name, layer in weight_layers(network).items():
        adapters[name] = LowRank(layer.weight.detach(), rank, scale=scale, rng=rng)
        parametrize.register_parametrization(layer, "weight", adapters[name])
    return adapters


def fold(network: nn.Module) -> None:
    r"""Make adapters part of the weights, :math:`W \leftarrow W + s B A`, and remove them."""
    for layer in weight_layers(network).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _block_of(network: nn.Module, layer: str) -> str:
    """Return the name of the first module on the way to a layer that is not opened."""
    parts = layer.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        if not _is_opened(network.get_submodule(name)):
            return name
    return layer


def _is_opened(module: nn.Module) -> bool:
    if type(module) in _CONTAINERS:
        return True
    held = [child for child in module.children() if type(child) in _CONTAINERS]
    return any(sum(map(_is_composite, c.children())) > 1 for c in held)


def _is_composite(module: nn.Module) -> bool:
    return not isinstance(module, Layer) and bool(weight_layers(module))
