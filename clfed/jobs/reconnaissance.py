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
from dataclasses import dataclass, field
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
from clfed.federated.networks import load_network, network_record
from clfed.federated.node import briefing
from clfed.federated.rounds import RoundReport, run_rounds
from clfed.federated.wire import record_bytes
from clfed.jobs.run import Run, open_run, train_encoder
from clfed.jobs.settings import check
from clfed.learners.fine_tuning import FineTuning
from clfed.prototypes import (
    MERGES,
    Contribution,
    ContributorLedger,
    PrototypeMemory,
    read_off,
)
from clfed.reporting.progress import progress
from clfed.seeding import derive_seed, generator
from clfed.strategies import GrowingHeadFedAvg, PrototypeAveraging

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
Engine = Callable[..., None]
BASE = "base"


@dataclass
class Step:
    """What one round of one draw showed."""

    classes: int
    up: int
    down: int
    seconds: float
    accuracy: dict[str, float]


@dataclass
class Cost:
    """What one alternative took: bytes over all nodes and rounds, and seconds."""

    up: int = 0
    down: int = 0
    seconds: float = 0.0


@dataclass
class Draw:
    """What one draw of missions showed."""

    steps: list[Step] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    memory: PrototypeMemory | None = None
    exact: bool = False
    holders: int = 0
    seen_by: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)


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
                draws.append(_Reconnaissance(cfg, run, grid, opened, encoder, number).run())

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
    read_off(cfg.job.classifier, ledger.total)
    for name, options in cfg.job.classifiers.items():
        read_off(name, ledger.total, groups=ledger.groups(), **options)


def _settings(config: Mapping[str, Any], draw: int) -> str:
    seed = derive_seed(config["seed"], "draw", draw)
    return field_settings(config["data"], config["scenario"], seed)


class _Reconnaissance:
    """One draw of missions, run through every alternative."""

    def __init__(
        self, cfg: DictConfig, run: Run, grid: Grid, opened: Field, encoder: Encoder, draw: int
    ) -> None:
        self.cfg, self.run_, self.grid, self.encoder, self.number = cfg, run, grid, encoder, draw
        self.field, self.plan = opened, opened.plan
        self.result = Draw()
        with run.track.phase("embedding", 1):
            self.support = opened.embed(self.plan.support, encoder)
            self.judge = Judge(self.plan.test, opened.embed(self.plan.test, encoder))
        self.base_judge = None
        if self.plan.base_test is not None:
            self.base_judge = Judge(self.plan.base_test, opened.embed(self.plan.base_test, encoder))
        self.empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id, cfg.memory.moments)
        self.base = self._base_memory()
        self.session = f"{encoder.embedding_id[:16]}/{cfg.seed}/{draw}"

    def run(self) -> Draw:
        """Run every alternative on the same missions."""
        strategy = self._reconnoitre()
        if self._wanted(self.cfg.job.finetuned):
            self._finetune()
        self._finish(strategy)
        return self.result

    def _base_memory(self) -> PrototypeMemory:
        base = self.plan.base_support
        if base is None:
            return self.empty
        labels = names(base)
        return self.empty.observe(self.field.embed(base, self.encoder), labels)

    def _briefing(self) -> dict[str, Any]:
        job = self.cfg.job.finetuned
        settings = {
            "field": _settings(self.run_.config, self.number),
            "moments": self.cfg.memory.moments,
            "cache_dir": str(self.run_.cache_dir),
        }
        if job is not None:
            settings["finetune"] = {
                "epochs": job.epochs,
                "batch_size": job.batch_size,
                "seed": self.cfg.seed,
                "optimiser": _optimiser(job),
            }
        return briefing(settings, self.encoder)

    def _reconnoitre(self) -> PrototypeAveraging:
        """Merge prototypes round by round, and judge them against the same data pooled."""
        base = self.base
        strategy: PrototypeAveraging = build(
            self.run_.config["strategy"],
            empty=self.empty,
            merge=self.cfg.merge,
            initial=Contribution.of(BASE, 1, base) if base else None,
            briefing=self._briefing(),
            session=self.session,
            nodes=self.plan.nodes,
        )
        if self.base_judge is not None:
            self.result.stages["eval0"] = {"base": self._base_accuracy(strategy.memory)}
        self.result.stages |= {"eval1": [], "eval2": []}
        before = strategy.memory

        def after(report: RoundReport, arrays: ArrayRecord) -> None:
            nonlocal before
            if not len(strategy.memory):
                raise FederationError(
                    f"No node's statistics were accepted in round {report.round}: "
                    f"{'; '.join(strategy.last.refused.values()) or 'none were sent'}."
                )
            known = self.plan.known(report.round)
            images = self.judge.of(known)
            pooled = self._pooled(report.round)
            merged = self._accuracy(strategy.memory, images)
            alone = [
                self._accuracy(base + strategy.ledger.share(name), images)
                for name in strategy.ledger.contributors
                if name != BASE
            ]
            accuracy = {
                "merged": merged,
                "pooled": self._accuracy(pooled, images),
                "isolated": sum(alone) / self.plan.nodes,
            }
            self._local_stages(report.round, before, strategy)
            self._union_stage(report.round, strategy.memory, merged)
            self.result.exact = pooled == strategy.memory
            step = Step(len(known), report.up, report.down, report.seconds, accuracy)
            self.result.steps.append(step)
            self.run_.metrics.log(report.round, _flat(step, self.number))
            bar.update(report.round, f"{len(known)} classes, merged {merged:.1%}")
            before = strategy.memory

        with self.run_.track.phase("reconnaissance", self.plan.rounds) as bar:
            run_rounds(
                strategy,
                self.grid,
                strategy.arrays(),
                rounds=self.plan.rounds,
                timeout=self.cfg.job.timeout,
                after=after,
            )
        self._broadcast(strategy)
        self.result.memory = strategy.memory
        shares = {n: strategy.ledger.share(n) for n in strategy.ledger.contributors}
        for name, share in shares.items():
            for cls in share.classes:
                self.result.seen_by.setdefault(cls, []).append(name)
        return strategy

    def _broadcast(self, strategy: PrototypeAveraging) -> None:
        """Leave every node with the final memory, and count the nodes that hold these bytes."""
        messages = list(strategy.configure_broadcast(self.grid))
        replies = exchange(self.grid, messages, timeout=self.cfg.job.timeout)
        digest = strategy.memory.sha256()
        self.result.holders = sum(
            reply.has_content() and reply.content["status"]["sha256"] == digest for reply in replies
        )
        cost = self.result.costs["merged"] = Cost(
            sum(s.up for s in self.result.steps),
            sum(s.down for s in self.result.steps),
            sum(s.seconds for s in self.result.steps),
        )
        cost.down += sum(record_bytes(message.content) for message in messages)

    def _finetune(self) -> None:
        """Run FedAvg with a growing head on the same missions."""
        job = self.cfg.job.finetuned
        strategy = GrowingHeadFedAvg(
            briefing=self._briefing(), session=self.session, nodes=self.plan.nodes
        )
        start = FineTuning(self.encoder, (), **_optimiser(job))
        cost = self.result.costs["finetuned"] = Cost()

        def after(report: RoundReport, arrays: ArrayRecord) -> None:
            images = self.judge.of(self.plan.known(report.round))
            network = load_network(self.encoder, arrays, strategy.classes, _optimiser(job))
            right = self.judge.correct_network(network.classes, network.predict, images)
            self.result.steps[report.round - 1].accuracy["finetuned"] = fraction(right)
            name = f"{_place(self.number)}/accuracy/finetuned"
            self.run_.metrics.log(report.round, {name: fraction(right)})
            cost.up += report.up
            cost.down += report.down
            cost.seconds += report.seconds
            bar.update(report.round, f"finetuned {fraction(right):.1%}")

        with self.run_.track.phase("FedAvg, the lower bound", self.plan.rounds) as bar:
            run_rounds(
                strategy,
                self.grid,
                network_record(start),
                rounds=self.plan.rounds,
                timeout=self.cfg.job.timeout,
                after=after,
            )

    def _joint(self) -> float:
        """Train one network on all support images at once."""
        job, support = self.cfg.job.joint, self.plan.support
        learner = FineTuning(self.encoder, support.classes, **_optimiser(job))
        with self.run_.track.phase("joint training, the upper bound", 1):
            learner.fit(
                support.images,
                support.labels,
                epochs=job.epochs,
                batch_size=job.batch_size,
                rng=generator(self.cfg.seed, "joint", self.number),
            )
        images = self.judge.of(self.plan.known(self.plan.rounds))
        return fraction(self.judge.correct_network(learner.classes, learner.predict, images))

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
        if self._wanted(self.cfg.job.joint):
            final["joint"] = self._joint()

    def _wanted(self, alternative: DictConfig | None) -> bool:
        """Whether this draw runs an alternative that costs a training of its own."""
        if alternative is None:
            return False
        return alternative.draws is None or self.number < alternative.draws

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
        return read_off(self.cfg.job.classifier, memory) if len(memory) else None

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


def _optimiser(job: DictConfig) -> dict[str, float]:
    return {key: job[key] for key in ("lr", "momentum", "weight_decay")}


def _place(draw: int) -> str:
    return "fed" if draw == 0 else f"fed/draw{draw}"


def _flat(step: Step, draw: int) -> dict[str, float]:
    """Return a step's metrics by name; draws after the first get a folder of their own."""
    place = _place(draw)
    accuracy = {f"{place}/accuracy/{name}": value for name, value in step.accuracy.items()}
    sizes = {f"{place}/bytes/up": step.up, f"{place}/bytes/down": step.down}
    return {f"{place}/classes": step.classes, **sizes, **accuracy}
