"""Tables of unlearning: one run beside its oracle, and many methods beside each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from clfed.reporting.run_groups import FinishedRun, Repetitions
from clfed.reporting.tables import console_table

if TYPE_CHECKING:
    from rich.table import Table

    from clfed.evaluation.evidence import Measure

#: What a report shows of each method, beside all attacks.
REPORTED = ("ua", "ra", "ta", "ta_forget", "avg_gap", "aus", "tow", "tow_mia", "js_forget", "pra")
ATTACK = "mia_"
TENTH = 0.1  # of the oracle's time, which an approximate method should not exceed
NOTHING = "-"


def evidence_table(results: Mapping[str, Any]) -> Table:
    """The table at the end of a run: the model before and after, beside the oracle.

    The spread over originals says how much depends on the model that forgets, the one over
    unlearning seeds how much on the forgetting itself, and the one of the oracle how far apart
    models lie that never saw the data.

    Args:
        results: Valid results of the unlearning job.
    """
    method, found = results["unlearner"], results["unlearning"]
    before, after, oracle = found["original"], found["measures"], found["oracle"]
    rows = [
        (
            _known()[name].title if name in _known() else name,
            found["ideals"].get(name, NOTHING),
            _signed(name, before.get(name, {}), "mean", "spread"),
            _signed(name, after.get(name, {}), "mean"),
            _signed(name, after.get(name, {}), "original_spread"),
            _signed(name, after.get(name, {}), "unlearning_spread"),
            _signed(name, oracle.get(name, {}), "mean", "spread"),
        )
        for name in _ordered([after, before, oracle])
    ]
    asked = "; ".join(f"{part['what']} ({part['images']} images)" for part in results["requests"])
    caption = [
        f"forgotten: {asked}",
        f"{'exact' if method['exact'] else 'no guarantee'}: {method['scope']}; answers from its "
        f"{method['reads']}; looks at {', '.join(method['needs']) or 'no data'}",
        cost_line(found["cost"]),
    ]
    if any(part[key] is not None for part in after.values() for key in part if key != "mean"):
        caption.append(
            "± originals: standard deviation over models that forget; ± unlearning: over seeds of "
            "the forgetting, for one of them"
        )
    return console_table(
        f"unlearning: {method['name']}, seed {results['seed']}",
        ("", "ideal", "before", "after", "± originals", "± unlearning", "oracle"),
        rows,
        "\n".join(caption),
    )


def sequence_table(results: Mapping[str, Any]) -> Table | None:
    """What each of several requests left; None where there was only one.

    Args:
        results: Valid results of the unlearning job.
    """
    sequence = results["unlearning"]["sequence"]
    if len(sequence) < 2:
        return None
    columns = ("forget", "earlier", "retain", "test", "hmean")
    rows = [
        (
            str(part["id"]),
            str(part["kind"]),
            *(NOTHING if part.get(key) is None else f"{part[key]:.1%}" for key in columns),
            f"{part['seconds']:.2f}",
        )
        for part in sequence
    ]
    note = "accuracy; earlier: on what the requests before it named"
    return console_table("After each request", ("request", "kind", *columns, "seconds"), rows, note)


def cost_line(cost: Mapping[str, Any]) -> str:
    """What forgetting took, against training again, and by how much it missed a tenth of that.

    Example:
        >>> cost_line({"seconds": 6.0, "spread": 0.5, "oracle_seconds": 30.0, "ratio": 0.2})
        '6.00 ± 0.50 s, 20.0% of the 30.0 s that training again takes: 2.0 times the tenth'
    """
    missed = f": {cost['ratio'] / TENTH:.1f} times the tenth" if cost["ratio"] > TENTH else ""
    return (
        f"{_pair((cost['seconds'], cost['spread']), '{:.2f}')} s, {cost['ratio']:.1%} of the "
        f"{cost['oracle_seconds']:.1f} s that training again takes{missed}"
    )


@dataclass(frozen=True)
class _Entry:
    """One row; numbers are mean and spread, None where there is no spread."""

    label: str
    measures: Mapping[str, tuple[float, float | None]]
    seconds: tuple[float, float | None] | None
    ratio: float | None
    runs: Sequence[FinishedRun]
    reference: bool = False

    @property
    def gap(self) -> float:
        return self.measures.get("avg_gap", (math.inf, None))[0]


def comparison(
    rows: Sequence[Repetitions], labels: Sequence[str]
) -> tuple[list[dict[str, object]], list[dict[str, Any]]]:
    """Methods beside oracle and original, the nearest to the oracle first.

    The oracle stands on top: its gap to other oracles is noise, which no method can undercut.
    What stands below the original is worse than forgetting nothing.

    Args:
        rows: One a method.
        labels: What to call them.

    Returns:
        Cells by column, and the rows of :func:`clfed.reporting.unlearning_chart.evidence_chart`.
    """
    oracle, original = _references(rows)
    methods = [_method(row, label) for row, label in zip(rows, labels, strict=True)]
    entries = [
        oracle,
        *sorted([*methods, original], key=lambda entry: (entry.gap, entry.label)),
    ]
    shown = _reported(entry.measures for entry in entries)
    cells: list[dict[str, object]] = [
        {
            "unlearner": entry.label,
            **{_heading(name): _unsigned(name, entry.measures.get(name)) for name in shown},
            "seconds": NOTHING if entry.seconds is None else _pair(entry.seconds, "{:.2f}"),
            "x oracle": NOTHING if entry.ratio is None else f"{entry.ratio:.3f}",
            "originals": sum(map(_originals, entry.runs)),
            "seeds": ", ".join(str(run.seed) for run in entry.runs),
        }
        for entry in entries
    ]
    bars = [
        {
            "method": entry.label,
            "avg_gap": entry.gap,
            "spread": entry.measures["avg_gap"][1],
            "ratio": entry.ratio,
            "reference": entry.reference,
        }
        for entry in entries
        if "avg_gap" in entry.measures
    ]
    return cells, bars


def explained(rows: Sequence[Repetitions]) -> list[str]:
    """What is exact, what the columns of :func:`comparison` mean, and which values are ideal."""
    exact = {run.method["name"]: run.method["scope"] for run in _runs(rows) if run.method["exact"]}
    found = [run.results["unlearning"] for run in _runs(rows)]
    ideals = {name: ideal for part in found for name, ideal in part["ideals"].items()}
    notes = [
        f"{_heading(name)}: {measure.meaning.rstrip('.')}; ideal: {ideals.get(name, measure.ideal)}"
        for name in _reported(part["measures"] for part in found)
        if (measure := _known().get(name)) is not None
    ]
    return [
        *(f"scope of {name}: {scope}" for name, scope in exact.items()),
        *notes,
        "x oracle: time, as a share of what training again without the data takes",
    ]


def _runs(rows: Iterable[Repetitions]) -> list[FinishedRun]:
    return [run for row in rows for run in row.runs]


def _method(row: Repetitions, label: str) -> _Entry:
    found = [run.results["unlearning"] for run in row.runs]
    costs = [part["cost"] for part in found]
    return _Entry(
        label,
        _pooled([part["measures"] for part in found], "original_spread"),
        _over(costs, "seconds", "spread"),
        statistics.fmean(cost["ratio"] for cost in costs),
        row.runs,
    )


def _references(rows: Sequence[Repetitions]) -> tuple[_Entry, _Entry]:
    """Oracle and original, of one run a seed; no originals that a method made for itself."""
    runs = _runs(rows)
    shared = [run for run in runs if not run.method.get("own_original")] or runs
    by_seed = {run.seed: run for run in shared}
    chosen = [by_seed[seed] for seed in sorted(by_seed)]
    found = [run.results["unlearning"] for run in chosen]
    oracle = _pooled([part["oracle"] for part in found], "spread")
    original = _pooled([part["original"] for part in found], "spread")
    seconds = _over([part["cost"] for part in found], "oracle_seconds")
    return (
        _Entry("oracle", oracle, seconds, 1.0, chosen, reference=True),
        _Entry("original", original, None, None, chosen, reference=True),
    )


def _originals(run: FinishedRun) -> int:
    return len({one["original_seed"] for one in run.results["unlearning"]["runs"]})


def _pooled(
    runs: Sequence[Mapping[str, Mapping[str, Any]]], spread: str
) -> dict[str, tuple[float, float | None]]:
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: _over([run[name] for run in runs if name in run], "mean", spread) for name in names
    }


def _over(
    parts: Sequence[Mapping[str, Any]], mean: str, spread: str = ""
) -> tuple[float, float | None]:
    """Mean over runs, and the spread within them where they have one, else that between them."""
    values = [part[mean] for part in parts]
    within = [part[spread] for part in parts if part.get(spread) is not None]
    if within:
        return statistics.fmean(values), math.sqrt(statistics.fmean(s**2 for s in within))
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@cache
def _known() -> dict[str, Measure]:
    # Here, because a report of other jobs needs none of what the measures are made with.
    from clfed.evaluation.evidence import MEASURES

    return {measure.name: measure for measure in MEASURES}


def _ordered(parts: Iterable[Iterable[str]]) -> list[str]:
    """Names in the order of the known measures; those of somebody's own come last."""
    names = dict.fromkeys(name for part in parts for name in part)
    order = [name for name in _known() if name in names]
    return [*order, *(name for name in names if name not in _known())]


def _reported(parts: Iterable[Iterable[str]]) -> list[str]:
    return [n for n in _ordered(parts) if n in REPORTED or n.startswith(ATTACK)]


def _is_percent(name: str) -> bool:
    return name in _known() and _known()[name].percent


def _heading(name: str) -> str:
    title = _known()[name].title if name in _known() else name
    return f"{title} %" if _is_percent(name) else title


def _signed(name: str, part: Mapping[str, Any], value: str, spread: str = "") -> str:
    """A cell of the console: percentages carry their sign."""
    if part.get(value) is None:
        return NOTHING
    return _pair((part[value], part.get(spread)), "{:.1%}" if _is_percent(name) else "{:.3f}")


def _unsigned(name: str, value: tuple[float, float | None] | None) -> str:
    """A cell of a report: the heading carries the sign."""
    if value is None:
        return NOTHING
    mean, spread = value
    if not _is_percent(name):
        return _pair(value, "{:.3f}")
    return _pair((100 * mean, None if spread is None else 100 * spread), "{:.2f}")


def _pair(value: tuple[float, float | None], form: str) -> str:
    mean, spread = value
    return form.format(mean) + ("" if spread is None else f" ± {form.format(spread)}")
