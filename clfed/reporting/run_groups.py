"""Finished runs, found in folders and put together by what they measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clfed.config import one_sentence
from clfed.errors import ConfigError, RunFolderError
from clfed.reporting.commands import ASIDE, Recipe, differences, recipe
from clfed.reporting.results import read
from clfed.reporting.run_checks import CHECKS

logger = logging.getLogger(__name__)

#: Jobs that have a table, with the key of their results that tells rows apart.
JOBS = {
    "continual": "learner",
    "unlearning": "unlearner",
    "federated": "method",
    "embedding": "method",
    "reconnaissance": "",
}
#: Keys of a protocol that a repetition changes, or that were measured.
REPEATED = ("seeds", "embedding")
#: The same within ``protocol.training``.
MEASURED = ("seconds", "cached", "best_step", "validation")


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """One run that can stand in a table.

    Attributes:
        folder: Where it lies.
        results: Content of ``results.json``, valid.
        written: When the results were written, seconds since the epoch.
    """

    folder: Path
    results: Mapping[str, Any]
    written: float

    @property
    def seed(self) -> int:
        """The seed of the run."""
        seed: int = self.results["seed"]
        return seed

    @property
    def method(self) -> Mapping[str, Any]:
        """Who did it, learner, unlearner or strategy; empty for jobs that compare no methods."""
        found: Mapping[str, Any] = self.results.get(JOBS[self.results["job"]], {})
        return found

    @property
    def watched(self) -> bool:
        """Whether the learner was evaluated while it trained."""
        return "stability" in self.results

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """What was measured, without what differs between repetitions."""
        found = {k: v for k, v in self.results["protocol"].items() if k not in REPEATED}
        if isinstance(training := found.get("training"), Mapping):
            found["training"] = {k: v for k, v in training.items() if k not in MEASURED}
        trained = {
            "reconnaissance": True,
            "federated": training is not None,
            "embedding": found.get("learner") != "none",
        }
        if trained.get(self.results["job"], False) and self.config is not None:
            # How the encoder was made decides as much, and these results do not say it.
            found |= {k: self.config[k] for k in ("backbone", "learner") if k in self.config}
        return found

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The resolved configuration, None where ``config.yaml`` is missing or no mapping."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            found = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))
        except (OSError, ValueError, YAMLError, OmegaConfBaseException):
            return None
        return found if isinstance(found, dict) else None  # type: ignore[return-value]

    @cached_property
    def recipe(self) -> Recipe | None:
        """The command that makes the run, None where its configuration is not to be had."""
        try:
            return None if self.config is None else recipe(self.config)
        except (ConfigError, KeyError, TypeError) as error:
            logger.warning("%s: no command is found again: %s", self.folder, error)
            return None


@dataclass(frozen=True)
class Repetitions:
    """The runs of one row: equal but for the seed, one run a seed.

    Attributes:
        runs: Ascending by seed.
        warnings: A sentence for each seed that was run more than once with other results.
    """

    runs: tuple[FinishedRun, ...]
    warnings: tuple[str, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [run.seed for run in self.runs]


def each(row: Repetitions, find: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    """Return what is found in the results of a row, without the runs where there is nothing."""
    return [value for run in row.runs if (value := find(run.results)) is not None]


def find_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read every ``results.json`` in some folders, at any depth.

    Args:
        folders: Searched recursively; what several of them hold counts once.

    Returns:
        The usable runs in the order of their paths, and a sentence for each other one.

    Raises:
        RunFolderError: Nothing usable was found.
    """
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("results.json")}
    runs, refused = [], []
    for path in sorted(paths.values()):
        try:
            runs.append(_open(path))
        except RunFolderError as error:
            refused.append(f"{path.parent}: {one_sentence(error)}")
    if not runs:
        names = ", ".join(map(str, folders))
        raise RunFolderError(
            f"Expected results of finished runs in {names}, got none"
            + (f"; the first of {len(refused)} left out is {refused[0]}" if refused else "."),
            remedy="Name folders of runs: clfed job=report job.runs=[runs]",
        )
    return runs, refused


def by_protocol(runs: Iterable[FinishedRun]) -> list[list[FinishedRun]]:
    """Put runs of the same job and protocol together, in the order in which they first occur."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(_key(run.results["job"], run.protocol), []).append(run)
    return list(groups.values())


def by_method(runs: Iterable[FinishedRun]) -> list[Repetitions]:
    """Divide the runs of one protocol into rows.

    Methods of the same name but with other settings, or of another kind, are rows of their own.
    """
    rows: dict[str, list[FinishedRun]] = {}
    for run in runs:
        # How many images a buffer holds may depend on the seed; whether there is one does not.
        # So may the bound of what was sent.
        kind = {k: v for k, v in run.method.items() if k not in ("stored", "scope", "epsilon")}
        kind["images_kept"] = bool(kind.get("images_kept"))
        kind["options"] = _without_seed(kind.get("options"), run.seed)
        rows.setdefault(_key(kind), []).append(run)
    return [_repetitions(found) for found in rows.values()]


def _without_seed(options: Any, seed: int) -> Any:
    """Return settings without those that follow the seed of the run."""
    if not isinstance(options, Mapping):
        return options
    return {
        key: _without_seed(value, seed)
        for key, value in options.items()
        if not (key == "seed" and value == seed)
    }


def _repetitions(runs: Sequence[FinishedRun]) -> Repetitions:
    newest: dict[int, FinishedRun] = {}
    warnings = []
    for run in sorted(runs, key=lambda run: run.written):
        before = newest.get(run.seed)
        newest[run.seed] = run
        if before is not None and _measured(before) != _measured(run):
            name = run.method.get("name", run.results["job"])
            warnings.append(
                f"{name}, seed {run.seed}: {before.folder} and {run.folder} hold different "
                f"results{_why(before, run)}; the newer one, {run.folder}, is used."
            )
    return Repetitions(tuple(newest[seed] for seed in sorted(newest)), tuple(warnings))


def _why(one: FinishedRun, other: FinishedRun) -> str:
    if one.config is None or other.config is None:
        return ""
    keys = [
        override.partition("=")[0].lstrip("+~")
        for key in dict.fromkeys((*one.config, *other.config))
        if key not in ASIDE
        for override in differences(one.config.get(key, ...), other.config.get(key, ...), key)
    ]
    return f" (they differ in {', '.join(keys)})" if keys else " of the same configuration"


def _measured(run: FinishedRun) -> str:
    keys = ("accuracy_matrix", "continual", "accuracy_by_mission")
    parts = [run.results.get(key) for key in keys]
    evidence = run.results.get("unlearning", {}).get("measures")
    return _key(run.results["final"]["accuracy"], *parts, evidence)


def _open(path: Path) -> FinishedRun:
    results: Mapping[str, Any] = read(path)
    if results["job"] not in JOBS:
        raise RunFolderError(f"job={results['job']} has no table in this report.")
    if (check := CHECKS.get(results["job"])) is not None:
        check(results)
    return FinishedRun(path.parent, results, path.stat().st_mtime)


def _key(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True)
