"""What a federated training of an embedding leaves behind: results, figures, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict

from clfed import __version__
from clfed.federated.field import Field
from clfed.federated.wire import record_bytes
from clfed.jobs.embedding import Trained
from clfed.jobs.method import method_name, state_digest
from clfed.jobs.run import Run
from clfed.reporting.console import console
from clfed.reporting.federated import REPLACEMENTS
from clfed.reporting.figures import accuracy_curves, bytes_curve
from clfed.reporting.metrics import flatten
from clfed.reporting.results import SCHEMA_VERSION
from clfed.reporting.tables import console_table

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table


def report(
    cfg: DictConfig, run: Run, field: Field, trained: Trained, *, seconds: float
) -> dict[str, Any]:
    """Write everything that a run leaves behind and print its tables.

    Returns:
        The content of ``results.json``.
    """
    results = assemble(cfg, run, field, trained, seconds=seconds)
    with run.track.phase("results and figures", 1):
        if trained.transfer is not None:
            trained.transfer.memory.save(run.folder.memory)
            accuracy_curves(results, run.folder.figures / "accuracy.png")
        bytes_curve(results, run.folder.figures / "bytes.png")
        for path in sorted(run.folder.figures.glob("*.png")):
            run.metrics.figure(path)
        run.folder.write_results(results)
        run.metrics.summary(flatten(results["final"], "final"))
    for table in tables(results):
        console().print(table)
    console().print(f"Everything is in {run.folder.path}", markup=False, soft_wrap=True)
    return results


def assemble(
    cfg: DictConfig, run: Run, field: Field, trained: Trained, *, seconds: float
) -> dict[str, Any]:
    """Return the content of ``results.json``."""
    looks, state, transfer = trained.state.looks, trained.state, trained.transfer
    validation = [k.validation for k in looks if k.validation is not None]
    tested = len(field.plan.test.classes)
    peaks = [look.report.peak for look in looks if look.report.peak is not None]
    results: dict[str, Any] = {
        "job": cfg.job.name,
        "version": SCHEMA_VERSION,
        "seed": cfg.seed,
        "protocol": _protocol(cfg, run, field, trained),
        "method": {
            "name": method_name(trained.strategy),
            "options": run.config["strategy"],
            "leaves": trained.strategy.leaves,
        },
        "steps": [
            {
                "step": look.report.round,
                "classes": tested,
                "accuracy": {} if look.validation is None else {"validation": look.validation},
                "bytes": {"up": look.report.up, "down": look.report.down},
                "seconds": look.report.seconds,
                "node_seconds": look.report.node_seconds,
                "asked": look.report.asked,
                "answered": look.report.answered,
                "head_classes": look.classes,
            }
            for look in looks
        ],
        "encoder": {
            "file": "encoder.safetensors",
            "embedding": trained.encoder.embedding_id,
            "bytes": len(trained.encoder.to_bytes()),
            "round": state.best_round,
        },
        "final": {
            "accuracy": {"validation": max(validation)} if validation else {},
            "memory_sha256": transfer.memory.sha256() if transfer else state_digest(state.arrays),
            "memory_bytes": transfer.memory.nbytes
            if transfer
            else record_bytes(RecordDict({"state": state.arrays})),
            "seconds": seconds,
            "bytes": {
                "up": sum(look.report.up for look in looks),
                "down": sum(look.report.down for look in looks),
            },
            "node_seconds": sum(look.report.node_seconds for look in looks),
            "peak_bytes": max(peaks, default=None),
        },
    }
    if transfer is not None and state.old is not None:
        results["replacement"] = {
            "old": state.old.embedding_id,
            "new": trained.encoder.embedding_id,
            "old_round": cfg.job.rounds // 2 if cfg.job.old is None else cfg.job.old,
            "accuracy": transfer.accuracy,
            "bytes": transfer.bytes,
            "images": transfer.images,
            "misfit": transfer.misfit,
            "departed": list(transfer.departed),
        }
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables at the end of a run."""
    final, encoder, steps = results["final"], results["encoder"], results["steps"]
    protocol = results["protocol"]
    reached = final["accuracy"].get("validation")
    asked, answered = (sum(step[key] for step in steps) for key in ("asked", "answered"))
    rows = [
        ("accuracy on validation classes", "-" if reached is None else f"{reached:.1%}"),
        ("kept round", f"{encoder['round']} of {len(steps)}"),
        ("replies in time", f"{answered} of {asked}"),
        ("sent by nodes, MB", f"{final['bytes']['up'] / 1e6:,.2f}"),
        ("sent to nodes, MB", f"{final['bytes']['down'] / 1e6:,.2f}"),
        ("work of the nodes, s", f"{final['node_seconds']:,.1f}"),
    ]
    caption = (
        f"{protocol['base_classes']} base classes on {protocol['nodes']} nodes; what leaves a "
        f"node: {results['method']['leaves']}"
    )
    title = f"{results['job']}: {results['method']['name']}, seed {results['seed']}"
    found = [console_table(title, ("", "value"), rows, caption)]
    replaced = results.get("replacement")
    if replaced is not None:
        ways = [(name, f"{replaced['accuracy'][name]:.1%}") for name in REPLACEMENTS]
        told = "\n".join(f"{name}: {text}" for name, text in REPLACEMENTS.items())
        caption = (
            f"{told}\nnearest class mean on validation classes; the older embedding is that of "
            f"round {replaced['old_round']}; {len(replaced['departed'])} nodes without images; the "
            f"map misses {replaced['misfit']:.1%} of {replaced['images']} images"
        )
        title = "Prototypes when the embedding is replaced"
        found.append(console_table(title, ("", "accuracy"), ways, caption))
    return found


def _protocol(cfg: DictConfig, run: Run, field: Field, trained: Trained) -> dict[str, Any]:
    plan, groups = field.plan, field.benchmark.groups
    return {
        "clfed": __version__,
        "data": field.benchmark.protocol,
        "base_classes": len(groups["base"]),
        "validation_classes": len(groups["validation"]),
        "scenario": run.config["scenario"],
        "nodes": plan.nodes,
        "rounds": cfg.job.rounds,
        "images": sum(len(m.indices) for m in plan.missions if m.round == 1),
        "test_images": len(plan.test),
        "label_space": "all validation classes",
        "backbone": run.config["backbone"],
        "learner": run.config["learner"].get("name", "none"),
        "embedding": trained.encoder.embedding_id,
        "embedding_size": trained.encoder.dim,
        "job": run.config["job"],
        "seeds": [cfg.seed],
        "accuracy": "over images of validation classes, which also choose the round",
    }
