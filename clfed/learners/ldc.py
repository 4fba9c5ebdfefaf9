r"""Learnable drift compensation (Gomez-Villa et al. 2024, arXiv 2407.08536).

.. math:: \mu_k \leftarrow A \mu_k, \qquad \Sigma_k \leftarrow A \Sigma_k A^\top, \qquad
    A = \arg\min_A \sum_i \|A h_i^- - h_i\|^2

One linear map from the older embedding to the present one, without bias, fitted to the present
images. Published: 20 epochs of Adam at 0.001. The default here is the closed form: no learning rate
or seed, a fraction of the time, and it needs two sums alone, which nodes can add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.drifting import DistilledDrifting
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.drift import linear_map, through

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

FITS = ("closed", "adam")


class LearnableDriftCompensation(DistilledDrifting):
    """Send old class means, and covariances where they are kept, through one linear map.

    Args:
        backbone: The network.
        transform: Its input transform.
        fit: ``closed`` (ridge regression of the drift) or ``adam`` (as published, starting from
            the identity).
        penalty: Of the closed form, relative to the mean square of an entry of the embeddings.
        fit_epochs: Passes of Adam over the present embeddings.
        fit_lr: Its learning rate.
        options: Options of :class:`~clfed.learners.drifting.DistilledDrifting`.

    Raises:
        ConfigError: No such fit, or a number is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        fit: str = "closed",
        penalty: float = 1e-3,
        fit_epochs: int = 20,
        fit_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, **options)
        if fit not in FITS:
            raise ConfigError(f"Expected learner.fit of {FITS}, got {fit!r}.")
        if not (penalty >= 0 and fit_epochs >= 0 and fit_lr > 0):
            raise ConfigError(
                "Expected learner.penalty >= 0, fit_epochs >= 0 and fit_lr > 0, got "
                f"{penalty}, {fit_epochs} and {fit_lr}."
            )
        self.fit, self.penalty, self.fit_epochs, self.fit_lr = fit, penalty, fit_epochs, fit_lr

    def drifted(
        self, memory: PrototypeMemory, experience: Experience, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Fit the map and apply it."""
        if self.fit == "closed":
            old, new = before.double(), after.double()
            matrix = linear_map(new.T @ old, old.T @ old, self.penalty)
        else:
            matrix = adam_map(
                before,
                after,
                epochs=self.fit_epochs,
                lr=self.fit_lr,
                batch_size=self.batch_size,
                rng=self.rng("drift"),
            ).double()
        return through(memory, matrix)


def adam_map(
    before: Tensor, after: Tensor, *, epochs: int, lr: float, batch_size: int, rng: torch.Generator
) -> Tensor:
    """Fit the map as published: Adam on the mean squared error, from the identity.

    Args:
        before: ``(N, D)`` embeddings by the older network.
        after: ``(N, D)``, the same images by the present one.
        epochs: Passes over them.
        lr: Learning rate.
        batch_size: Rows a step.
        rng: Shuffles each pass.

    Returns:
        ``(D, D)``.
    """
    matrix = torch.eye(before.shape[1], dtype=before.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([matrix], lr)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(before), generator=rng), batch_size):
                loss = F.mse_loss(before[rows] @ matrix.T, after[rows])
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
    return matrix.detach()
