"""From what the draws showed to ``results.json``, figures, and the table on the screen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from clfed import __version__
from clfed.backbones import Encoder
from clfed.errors import FederationError
from clfed.federated.field import Field
from clfed.jobs.run import Run
from clfed.jobs.settings import answering
from clfed.learners.training import BaseTraining, make_learner
from clfed.reporting import figures
from clfed.reporting.console import console
from clfed.reporting.metrics import flatten
from clfed.reporting.results import SCHEMA_VERSION
from clfed.reporting.tables import classifiers_table, summary_table

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from clfed.jobs.draw import Draw


def report(
    cfg: DictConfig,
    run: Run,
    field: Field,
    encoder: Encoder,
    draws: Sequence[Draw],
    *,
    training: Mapping[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Write everything that a run leaves behind and print its table.

    Returns:
        The content of ``results.json``.
    """
    results = assemble(cfg, field, encoder, draws, training=training, seconds=seconds)
    first = draws[0]
    if first.memory is None:
        raise FederationError("The federation ended before its first round was merged.")
    with run.track.phase("results and figures", 1):
        first.memory.save(run.folder.memory)
        paths = {
            name: run.folder.figures / f"{name}.png" for name in ("accuracy", "bytes", "prototypes")
        }
        figures.accuracy_curves(results, paths["accuracy"])
        figures.bytes_curve(results, paths["bytes"])
        seen = [_who(first.seen_by[name]) for name in first.memory.classes]
        figures.prototype_map(
            first.memory.prototypes(), first.memory.classes, seen, paths["prototypes"]
        )
        run.folder.write_results(results)
        for path in paths.values():
            run.metrics.figure(path)
        run.metrics.summary(flatten(results["final"], "final"))
    out = console()
    out.print(summary_table(_only(results, results["alternatives"])))
    out.print(classifiers_table(results))
    if cfg.merge == "pooled":
        exact = all(draw.exact for draw in draws)
        told = "equals the pooled one byte for byte" if exact else "is not the pooled one"
        held = f"{results['nodes_with_final_memory']} of {results['nodes']} nodes hold it"
        out.print(f"The merged memory {told}; {held}.")
    out.print(f"Everything is in {run.folder.path}")
    return results


def assemble(
    cfg: DictConfig,
    field: Field,
    encoder: Encoder,
    draws: Sequence[Draw],
    *,
    training: Mapping[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the content of ``results.json``: means over draws, spread where there are several."""
    memory = draws[0].memory
    assert memory is not None
    nodes = field.plan.nodes
    rounds = min(len(draw.steps) for draw in draws)
    steps = []
    for index in range(rounds):
        parts = [draw.steps[index] for draw in draws]
        steps.append(
            {
                "step": index + 1,
                "classes": round(_mean([p.classes for p in parts])),
                **_accuracy([p.accuracy for p in parts]),
                "bytes": {
                    "up": round(_mean([p.up for p in parts])),
                    "down": round(_mean([p.down for p in parts])),
                },
                "seconds": _mean([p.seconds for p in parts]),
            }
        )
    final = _accuracy([draw.accuracy for draw in draws])
    alternatives: dict[str, Any] = {
        name: {"classes": steps[-1]["classes"]}
        for name in final["accuracy"]
        if name not in cfg.job.classifiers
    }
    for name in alternatives.keys() & draws[0].costs.keys():
        costs = [draw.costs[name] for draw in draws if name in draw.costs]
        alternatives[name] |= {
            "bytes": {
                "up": round(_mean([c.up for c in costs])),
                "down": round(_mean([c.down for c in costs])),
            },
            "seconds": _mean([c.seconds for c in costs]),
        }
    spread = final.get("spread", {})
    classifiers = {
        name: {
            "accuracy": final["accuracy"][name],
            **({"spread": spread[name]} if name in spread else {}),
        }
        for name in cfg.job.classifiers
        if name in final["accuracy"]
    }
    return {
        "job": cfg.job.name,
        "version": SCHEMA_VERSION,
        "seed": cfg.seed,
        "protocol": _protocol(cfg, field, encoder, draws, training),
        "learner": _learner(cfg, field),
        "steps": steps,
        "final": {
            **final,
            "memory_sha256": memory.sha256(),
            "memory_bytes": memory.nbytes,
            "seconds": seconds,
        },
        "nodes": nodes,
        "alternatives": alternatives,
        "classifiers": classifiers,
        "nodes_with_final_memory": min(draw.holders for draw in draws),
        "merged_equals_pooled": all(draw.exact for draw in draws),
        "stages": [draw.stages for draw in draws],
    }


def _protocol(
    cfg: DictConfig,
    field: Field,
    encoder: Encoder,
    draws: Sequence[Draw],
    training: Mapping[str, Any] | None,
) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plan = field.plan
    return {
        "clfed": __version__,
        "data": field.benchmark.protocol,
        "base_classes": len(field.benchmark.groups.get("base", ())),
        "validation_classes": len(field.benchmark.groups.get("validation", ())),
        "scenario": OmegaConf.to_container(cfg.scenario),
        "nodes": plan.nodes,
        "rounds": plan.rounds,
        "field_classes": len(plan.test.classes),
        "support_images": len(plan.support),
        "test_images": len(plan.test),
        "label_space": "all field classes known to any node"
        + (
            ""
            if plan.base_support is None
            else " and all base classes (finetuned and joint: field classes alone)"
        ),
        "merge": cfg.merge,
        "moments": cfg.memory.moments,
        "message_bits": cfg.strategy.get("message_bits"),
        "classifier": answering(cfg)[0],
        "embedding": encoder.embedding_id,
        "embedding_size": encoder.dim,
        "training": dict(training) if training is not None else None,
        "draws": len(draws),
        "seeds": [cfg.seed],
        "spread": "standard deviation over draws of classes and images; one encoder",
        "accuracy": "over images",
    }


def _learner(cfg: DictConfig, field: Field) -> dict[str, str]:
    """Name of the learner, and how what it keeps merges in a stream of its own."""
    settings = BaseTraining.from_config(cfg).learner
    name = str(settings.get("name", "none"))
    if not settings.get("_target_"):
        return {"name": name, "merge": "exact"}
    # Some merge by their settings; the size of the network has no part in it.
    learner = make_learner(settings, nn.Identity(), field.benchmark, dim=1, seed=cfg.seed)
    return {"name": name, "merge": learner.merges}


def _accuracy(parts: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    values = {name: [p[name] for p in parts if name in p] for name in parts[0]}
    result = {"accuracy": {name: _mean(found) for name, found in values.items()}}
    if len(parts) > 1:
        several = {name: found for name, found in values.items() if len(found) > 1}
        result["spread"] = {name: statistics.stdev(found) for name, found in several.items()}
    return result


def _only(results: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results with the final accuracies of these names alone."""
    final = dict(results["final"])
    for key in ("accuracy", "spread"):
        if key in final:
            final[key] = {name: final[key][name] for name in names if name in final[key]}
    return {**results, "final": final}


def _mean(values: Sequence[float]) -> float:
    return float(statistics.fmean(values))


def _who(contributors: Sequence[str]) -> str:
    return contributors[0] if len(contributors) == 1 else "several"
