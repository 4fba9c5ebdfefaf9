"""The embedding itself, trained in the federation.

Nodes hold shares of the base classes' images and train the whole network by federated averaging
(McMahan et al. 2017, arXiv 1602.05629) or FedProx (Li et al. 2020, arXiv 1812.06127). In a round
a part of the nodes takes part, and it goes on without stragglers where enough have answered. The
validation classes alone choose the round whose weights are kept, as in central base training; the
head over base classes is thrown away. The field and the test images of the data set are never
looked at.

Then the embedding that nodes had used so far is replaced by the new one, see
:mod:`clfed.jobs.embedding_transfer`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from omegaconf import OmegaConf

from clfed.backbones import Encoder
from clfed.config import build, target
from clfed.errors import ConfigError
from clfed.federated.field import Field, field_settings, open_field
from clfed.federated.node import briefing
from clfed.federated.rounds import RoundReport, run_rounds
from clfed.jobs.embedding_checkpoint import Look, RoundCheckpoint, TrainingState
from clfed.jobs.embedding_transfer import Replacement, Transfer
from clfed.jobs.method import make_method
from clfed.jobs.run import Run, open_run, train_encoder
from clfed.jobs.settings import number, whole
from clfed.learners.encoder_files import save_base
from clfed.learners.loop import nearest_mean_accuracy
from clfed.learners.options import TrainingSummary
from clfed.learners.training import BaseTraining, freeze
from clfed.reporting.progress import progress
from clfed.scenarios.base_shares import VALIDATION, validation_split
from clfed.strategies import FedAvg, FedProx

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
Engine = Callable[..., None]
# The server's half of these remembers nothing but the network, which a checkpoint holds.
METHODS = (FedAvg, FedProx)


@dataclass(frozen=True)
class Trained:
    """An embedding that a federation has trained.

    Attributes:
        strategy: The method.
        encoder: The weights that did best on the validation classes.
        state: How it came about.
        transfer: What became of older prototypes; None without validation classes.
    """

    strategy: FedAvg
    encoder: Encoder
    state: TrainingState
    transfer: Transfer | None

    @property
    def summary(self) -> TrainingSummary:
        """The account that goes with the encoder's file; a step is a round."""
        looks = self.state.looks
        curve = [[k.report.round, k.validation] for k in looks if k.validation is not None]
        return TrainingSummary(
            steps=len(looks),
            best_step=self.state.best_round,
            validation=[[float(round_), accuracy] for round_, accuracy in curve],
            precision="32",
            seconds=sum(look.report.seconds for look in looks),
        )


def run(cfg: DictConfig, engine: Engine | None = None) -> Path:
    """Train an embedding and return the run folder.

    Args:
        cfg: The resolved configuration.
        engine: Carries messages, called as ``engine(serve, nodes=N)``; the configured one if
            omitted.

    Raises:
        ClfedError: Anything that the user can mend.
    """
    check(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    # The seed of central base training, so that the validation images are the same.
    settings = field_settings(config["data"], config["scenario"], config["seed"])
    # Before the run folder: what the data refuse must not cost the results of an earlier run.
    with progress() as track, track.phase("data and shares"):
        opened = open_field(settings)
    with open_run(cfg) as run:
        file = run.folder.path / "encoder.safetensors"
        file.unlink(missing_ok=True)
        start, _ = train_encoder(cfg, run)
        checkpoint = RoundCheckpoint(run.cache_dir / "embedding", run.config, start.embedding_id)
        found: list[Trained] = []

        def serve(grid: Grid) -> None:
            training = EmbeddingTraining(cfg, run, grid, opened, start, settings, checkpoint)
            found.append(training.run())

        begin = time.perf_counter()
        carry = engine if engine is not None else partial(build, run.config["engine"])
        carry(serve=serve, nodes=opened.plan.nodes)
        from clfed.jobs.embedding_summary import report

        save_base(found[0].encoder, found[0].summary, file)
        report(cfg, run, opened, found[0], seconds=time.perf_counter() - begin)
        checkpoint.remove()
        return run.folder.path


def check(cfg: DictConfig) -> None:
    """Refuse settings of the wrong kind.

    Raises:
        ConfigError: Names the first key that does not fit.
    """
    for key in ("rounds", "validate_every", "attempts"):
        whole(cfg, f"job.{key}", least=1)
    if cfg.job.old is not None:
        whole(cfg, "job.old", least=0)
        if cfg.job.old > cfg.job.rounds:
            raise ConfigError(
                f"job.old must be at most job.rounds, {cfg.job.rounds}, got {cfg.job.old}."
            )
    for key in ("enough", "departed"):
        number(cfg, f"job.{key}")
        if cfg.job[key] > 1:
            raise ConfigError(f"job.{key} must be a share from 0 to 1, got {cfg.job[key]}.")
    for key in ("job.timeout", "job.penalty", "strategy.wait"):
        number(cfg, key)
    if not isinstance(cfg.job.resume, bool):
        raise ConfigError(f"job.resume must be true or false, got {cfg.job.resume!r}.")
    if target(cfg.strategy) not in METHODS:
        raise ConfigError(
            f"job=embedding trains one network for all, got {cfg.strategy['_target_']}.",
            remedy="Choose strategy=fedavg or strategy=fedprox.",
        )
    if cfg.get("curriculum") is not None:
        raise ConfigError(
            "job=embedding has no curriculum, got one.", remedy="Leave curriculum= out."
        )


class EmbeddingTraining:
    """Rounds over the base classes, with a look at the validation classes.

    Args:
        cfg: The resolved configuration.
        run: Surroundings of the run.
        grid: Reaches the nodes.
        opened: What they hold.
        start: The weights of the first round.
        settings: From which nodes open the same field.
        checkpoint: What a killed training goes on from.
    """

    def __init__(
        self,
        cfg: DictConfig,
        run: Run,
        grid: Grid,
        opened: Field,
        start: Encoder,
        settings: str,
        checkpoint: RoundCheckpoint,
    ) -> None:
        self.cfg, self.run_, self.grid, self.opened = cfg, run, grid, opened
        self.start, self.checkpoint = start, checkpoint
        self.node_settings = {
            "field": settings,
            "moments": "none",
            "cache_dir": str(run.cache_dir),
        }
        self.session = f"{start.embedding_id[:16]}/{cfg.seed}/embedding"
        # All rounds are over the same mission: the shares of the base classes.
        options = {**run.config["strategy"], "rounds_per_mission": cfg.job.rounds}
        strategy = make_method(
            {**run.config, "strategy": options, "curriculum": None},
            start,
            briefing=briefing(self.node_settings, start),
            session=self.session,
            nodes=opened.plan.nodes,
        )
        assert isinstance(strategy, FedAvg)
        self.strategy = strategy
        self.base = BaseTraining.from_config(cfg)
        self.old_round = cfg.job.rounds // 2 if cfg.job.old is None else cfg.job.old
        benchmark = opened.benchmark
        self.validation = benchmark.train.of_classes(benchmark.groups["validation"])
        self.support = validation_split(
            self.validation, self.base.trainer.validation_shots, cfg.seed
        )
        self.state = TrainingState(strategy.arrays(), old=None if self.old_round else start)

    def run(self) -> Trained:
        """Train, and replace the older embedding by the new one."""
        found = self.checkpoint.read() if self.cfg.job.resume else None
        if found is not None:
            logger.info("Going on after round %d from %s", len(found.looks), self.checkpoint.path)
            self.state = found
            self.strategy.classes = found.classes
        for look in self.state.looks:
            self._log(look)
        job = self.cfg.job
        with self.run_.track.phase("federated training", job.rounds) as self._bar:
            run_rounds(
                self.strategy,
                self.grid,
                self.state.arrays,
                first=len(self.state.looks) + 1,
                rounds=job.rounds,
                timeout=job.timeout,
                enough=job.enough,
                attempts=job.attempts,
                after=self._after,
                gauged=True,
            )
        best = self.state.best
        assert best is not None
        return Trained(self.strategy, best, self.state, self._replaced(best))

    def _after(self, report: RoundReport, arrays: ArrayRecord) -> None:
        state, job = self.state, self.cfg.job
        last = report.round == job.rounds
        state.arrays, state.classes = arrays, self.strategy.classes
        accuracy = None
        if last or report.round % job.validate_every == 0:
            encoder = self._frozen(arrays)
            accuracy = self._accuracy(encoder)
            best = max((k.validation for k in state.looks if k.validation is not None), default=0)
            # The later of two equals has seen more.
            if state.best is None or accuracy is None or accuracy >= best:
                state.best, state.best_round = encoder, report.round
        if report.round == self.old_round:
            state.old = self._frozen(arrays)
        look = Look(report, len(state.classes), accuracy)
        state.looks.append(look)
        self.checkpoint.write(state)
        self._log(look)
        told = "" if accuracy is None else f", validation {accuracy:.1%}"
        self._bar.update(report.round, f"{report.answered} of {report.asked} nodes{told}")

    def _frozen(self, arrays: ArrayRecord) -> Encoder:
        backbone = self.strategy.network(arrays).backbone
        return freeze(backbone, self.base, self.opened.benchmark)

    def _accuracy(self, encoder: Encoder) -> float | None:
        if not len(self.validation):
            return None
        embeddings = encoder.embed(self.validation.images)
        return nearest_mean_accuracy(embeddings, self.validation.labels, self.support)

    def _log(self, look: Look) -> None:
        values = {
            "fed/bytes/up": float(look.report.up),
            "fed/bytes/down": float(look.report.down),
            "fed/node_seconds": look.report.node_seconds,
            "fed/answered": float(look.report.answered),
        }
        if look.validation is not None:
            values["fed/accuracy/validation"] = look.validation
        self.run_.metrics.log(look.report.round, values)

    def _replaced(self, encoder: Encoder) -> Transfer | None:
        old = self.state.old
        assert old is not None
        if self.opened.plan.rounds < VALIDATION:
            return None
        job = self.cfg.job
        with self.run_.track.phase("replacing the older embedding", 1):
            return Replacement(
                self.grid,
                self.opened,
                self.node_settings,
                old=old,
                new=encoder,
                seed=self.cfg.seed,
                session=self.session,
                wait=self.cfg.strategy.wait,
                timeout=job.timeout,
            ).run(departed=job.departed, penalty=job.penalty)
