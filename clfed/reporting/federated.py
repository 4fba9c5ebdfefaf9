"""Rows of a report over federated methods: what is known, what it took, what left a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clfed.config import choices, config_dir
from clfed.reporting.cells import NOTHING, bar, join, mean, number, percent
from clfed.reporting.commands import differences
from clfed.reporting.run_groups import Repetitions, each

#: Groups that are wrapped around a method, with the choice that changes nothing.
AROUND = {"curriculum": "", "privacy": "plain"}
#: What may become of prototypes when their embedding is replaced.
REPLACEMENTS = {
    "before": "older prototypes under the older embedding",
    "recomputed": "every node embeds its images anew",
    "carried": "nodes without images keep theirs, moved by the others' drift statistics",
    "moved": "all prototypes moved by drift statistics",
    "stale": "older prototypes under the present embedding, unchanged",
}
#: Accuracies of runs that were looked at often, with their headings.
OVER_TIME = {
    "union_last10": "accuracy %, last 10",
    "own_last10": "own %, last 10",
    "own_best": "own %, best",
}

PEAK = "peak MB: largest memory that the work of one node took"


def method_name(method: Mapping[str, Any]) -> str:
    """Return the name of a method and of what is wrapped around it.

    Args:
        method: ``method`` of the results; ``curriculum`` and ``privacy`` in it are optional, each
            the name of a choice or its settings.
    """
    around = [_choice(group, method.get(group)) for group in AROUND]
    told = [
        name
        for name, plain in zip(around, AROUND.values(), strict=True)
        if name is not None and name != plain
    ]
    return " + ".join([str(method["name"]), *told])


def settings(row: Repetitions) -> dict[str, Any]:
    """Return everything by which methods of one name may differ."""
    method = row.runs[0].method
    around = {group: method.get(f"{group}_options", method.get(group)) for group in AROUND}
    return {**method["options"], **around}


def union(row: Repetitions) -> list[float]:
    """Return the final accuracy over all classes, one value a seed."""
    return each(row, lambda results: results["final"]["accuracy"]["union"])


def method_cells(row: Repetitions, label: str) -> dict[str, object]:
    """Return the cells of one method by column.

    Args:
        row: Its runs.
        label: What to call it.
    """

    def accuracy(key: str) -> str:
        return percent(each(row, lambda results: results["final"]["accuracy"].get(key)))

    return {
        "method": label,
        "accuracy %": accuracy("union"),
        "own %": accuracy("own"),
        "forgetting %": percent(each(row, lambda results: results["final"]["forgetting"])),
        **{heading: accuracy(key) for key, heading in OVER_TIME.items()},
        **_costs(row),
        "epsilon": number(each(row, lambda results: results["method"].get("epsilon")), "{:.3g}"),
        "seeds": join(row.seeds),
    }


def without_empty(cells: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Leave out the columns over time where no run was looked at so often."""
    empty = {h for h in OVER_TIME.values() if all(row[h] == NOTHING for row in cells)}
    return [{key: cell for key, cell in row.items() if key not in empty} for row in cells]


def method_bar(row: Repetitions, label: str) -> dict[str, Any]:
    """Return one row of :func:`clfed.reporting.federated_chart.methods_chart`."""
    own = each(row, lambda results: results["final"]["accuracy"]["own"])
    sent = each(row, lambda results: sum(results["final"]["bytes"].values()))
    return {"method": label, "own": mean(own), "bytes": mean(sent), **bar(union(row))}


def explained(rows: Sequence[Repetitions]) -> list[str]:
    """What the columns of :func:`method_cells` mean."""
    found = [
        "accuracy %: test images of all classes that any node has met; where every node has a "
        "model of its own, over the answers of all nodes",
        "own %: test images that are like what each node has met itself, over all nodes",
        "forgetting %: points lost since the best moment, mean over the missions but the last",
        "kB, node seconds: of the whole run, all nodes together; down: with the network, which "
        "each node gets once",
        PEAK,
    ]
    methods = [run.method for row in rows for run in row.runs]
    if any("union_last10" in run.results["final"]["accuracy"] for row in rows for run in row.runs):
        found.append(
            "last 10: mean of the last ten looks; best: chosen by test images, so too optimistic"
        )
    bounds = dict.fromkeys(
        f"delta = {method.get('delta', NOTHING)}, one {method.get('unit', 'example')}"
        for method in methods
        if method.get("epsilon") is not None
    )
    if bounds:
        found.append(f"epsilon: of the whole run, {'; '.join(bounds)}; -: no bound")
    return found


def validation(row: Repetitions) -> list[float]:
    """Return the accuracy of an embedding on the validation classes, one value a seed."""
    return each(row, lambda results: results["final"]["accuracy"].get("validation"))


def reached(row: Repetitions) -> float:
    """Return the mean of :func:`validation`, 0 where there are no validation classes."""
    return mean(validation(row) or [0.0])


def embedding_cells(row: Repetitions, label: str) -> dict[str, object]:
    """Return the cells of one way to train an embedding by column.

    Args:
        row: Its runs.
        label: What to call it.
    """
    return {
        "method": label,
        "accuracy %": percent(validation(row)),
        **{f"{way} %": percent(_replaced(row, way)) for way in REPLACEMENTS},
        **_costs(row),
        "seeds": join(row.seeds),
    }


def embedding_bars(row: Repetitions, label: str) -> list[dict[str, Any]]:
    """Return rows of :func:`clfed.reporting.continual.learners_chart`."""
    named = {"": validation(row)} | {f", {way}": _replaced(row, way) for way in REPLACEMENTS}
    return [{"learner": label + way, **bar(found)} for way, found in named.items() if found]


def embeddings_explained() -> list[str]:
    """What the columns of :func:`embedding_cells` mean."""
    ways = "; ".join(f"{way}: {told}" for way, told in REPLACEMENTS.items())
    return [
        "accuracy %: images of the validation classes, named by the nearest class mean; they also "
        "choose the round that is kept",
        f"when the embedding of an earlier round is replaced by it: {ways}",
        "kB, node seconds: of the rounds of training, all nodes together",
        PEAK,
    ]


def _replaced(row: Repetitions, way: str) -> list[float]:
    return each(row, lambda results: results.get("replacement", {}).get("accuracy", {}).get(way))


def _costs(row: Repetitions) -> dict[str, object]:
    def sent(way: str) -> list[float]:
        return each(row, lambda results: results["final"]["bytes"][way] / 1000)

    peaks = each(row, lambda results: results["final"]["peak_bytes"])
    return {
        "kB up": number(sent("up"), "{:,.1f}"),
        "kB down": number(sent("down"), "{:,.1f}"),
        "node seconds": number(
            each(row, lambda results: results["final"]["node_seconds"]), "{:,.1f}"
        ),
        "peak MB": number([peak / 1e6 for peak in peaks], "{:,.0f}"),
        "what leaves a node": row.runs[0].method["leaves"],
    }


def _choice(group: str, found: Any) -> str | None:
    """Return the choice of a group that is nearest to its settings, None where there are none."""
    if found is None or isinstance(found, str):
        return found
    known = {name: _read(group, name) for name, _ in choices(group)}
    return min(known, key=lambda name: len([*differences(known[name], found, "")]), default=None)


def _read(group: str, name: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{name}.yaml"))
