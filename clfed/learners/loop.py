"""The training loop of an embedding: Lightning's, with a look at the validation classes."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clfed.backbones import Encoder
from clfed.data.benchmark import ImageSet
from clfed.errors import EncoderError, InvalidEmbedding
from clfed.learners.base import Batch, ContinualLearner
from clfed.learners.episodes import with_rotations
from clfed.learners.options import Progress, TrainerOptions, TrainingSummary
from clfed.learners.protonet import squared_distance_logits
from clfed.learners.surroundings import quiet, threads
from clfed.scenarios.base_shares import validation_split

log = logging.getLogger(__name__)


def fit(
    learner: ContinualLearner,
    base: ImageSet,
    validation: ImageSet,
    options: TrainerOptions,
    *,
    seed: int,
    checkpoint: Path,
    encode: Callable[[nn.Module], Encoder],
    progress: Progress,
) -> tuple[Encoder, TrainingSummary]:
    """Train a learner and return the best encoder of its validation curve.

    Args:
        learner: Changed in place.
        base: What it learns from.
        validation: Classes that choose the step; without any, the last step is taken.
        options: How to train.
        seed: Decides episodes and the validation split.
        checkpoint: File that a killed training goes on from.
        encode: Freezes a backbone.
        progress: Called after every step.

    Raises:
        NotEnoughData: Too few base classes or images.
        InvalidEmbedding: The training diverged.
    """
    start = _steps_done(checkpoint)
    batches = learner.batches(base, seed=seed, start=start)
    if learner.rotations:  # as many ways to be wrong as in training
        validation = with_rotations(validation)
    support = validation_split(validation, options.validation_shots, seed)
    watch = _Watch(
        learner,
        validation=validation,
        support=support,
        options=options,
        checkpoint=checkpoint,
        encode=encode,
        progress=progress,
    )
    with threads(options.threads), quiet():
        trainer = L.Trainer(
            max_steps=learner.length,
            max_epochs=-1,
            accelerator=options.accelerator,
            devices=1,
            precision="bf16-mixed" if options.resolved_precision() != "32" else "32-true",
            callbacks=[watch],
            default_root_dir=checkpoint.parent,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        # Its own generator: a loader without one draws from the ambient state.
        loader = DataLoader(batches, batch_size=None, generator=torch.Generator())
        trainer.fit(learner, loader, ckpt_path=checkpoint if start else None)
    if watch.best is None or trainer.global_step < learner.length:
        raise EncoderError(
            f"The training was stopped at step {trainer.global_step} of {learner.length}.",
            remedy="Run the command again; it goes on from its last checkpoint.",
        )
    return watch.best, TrainingSummary(
        steps=learner.length,
        best_step=watch.best_step,
        validation=watch.curve,
        precision=options.resolved_precision(),
        seconds=watch.seconds(),
    )


class _Watch(L.Callback):
    """Averages the weights, looks at the validation classes, keeps the best, writes checkpoints."""

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        validation: ImageSet,
        support: Tensor,
        options: TrainerOptions,
        checkpoint: Path,
        encode: Callable[[nn.Module], Encoder],
        progress: Progress,
    ) -> None:
        self.learner, self.validation, self.support = learner, validation, support
        self.options, self.checkpoint = options, checkpoint
        self.encode, self.progress = encode, progress
        self.average = copy.deepcopy(learner.backbone) if learner.ema else learner.backbone
        self.best: Encoder | None = None
        self.best_step = 0
        self.curve: list[list[float]] = []
        self._before, self._begin = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Wall time so far, with that of an earlier part of a killed training."""
        return self._before + time.monotonic() - self._begin

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average beside the weights, on whatever device."""
        self.average.to(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Do what is due after a step."""
        step, total = trainer.global_step, self.learner.length
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise InvalidEmbedding(
                f"The training diverged: the loss of step {step} is {loss}.",
                remedy="Set a smaller learner.lr.",
            )
        if self.learner.ema:
            # Early on, the average is over what there is, not over the initial weights.
            decay = min(self.learner.ema, (step + 1) / (step + 10))
            average_weights(self.average, self.learner.backbone, decay)
        if step == total or (step % self.options.validate_every == 0 and len(self.validation)):
            self.look(step)
        accuracy = f", validation {self.curve[-1][1]:.3f}" if self.curve else ""
        self.progress(step, total, f"loss {loss:.3f}{accuracy}")
        every = self.options.resume_every
        if every and step % every == 0 and step < total:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint whole or not at all; the training itself can do without it."""
        partial = self.checkpoint.with_suffix(".partial")
        try:
            trainer.save_checkpoint(partial)
            partial.replace(self.checkpoint)
        except (OSError, RuntimeError) as error:
            log.warning("No checkpoint: a killed training would start anew. %s", error)
            partial.unlink(missing_ok=True)

    def look(self, step: int) -> None:
        """Freeze the present weights, judge them, and keep them if they are the best so far."""
        encoder = self.encode(self.average)
        accuracy = 0.0
        if len(self.validation):
            embeddings = encoder.embed(self.validation.images)
            accuracy = nearest_mean_accuracy(embeddings, self.validation.labels, self.support)
            self.curve.append([step, accuracy])
        # The later of two equals has seen more.
        if self.best is None or accuracy >= max(past for _, past in self.curve or [[0, 0.0]]):
            self.best, self.best_step = encoder, step

    def state_dict(self) -> dict[str, Any]:
        """Everything that a killed training needs beside what Lightning keeps."""
        return {
            "average": self.average.state_dict() if self.learner.ema else {},
            "best": torch.frombuffer(bytearray(self.best.to_bytes()), dtype=torch.uint8)
            if self.best
            else None,
            "best_step": self.best_step,
            "curve": self.curve,
            "seconds": self.seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if self.learner.ema:
            self.average.load_state_dict(state_dict["average"])
        if state_dict["best"] is not None:
            self.best = Encoder.from_bytes(state_dict["best"].numpy().tobytes())
        self.best_step, self.curve = state_dict["best_step"], state_dict["curve"]
        self._before = state_dict["seconds"]


@torch.no_grad()
def average_weights(average: nn.Module, network: nn.Module, decay: float) -> None:
    r"""Move a running average: :math:`\bar w \leftarrow d \bar w + (1 - d) w`, buffers included.

    Args:
        average: Changed in place.
        network: Of the same architecture.
        decay: :math:`d`; counters among the buffers are copied.
    """
    old, new = average.state_dict(), network.state_dict()
    moving = [name for name, tensor in new.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([old[name] for name in moving], [new[name] for name in moving], 1 - decay)
    for name in new.keys() - set(moving):
        old[name].copy_(new[name])


def nearest_mean_accuracy(embeddings: Tensor, labels: Tensor, support: Tensor) -> float:
    """Return the fraction of queries whose nearest class mean is right.

    Args:
        embeddings: ``(N, D)``.
        labels: ``(N,)`` int64, each class from 0 with one support image at least.
        support: ``(N,)`` bool, the images that make the means; the others are the queries.
    """
    members = labels[support]
    counts = torch.bincount(members)
    sums = torch.zeros(len(counts), embeddings.shape[1], dtype=torch.float64)
    sums.index_add_(0, members, embeddings[support].double())
    logits = squared_distance_logits(embeddings[~support].double(), sums / counts[:, None])
    return float((logits.argmax(1) == labels[~support]).double().mean())


def _steps_done(checkpoint: Path) -> int:
    """Return the step of a checkpoint, 0 without one; a damaged one is reported and removed."""
    if not checkpoint.is_file():
        return 0
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:
        log.warning("The checkpoint %s is damaged, the training starts anew: %s", checkpoint, error)
        checkpoint.unlink()
        return 0
