"""What becomes of prototypes when the embedding is replaced by a newer one.

=========== ===================================================================================
before      the older prototypes under the older embedding
recomputed  every node embeds its images anew: complete rows, in a new ledger
carried     so do those that still have images; the rows of the others move with the drift
            statistics of the former
moved       all rows move like that, as if nobody had an image of these classes any more
stale       the older prototypes, used under the present embedding as if nothing had happened
=========== ===================================================================================

Every accuracy is that of the nearest class mean over images of the validation classes. The drift
statistics are over base classes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from clfed.backbones import Encoder
from clfed.evaluation.judge import Judge, fraction
from clfed.federated.field import Field
from clfed.federated.node import briefing
from clfed.federated.rounds import RoundReport, run_rounds
from clfed.prototypes import ContributorLedger, PrototypeMemory, read_off
from clfed.prototypes.contribution import Contribution
from clfed.prototypes.drift import readdressed
from clfed.prototypes.drift_statistics import carried, carry_over
from clfed.scenarios.base_shares import BASE, VALIDATION
from clfed.seeding import generator
from clfed.strategies import PrototypeAveraging
from clfed.strategies.base import TrainOnly
from clfed.strategies.drift_survey import DriftSurvey

Records = Mapping[str, ArrayRecord | ConfigRecord]


@dataclass
class Transfer:
    """What the change of embeddings led to.

    Attributes:
        memory: The memory that nodes recomputed under the present embedding.
        accuracy: Of each way, see the module.
        bytes: What each kind of message took, ``up`` and ``down``.
        images: Number of images of the drift statistics.
        misfit: Share of their present embeddings that the map misses.
        departed: Names of the nodes that have no images any more.
    """

    memory: PrototypeMemory
    accuracy: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    images: int = 0
    misfit: float = 0.0
    departed: tuple[str, ...] = ()


class Replacement:
    """Replaces an embedding by a newer one in a federation of nodes with images.

    Args:
        grid: Reaches the nodes.
        opened: What they see; its test images are of validation classes.
        node_settings: What nodes must know, see :func:`clfed.federated.node.briefing`.
        old: The older embedding.
        new: The present one.
        seed: Decides which nodes have no images any more.
        session: Tells this federation from every other one.
        wait: Longest wait for nodes, seconds.
        timeout: Longest wait for the replies of a round, seconds.
    """

    def __init__(
        self,
        grid: Grid,
        opened: Field,
        node_settings: Mapping[str, Any],
        *,
        old: Encoder,
        new: Encoder,
        seed: int,
        session: str,
        wait: float,
        timeout: float,
    ) -> None:
        self.grid, self.opened, self.plan = grid, opened, opened.plan
        self.old, self.new, self.seed = old, new, seed
        self._settings = {**node_settings, "moments": "none"}
        self._session, self._wait, self._timeout = session, wait, timeout
        self._bytes: dict[str, dict[str, int]] = {}

    def run(self, *, departed: float, penalty: float) -> Transfer:
        """Try every way.

        Args:
            departed: Share of the nodes that have no images any more; one node keeps its images.
            penalty: Of the map, see
                :meth:`clfed.prototypes.drift_statistics.DriftStatistics.matrix`.

        Raises:
            NotEnoughData: Nobody has images for drift statistics.
        """
        before = self._recomputed(self.old, "before")
        now = self._recomputed(self.new, "recomputed")
        gone = self._departed(before.contributors, departed)
        statistics = self._survey().statistics(without=gone)
        partly = ContributorLedger(now.dim, now.embedding_id)
        for name in now.contributors:
            if name not in gone:
                partly.receive(Contribution.of(name, 1, now.share(name), complete=True))
        carry_over(before, partly, statistics, penalty)
        stale = readdressed(before.total, now.embedding_id)
        return Transfer(
            memory=now.total,
            accuracy={
                "before": self._accuracy(before.total, self.old),
                "recomputed": self._accuracy(now.total, self.new),
                "carried": self._accuracy(partly.total, self.new),
                "moved": self._accuracy(carried(before.total, statistics, penalty), self.new),
                "stale": self._accuracy(stale, self.new),
            },
            bytes=self._bytes,
            images=statistics.count,
            misfit=statistics.misfit(statistics.matrix(penalty)),
            departed=gone,
        )

    def _recomputed(self, encoder: Encoder, purpose: str) -> ContributorLedger:
        """Let every node learn all its images under one embedding, into a ledger of its own."""
        strategy = PrototypeAveraging(
            PrototypeMemory.empty(encoder.dim, encoder.embedding_id),
            **self._common(encoder, purpose),
        )
        # A new session starts afresh; the number of the round says up to which mission.
        self._round(strategy, strategy.arrays(), VALIDATION, purpose)
        return strategy.ledger

    def _survey(self) -> DriftSurvey:
        strategy = DriftSurvey(
            self.new,
            before=self.old,
            local={"_target_": "clfed.strategies.drift_survey.DriftReport"},
            **self._common(self.new, "statistics"),
        )
        self._round(strategy, strategy.arrays(), BASE, "statistics")
        return strategy

    def _common(self, encoder: Encoder, purpose: str) -> dict[str, Any]:
        return {
            "briefing": briefing(self._settings, encoder),
            "session": f"{self._session}/{purpose}",
            "nodes": self.plan.nodes,
            "wait": self._wait,
        }

    def _round(self, strategy: TrainOnly, arrays: ArrayRecord, number: int, purpose: str) -> None:
        def after(report: RoundReport, arrays: ArrayRecord) -> None:
            self._bytes[purpose] = {"up": report.up, "down": report.down}

        run_rounds(
            strategy,
            self.grid,
            arrays,
            rounds=number,
            first=number,
            timeout=self._timeout,
            after=after,
        )

    def _departed(self, names: tuple[str, ...], share: float) -> tuple[str, ...]:
        count = min(math.floor(share * len(names)), len(names) - 1)
        drawn = torch.randperm(len(names), generator=generator(self.seed, "departed"))[:count]
        return tuple(sorted(names[place] for place in drawn.tolist()))

    def _accuracy(self, memory: PrototypeMemory, encoder: Encoder) -> float:
        test = self.plan.test
        judge = Judge(test, self.opened.embed(test, encoder))
        known = [name for name in test.classes if name in memory]
        classifier = read_off("ncm", memory.select(known)) if known else None
        return fraction(judge.correct(classifier, torch.arange(len(test))))
