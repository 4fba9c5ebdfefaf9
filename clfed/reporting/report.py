"""Tables over many runs: one for each protocol, one row for each learner, unlearner or method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from clfed.reporting import federated
from clfed.reporting.cells import NOTHING, bar, join, mean, number, percent
from clfed.reporting.commands import command_lines, differences
from clfed.reporting.run_groups import FinishedRun, Repetitions, by_method, by_protocol, each
from clfed.reporting.tables import markdown_table
from clfed.reporting.unlearning_tables import comparison, explained
from clfed.reporting.words import in_words, words

MARKS = {
    "buffer": "keeps images of earlier experiences",
    "transductive": "answers depend on the other images that are asked about",
    "pre-trained": "starts from weights that other data made",
    "exact": "an algorithm guarantees the result, for what its scope names",
    "own original": "forgets from a model that it trained in its own way, not from the original",
}


@dataclass(frozen=True)
class Table:
    """The runs of one protocol.

    Attributes:
        job: Whose runs these are.
        title: Job and stream in a few words.
        protocol: What was measured, by name.
        commands: Shell commands that make the runs.
        rows: Cells by column.
        bars: The same rows for :func:`clfed.reporting.continual.learners_chart`, of unlearners
            for :func:`clfed.reporting.unlearning_chart.evidence_chart`, or of federated methods
            for :func:`clfed.reporting.federated_chart.methods_chart`.
        notes: What marks and columns mean.
        warnings: What a reader must know before comparing.
    """

    job: str
    title: str
    protocol: Mapping[str, Any]
    commands: tuple[str, ...]
    rows: tuple[Mapping[str, object], ...]
    bars: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def tables(runs: Iterable[FinishedRun]) -> list[Table]:
    """Make a table for each protocol among some runs."""
    makers = {
        "continual": _streams,
        "unlearning": _unlearners,
        "federated": _methods,
        "embedding": _embeddings,
        "reconnaissance": _alternatives,
    }
    return [makers[group[0].results["job"]](group) for group in by_protocol(runs)]


def markdown(found: Sequence[Table], refused: Sequence[str]) -> str:
    """Write tables as one Markdown document.

    Args:
        found: From :func:`tables`.
        refused: A sentence for each folder that was left out.
    """
    blocks = [f"# Report\n\n{_many(len(found), 'table')}, one for each protocol. {_CELLS}"]
    for place, table in enumerate(found, 1):
        parts = [f"## Table {place}: {table.title}"]
        parts += [f"**Warning:** {warning}" for warning in table.warnings]
        parts.append("\n".join(in_words(table.protocol)))
        if table.commands:
            parts.append("\n".join(["```sh", *table.commands, "```"]))
        parts.append(markdown_table(table.rows))
        parts += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
        blocks.append("\n\n".join(parts))
    if refused:
        lines = "\n".join(f"- {sentence}" for sentence in refused)
        blocks.append(f"## Left out: {_many(len(refused), 'folder')}\n\n{lines}")
    return "\n\n".join(blocks) + "\n"


_CELLS = (
    "Percentages are means over the seeds, with the sample standard deviation where there are "
    "several; kilobytes, seconds and bytes are means."
)


def _streams(group: Sequence[FinishedRun]) -> Table:
    """One row a learner, the most accurate one first."""
    rows = sorted(by_method(group), key=lambda row: (-mean(_accuracies(row)), _learner(row)))
    labels = _labels(rows)
    marks = [_marks(row) for row in rows]
    cells: list[dict[str, object]] = [
        {
            "learner": _marked(label, marked),
            "kept images": max(int(run.method.get("images_kept", 0)) for run in row.runs),
            "merge": str(row.runs[0].method.get("merge", NOTHING)),
            "accuracy %": percent(_accuracies(row)),
            "incremental %": percent(_metric(row, "acc/inc")),
            "forgetting %": percent(_metric(row, "forgetting/max")),
            "WC-ACC %": percent(each(row, lambda r: r.get("stability", {}).get("wc_acc"))),
            "stored kB": number(each(row, _stored), "{:,.1f}"),
            "seconds": number(each(row, lambda r: r["final"]["seconds"]), "{:,.1f}"),
            "seeds": join(row.seeds),
        }
        for row, label, marked in zip(rows, labels, marks, strict=True)
    ]
    if all(row["WC-ACC %"] == NOTHING for row in cells):
        for row in cells:
            del row["WC-ACC %"]
    bars = [
        {"learner": label, "marks": marked, **bar(_accuracies(row))}
        for row, label, marked in zip(rows, labels, marks, strict=True)
    ]
    return _table(group, rows, cells, bars, marks)


def _unlearners(group: Sequence[FinishedRun]) -> Table:
    """One row an unlearner, the nearest to the oracle first, beside oracle and original."""
    rows = sorted(by_method(group), key=_learner)
    marks = [_marks(row) for row in rows]
    cells, bars = comparison(rows, [*map(_marked, _labels(rows), marks)])
    return _table(group, rows, cells, bars, marks, explained(rows))


def _methods(group: Sequence[FinishedRun]) -> Table:
    """One row a federated method, the most accurate one first."""
    named = [(federated.method_name(row.runs[0].method), row) for row in by_method(group)]
    named.sort(key=lambda pair: (-mean(federated.union(pair[1])), pair[0]))
    rows = [row for _, row in named]
    marks = [_marks(row) for row in rows]
    labels = _told_apart([name for name, _ in named], [*map(federated.settings, rows)])
    labels = [*map(_marked, labels, marks)]
    cells = federated.without_empty([*map(federated.method_cells, rows, labels)])
    bars = [*map(federated.method_bar, rows, labels)]
    return _table(group, rows, cells, bars, marks, federated.explained(rows))


def _embeddings(group: Sequence[FinishedRun]) -> Table:
    """One row for each way to train an embedding in the federation, the most accurate one first."""
    rows = sorted(by_method(group), key=lambda row: (-federated.reached(row), _learner(row)))
    labels = _labels(rows)
    bars = [b for pair in zip(rows, labels, strict=True) for b in federated.embedding_bars(*pair)]
    cells = [*map(federated.embedding_cells, rows, labels)]
    return _table(group, rows, cells, bars, [], federated.embeddings_explained())


def _alternatives(group: Sequence[FinishedRun]) -> Table:
    """One row for each way of learning that a federation was compared with."""
    (row,) = by_method(group)
    final = [run.results["final"]["accuracy"] for run in row.runs]
    listed = [run.results.get("alternatives", {}) for run in row.runs]
    names = [n for n in dict.fromkeys(n for a in listed for n in a) if any(n in f for f in final)]
    # Results without alternatives name them in their accuracies.
    names = names or list(dict.fromkeys(n for f in final for n in f))
    values = {name: [f[name] for f in final if name in f] for name in names}
    names.sort(key=lambda name: (-mean(values[name]), name))
    # One run may be many draws already; its own spread is then the only one there is.
    spreads = [run.results["final"].get("spread", {}) for run in row.runs]
    alone = {n: spreads[0].get(n) if len(row.runs) == 1 else None for n in names}
    cells: list[dict[str, object]] = [
        {
            "alternative": name,
            "accuracy %": percent(values[name], alone[name]),
            "kB up": _cost(listed, name, lambda c: c["bytes"]["up"] / 1000),
            "kB down": _cost(listed, name, lambda c: c["bytes"]["down"] / 1000),
            "seconds": _cost(listed, name, lambda c: c["seconds"]),
            "seeds": join(r.seed for r, f in zip(row.runs, final, strict=True) if name in f),
        }
        for name in names
    ]
    bars = [{"learner": name, **bar(values[name], alone[name])} for name in names]
    return _table(group, [row], cells, bars, [])


def _table(
    group: Sequence[FinishedRun],
    rows: Sequence[Repetitions],
    cells: Sequence[Mapping[str, object]],
    bars: Sequence[Mapping[str, Any]],
    marks: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
) -> Table:
    first = group[0]
    recipes = [(row.runs[-1].recipe, row.seeds) for row in rows]
    lines = command_lines([(made, seeds) for made, seeds in recipes if made is not None])
    used = [mark for mark in MARKS if any(mark in marked for marked in marks)]
    warnings = [warning for row in rows for warning in row.warnings]
    if len({tuple(row.seeds) for row in rows}) > 1:
        warnings.append("the rows do not have the same seeds, so their means are not paired.")
    watched = [run.results["stability"] for row in rows for run in row.runs if run.watched]
    if len({(found.get("every"), found.get("samples")) for found in watched}) > 1:
        warnings.append("WC-ACC was measured at different intervals or on different samples.")
    return Table(
        job=first.results["job"],
        title=f"{first.results['job']}{_about(group)}",
        protocol=first.protocol,
        commands=tuple(lines),
        rows=tuple(cells),
        bars=tuple(bars),
        notes=(*(f"{mark}: {MARKS[mark]}" for mark in used), *notes),
        warnings=tuple(warnings),
    )


def _marks(row: Repetitions) -> tuple[str, ...]:
    method, protocol = row.runs[0].method, row.runs[0].protocol
    holds = {
        "buffer": any(run.method.get("images_kept", 0) for run in row.runs),
        "transductive": method.get("transductive"),
        "pre-trained": method.get("pretrained") or protocol.get("pretrained"),
        "exact": method.get("exact"),
        "own original": method.get("own_original"),
    }
    return tuple(mark for mark in MARKS if holds[mark])


def _marked(label: str, marks: Sequence[str]) -> str:
    return f"{label} ({', '.join(marks)})" if marks else label


def _labels(rows: Sequence[Repetitions]) -> list[str]:
    """Names of methods; where one stands in several rows, with the settings that differ."""
    options = [row.runs[0].method.get("options") or {} for row in rows]
    return _told_apart([*map(_learner, rows)], options)


def _told_apart(names: Sequence[str], options: Sequence[Mapping[str, Any]]) -> list[str]:
    labels = []
    for name, own in zip(names, options, strict=True):
        others = [o for n, o in zip(names, options, strict=True) if n == name and o != own]
        differing = dict.fromkeys(
            override.partition("=")[0].lstrip("+~").removeprefix(".")
            for other in others
            for override in differences(other, own, "")
        )
        told = [f"{key}={_at(own, key)}" for key in differing]
        labels.append(" ".join([name, *told]))
    return labels


def _at(options: Any, key: str) -> str:
    for part in key.split("."):
        options = options.get(part) if isinstance(options, Mapping) else None
    return words(options)


def _learner(row: Repetitions) -> str:
    return str(row.runs[0].method.get("name"))


def _accuracies(row: Repetitions) -> list[float]:
    return [run.results["final"]["accuracy"][_learner(row)] for run in row.runs]


def _metric(row: Repetitions, name: str) -> list[float]:
    def find(results: Mapping[str, Any]) -> float | None:
        found = results.get("continual") or {}
        # Numbers of streams whose questions name their task carry a suffix.
        value: float | None = found.get(name, found.get(f"{name}_til"))
        return value

    return each(row, find)


def _stored(results: Mapping[str, Any]) -> float | None:
    stored = results["learner"].get("stored")
    return sum(stored.values()) / 1000 if stored else None


def _cost(
    listed: Sequence[Mapping[str, Any]], name: str, find: Callable[[Mapping[str, Any]], float]
) -> str:
    costs = [alternatives[name] for alternatives in listed if name in alternatives]
    try:
        return number([find(cost) for cost in costs], "{:,.1f}")
    except KeyError:
        return NOTHING


def _about(group: Sequence[FinishedRun]) -> str:
    """What the runs were about, in a few words."""
    requests = [run.results.get("requests", ()) for run in group]
    asked = {tuple(f"{part['kind']}: {part['what']}" for part in parts) for parts in requests}
    if len(asked) > 1:
        kinds = dict.fromkeys(part["kind"] for part in requests[0])
        return f", {', '.join(kinds)} drawn by the seed"
    if parts := asked.pop():
        return f", {shorten('; '.join(parts), 60, placeholder=' ...')}"
    scenario = group[0].protocol.get("scenario")
    target = scenario.get("_target_") if isinstance(scenario, Mapping) else scenario
    return f", {words(target).rpartition('.')[2]}" if target else ""


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
