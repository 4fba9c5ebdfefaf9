"""One request through an unlearner: bind, prepare, train or solve, finalize, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lightning as L  # noqa: N812

from clfed.learners import state
from clfed.learners.base import ContinualLearner
from clfed.learners.fitting import check_finite, fit
from clfed.learners.options import TrainerOptions
from clfed.learners.surroundings import brisk, threads
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.masks import Saliency, SoftThreshold
from clfed.unlearning.report import Report


class StopRule(L.Callback):
    """Ends the training once the method says so.

    Args:
        context: Behind the method's guard.

    Attributes:
        fired: Whether it did.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.fired = context, False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask the method after a pass, unless it said so already."""
        self.ask(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the method after a step, where it is to be asked so often."""
        if pl_module.stops_after == "step":
            self.ask(trainer, pl_module)

    def ask(self, trainer: Any, unlearner: Unlearner) -> None:
        """Stop where the method says so, once."""
        if not self.fired and unlearner.should_stop(self.context):
            self.fired, trainer.should_stop = True, True


def forget(
    unlearner: Unlearner,
    context: Context,
    options: TrainerOptions,
    *,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[ContinualLearner, Report]:
    """Let a model forget.

    An empty forget set changes nothing at all.

    Args:
        unlearner: Holds the student, a copy of ``context.learner``, which stays as it is.
        context: The request and the data; the unlearner sees it through its own guard.
        options: Threads, precision and accelerator.
        callbacks: Further Lightning callbacks.

    Returns:
        The model that has forgotten, in eval mode, and the account.

    Raises:
        ConfigError: Model, data and method do not fit together.
        UndeclaredData: The method looked at what it did not declare.
        InvalidEmbedding: The unlearning diverged.
    """
    start = time.perf_counter()
    before = state.sha256(context.learner)
    seen = context.behind(unlearner.needs)
    rule = StopRule(seen)
    if len(context.forget):
        with threads(options.threads), brisk():
            unlearner.bind(seen)
            masks = _masks(unlearner, seen)
            unlearner.prepare(seen)
            if unlearner.schedule == "none":
                unlearner.solve(seen)
            else:
                _train(unlearner, options, [*masks, rule, *callbacks])
            for mask in masks:
                if isinstance(mask, Saliency):
                    mask.restore(unlearner)
            unlearner.finalize(seen)
            remedy = "Choose a smaller unlearner.lr, or fewer unlearner.epochs."
            check_finite(unlearner.learner, "unlearning", remedy)
    # Of what was trained here nothing but the weights goes on.
    unlearner.learner.zero_grad(set_to_none=True)
    model = unlearner.learner.eval()
    return model, Report(
        unlearner=unlearner.method or type(unlearner).__name__,
        request=context.request.id,
        exact=unlearner.exact,
        scope=unlearner.scope,
        touched=seen.guard.counts(),
        steps=unlearner.step_number,
        seconds=time.perf_counter() - start,
        before=before,
        after=state.sha256(model),
        stopped=rule.fired,
        lineage=unlearner.lineage,
    )


def _masks(unlearner: Unlearner, context: Context) -> list[L.Callback]:
    found: list[L.Callback] = []
    if unlearner.mask_options is not None:
        mask = Saliency(**unlearner.mask_options)
        mask.measure(unlearner, context)
        found.append(mask)
    if unlearner.proximal is not None:
        soft = SoftThreshold(unlearner.proximal)
        soft.measure(unlearner)
        found.append(soft)
    return found


def _train(unlearner: Unlearner, options: TrainerOptions, callbacks: Sequence[L.Callback]) -> None:
    if unlearner.batches is not None and unlearner.epochs and unlearner.batches.steps:
        fit(unlearner, unlearner.batches, options, callbacks, max_epochs=unlearner.epochs)
