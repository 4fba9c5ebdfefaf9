"""One experience of a stream through a learner: begin, train, end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from clfed.errors import InvalidEmbedding
from clfed.learners.base import Batch, ContinualLearner
from clfed.learners.optimisers import pack
from clfed.learners.options import TrainerOptions
from clfed.learners.surroundings import brisk, quiet, threads
from clfed.seeding import derive_seed

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


def learn(
    learner: ContinualLearner,
    experience: Experience,
    options: TrainerOptions,
    *,
    callbacks: Sequence[L.Callback] = (),
) -> int:
    """Let a learner go through one experience.

    An experience without images changes nothing at all.

    Args:
        learner: Changed in place.
        experience: What it meets.
        options: How to train.
        callbacks: Lightning callbacks; the fast loop calls their ``on_train_start`` and
            ``on_train_batch_end`` alone, with None as the trainer.

    Returns:
        Steps of the optimiser.

    Raises:
        ConfigError: The learner does not fit the stream.
        InvalidEmbedding: The training diverged.
    """
    learner.begin_experience(experience)
    with threads(options.threads), brisk():
        if learner.length:
            train(learner, experience, options, callbacks)
        learner.end_experience(experience)
    return learner.length


def train(
    learner: ContinualLearner,
    experience: Experience,
    options: TrainerOptions,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train a learner that has begun an experience, by the loop that ``options`` name."""
    batches = learner.batches(
        learner.training_data(experience),
        seed=derive_seed(learner.seed, "experience", experience.number),
    )
    run: Callable[..., torch.optim.Optimizer] = _fast if options.loop == "fast" else _lightning
    optimiser = run(learner, batches, options, callbacks)
    learner.optimiser_state = {} if experience.announced else pack(optimiser, learner)
    check_finite(learner, "training", "Choose a smaller learner.lr, or set learner.clip.")


def _lightning(
    learner: ContinualLearner,
    batches: IterableDataset[Batch],
    options: TrainerOptions,
    callbacks: Sequence[L.Callback],
) -> torch.optim.Optimizer:
    trainer = fit(learner, batches, options, callbacks, max_steps=learner.length)
    optimiser: torch.optim.Optimizer = trainer.optimizers[0]
    return optimiser


def fit(
    module: L.LightningModule,
    batches: IterableDataset[Any],
    options: TrainerOptions,
    callbacks: Sequence[L.Callback],
    *,
    max_steps: int = -1,
    max_epochs: int = -1,
) -> L.Trainer:
    """Train a module with Lightning and nothing around it, and return who trained it.

    Args:
        module: Trained in place.
        batches: Whole batches.
        options: Accelerator and precision.
        callbacks: Lightning callbacks.
        max_steps: Steps of the optimiser; -1: as many as the passes hold.
        max_epochs: Passes; -1: as many as the steps take.
    """
    with quiet():
        # A new Trainer each time: a used one trains nothing.
        trainer = L.Trainer(
            max_steps=max_steps,
            max_epochs=max_epochs,
            accelerator=options.accelerator,
            devices=1,
            precision="bf16-mixed" if options.resolved_precision() != "32" else "32-true",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        # No DataLoader: the batches are whole already, and it would draw from the ambient state.
        trainer.fit(module, batches)
    return trainer


def _fast(
    learner: ContinualLearner,
    batches: IterableDataset[Batch],
    options: TrainerOptions,
    callbacks: Sequence[L.Callback],
) -> torch.optim.Optimizer:
    """The same hooks in the same order, without what Lightning adds around them."""
    configured: dict[str, Any] = learner.configure_optimizers()
    optimiser: torch.optim.Optimizer = configured["optimizer"]
    scheduler = configured.get("lr_scheduler", {}).get("scheduler")
    mixed = options.resolved_precision() != "32"
    learner.train()
    for callback in callbacks:
        callback.on_train_start(None, learner)  # type: ignore[arg-type]
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss: Tensor = learner.training_step(batch, number)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        learner.on_after_backward()
        learner.on_before_optimizer_step(optimiser)
        optimiser.step()
        if scheduler is not None:
            scheduler.step()
        learner.on_train_batch_end(None, batch, number)
        for callback in callbacks:
            callback.on_train_batch_end(None, learner, None, batch, number)  # type: ignore[arg-type]
    return optimiser


def check_finite(learner: ContinualLearner, what: str, remedy: str) -> None:
    """Refuse weights that are no numbers any more.

    Args:
        learner: Whose weights.
        what: What was done to them.
        remedy: What to do about it.

    Raises:
        InvalidEmbedding: There are such.
    """
    if not all(bool(torch.isfinite(weights).all()) for weights in learner.parameters()):
        raise InvalidEmbedding(
            f"The {what} diverged: weights are no longer finite numbers.", remedy=remedy
        )
