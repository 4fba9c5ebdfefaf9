"""One federated method on the missions of one draw, measured like every other one.

After each mission, or every ``job.every`` rounds, the method is asked about test images of all
classes that any node has met by then, over the union of classes (``union``); and about those that
are like what each node has met itself (``own``). Where every node has a model of its own, both are
over the answers of all nodes.
Forgetting is that of :func:`clfed.evaluation.continual.forgetting` over the classes that became
known with each mission. Test images are never sent anywhere and choose nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from omegaconf import OmegaConf
from torch import Tensor

from clfed.backbones import Encoder
from clfed.config import build
from clfed.errors import FederationError
from clfed.evaluation.judge import Judge, fraction
from clfed.federated import records
from clfed.federated.field import Field, field_settings, open_field
from clfed.federated.grid import exchange
from clfed.federated.node import briefing
from clfed.federated.rounds import RoundReport, run_rounds
from clfed.jobs.method import make_method, method_name
from clfed.jobs.protection import Protection, public_images, rehearse
from clfed.jobs.run import Run, open_run, train_encoder
from clfed.jobs.settings import check_federated
from clfed.prototypes import PrototypeMemory
from clfed.reporting.progress import progress
from clfed.seeding import derive_seed
from clfed.strategies.prototype_averaging import PrototypeAveraging
from clfed.strategies.training import TrainingStrategy

if TYPE_CHECKING:
    from omegaconf import DictConfig

Engine = Callable[..., None]


@dataclass
class Look:
    """What one look at a method showed, and what it took since the look before.

    Attributes:
        round: The round after which it was made.
        ends_mission: Whether that was the last round on its mission.
        classes: Classes known by then.
        union: Accuracy on test images of all of them.
        own: Accuracy on the images that are like each node's own.
        by_mission: Accuracy on the classes that became known with each mission so far; None where
            a mission brought none.
        up: Payload bytes from nodes.
        down: Payload bytes to nodes.
        seconds: Wall-clock time.
        node_seconds: Time that nodes worked.
        peak: Largest memory that one node's work took, bytes.
        epsilon: What all messages so far have spent; None: nothing bounds it.
    """

    round: int = 0
    ends_mission: bool = False
    classes: int = 0
    union: float = 0.0
    own: float = 0.0
    by_mission: list[float | None] = field(default_factory=list)
    up: int = 0
    down: int = 0
    seconds: float = 0.0
    node_seconds: float = 0.0
    peak: int | None = None
    epsilon: float | None = None

    def add(self, report: RoundReport) -> None:
        """Add what one round took."""
        self.round = report.round
        self.up += report.up
        self.down += report.down
        self.seconds += report.seconds
        self.node_seconds += report.node_seconds
        self.peak = max((p for p in (self.peak, report.peak) if p is not None), default=None)


def run(cfg: DictConfig, engine: Engine | None = None) -> Path:
    """Run one method and return its run folder.

    Args:
        cfg: The resolved configuration.
        engine: Carries messages, called as ``engine(serve, nodes=N)``; the configured one if
            omitted.

    Raises:
        ClfedError: Anything that the user can mend.
    """
    check_federated(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    settings = field_settings(
        config["data"], config["scenario"], derive_seed(config["seed"], "draw", 0)
    )
    # Before the run folder: what the data refuse must not cost the results of an earlier run.
    with progress() as track, track.phase("data and missions"):
        opened = open_field(settings)
        rehearse(cfg, opened)
    with open_run(cfg) as run:
        encoder, training = train_encoder(cfg, run)
        found: list[Federation] = []

        def serve(grid: Grid) -> None:
            federation = Federation(cfg, run, grid, opened, encoder, settings)
            federation.play()
            found.append(federation)

        start = time.perf_counter()
        carry = engine if engine is not None else partial(build, run.config["engine"])
        carry(serve=serve, nodes=opened.plan.nodes)
        from clfed.jobs.federated_summary import report

        seconds = time.perf_counter() - start
        report(cfg, run, opened, encoder, found[0], training=training, seconds=seconds)
        return run.folder.path


class Federation:
    """A method on the missions of a field.

    Attributes:
        strategy: The method.
        protection: What its messages reveal.
        looks: What it showed, look by look.
        state: The method's state as it was sent last.
    """

    def __init__(
        self,
        cfg: DictConfig,
        run: Run,
        grid: Grid,
        opened: Field,
        encoder: Encoder,
        settings: str,
    ) -> None:
        self.cfg, self.run, self.grid, self.plan = cfg, run, grid, opened.plan
        session = f"{encoder.embedding_id[:16]}/{cfg.seed}/federated"
        self.protection = Protection(
            cfg,
            opened,
            PrototypeMemory.empty(encoder.dim, encoder.embedding_id, cfg.memory.moments),
            session=session,
            public=lambda: encoder.embed(public_images(opened)),
        )
        node_settings = {
            "field": settings,
            "moments": cfg.memory.moments,
            "cache_dir": str(run.cache_dir),
            **self.protection.node_settings(),
        }
        self.strategy = make_method(
            run.config,
            encoder,
            briefing=briefing(node_settings, encoder),
            session=session,
            nodes=opened.plan.nodes,
            channel=self.protection.channel,
            wrap=self.protection.local,
        )
        test, embeddings = opened.plan.test, None
        if isinstance(self.strategy, PrototypeAveraging):
            with run.track.phase("embedding the test images", 1):
                embeddings = self.protection.seen(opened.embed(test, encoder))
        self.judge = Judge(test, embeddings)
        self.looks: list[Look] = []
        self.state = self.strategy.arrays()
        place = {name: index for index, name in enumerate(test.classes)}
        known = [{*map(place.__getitem__, self.plan.known(n))} for n in range(self.plan.rounds + 1)]
        self._new = [sorted(now - before) for before, now in pairwise(known)]

    def play(self) -> None:
        """Go through all missions."""
        per, every = self.strategy.rounds_per_mission, self.cfg.job.every
        rounds, current = self.plan.rounds * per, Look()

        def after(report: RoundReport, arrays: ArrayRecord) -> None:
            nonlocal current
            self.state = arrays
            current.add(report)
            current.node_seconds += self.protection.channel.seconds
            current.ends_mission = report.round % per == 0
            text = f"mission {self._mission(report.round)}"
            if current.ends_mission or (every is not None and report.round % every == 0):
                self._look(arrays, current)
                self.looks.append(current)
                text = f"{current.classes} classes, {current.union:.1%}"
                current = Look()
            bar.update(report.round, text)

        with self.run.track.phase(method_name(self.strategy), rounds) as bar:
            run_rounds(
                self.strategy,
                self.grid,
                self.strategy.arrays(),
                rounds=rounds,
                timeout=self.cfg.job.timeout,
                after=after,
                gauged=True,
            )

    def _mission(self, round_: int) -> int:
        return (round_ - 1) // self.strategy.rounds_per_mission + 1

    def _look(self, arrays: ArrayRecord, look: Look) -> None:
        mission = self._mission(look.round)
        asked = self.plan.asked(mission)
        right = self._answers(look.round, arrays, asked)
        look.classes = len(self.plan.known(mission))
        look.epsilon = self.protection.epsilon(look.round)
        look.union = fraction(torch.cat(list(right.values())))
        own = [mask[torch.isin(asked, self.plan.own_test(n, mission))] for n, mask in right.items()]
        look.own = fraction(torch.cat(own))
        labels = self.judge.images.labels[asked]
        for new in self._new[:mission]:
            of_mission = torch.isin(labels, torch.tensor(new, dtype=torch.int64))
            found = torch.cat([mask[of_mission] for mask in right.values()])
            look.by_mission.append(fraction(found) if len(found) else None)
        self.run.metrics.log(
            look.round,
            {
                "fed/classes": look.classes,
                "fed/accuracy/union": look.union,
                "fed/accuracy/own": look.own,
                "fed/bytes/up": look.up,
                "fed/bytes/down": look.down,
                "fed/node_seconds": look.node_seconds,
                **({} if look.epsilon is None else {"fed/epsilon": look.epsilon}),
            },
        )

    def _answers(self, round_: int, arrays: ArrayRecord, asked: Tensor) -> dict[int, Tensor]:
        """Return for each node and each asked test image whether it is named rightly, bool."""
        strategy = self.strategy
        if isinstance(strategy, TrainingStrategy) and strategy.personal:
            return self._personal(strategy, round_, arrays, asked)
        if isinstance(strategy, PrototypeAveraging):
            classifier = strategy.classifier() if len(strategy.memory) else None
            right = self.judge.correct(classifier, asked)
        else:
            network = strategy.network(arrays)
            right = self.judge.correct_network(network.classes, network.predict, asked)
        return dict.fromkeys(range(self.plan.nodes), right)

    def _personal(
        self, strategy: TrainingStrategy[Any], round_: int, arrays: ArrayRecord, asked: Tensor
    ) -> dict[int, Tensor]:
        ids = strategy.connected(self.grid)
        messages = strategy.requests(round_, arrays, ConfigRecord(), ids, "query.predict")
        found: dict[int, Tensor] = {}
        for reply in exchange(self.grid, messages, timeout=self.cfg.job.timeout):
            if reply.has_error():
                raise FederationError(f"A node could not answer: {reply.error.reason}")
            status = records.config(reply.content, "status")
            predicted = records.array(records.arrays(reply.content, "answers"), "predicted")
            classes = json.loads(records.text(status, "classes"))
            rows = torch.from_numpy(np.array(predicted.numpy()))
            number = records.integer(status, "number")
            found[number] = self.judge.right(classes, rows, asked)
        if len(found) < self.plan.nodes:
            raise FederationError(
                f"Expected all {self.plan.nodes} nodes to answer the test images, "
                f"{len(found)} did.",
                remedy="Set a larger job.timeout.",
            )
        return dict(sorted(found.items()))
