"""Experts of a mixture: a classifier, and an autoencoder that tells how familiar an image is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clfed.learners.tables import Head
from clfed.seeding import derive_seed, generator

_LEAST_VARIANCE = 1e-4


class Expert(nn.Module):
    r"""A classifier over the classes that it met, and an autoencoder that knows what it met.

    Args:
        dim: Length :math:`D` of an embedding.
        hidden: Units of every hidden layer.
        code: Length of a code.
        seed: Of the weights, which are drawn by it alone.

    Attributes:
        variance: :math:`\sigma^2`, a running mean of the squared errors of the autoencoder.
        misfit: How far its samples were from its own data when it was frozen.
    """

    variance: Tensor
    misfit: Tensor

    def __init__(self, dim: int, hidden: int, code: int, seed: int) -> None:
        super().__init__()
        self.code = code
        self.encoder = _layers(dim, hidden, 2 * code)
        self.decoder = _layers(code, hidden, dim)
        self.features = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.head = Head(hidden, "linear")
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("misfit", torch.zeros(()))
        _draw(self, seed)

    def shortfall(self, embeddings: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Return the autoencoder's loss of ``(B, D)``, ``(B,)``; ``noise`` is ``(B, code)``."""
        mean, log_spread = self.encoder(embeddings).chunk(2, dim=1)
        rebuilt = self.decoder(mean + (0.5 * log_spread).exp() * noise)
        error = (embeddings - rebuilt).square().mean(1) / self.variance + self.variance.log()
        divergence = (mean.square() + log_spread.exp() - 1 - log_spread).sum(1)
        return torch.as_tensor(error + divergence / embeddings.shape[1]) / 2

    @torch.no_grad()
    def settle(self, embeddings: Tensor) -> None:
        """Let the variance follow the squared error of ``(B, D)``, never down to zero."""
        code = self.encoder(embeddings)[:, : self.code]
        error = (embeddings - self.decoder(code)).square().mean()
        self.variance.lerp_(error.clamp(min=_LEAST_VARIANCE), 0.05)

    @torch.no_grad()
    def sample(self, number: int, rng: torch.Generator) -> Tensor:
        """Draw embeddings ``(number, D)``."""
        means: Tensor = self.decoder(torch.randn(number, self.code, generator=rng))
        noise = torch.randn(means.shape, generator=rng)
        return means + self.variance.sqrt() * noise

    def logits(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to one logit for each class that this expert met."""
        return torch.as_tensor(self.head(self.features(embeddings)))


class Experts(nn.ModuleList):
    """Experts that are made as needed, also where a checkpoint holds more of them."""

    def __init__(self, dim: int, hidden: int, code: int, seed: int) -> None:
        super().__init__()
        self.sizes, self.seed = (dim, hidden, code), seed

    def add(self) -> None:
        """Append an expert, its weights from the seed and its number."""
        self.append(Expert(*self.sizes, seed=derive_seed(self.seed, "expert", len(self))))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        numbers = {key.removeprefix(prefix).partition(".")[0] for key in state_dict}
        while str(len(self)) in numbers:
            self.add()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _layers(dim_in: int, hidden: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, hidden), nn.ReLU(), nn.Linear(hidden, dim_out))


@torch.no_grad()
def _draw(module: nn.Module, seed: int) -> None:
    """Draw all linear weights, uniform within the inverse root of their inputs; no bias."""
    rng = generator(seed, "weights")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.uniform_(-1, 1, generator=rng).mul_(layer.in_features**-0.5)
            layer.bias.zero_()
