"""The alternatives that train networks: the lower and the upper bound of reconnaissance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from clfed.evaluation.judge import fraction
from clfed.federated.rounds import RoundReport, run_rounds
from clfed.jobs.draw import Cost, Setting
from clfed.learners.fine_tuning import FineTuning
from clfed.seeding import generator
from clfed.strategies import FedAvg

if TYPE_CHECKING:
    from omegaconf import DictConfig


def wanted(alternative: DictConfig | None, draw: int) -> bool:
    """Whether a draw runs an alternative that costs a training of its own."""
    if alternative is None:
        return False
    return alternative.draws is None or draw < alternative.draws


def optimiser(job: DictConfig) -> dict[str, float]:
    """Return the options of :class:`FineTuning` among those of an alternative."""
    return {key: job[key] for key in ("lr", "momentum", "weight_decay")}


def finetuned(setting: Setting) -> tuple[list[float], Cost]:
    """Run FedAvg with a growing head on the missions of a draw.

    Returns:
        The accuracy on all classes known after each round, and the cost.
    """
    job, plan = setting.cfg.job.finetuned, setting.plan
    options = {"epochs": job.epochs, "batch_size": job.batch_size, **optimiser(job)}
    strategy = FedAvg(
        setting.encoder,
        local={"_target_": "clfed.strategies.fedavg.FedAvgTraining", **options},
        briefing=setting.briefing,
        session=setting.session,
        nodes=plan.nodes,
        seed=setting.cfg.seed,
    )
    accuracies: list[float] = []
    cost = Cost()

    def after(report: RoundReport, arrays: ArrayRecord) -> None:
        images = setting.judge.of(plan.known(report.round))
        network = strategy.network(arrays)
        right = setting.judge.correct_network(network.classes, network.predict, images)
        accuracies.append(fraction(right))
        setting.log(report.round, {"accuracy/finetuned": accuracies[-1]})
        cost.up += report.up
        cost.down += report.down
        cost.seconds += report.seconds
        bar.update(report.round, f"finetuned {accuracies[-1]:.1%}")

    with setting.run.track.phase("FedAvg, the lower bound", plan.rounds) as bar:
        run_rounds(
            strategy,
            setting.grid,
            strategy.arrays(),
            rounds=plan.rounds,
            timeout=setting.cfg.job.timeout,
            after=after,
        )
    return accuracies, cost


def joint(setting: Setting) -> float:
    """Train one network on all support images at once; returns its accuracy on all classes."""
    job, plan = setting.cfg.job.joint, setting.plan
    learner = FineTuning(setting.encoder, plan.support.classes, **optimiser(job))
    with setting.run.track.phase("joint training, the upper bound", 1):
        learner.fit(
            plan.support.images,
            plan.support.labels,
            epochs=job.epochs,
            batch_size=job.batch_size,
            rng=generator(setting.cfg.seed, "joint", setting.number),
        )
    images = setting.judge.of(plan.known(plan.rounds))
    return fraction(setting.judge.correct_network(learner.classes, learner.predict, images))
