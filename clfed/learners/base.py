"""The base of all learners that train a backbone to embed images."""

from __future__ import annotations

import math
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError

OPTIMISERS = ("adam", "sgd")
SCHEDULES = ("constant", "step", "cosine")

Batch = tuple[Tensor, Tensor]


class EmbeddingLearner(L.LightningModule):
    """A backbone, its input transform, an optimiser and a schedule.

    A method adds ``loss(embeddings, labels)`` and ``batches``.

    Args:
        backbone: Maps float32 ``(B, C, H, W)`` to ``(B, D)``; it is trained in place.
        transform: Turns images of 0..255 into the backbone's input.
        steps: Length of the training; nothing else stops it.
        lr: Largest learning rate.
        optimizer: ``adam`` (decoupled weight decay) or ``sgd`` (Nesterov momentum 0.9).
        weight_decay: Decay of the weights, 0 for none.
        schedule: ``constant``; ``step``, halved every ``halve_every`` steps; or ``cosine``, down
            to nearly zero at the last step.
        halve_every: Steps between halvings.
        warmup: Steps over which the rate rises linearly at the start.
        ema: Decay of the running average of the weights that becomes the encoder; 0 takes the
            weights themselves.
        num_classes: Base classes, without their rotations; for methods with a head.
        dim: Length of an embedding; for methods with a head.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    #: Whether rotated classes count as further classes, in validation too.
    rotations: bool = False

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        steps: int,
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        schedule: str = "constant",
        halve_every: int = 2000,
        warmup: int = 0,
        ema: float = 0.0,
        num_classes: int = 0,
        dim: int = 0,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMISERS or schedule not in SCHEDULES:
            raise ConfigError(
                f"Expected an optimizer of {OPTIMISERS} and a schedule of {SCHEDULES}, got "
                f"{optimizer!r} and {schedule!r}."
            )
        if steps < 1 or lr <= 0 or weight_decay < 0 or halve_every < 1 or not 0 <= ema < 1:
            raise ConfigError(
                "A learner needs steps >= 1, lr > 0, weight_decay >= 0, halve_every >= 1 and "
                f"0 <= ema < 1, got {steps}, {lr}, {weight_decay}, {halve_every} and {ema}."
            )
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.transform = transform
        self.num_classes, self.dim = num_classes, dim
        self.steps, self.lr, self.optimizer, self.weight_decay = steps, lr, optimizer, weight_decay
        self.schedule, self.halve_every, self.warmup, self.ema = schedule, halve_every, warmup, ema

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> IterableDataset[Batch]:
        """Return what the steps ``start..steps`` learn from: images and integer labels.

        A step's batch depends on the seed and the step alone, so a resumed training sees what an
        uninterrupted one would.

        Args:
            images: The base classes.
            seed: Decides the draws.
            start: First step.

        Raises:
            NotEnoughData: Fewer classes or images than the method needs.
        """
        raise NotImplementedError

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of float32 embeddings ``(B, D)`` and labels ``(B,)``."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Embed images ``(B, C, H, W)`` of 0..255, or ready features, in the present mode."""
        inputs = self.transform(images)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.backbone(inputs)
        return embeddings

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch; distances and softmax in float32 whatever the precision."""
        images, labels = batch
        embeddings = self.embed(images)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.loss(embeddings.float(), labels)

    def configure_optimizers(self) -> Any:
        """Return the optimiser with its schedule, stepped after every batch."""
        parameters = self.parameters()
        optimiser: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
            if self.optimizer == "adam"
            else torch.optim.SGD(
                parameters, self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
            )
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def rate(self, step: int) -> float:
        """Return the learning rate at a step as a fraction of ``lr``."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "step":
            return rising * 0.5 ** (step // self.halve_every)
        if self.schedule == "cosine":
            return rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rising
