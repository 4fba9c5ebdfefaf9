"""What a run along a stream leaves behind: results, figures, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from clfed import __version__
from clfed.data.benchmark import Benchmark
from clfed.evaluation.callback import ContinualEvaluation
from clfed.evaluation.continual import summary as stream_metrics
from clfed.evaluation.exam import Exam
from clfed.evaluation.retrieval import recall_at
from clfed.jobs.checkpoint import Record
from clfed.jobs.run import Run
from clfed.learners import state
from clfed.learners.base import ContinualLearner
from clfed.learners.options import TrainerOptions
from clfed.learners.training import BaseTraining
from clfed.reporting.console import console
from clfed.reporting.continual import accuracy_matrix, stability_curves
from clfed.reporting.figures import accuracy_curves
from clfed.reporting.metrics import flatten
from clfed.reporting.results import SCHEMA_VERSION
from clfed.reporting.tables import classifiers_table, metrics_table
from clfed.scenarios.streams import Stream

if TYPE_CHECKING:
    from omegaconf import DictConfig


def report(
    cfg: DictConfig,
    run: Run,
    benchmark: Benchmark,
    stream: Stream,
    learner: ContinualLearner,
    records: Sequence[Record],
    watch: ContinualEvaluation | None,
) -> None:
    """Write everything that a finished run leaves, and show its table.

    Args:
        cfg: The resolved configuration.
        run: The surroundings of the run.
        benchmark: The data set.
        stream: What was learned.
        learner: Who learned it.
        records: One a phase.
        watch: The evaluation during training, if there was one.

    Raises:
        RunFolderError: A file cannot be written.
    """
    results = _results(cfg, run, benchmark, stream, learner, records)
    with run.track.phase("figures", 1):
        if watch is not None:
            results["stability"] = watch.result()
            stability_curves(results, run.folder.figures / "stability.png")
            for name, value in _stability(results["stability"]).items():
                results["continual"][name] = value
        accuracy_curves(results, run.folder.figures / "accuracy.png")
        accuracy_matrix(results, run.folder.figures / "accuracy_matrix.png")
    for figure in sorted(run.folder.figures.glob("*.png")):
        run.metrics.figure(figure)
    if learner.memory is not None:
        learner.memory.save(run.folder.memory)
    # Last of all: where there are results, there is everything else.
    run.folder.write_results(results)
    run.metrics.summary(flatten({"final": results["final"], "cl": results["continual"]}))
    console().print(metrics_table(results))
    if (table := classifiers_table(results)) is not None:
        console().print(table)
    console().print(f"run folder: {run.folder.path}", markup=False, soft_wrap=True)


def _results(
    cfg: DictConfig,
    run: Run,
    benchmark: Benchmark,
    stream: Stream,
    learner: ContinualLearner,
    records: Sequence[Record],
) -> dict[str, Any]:
    name = learner.method or type(learner).__name__
    stored = state.stored(learner)
    classifiers = _classifiers(cfg, stream, learner)
    return {
        "job": cfg.job.name,
        "version": SCHEMA_VERSION,
        "seed": cfg.seed,
        "protocol": _protocol(cfg, run, benchmark, stream, learner),
        "learner": {
            "name": name,
            "options": run.config["learner"],
            "images_kept": learner.images_kept,
            "merge": learner.merges,
            "transductive": learner.transductive,
            "embedding_size": learner.dim,
            "stored": stored,
        },
        "steps": [
            {
                "step": record.phase + 1,
                "classes": record.classes,
                "accuracy": {name: record.accuracy},
                "bytes": {"up": 0, "down": 0},
                "seconds": record.seconds,
                "updates": record.updates,
                "images": record.images,
                "losses": record.losses,
                "unknown": record.unknown,
            }
            for record in records
        ],
        "final": {
            "accuracy": {
                name: records[-1].accuracy,
                **{key: row["accuracy"] for key, row in classifiers.items()},
            },
            "memory_sha256": state.sha256(learner),
            "memory_bytes": stored["extra"] + stored["images"],
            "seconds": sum(record.seconds for record in records),
        },
        "accuracy_matrix": [record.phases for record in records],
        "continual": _metrics(cfg, stream, learner, records),
        "classifiers": {name: _parts(stream, records[-1]), **classifiers} if classifiers else {},
    }


def _metrics(
    cfg: DictConfig, stream: Stream, learner: ContinualLearner, records: Sequence[Record]
) -> dict[str, float]:
    nothing = float("nan")
    matrix = [[nothing if a is None else a for a in record.phases] for record in records]
    untrained = records[0].baselines or [None]
    baselines = [value for value in untrained if value is not None]
    met: set[str] = set()
    brought = []
    for test in stream.tests:
        brought.append(len(set(test.classes) - met))
        met |= set(test.classes)
    found = stream_metrics(
        matrix,
        images=[len(test) for test in stream.tests],
        class_counts=brought if all(brought) else None,
        baselines=baselines if len(baselines) == len(untrained) else None,
        per_class=list(records[-1].per_class.values()),
    )
    parts = _parts(stream, records[-1])
    found |= {f"acc/{key}": value for key, value in parts.items() if key != "accuracy"}
    unknown = [record.unknown for record in records if record.unknown]
    for key in unknown[0] if unknown else ():
        found[f"unknown/{key}"] = sum(part[key] for part in unknown) / len(unknown)
    ks = tuple(cfg.job.recall_at) if cfg.job.recall_at is not None else learner.recall_at
    if ks:
        images = torch.cat([test.images for test in stream.tests])
        names = [n for t in stream.tests for n in map(t.classes.__getitem__, t.labels.tolist())]
        labels = learner.rows(names)
        recalls = recall_at(learner.embed_all(images), labels, ks)
        found |= {f"recall@{k}": value for k, value in recalls.items()}
    suffix = "_til" if stream.setting == "task" else ""
    return {f"{key}{suffix}": value for key, value in found.items()}


def _classifiers(
    cfg: DictConfig, stream: Stream, learner: ContinualLearner
) -> dict[str, dict[str, float]]:
    """Accuracies of further classifiers that are read off the final memory."""
    asked = cfg.job.classifiers
    if not asked or learner.memory is None:
        return {}
    exam = Exam(stream.tests, restricted=stream.setting == "task")
    found = {}
    own = learner.classifier
    for name, options in asked.items():
        learner.classifier = {"name": str(name), **dict(options)}
        marks = exam.take(learner, met=len(stream.tests))
        record = Record(phase=len(stream.tests) - 1, accuracy=marks.images, phases=marks.phases)
        found[str(name)] = _parts(stream, record)
    learner.classifier = own
    return found


def _parts(stream: Stream, record: Record) -> dict[str, float]:
    """Accuracy over all images, over those of the first phase, and over those of later ones.

    Where a few classes of few images follow many of many, the accuracy over all images hides how
    the few do; the harmonic mean does not.
    """
    found = {"accuracy": record.accuracy}
    known = [(a, len(t)) for a, t in zip(record.phases, stream.tests, strict=True) if a is not None]
    if len(known) < 2:
        return found
    first = known[0][0]
    later = sum(a * n for a, n in known[1:]) / sum(n for _, n in known[1:])
    harmonic = 2 * first * later / (first + later) if first + later else 0.0
    return found | {"first": first, "later": later, "harmonic": harmonic}


def _protocol(
    cfg: DictConfig,
    run: Run,
    benchmark: Benchmark,
    stream: Stream,
    learner: ContinualLearner,
) -> dict[str, Any]:
    trainer: TrainerOptions = BaseTraining.from_config(cfg).trainer
    return {
        "clfed": __version__,
        "data": benchmark.protocol,
        "stream": stream.protocol,
        "scenario": run.config["scenario"],
        "setting": stream.setting,
        "phases": len(stream.tests),
        "experiences": len(stream.experiences),
        "classes": len(stream.classes),
        "train_images": sum(len(e.train) for e in stream.experiences),
        "test_images": sum(len(test) for test in stream.tests),
        "replay_free_stream": stream.replay_free,
        "backbone": run.config["backbone"],
        "pretrained": run.config["backbone"].get("weights"),
        "precision": trainer.resolved_precision(),
        "label_space": {
            "class": "all classes seen so far",
            "task": "the classes of the image's own experience",
            "domain": "all classes, the same in every experience",
        }[stream.setting],
        "seeds": [cfg.seed],
        "accuracy": "over images",
    }


def _stability(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a continual evaluation that are defined for the whole stream."""
    return {key: value for key, value in result.items() if isinstance(value, float)}
