"""Continual learning: how much does a learner forget along a stream, without replay?

One learner goes through the experiences of a stream, and is asked after each of them about the
test images of everything that it met. What it keeps between two experiences is counted in bytes,
and written down, so that a run that was killed goes on where its last experience ended.

Test images choose nothing: no checkpoint, no setting, no stop.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812
import torch
from omegaconf import OmegaConf

from clfed.backbones.encoder import Transform
from clfed.config import build
from clfed.data.benchmark import Benchmark
from clfed.errors import ConfigError, UnsupportedStatistics
from clfed.evaluation.callback import ContinualEvaluation
from clfed.evaluation.exam import Exam
from clfed.evaluation.unknown import auroc, fpr_at_tpr
from clfed.federated.field import open_benchmark
from clfed.jobs.checkpoint import Checkpoint, Record
from clfed.jobs.run import Run, open_run
from clfed.jobs.settings import check_continual
from clfed.learners.base import ContinualLearner
from clfed.learners.embedding import EmbeddingModule
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.learners.training import (
    BaseTraining,
    check_backbone,
    initial_backbone,
    make_learner,
)
from clfed.prototypes.rehearsal import check_classifier
from clfed.reporting.progress import Phase, progress
from clfed.scenarios.streams import Experience, Stream

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Path:
    """Run the whole experiment and return its run folder.

    Args:
        cfg: The resolved configuration.

    Raises:
        ClfedError: Anything that the user can mend.
    """
    check_continual(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    # Before the run folder: what is refused here must not cost the results of an earlier run.
    with progress() as track, track.phase("data and stream"):
        benchmark = open_benchmark(config["data"])
        stream = open_stream(config["scenario"], benchmark, cfg.seed)
        learner = new_learner(cfg, benchmark, stream)
    with open_run(cfg) as run:
        journey = _Journey(cfg, run, stream, learner)
        journey.go()
        from clfed.jobs.continual_summary import report

        report(cfg, run, benchmark, stream, journey.learner, journey.records, journey.watch)
        return run.folder.path


def open_stream(scenario: dict[str, Any], benchmark: Benchmark, seed: int) -> Stream:
    """Build the stream that a configuration names.

    Raises:
        ConfigError: The scenario is one of another job.
    """
    stream = build(scenario, benchmark=benchmark, seed=seed)
    if not isinstance(stream, Stream):
        raise ConfigError(
            "job=continual needs a scenario that makes a stream of experiences, got "
            f"{scenario.get('_target_')}.",
            remedy="Choose scenario=split, permuted, rotated, few_shot, online or power_law.",
        )
    return stream


def new_learner(cfg: DictConfig, benchmark: Benchmark, stream: Stream) -> ContinualLearner:
    """Build the configured learner on a new backbone, and refuse what does not fit together.

    Raises:
        ConfigError: Learner, backbone and data do not fit together.
    """
    parts = BaseTraining.from_config(cfg)
    if not parts.learner.get("_target_"):
        raise ConfigError(
            "job=continual needs a learner, got learner=none.",
            remedy="clfed --help lists the learners; ncm trains least.",
        )
    shape = tuple(stream.experiences[0].train.images.shape[1:])
    check_backbone(parts.backbone, shape, benchmark.name)
    backbone = initial_backbone(parts.backbone, shape, cfg.seed)
    probe = stream.experiences[0].train.images[:2]
    transform = Transform(benchmark.mean, benchmark.std)
    dim = EmbeddingModule(backbone, transform).embed_all(probe).shape[1]
    learner = make_learner(parts.learner, backbone, benchmark, dim=dim, seed=cfg.seed)
    for name, options in cfg.job.classifiers.items():
        if learner.moments is None:
            raise UnsupportedStatistics(
                f"Expected a learner with a memory for job.classifiers={name}, got "
                f"{learner.method or type(learner).__name__}, which keeps none.",
                remedy="Leave job.classifiers empty, or set learner.moments.",
            )
        check_classifier({"name": str(name), **options}, learner.moments)
    return learner


class _Ticker(L.Callback):
    """Shows how far the training of an experience is.

    Args:
        bar: Where it is shown.
    """

    EVERY = 0.2  # seconds

    def __init__(self, bar: Phase) -> None:
        self.bar, self.shown = bar, 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step, but not more often than an eye can follow."""
        now = time.monotonic()
        if now - self.shown >= self.EVERY:
            self.shown = now
            done, steps = pl_module.step_number, pl_module.length
            self.bar.update(self.bar.step, f"experience {pl_module.number}, step {done} of {steps}")


class _Journey:
    """One learner on its way through a stream."""

    def __init__(
        self, cfg: DictConfig, run: Run, stream: Stream, learner: ContinualLearner
    ) -> None:
        self.cfg, self.run, self.stream, self.learner = cfg, run, stream, learner
        self.exam = Exam(stream.tests, restricted=stream.setting == "task")
        self.options: TrainerOptions = BaseTraining.from_config(cfg).trainer
        self.records: list[Record] = []
        self.watch = self._watch()
        self.checkpoint = Checkpoint(run.folder.learner, run.config)

    def go(self) -> None:
        """Learn every experience that is not learned yet, and ask after each phase."""
        done = self._resume()
        experiences = self.stream.experiences
        with self.run.track.phase("experiences", len(experiences)) as bar:
            for experience in experiences[:done]:
                self._log(experience)
            for experience in experiences[done:]:
                text = self._learn(experience, _Ticker(bar))
                bar.update(experience.number + 1, text)

    def _learn(self, experience: Experience, ticker: _Ticker) -> str:
        first = not self.records or self.records[-1].phase != experience.phase
        if first:
            if self.watch is not None:
                self.watch.begin_experience(experience.phase, self.stream.tests[experience.phase])
            self.records.append(Record(phase=experience.phase))
        record = self.records[-1]
        if experience.number == 0 and self.stream.setting == "domain":
            record.baselines = self._untrained(experience)
        start, looked = time.perf_counter(), self._looked()
        callbacks = [ticker] if self.watch is None else [self.watch, ticker]
        record.updates += learn(self.learner, experience, self.options, callbacks=callbacks)
        record.seconds += time.perf_counter() - start - (self._looked() - looked)
        record.images += len(experience.train)
        record.losses = self.learner.mean_losses()
        record.classes = len(self.learner.classes)
        if self._last_of_phase(experience):
            if self.watch is not None:
                self.watch.end_experience(self.learner)
            self._examine(record)
        state = None if self.watch is None else self.watch.state()
        if self._last_of_phase(experience):
            self.checkpoint.write(self.learner, experience.number + 1, self.records, state)
            self._log(experience)
        return f"{record.classes} classes, {record.accuracy:.1%}"

    def _looked(self) -> float:
        """Seconds that looking during the training took so far."""
        return 0.0 if self.watch is None else self.watch.seconds

    def _last_of_phase(self, experience: Experience) -> bool:
        later = self.stream.experiences[experience.number + 1 :]
        return not later or later[0].phase != experience.phase

    def _examine(self, record: Record) -> None:
        marks = self.exam.take(self.learner, met=record.phase + 1)
        record.phases, record.accuracy = marks.phases, marks.images
        record.per_class = marks.per_class
        ask = getattr(self.learner, "ood_scores", None)
        if ask is not None and record.phase + 1 < len(self.stream.tests):
            # The learner's scores rise with doubt, those of the metrics with certainty.
            known = -torch.cat([ask(t.images) for t in self.stream.tests[: record.phase + 1]])
            unknown = -torch.cat([ask(t.images) for t in self.stream.tests[record.phase + 1 :]])
            record.unknown = {
                "auroc": auroc(known.numpy(), unknown.numpy()),
                "fpr95": fpr_at_tpr(known.numpy(), unknown.numpy()),
            }

    def _untrained(self, experience: Experience) -> list[float | None]:
        """Accuracy on every test set before any training, for forward transfer."""
        untrained = copy.deepcopy(self.learner)
        untrained.begin_experience(experience)
        return self.exam.take(untrained, met=0).phases

    def _log(self, experience: Experience) -> None:
        if not self._last_of_phase(experience):
            return
        record = next(r for r in self.records if r.phase == experience.phase)
        values = {"cl/acc/all": record.accuracy, "cl/seconds": record.seconds}
        values |= {f"cl/loss/{name}": value for name, value in record.losses.items()}
        values |= {
            f"cl/acc/experience{i}": value
            for i, value in enumerate(record.phases)
            if value is not None
        }
        values |= {f"cl/unknown/{name}": value for name, value in record.unknown.items()}
        self.run.metrics.log(record.phase + 1, values)

    def _watch(self) -> ContinualEvaluation | None:
        options = self.cfg.job.stability
        if options.every is None:
            return None
        return ContinualEvaluation(
            options.every,
            options.samples,
            tuple(options.windows),
            seed=self.cfg.seed,
            task_classes=self.stream.setting == "task",
        )

    def _resume(self) -> int:
        """Go on from a checkpoint of the same configuration; returns the experiences done."""
        found = self.checkpoint.read(self.learner) if self.cfg.job.resume else None
        if found is None:
            return 0
        self.records = found.records
        if self.watch is not None and found.watch is not None:
            self.watch.restore(found.watch)
            for record in self.records:
                self.watch.begin_experience(record.phase, self.stream.tests[record.phase])
        logger.info("going on after %s experiences", found.experiences)
        return found.experiences
