r"""LAF: label-agnostic forgetting (Shen et al. 2024, arXiv 2404.00506).

Two small autoencoders of the original's embeddings, :math:`h` of all images and :math:`h_f` of
those that go, say how well an embedding :math:`e` fits in: :math:`m(e) = \|h(e) - e\|^2`. Each
pair of batches makes two steps of the encoder; no label is looked at.

.. math:: L_{UE} = \sum_{i \in B_r} e^{m_i / (1 + m_i)} - \sum_{j \in B_f} e^{m_j^f / (1 + m_j^f)}

.. math:: L_{RA} = \sum_{i \in B_r} \log \frac{\exp d_i}{\sum_{j \in B_f} \exp(d_j / \tau)}, \qquad
          d = 1 - \cos(e, e_o)

The first makes embeddings that go unlike what they were and keeps those that stay typical; the
second holds the latter where the original :math:`e_o` has them and drives the former away.

Public code ends the decoder in a sigmoid, which cannot reach embeddings above 1, and draws noise in
use; here it is linear (``decoder: sigmoid`` brings the other back) and the mean code is used. The
encoder stays in eval mode throughout, as there. As :math:`e^{m/(1+m)}` is flat for a large error,
embeddings are divided by their root mean square before they are compared (``scale: false``: not).

LAF+R then trains the head on labelled images that stay; it declares their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed, generator
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches
from clfed.unlearning.vae import DECODERS, VAE


class Laf(Unlearner):
    r"""Unlearn by what embeddings look like.

    Args:
        learner: The original.
        align_lr: Learning rate of the steps on :math:`L_{RA}`; ``lr`` is that of :math:`L_{UE}`.
        tau: :math:`\tau`.
        hidden: Hidden widths of the autoencoders.
        latent: Length of their code.
        decoder: ``linear`` or ``sigmoid``.
        scale: Whether embeddings are divided by their root mean square.
        fit_epochs: Passes of the autoencoders over their embeddings.
        fit_lr: Their learning rate.
        fit_batch_size: Their embeddings a batch.
        divergence_weight: :math:`\beta` of their loss.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET_X | Need.RETAIN_X
    schedule = "zip"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        align_lr: float = 1e-4,
        tau: float = 20.0,
        hidden: Sequence[int] = (128, 32),
        latent: int = 8,
        decoder: str = "linear",
        scale: bool = True,
        fit_epochs: int = 10,
        fit_lr: float = 1e-3,
        fit_batch_size: int = 32,
        divergence_weight: float = 0.025,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if decoder not in DECODERS:
            raise ConfigError(f"Expected unlearner.decoder of {DECODERS}, got {decoder!r}.")
        if min(align_lr, tau, fit_lr) <= 0 or divergence_weight < 0 or fit_epochs < 0:
            raise ConfigError(
                "Expected positive unlearner.align_lr, tau and fit_lr, divergence_weight >= 0 and "
                f"fit_epochs >= 0, got {align_lr}, {tau}, {fit_lr}, {divergence_weight} and "
                f"{fit_epochs}."
            )
        if min(*hidden, latent, fit_batch_size) < 1:
            raise ConfigError(
                "Expected positive unlearner.hidden, latent and fit_batch_size, got "
                f"{list(hidden)}, {latent} and {fit_batch_size}."
            )
        self.automatic_optimization = False
        self.align_lr, self.tau, self.scale = align_lr, tau, scale
        self.shape: dict[str, Any] = {"hidden": hidden, "latent": latent, "decoder": decoder}
        self.fitting: dict[str, Any] = {
            "epochs": fit_epochs,
            "lr": fit_lr,
            "batch_size": fit_batch_size,
            "weight": divergence_weight,
        }

    def prepare(self, context: Context) -> None:
        """Fit both autoencoders."""
        assert self.batches is not None
        going = self.teacher.embed_all(context.forget.images)
        staying = self.teacher.embed_all(self.batches.pools["retain"].images)
        everything = torch.cat([going, staying])
        self.unit = float(everything.square().mean().sqrt().clamp(min=1e-6)) if self.scale else 1.0
        self.typical = self.autoencoder(everything, "all")
        self.departing = self.autoencoder(going, "forget")

    def autoencoder(self, embeddings: Tensor, purpose: str) -> VAE:
        """Return an autoencoder of some embeddings ``(N, D)``."""
        seed = derive_seed(self.seed, purpose)
        vae = VAE(embeddings.shape[1], **self.shape, seed=seed)
        vae.fit(embeddings / self.unit, **self.fitting, seed=seed)
        return vae

    def adapts(self, batch: Batches) -> bool:
        """Never: the encoder stays in eval mode."""
        return False

    def training_step(self, batch: Batches, batch_idx: int) -> Tensor:
        """Two steps, one an optimiser; the second sees the weights that the first one made."""
        self.learner.train(self.adapts(batch))
        self.step_number += 1
        losses = []
        optimisers: list[LightningOptimizer] = self.optimizers()  # type: ignore[assignment]
        for optimiser, loss in zip(optimisers, (self.extraction, self.alignment), strict=True):
            value = loss(batch)
            optimiser.zero_grad()
            self.manual_backward(value)
            optimiser.step()
            losses.append(value.detach())
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> Any:
        """Return one Adam for each loss, both of the encoder."""
        weights = list(self.learner.backbone.parameters())
        return [
            torch.optim.AdamW(weights, lr, weight_decay=self.weight_decay)
            for lr in (self.lr, self.align_lr)
        ]

    def extraction(self, batch: Batches) -> Tensor:
        r""":math:`L_{UE}` of a batch."""
        retain, forget = self.embeddings(batch)
        return bounded(self.error(self.typical, retain)).sum() - (
            bounded(self.error(self.departing, forget)).sum()
        )

    def alignment(self, batch: Batches) -> Tensor:
        r""":math:`L_{RA}` of a batch."""
        retain, forget = self.embeddings(batch)
        with torch.no_grad():
            was_retain = self.teacher.embed(batch["retain"].images).float()
            was_forget = self.teacher.embed(batch["forget"].images).float()
        return alignment_loss(away(retain, was_retain), away(forget, was_forget), self.tau)

    def embeddings(self, batch: Batches) -> tuple[Tensor, Tensor]:
        """Embed the images that stay and those that go."""
        parts = batch["retain"].images, batch["forget"].images
        both = self.learner.embed(torch.cat(parts)).float()
        return both[: len(parts[0])], both[len(parts[0]) :]

    def error(self, vae: VAE, embeddings: Tensor) -> Tensor:
        """Squared error ``(B,)`` of the reconstruction of embeddings ``(B, D)``."""
        scaled = embeddings / self.unit
        found: Tensor = vae(scaled)
        return (found - scaled).square().sum(1)


class LafRepair(Laf):
    """LAF+R: after LAF, train the head on labelled images that stay.

    Args:
        learner: The original.
        repair_epochs: Passes over these images.
        repair_lr: Learning rate of Adam.
        options: Options of :class:`Laf`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET_X | Need.RETAIN

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        repair_epochs: int = 1,
        repair_lr: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if repair_epochs < 0 or repair_lr <= 0:
            raise ConfigError(
                "Expected unlearner.repair_epochs >= 0 and repair_lr > 0, got "
                f"{repair_epochs} and {repair_lr}."
            )
        self.repair_epochs, self.repair_lr = repair_epochs, repair_lr

    def finalize(self, context: Context) -> None:
        """Train the head; the encoder and so the embeddings stay."""
        assert self.batches is not None
        retain = self.batches.pools["retain"]
        embeddings, labels = self.learner.embed_all(retain.images), retain.labels
        head = self.learner.head.to("cpu")
        optimiser = torch.optim.Adam(head.parameters(), self.repair_lr)
        rng = generator(self.seed, "repair")
        for _ in range(self.repair_epochs):
            order = torch.randperm(len(labels), generator=rng)
            for rows in torch.split(order, self.batch_size):
                optimiser.zero_grad()
                loss = F.cross_entropy(self.outputs(embeddings[rows]), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        super().finalize(context)


def bounded(errors: Tensor) -> Tensor:
    r""":math:`\exp(m / (1 + m))` in :math:`[1, e)`.

    Example:
        >>> bounded(torch.tensor([0.0, 1e9])).tolist()
        [1.0, 2.7182817459106445]
    """
    return (errors / (1 + errors)).exp()


def away(embeddings: Tensor, originals: Tensor) -> Tensor:
    """Cosine distance ``(B,)`` of embeddings from what they were."""
    return 1 - F.cosine_similarity(embeddings, originals)


def alignment_loss(retain: Tensor, forget: Tensor, tau: float) -> Tensor:
    r""":math:`L_{RA} = \sum_i d_i - |B_r| \log \sum_j \exp(d_j / \tau)`.

    Args:
        retain: :math:`d_i`, ``(B_r,)``.
        forget: :math:`d_j`, ``(B_f,)``.
        tau: :math:`\tau`.

    Example:
        >>> float(alignment_loss(torch.tensor([0.5, 0.5]), torch.tensor([0.0]), tau=2.0))
        1.0
    """
    return retain.sum() - len(retain) * (forget / tau).logsumexp(0)
