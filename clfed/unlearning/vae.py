r"""A small variational autoencoder of embeddings (Kingma & Welling 2014, arXiv 1312.6114).

.. math:: L = \|h(e) - e\|^2 + \beta\, \mathrm{KL}\big(N(m, \sigma^2) \,\|\, N(0, 1)\big)

In eval mode it reconstructs from the mean :math:`m`, so an answer is never a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from clfed.seeding import derive_seed, generator

DECODERS = ("linear", "sigmoid")


class VAE(nn.Module):
    """Encoder, Gaussian code, decoder of the mirrored widths.

    Args:
        dim: Length :math:`D` of an embedding.
        hidden: Widths of the encoder's hidden layers.
        latent: Length of a code.
        decoder: ``linear`` reaches any number; ``sigmoid`` only those between 0 and 1.
        seed: Of the first weights; nothing ambient is read or changed.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int], latent: int, *, decoder: str, seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "vae"))
            self.encoder = _layers([dim, *hidden, 2 * latent])
            self.decoder = _layers([latent, *reversed(hidden), dim])
        if decoder == "sigmoid":
            self.decoder.append(nn.Sigmoid())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Reconstruct embeddings ``(B, D)``, from the mean of their code."""
        reconstruction: Tensor = self.decoder(self.encoder(embeddings).chunk(2, dim=1)[0])
        return reconstruction

    def loss(self, embeddings: Tensor, weight: float, rng: torch.Generator) -> Tensor:
        r"""Return the loss of embeddings ``(B, D)``, averaged over them.

        Args:
            embeddings: What to reconstruct.
            weight: :math:`\beta`.
            rng: Of the code's noise.
        """
        mean, log_variance = self.encoder(embeddings).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=rng)
        found = self.decoder(mean + noise * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        error: Tensor = (found - embeddings).square().sum(1)
        loss: Tensor = (error + weight * divergence).mean()
        return loss

    def fit(
        self,
        embeddings: Tensor,
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        weight: float,
        seed: int,
    ) -> None:
        r"""Train on embeddings, with Adam, and freeze.

        Args:
            embeddings: ``(N, D)`` float32.
            epochs: Passes.
            lr: Learning rate.
            batch_size: Embeddings a batch.
            weight: :math:`\beta`.
            seed: Of order and noise.
        """
        optimiser = torch.optim.Adam(self.parameters(), lr)
        rng = generator(seed, "vae", "fit")
        for _ in range(epochs):
            order = torch.randperm(len(embeddings), generator=rng)
            for rows in torch.split(order, batch_size):
                optimiser.zero_grad()
                loss = self.loss(embeddings[rows], weight, rng)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        self.eval().requires_grad_(False)


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
