"""Unlearning: is it as if the model had never seen the forget set, and what did that cost?

Models are trained on everything, an unlearner makes them forget, and the result is compared with
models that were trained, by the same recipe, without what was to be forgotten. Test images choose
nothing: no stop, no step, no setting.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.evaluation.evidence import Sheet
from clfed.jobs.run import open_run
from clfed.jobs.settings import check_unlearning
from clfed.jobs.unlearning_exam import Examiner
from clfed.jobs.unlearning_stage import Stage, of_classes
from clfed.learners.base import ContinualLearner
from clfed.reporting.progress import progress
from clfed.unlearning.report import Report
from clfed.unlearning.requests import Request
from clfed.unlearning.running import forget

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True, eq=False)
class Outcome:
    """One request through one unlearner.

    Attributes:
        request: What was asked.
        gone: ``(M,)`` int64 ids that went with it.
        original_seed: Of the model at the start of the sequence.
        unlearning_seed: Of the unlearner.
        before: What the model said that it was given.
        after: The model that has forgotten.
        report: The unlearner's account, its seconds without those of looking.
        evidence: Measures by name.
        sheet: What ``after`` answered.
        trace: Accuracies along the run.
        earlier: Accuracy on what earlier requests made go, None for the first.
    """

    request: Request
    gone: Tensor
    original_seed: int
    unlearning_seed: int
    before: Sheet
    after: ContinualLearner
    report: Report
    evidence: dict[str, float]
    sheet: Sheet
    trace: list[dict[str, float]]
    earlier: float | None


def run(cfg: DictConfig) -> Path:
    """Run the whole experiment and return its run folder.

    Args:
        cfg: The resolved configuration.

    Raises:
        ClfedError: Anything that the user can mend.
    """
    check_unlearning(cfg)
    # Before the run folder: what is refused here must not cost the results of an earlier run.
    with progress() as track:
        stage = Stage(cfg, track)
        stage.check()
    with open_run(cfg) as run:
        stage.track = run.track
        exam = Examiner(stage)
        outcomes = play(stage, exam)
        from clfed.jobs.unlearning_summary import report

        report(cfg, run, exam, outcomes)
        return run.folder.path


def play(stage: Stage, exam: Examiner) -> list[Outcome]:
    """Train what is missing, then let every model go through all requests.

    Args:
        stage: Data and models.
        exam: Who asks the models.

    Returns:
        Outcomes in the order: sequences one after another, requests within; the first sequence
        is that of the first seeds.
    """
    seeds = stage.seeds
    with stage.track.phase("originals", len(seeds["original"])) as bar:
        for index, seed in enumerate(seeds["original"], 1):
            bar.update(index, f"{stage.start(seed)[1]:.1f} s of training")
    total = len(seeds["oracle"]) * len(stage.requests)
    with stage.track.phase("retrained oracles", total) as bar:
        for index in range(total):
            number, which = divmod(index, len(seeds["oracle"]))
            seconds = stage.oracle(number, seeds["oracle"][which])[1]
            bar.update(index + 1, f"{seconds:.1f} s of training")
    first = (seeds["original"][0], seeds["unlearning"][0])
    pairs = [first]
    pairs += [(seed, first[1]) for seed in seeds["original"][1:]]
    pairs += [(first[0], seed) for seed in seeds["unlearning"][1:]]
    outcomes: list[Outcome] = []
    with stage.track.phase("unlearning", len(pairs) * len(stage.requests)) as bar:
        for original, unlearning in pairs:
            model = stage.start(original)[0]
            for number in range(len(stage.requests)):
                outcome = _forget(exam, model, number, original, unlearning, look=not outcomes)
                outcomes.append(outcome)
                model = outcome.after
                told = f"{outcome.request.id}: {outcome.report.seconds:.2f} s"
                bar.update(len(outcomes), told)
    return outcomes


def _forget(
    exam: Examiner,
    model: ContinualLearner,
    number: int,
    original: int,
    seed: int,
    *,
    look: bool,
) -> Outcome:
    stage = exam.stage
    around = stage.context(model, number, seed, original)
    trace = Trace(stage, number)
    made = stage.unlearner(model, seed)
    if look or len(stage.requests) > 1:
        trace.look(stage.reading(model), 0)
    after, account = forget(
        made, around, stage.recipe.parts.trainer, callbacks=[trace] if look else []
    )
    if look or len(stage.requests) > 1:
        trace.look(after, account.steps)
    before = exam.before(model, number, original, seed)
    sheet = exam.sheet(after, number)
    earlier = None
    if number:
        past = stage.part(torch.cat(stage.gone[:number]))
        earlier = _accuracy(after, past)
    measures = exam.evidence(sheet, before, number)
    seconds = max(account.seconds - trace.seconds, 0.0) if look else account.seconds
    return Outcome(
        request=around.request,
        gone=stage.gone[number],
        original_seed=original,
        unlearning_seed=seed,
        before=before,
        after=after,
        report=replace(account, seconds=seconds),
        evidence=measures,
        sheet=sheet,
        trace=trace.points,
        earlier=earlier,
    )


class Trace(L.Callback):
    """Accuracies after each pass, on at most so many images of each kind.

    They are for a picture; nothing is chosen by them.

    Args:
        stage: Whose data.
        number: Of the request.

    Attributes:
        points: ``step`` and accuracies by name.
        seconds: Time of the looks during training.
    """

    MOST = 1000

    def __init__(self, stage: Stage, number: int) -> None:
        went = stage.closed_classes(number)
        self.parts = {
            "forget": _first(stage.part(stage.gone[number]), self.MOST),
            "retain": _first(stage.staying(number), self.MOST),
            "test": _first(of_classes(stage.holdings.test, went, inside=False), self.MOST),
        }
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the student."""
        start = time.perf_counter()
        self.look(pl_module.learner, pl_module.step_number)
        self.seconds += time.perf_counter() - start

    def look(self, learner: ContinualLearner, step: int) -> None:
        """Note the accuracies of a model; a second look at a step replaces the first."""
        if self.points and self.points[-1]["step"] == step and step:
            self.points.pop()
        found = {name: _accuracy(learner, part) for name, part in self.parts.items()}
        self.points.append({"step": step, **found})


def _accuracy(learner: ContinualLearner, images: ImageSet) -> float:
    if not len(images):
        return 0.0
    said = learner.scores_of(images.images, closed=False).argmax(1)
    return float((said == images.labels).double().mean())


def _first(images: ImageSet, most: int) -> ImageSet:
    """Return at most so many images, evenly spread over the set."""
    if len(images) <= most:
        return images
    return images.subset(torch.linspace(0, len(images) - 1, most).long())


def sequences(outcomes: Sequence[Outcome], requests: int) -> list[Sequence[Outcome]]:
    """Divide outcomes into the sequences that they came in."""
    return [outcomes[start : start + requests] for start in range(0, len(outcomes), requests)]
