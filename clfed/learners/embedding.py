"""The part of a learner that maps images to embeddings, and how it is optimised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn

from clfed.backbones.build import build_feature_map
from clfed.backbones.encoder import BATCH, Transform
from clfed.errors import ConfigError
from clfed.learners import state
from clfed.learners.optimisers import OPTIMISERS, SCHEDULES, make_optimiser, rate_at, unpack


class EmbeddingModule(L.LightningModule):
    """A backbone with its input transform, its optimiser and the schedule of its learning rate.

    Args:
        backbone: Maps float32 ``(B, C, H, W)`` or ``(B, D)`` to ``(B, dim)``; trained in place.
        transform: Turns images of 0..255 into the backbone's input.
        dim: Length of an embedding.
        lr: Largest learning rate.
        later_lr: The same after the first experience; None: no other.
        optimizer: ``adam`` (decoupled weight decay) or ``sgd`` (Nesterov momentum 0.9).
        weight_decay: Decay of the weights, 0 for none.
        schedule: ``constant``; ``step``, halved every ``halve_every`` steps; or ``cosine``, down
            to nearly zero at the last step.
        halve_every: Steps between halvings.
        warmup: Steps over which the rate rises linearly at the start.
        ema: Decay of the running average of the weights that becomes the encoder in base
            training; 0 takes the weights themselves.
        clip: Largest norm of the gradient; None leaves it alone.
        feature_map: ``_target_`` and options of a map in :mod:`clfed.prototypes.features` of what
            is remembered and scored.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        dim: int = 0,
        lr: float = 1e-3,
        later_lr: float | None = None,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        schedule: str = "constant",
        halve_every: int = 2000,
        warmup: int = 0,
        ema: float = 0.0,
        clip: float | None = None,
        feature_map: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMISERS or schedule not in SCHEDULES:
            raise ConfigError(
                f"Expected learner.optimizer of {OPTIMISERS} and learner.schedule of {SCHEDULES}, "
                f"got {optimizer!r} and {schedule!r}."
            )
        if lr <= 0 or weight_decay < 0 or halve_every < 1 or warmup < 0 or not 0 <= ema < 1:
            raise ConfigError(
                "A learner needs lr > 0, weight_decay >= 0, halve_every >= 1, warmup >= 0 and "
                f"0 <= ema < 1, got {lr}, {weight_decay}, {halve_every}, {warmup} and {ema}."
            )
        if (later_lr is not None and later_lr <= 0) or (clip is not None and clip <= 0):
            raise ConfigError(f"Expected positive later_lr and clip, got {later_lr} and {clip}.")
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.transform, self.dim = transform, dim
        self.lr, self.later_lr, self.optimizer = lr, later_lr, optimizer
        self.weight_decay, self.schedule = weight_decay, schedule
        self.halve_every, self.warmup, self.ema, self.clip = halve_every, warmup, ema, clip
        self.feature_map = build_feature_map(feature_map, dim)
        self._feature_map_settings = None if feature_map is None else dict(feature_map)
        #: Number of the present experience, -1 before the first.
        self.number = -1
        #: Steps of the present training.
        self.length = 0
        #: Whether the present experience was announced; an optimiser goes on where none is.
        self.announced = True
        #: What the optimiser goes on with where no experience is announced.
        self.optimiser_state: dict[str, Any] = {}

    def embed(self, images: Tensor, backbone: nn.Module | None = None) -> Tensor:
        """Embed images ``(B, C, H, W)`` of 0..255, or ready features, in the present mode.

        Args:
            images: What the transform takes.
            backbone: Another network, such as the teacher's; the learner's own when omitted.
        """
        inputs = self.transform(images)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = (self.backbone if backbone is None else backbone)(inputs)
        return embeddings

    @torch.no_grad()
    def embed_all(self, images: Tensor, backbone: nn.Module | None = None) -> Tensor:
        """Embed any number of images in eval mode, each the same bits whatever its neighbours.

        Returns:
            float32 ``(N, D)`` on the CPU.
        """
        network = self.backbone if backbone is None else backbone
        was_training = network.training
        network.eval()
        device = next((p.device for p in network.parameters()), None)
        if device is None:  # nothing to be trained: pixels or ready features as they are
            return self.embed(images, network).float().cpu()
        parts = []
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            batch = part.new_zeros(BATCH, *part.shape[1:])
            batch[: len(part)] = part
            with torch.autocast(device.type, enabled=False):
                parts.append(self.embed(batch.to(device), network)[: len(part)].float().cpu())
        network.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def mapped(self, embeddings: Tensor) -> Tensor:
        """Apply the feature map, if there is one."""
        if self.feature_map is None:
            return embeddings
        mapped: Tensor = self.feature_map(embeddings)
        return mapped

    def version(self) -> str:
        """Return the identity of the present embedding: a SHA-256 over the backbone's weights."""
        digest = hashlib.sha256(repr(self._feature_map_settings).encode())
        state.update(digest, self.backbone.state_dict())
        return digest.hexdigest()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what the optimiser trains, as its parameter groups."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Return the optimiser with its schedule, stepped after every batch."""
        rate = self.lr if self.later_lr is None or self.number < 1 else self.later_lr
        optimiser = make_optimiser(self.optimizer, self.parameter_groups(), rate, self.weight_decay)
        if not self.announced and self.optimiser_state:
            unpack(optimiser, self, self.optimiser_state)
        if self.schedule == "constant" and not self.warmup:
            return {"optimizer": optimiser}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def rate(self, step: int) -> float:
        """Return the learning rate at a step as a fraction of the largest one."""
        return rate_at(
            step,
            self.schedule,
            warmup=self.warmup,
            halve_every=self.halve_every,
            length=self.length,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Shorten a gradient that is longer than ``clip``."""
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
