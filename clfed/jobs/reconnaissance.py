"""Federated reconnaissance: do the merged prototypes separate all classes that any node has seen?

The experiment of Hendryx et al. 2021 (arXiv 2109.00150), beside the alternatives that a reader
needs to judge it:

=========== ===================================================================================
merged      nearest class mean over the table that the federation merged
pooled      the same classifier over all support images in one place
isolated    each node's own statistics alone, averaged over nodes
finetuned   FedAvg with a growing head on the same missions (lower bound)
joint       one network trained on all support images at once, after the last round
=========== ===================================================================================

Every accuracy is over test images of all field classes known so far, answered over the union of
classes. Test images are never sent anywhere and choose nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from omegaconf import OmegaConf

from clfed.backbones import Encoder
from clfed.config import build
from clfed.errors import FederationError
from clfed.evaluation.judge import Judge, fraction
from clfed.federated.field import Field, field_settings, names, open_field
from clfed.federated.grid import exchange
from clfed.federated.node import briefing
from clfed.federated.rounds import RoundReport, run_rounds
from clfed.federated.wire import record_bytes
from clfed.jobs.alternatives import finetuned, joint, wanted
from clfed.jobs.draw import Cost, Draw, Setting, Step
from clfed.jobs.run import Run, open_run, train_encoder
from clfed.jobs.settings import answering, check
from clfed.prototypes import (
    MERGES,
    Contribution,
    ContributorLedger,
    PrototypeMemory,
    read_off,
)
from clfed.reporting.progress import progress
from clfed.seeding import derive_seed
from clfed.strategies import PrototypeAveraging

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
Engine = Callable[..., None]
BASE = "base"


def run(cfg: DictConfig, engine: Engine | None = None) -> Path:
    """Run the whole experiment and return its run folder.

    Args:
        cfg: The resolved configuration.
        engine: Carries messages, called as ``engine(serve, nodes=N)``; the configured one if
            omitted.

    Raises:
        ClfedError: Anything that the user can mend.
    """
    check(cfg)
    rehearse(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    # Before the run folder: what the data refuse must not cost the results of an earlier run.
    with progress() as track, track.phase("data and missions"):
        first = open_field(_settings(config, 0))
    with open_run(cfg) as run:
        encoder, training = train_encoder(cfg, run)
        draws: list[Draw] = []

        def serve(grid: Grid) -> None:
            for number in range(cfg.job.draws):
                # Opened when its turn comes, so that the nodes find the same field in the cache.
                opened = open_field(_settings(config, number))
                setting = _setting(cfg, run, grid, opened, encoder, number)
                draws.append(_Reconnaissance(setting).run())

        start = time.perf_counter()
        carry = engine if engine is not None else partial(build, run.config["engine"])
        carry(serve=serve, nodes=first.plan.nodes)
        from clfed.jobs.summary import report

        seconds = time.perf_counter() - start
        report(cfg, run, first, encoder, draws, training=training, seconds=seconds)
        return run.folder.path


def rehearse(cfg: DictConfig) -> None:
    """Refuse what would fail only after the training, on a memory of two classes.

    Raises:
        ConfigError: A classifier has no such option.
        UnsupportedStatistics: A classifier needs second moments that ``memory.moments`` leaves
            out, or the merge rule cannot handle those that it keeps.
    """
    ledger = ContributorLedger(2, "rehearsal", cfg.memory.moments)
    seen = ledger.total.observe(torch.eye(4)[:, :2], ["a", "b", "a", "b"])
    ledger.receive(Contribution.of("nobody", 1, seen))
    MERGES[cfg.merge](seen, [seen])
    name, options = answering(cfg)
    read_off(name, ledger.total, **options)
    for name, options in cfg.job.classifiers.items():
        read_off(name, ledger.total, groups=ledger.groups(), **options)


def _settings(config: Mapping[str, Any], draw: int) -> str:
    seed = derive_seed(config["seed"], "draw", draw)
    return field_settings(config["data"], config["scenario"], seed)


def _setting(
    cfg: DictConfig, run: Run, grid: Grid, opened: Field, encoder: Encoder, number: int
) -> Setting:
    with run.track.phase("embedding", 1):
        opened.embed(opened.plan.support, encoder)
        judge = Judge(opened.plan.test, opened.embed(opened.plan.test, encoder))
    settings = {
        "field": _settings(run.config, number),
        "moments": cfg.memory.moments,
        "cache_dir": str(run.cache_dir),
    }
    session = f"{encoder.embedding_id[:16]}/{cfg.seed}/{number}"
    records = briefing(settings, encoder)
    return Setting(cfg, run, grid, opened, encoder, judge, number, session, records)


class _Reconnaissance:
    """One draw of missions, run through every alternative."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.cfg, self.plan = setting, setting.cfg, setting.plan
        self.judge, self.result = setting.judge, Draw()
        opened, encoder = setting.field, setting.encoder
        self.support = opened.embed(self.plan.support, encoder)
        self.empty = PrototypeMemory.empty(
            encoder.dim, encoder.embedding_id, self.cfg.memory.moments
        )
        self.base, self.base_judge = self.empty, None
        if self.plan.base_support is not None and self.plan.base_test is not None:
            base, test = self.plan.base_support, self.plan.base_test
            self.base = self.empty.observe(opened.embed(base, encoder), names(base))
            self.base_judge = Judge(test, opened.embed(test, encoder))

    def run(self) -> Draw:
        """Run every alternative on the same missions."""
        strategy = self._reconnoitre()
        if wanted(self.cfg.job.finetuned, self.setting.number):
            accuracies, self.result.costs["finetuned"] = finetuned(self.setting)
            for step, accuracy in zip(self.result.steps, accuracies, strict=True):
                step.accuracy["finetuned"] = accuracy
        self._finish(strategy)
        return self.result

    def _reconnoitre(self) -> PrototypeAveraging:
        """Merge prototypes round by round, and judge them against the same data pooled."""
        setting = self.setting
        strategy: PrototypeAveraging = build(
            setting.run.config["strategy"],
            empty=self.empty,
            merge=self.cfg.merge,
            initial=Contribution.of(BASE, 1, self.base) if self.base else None,
            briefing=setting.briefing,
            session=setting.session,
            nodes=self.plan.nodes,
        )
        if self.base_judge is not None:
            self.result.stages["eval0"] = {"base": self._base_accuracy(strategy.memory)}
        self.result.stages |= {"eval1": [], "eval2": []}
        before = strategy.memory

        def after(report: RoundReport, arrays: ArrayRecord) -> None:
            nonlocal before
            step = self._judge_round(report, before, strategy)
            text = f"{step.classes} classes, merged {step.accuracy['merged']:.1%}"
            bar.update(report.round, text)
            before = strategy.memory

        with setting.run.track.phase("reconnaissance", self.plan.rounds) as bar:
            run_rounds(
                strategy,
                setting.grid,
                strategy.arrays(),
                rounds=self.plan.rounds,
                timeout=self.cfg.job.timeout,
                after=after,
            )
        self._broadcast(strategy)
        self.result.memory = strategy.memory
        for name in strategy.ledger.contributors:
            for cls in strategy.ledger.share(name).classes:
                self.result.seen_by.setdefault(cls, []).append(name)
        return strategy

    def _judge_round(
        self, report: RoundReport, before: PrototypeMemory, strategy: PrototypeAveraging
    ) -> Step:
        if not len(strategy.memory):
            raise FederationError(
                f"No node's statistics were accepted in round {report.round}: "
                f"{'; '.join(strategy.last.refused.values()) or 'none were sent'}."
            )
        known = self.plan.known(report.round)
        images = self.judge.of(known)
        pooled = self._pooled(report.round)
        alone = [
            self._accuracy(self.base + strategy.ledger.share(name), images)
            for name in strategy.ledger.contributors
            if name != BASE
        ]
        accuracy = {
            "merged": self._accuracy(strategy.memory, images),
            "pooled": self._accuracy(pooled, images),
            "isolated": sum(alone) / self.plan.nodes,
        }
        self._local_stages(report.round, before, strategy)
        self._union_stage(report.round, strategy.memory, accuracy["merged"])
        self.result.exact &= pooled == strategy.memory
        step = Step(len(known), report.up, report.down, report.seconds, accuracy)
        self.result.steps.append(step)
        self.setting.log(
            report.round,
            {
                "classes": step.classes,
                "bytes/up": step.up,
                "bytes/down": step.down,
                **{f"accuracy/{name}": value for name, value in accuracy.items()},
            },
        )
        return step

    def _broadcast(self, strategy: PrototypeAveraging) -> None:
        """Leave every node with the final memory, and count the nodes that hold these bytes."""
        grid = self.setting.grid
        messages = list(strategy.configure_broadcast(grid))
        replies = exchange(grid, messages, timeout=self.cfg.job.timeout)
        digest = strategy.memory.sha256()
        self.result.holders = sum(
            reply.has_content() and reply.content["status"]["sha256"] == digest for reply in replies
        )
        steps = self.result.steps
        self.result.costs["merged"] = Cost(
            up=sum(step.up for step in steps),
            down=sum(step.down for step in steps)
            + sum(record_bytes(message.content) for message in messages),
            seconds=sum(step.seconds for step in steps),
        )

    def _finish(self, strategy: PrototypeAveraging) -> None:
        """Judge every configured classifier on the final memory."""
        final = self.result.accuracy
        final |= self.result.steps[-1].accuracy
        images = self.judge.of(self.plan.known(self.plan.rounds))
        groups = strategy.ledger.groups()
        for name, options in self.cfg.job.classifiers.items():
            if name == "fedcof" and strategy.memory != strategy.ledger.total:
                logger.warning("fedcof is left out: merge=%s has no groups.", self.cfg.merge)
                continue
            classifier = read_off(name, strategy.memory, groups=groups, **options)
            final[name] = fraction(self.judge.correct(classifier, images))
        if wanted(self.cfg.job.joint, self.setting.number):
            final["joint"] = joint(self.setting)

    def _pooled(self, round_: int) -> PrototypeMemory:
        """The memory of everything met so far, observed in one place and at once."""
        met = self.plan.met(round_)
        return self.base + self.empty.observe(self.support[met], names(self.plan.support, met))

    def _accuracy(self, memory: PrototypeMemory, images: Any) -> float:
        return fraction(self.judge.correct(self._classifier(memory), images))

    def _base_accuracy(self, memory: PrototypeMemory) -> float:
        judge = self.base_judge
        assert judge is not None
        images = judge.of(judge.images.classes)
        return fraction(judge.correct(self._classifier(memory), images))

    def _classifier(self, memory: PrototypeMemory) -> Any:
        name, options = answering(self.cfg)
        return read_off(name, memory, **options) if len(memory) else None

    def _local_stages(
        self, round_: int, before: PrototypeMemory, strategy: PrototypeAveraging
    ) -> None:
        """Eval-1: each node after its mission, before the merge."""
        previous = self.plan.known(round_ - 1)
        for name, delta in strategy.last.deltas.items():
            classifier = self._classifier(before + delta)
            parts = {}
            if self.base_judge is not None:
                parts["base"] = self._base_accuracy(before + delta)
            for part, classes in (("previous", previous), ("mission", delta.classes)):
                if classes:
                    right = self.judge.correct(classifier, self.judge.of(classes))
                    parts[part] = fraction(right)
            parts["mean"] = sum(parts.values()) / max(len(parts), 1)
            self.result.stages["eval1"].append({"step": round_, "node": name, **parts})

    def _union_stage(self, round_: int, memory: PrototypeMemory, field_accuracy: float) -> None:
        """Eval-2: the merged table, base and field classes apart, one label space."""
        entry: dict[str, Any] = {"step": round_, "field": field_accuracy}
        if self.base_judge is not None:
            entry["base"] = self._base_accuracy(memory)
        self.result.stages["eval2"].append(entry)
