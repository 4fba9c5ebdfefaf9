"""What a run of unlearning leaves behind: results, certificates, figures, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from clfed import __version__
from clfed.evaluation.evidence import MEASURES, attack_scores, floor
from clfed.evaluation.forgetting import h_mean
from clfed.jobs.further_evidence import further_evidence
from clfed.jobs.run import Run
from clfed.jobs.unlearning import Outcome, sequences
from clfed.jobs.unlearning_exam import Examiner
from clfed.jobs.unlearning_stage import Stage
from clfed.learners import state
from clfed.reporting import unlearning as figures
from clfed.reporting.console import console
from clfed.reporting.metrics import flatten
from clfed.reporting.results import SCHEMA_VERSION
from clfed.reporting.unlearning_tables import evidence_table, sequence_table
from clfed.unlearning.certificate import Certificate, certify
from clfed.unlearning.needs import names
from clfed.unlearning.requests import Request

if TYPE_CHECKING:
    from omegaconf import DictConfig

MOST_POINTS = 2000  # of each kind in a map of embeddings


def report(cfg: DictConfig, run: Run, exam: Examiner, outcomes: Sequence[Outcome]) -> None:
    """Write everything that a finished run leaves, and show its table.

    Args:
        cfg: The resolved configuration.
        run: The surroundings of the run.
        exam: Who asked the models.
        outcomes: What happened, see :func:`clfed.jobs.unlearning.play`.

    Raises:
        RunFolderError: A file cannot be written.
    """
    stage = exam.stage
    results = _results(cfg, run, exam, outcomes)
    first = sequences(outcomes, len(stage.requests))[0]
    _certify(run, stage, first, results)
    with run.track.phase("figures", 1):
        _draw(run, exam, first[-1], results)
    for figure in sorted(run.folder.figures.glob("*.png")):
        run.metrics.figure(figure)
    for point in results["unlearning"]["trace"]:
        values = {f"mu/acc/{name}": value for name, value in point.items() if name != "step"}
        run.metrics.log(int(point["step"]), values)
    # Last of all: where there are results, there is everything else.
    run.folder.write_results(results)
    means = {name: part["mean"] for name, part in results["unlearning"]["measures"].items()}
    run.metrics.summary(flatten({"final": results["final"], "mu": means}))
    console().print(evidence_table(results))
    if (table := sequence_table(results)) is not None:
        console().print(table)
    console().print(f"run folder: {run.folder.path}", markup=False, soft_wrap=True)


def _results(
    cfg: DictConfig, run: Run, exam: Examiner, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    stage = exam.stage
    name = str(stage.settings.get("name"))
    paths = sequences(outcomes, len(stage.requests))
    first, last = paths[0], [path[-1] for path in paths]
    final = first[-1]
    stored = state.stored(final.after)
    return {
        "job": cfg.job.name,
        "version": SCHEMA_VERSION,
        "seed": cfg.seed,
        "protocol": _protocol(run, stage),
        "unlearner": {
            "name": name,
            "options": stage.settings,
            "exact": final.report.exact,
            "scope": final.report.scope,
            "needs": names(stage.unlearner_class.needs),
            "reads": stage.unlearner_class.reads,
            "own_original": stage.unlearner_class.own_original,
        },
        "requests": [
            {"id": r.id, "kind": r.kind, "what": _what(r), "images": len(gone)}
            for r, gone in zip(stage.requests, stage.gone, strict=True)
        ],
        "steps": [
            {
                "step": number + 1,
                "classes": len(outcome.after.classes) - len(outcome.after.retired),
                "accuracy": {
                    "forget": 1 - outcome.evidence["ua"],
                    "retain": outcome.evidence["ra"],
                    "test": outcome.evidence["ta"],
                },
                "bytes": {"up": 0, "down": 0},
                "seconds": outcome.report.seconds,
            }
            for number, outcome in enumerate(first)
        ],
        "final": {
            "accuracy": {name: final.evidence["ta"]},
            "memory_sha256": final.report.after,
            "memory_bytes": stored["extra"] + stored["images"],
            "seconds": sum(outcome.report.seconds for outcome in first),
        },
        "unlearning": _unlearning(cfg, exam, paths, last),
    }


def _unlearning(
    cfg: DictConfig,
    exam: Examiner,
    paths: Sequence[Sequence[Outcome]],
    last: Sequence[Outcome],
) -> dict[str, Any]:
    stage = exam.stage
    final, number = last[0], len(stage.requests) - 1
    originals = [o for o in last if o.unlearning_seed == final.unlearning_seed]
    unlearnings = [o for o in last if o.original_seed == final.original_seed]
    mean, spread = floor(
        exam.oracle_sheets(number),
        original=final.before,
        **exam.judging(number),
    )
    with stage.track.phase("further evidence", 1):
        further = further_evidence(cfg, exam, final, number)
    measures = {
        key: {
            "mean": statistics.fmean(o.evidence[key] for o in last),
            "original_spread": _spread(o.evidence[key] for o in originals),
            "unlearning_spread": _spread(o.evidence[key] for o in unlearnings),
        }
        for key in final.evidence
    }
    before = [exam.evidence(o.before, o.before, number) for o in originals]
    seconds = [sum(o.report.seconds for o in path) for path in paths]
    trained = [
        sum(stage.oracle(i, seed)[1] for i in range(len(stage.requests)))
        for seed in stage.seeds["oracle"]
    ]
    return {
        "kind": final.request.kind,
        "measures": measures | {k: _alone(v["method"]) for k, v in further.items()},
        "original": {
            key: {
                "mean": statistics.fmean(found[key] for found in before),
                "spread": _spread(found[key] for found in before),
            }
            for key in before[0]
        },
        "oracle": {key: {"mean": mean[key], "spread": spread.get(key)} for key in mean}
        | {k: {"mean": v["oracle"], "spread": None} for k, v in further.items() if "oracle" in v},
        "ideals": {measure.name: measure.ideal for measure in MEASURES},
        "cost": {
            "seconds": statistics.fmean(seconds),
            "spread": _spread(seconds),
            "oracle_seconds": statistics.fmean(trained),
            "ratio": statistics.fmean(seconds) / statistics.fmean(trained),
            "steps": statistics.fmean(sum(o.report.steps for o in path) for path in paths),
        },
        "runs": [
            {
                "original_seed": o.original_seed,
                "unlearning_seed": o.unlearning_seed,
                "seconds": o.report.seconds,
                "steps": o.report.steps,
                "touched": o.report.touched,
                "lineage": o.report.lineage,
                "evidence": o.evidence,
            }
            for o in last
        ],
        "trace": final.trace,
        "sequence": [_in_sequence(outcome, paths[0][:i]) for i, outcome in enumerate(paths[0])],
    }


def _in_sequence(outcome: Outcome, earlier: Sequence[Outcome]) -> dict[str, Any]:
    found, before = outcome.evidence, outcome.trace[0]
    return {
        "id": outcome.request.id,
        "kind": outcome.request.kind,
        "forget": 1 - found["ua"],
        "retain": found["ra"],
        "test": found["ta"],
        "earlier": outcome.earlier,
        "hmean": h_mean(found["ra"], before["forget"], 1 - found["ua"]),
        "seconds": outcome.report.seconds,
    }


def _certify(run: Run, stage: Stage, path: Sequence[Outcome], results: Mapping[str, Any]) -> None:
    """Leave a folder with the model and a certificate for each request of a sequence."""
    previous: list[Certificate] = []
    for number, outcome in enumerate(path):
        last = number == len(path) - 1
        certificate = certify(
            run.folder.path / "requests" / f"{number + 1:02d}-{outcome.request.id}",
            request=outcome.request,
            gone=outcome.gone,
            holdings=stage.holdings,
            model=outcome.after,
            report=outcome.report,
            settings=stage.settings,
            evidence=outcome.evidence,
            oracle=results["unlearning"]["oracle"] if last else None,
            previous=previous,
            signing_key=run.config["job"]["signing_key"],
        )
        previous.append(certificate)


def _draw(run: Run, exam: Examiner, final: Outcome, results: Mapping[str, Any]) -> None:
    stage, folder = exam.stage, run.folder.figures
    before, oracle = final.before, exam.oracle_sheets(len(stage.requests) - 1)[0]
    figures.accuracy_trace(results, folder / "accuracy.png")
    figures.attack_histograms(
        attack_scores(before, final.request.kind),
        attack_scores(final.sheet, final.request.kind),
        attack_scores(oracle, final.request.kind),
        folder / "attack.png",
    )
    parts = ("forget", "retain")
    labels = torch.cat([getattr(before, part).labels for part in parts])
    forgotten = torch.arange(len(labels)) < len(before.forget.labels)
    # A picture needs some of the images that stay; a few thousand would only cover one another.
    shown = torch.linspace(0, len(labels) - 1, min(len(labels), MOST_POINTS)).long()
    shown = torch.unique(torch.cat([forgotten.nonzero().flatten()[:MOST_POINTS], shown]))
    figures.embedding_maps(
        torch.cat([getattr(before, part).embeddings for part in parts])[shown],
        torch.cat([getattr(final.sheet, part).embeddings for part in parts])[shown],
        labels[shown],
        forgotten[shown],
        stage.holdings.train.classes,
        folder / "embedding.png",
    )
    if len(stage.requests) > 1:
        figures.sequence_curves(results, folder / "sequence.png")


def _protocol(run: Run, stage: Stage) -> dict[str, Any]:
    trainer = stage.recipe.parts.trainer
    return {
        "clfed": __version__,
        "data": stage.benchmark.protocol,
        "holdings": stage.holdings.protocol,
        "scenario": run.config["scenario"],
        "forget": run.config["forget"],
        "train_images": len(stage.holdings.train),
        "validation_images": len(stage.holdings.validation),
        "test_images": len(stage.holdings.test),
        "classes": len(stage.holdings.train.classes),
        "backbone": run.config["backbone"],
        "learner": run.config["learner"],
        "precision": trainer.resolved_precision(),
        "threads": trainer.threads,
        "repeats": {part: len(seeds) for part, seeds in stage.seeds.items()},
        "seeds": [run.config["seed"]],
        "accuracy": "over images, of open outputs: no class is masked when it is judged",
        "selection": "settings of the unlearner come from held-out images of other seeds",
    }


def _what(request: Request) -> str:
    if request.kind == "sample":
        return f"{len(request.samples)} samples"
    return request.contributor or ", ".join(request.classes)


def _alone(value: float) -> dict[str, float | None]:
    return {"mean": value, "original_spread": None, "unlearning_spread": None}


def _spread(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.stdev(found) if len(found) > 1 else None
