"""What a run of one federated method leaves behind: results, figures, a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict

from clfed import __version__
from clfed.backbones import Encoder
from clfed.federated.field import Field
from clfed.federated.wire import record_bytes
from clfed.jobs.federated import Federation, Look
from clfed.jobs.method import method_name, state_digest
from clfed.jobs.run import Run
from clfed.prototypes import PrototypeMemory
from clfed.reporting.console import console
from clfed.reporting.figures import accuracy_curves, bytes_curve
from clfed.reporting.metrics import flatten
from clfed.reporting.results import SCHEMA_VERSION
from clfed.reporting.tables import federated_table
from clfed.strategies.prototype_averaging import PrototypeAveraging

if TYPE_CHECKING:
    from omegaconf import DictConfig

LAST = 10


def report(
    cfg: DictConfig,
    run: Run,
    field: Field,
    encoder: Encoder,
    federation: Federation,
    *,
    training: Mapping[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Write everything that a run leaves behind and print its table.

    Returns:
        The content of ``results.json``.
    """
    results = assemble(cfg, run, field, encoder, federation, training=training, seconds=seconds)
    with run.track.phase("results and figures", 1):
        memory = _memory(federation)
        if memory is not None:
            memory.save(run.folder.memory)
        for draw, name in ((accuracy_curves, "accuracy"), (bytes_curve, "bytes")):
            draw(results, run.folder.figures / f"{name}.png")
            run.metrics.figure(run.folder.figures / f"{name}.png")
        run.folder.write_results(results)
        run.metrics.summary(flatten(results["final"], "final"))
    console().print(federated_table(results))
    console().print(f"Everything is in {run.folder.path}", markup=False, soft_wrap=True)
    return results


def assemble(
    cfg: DictConfig,
    run: Run,
    field: Field,
    encoder: Encoder,
    federation: Federation,
    *,
    training: Mapping[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the content of ``results.json``."""
    looks, last = federation.looks, federation.looks[-1]
    memory = _memory(federation)
    peaks = [look.peak for look in looks if look.peak is not None]
    return {
        "job": cfg.job.name,
        "version": SCHEMA_VERSION,
        "seed": cfg.seed,
        "protocol": _protocol(cfg, run, field, encoder, training),
        "method": {
            "name": method_name(federation.strategy),
            "options": run.config["strategy"],
            "leaves": federation.protection.leaves(federation.strategy.leaves),
            "privacy": federation.protection.tier.name,
            "curriculum": run.config.get("curriculum"),
            **_bound(run, federation),
        },
        "steps": [
            {
                "step": look.round,
                "classes": look.classes,
                "accuracy": {"union": look.union, "own": look.own},
                "bytes": {"up": look.up, "down": look.down},
                "seconds": look.seconds,
                "node_seconds": look.node_seconds,
                **({} if look.epsilon is None else {"epsilon": look.epsilon}),
            }
            for look in looks
        ],
        "accuracy_by_mission": [look.by_mission for look in looks if look.ends_mission],
        "final": {
            "accuracy": {"union": last.union, "own": last.own, **_over_time(looks)},
            "memory_sha256": memory.sha256() if memory else state_digest(federation.state),
            "memory_bytes": memory.nbytes
            if memory
            else record_bytes(RecordDict({"state": federation.state})),
            "seconds": seconds,
            "forgetting": forgetting([look.by_mission for look in looks if look.ends_mission]),
            "bytes": {
                "up": sum(look.up for look in looks),
                "down": sum(look.down for look in looks),
            },
            "node_seconds": sum(look.node_seconds for look in looks),
            "peak_bytes": max(peaks, default=None),
        },
    }


def forgetting(by_mission: Sequence[Sequence[float | None]]) -> float | None:
    r"""Mean distance from the best past accuracy, as in :mod:`clfed.evaluation.continual`.

    Args:
        by_mission: Row ``t``: accuracy after mission ``t`` on what each mission up to it brought,
            None where it brought no new class.

    Returns:
        None where only the last mission brought classes.
    """
    *earlier, last = by_mission
    drops = [
        max(best for row in earlier[number:] if (best := row[number]) is not None) - end
        for number, end in enumerate(last[: len(earlier)])
        if end is not None
    ]
    return statistics.fmean(drops) if drops else None


def _over_time(looks: Sequence[Look]) -> dict[str, float]:
    """Mean of the last looks and the best one, where one mission was looked at often."""
    if len(looks) <= LAST or any(look.ends_mission for look in looks[:-1]):
        return {}
    tail = looks[-LAST:]
    return {
        "union_last10": statistics.fmean(look.union for look in tail),
        "own_last10": statistics.fmean(look.own for look in tail),
        "own_best": max(look.own for look in looks),
    }


def _bound(run: Run, federation: Federation) -> dict[str, Any]:
    """What the messages of the whole run reveal at most, for tiers that promise something."""
    options = {k: v for k, v in run.config["privacy"].items() if k != "_target_"}
    epsilon = federation.looks[-1].epsilon
    found: dict[str, Any] = {"privacy_options": options} if options else {}
    if epsilon is not None:
        tier = federation.protection.tier
        found |= {"epsilon": epsilon, "delta": tier.delta, "unit": tier.unit}
    return found


def _memory(federation: Federation) -> PrototypeMemory | None:
    strategy = federation.strategy
    return strategy.memory if isinstance(strategy, PrototypeAveraging) else None


def _protocol(
    cfg: DictConfig,
    run: Run,
    field: Field,
    encoder: Encoder,
    training: Mapping[str, Any] | None,
) -> dict[str, Any]:
    plan = field.plan
    return {
        "clfed": __version__,
        "data": field.benchmark.protocol,
        "base_classes": len(field.benchmark.groups.get("base", ())) if training else 0,
        "scenario": run.config["scenario"],
        "nodes": plan.nodes,
        "missions": plan.rounds,
        "classes": len(plan.test.classes),
        "support_images": len(plan.support),
        "test_images": len(plan.test),
        "label_space": "all classes known to any node",
        "backbone": run.config["backbone"],
        "learner": run.config["learner"].get("name", "none"),
        "embedding": encoder.embedding_id,
        "embedding_size": encoder.dim,
        "training": dict(training) if training is not None else None,
        "seeds": [cfg.seed],
        "accuracy": "over images",
        "own": "like what each node met itself, over nodes",
    }
