"""Tables for people: on the console with rich, in documents as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clfed.reporting.console import console
from clfed.reporting.federated import method_name

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "classifiers_table",
    "console",
    "console_table",
    "federated_table",
    "markdown_table",
    "metrics_table",
    "summary_table",
]

DESCRIPTIONS = {
    "merged": "every node's prototypes added up",
    "pooled": "all images in one place",
    "isolated": "each node alone",
    "finetuned": "trained on the newest classes only",
    "joint": "trained on all images at once",
}


def summary_table(results: Mapping[str, Any]) -> Table:
    """The table at the end of a run: what each alternative reached, and at what cost.

    What an alternative saw and cost comes from ``alternatives`` in the results. The first one
    takes the run's own steps where it is not listed there; the others show a dash. Bytes are
    divided by the number of nodes when ``protocol.nodes`` says how many there are.

    Args:
        results: Valid results, see :mod:`clfed.reporting.results`.
    """
    nodes = results["protocol"].get("nodes")
    per_node = isinstance(nodes, int) and not isinstance(nodes, bool) and nodes > 0
    share = nodes if per_node else 1
    final = results["final"]
    own = _run_costs(results)
    rows, notes = [], []
    for index, (name, accuracy) in enumerate(final["accuracy"].items()):
        costs = results.get("alternatives", {}).get(name) or (own if index == 0 else {})
        sent = costs.get("bytes")
        if note := costs.get("description") or DESCRIPTIONS.get(name):
            notes.append(f"{name}: {note}")
        rows.append(
            (
                name,
                _percent(accuracy, final.get("spread", {}).get(name)),
                _whole(costs.get("classes")),
                _kilobytes(sent["up"] / share) if sent else "-",
                _kilobytes(sent["down"] / share) if sent else "-",
                _seconds(costs.get("seconds")),
            )
        )
    merge = results.get("learner", {}).get("merge", "exact")
    if results["job"] == "reconnaissance" and merge != "exact":
        notes.append(
            f"{results['learner']['name']}: in a stream it merges "
            f"{'not at all' if merge == 'none' else 'approximately'}; here its network is frozen "
            "after base training and only exact class statistics are added"
        )
    notes.append(f"kB: over the whole run, {'for each node' if per_node else 'all nodes together'}")
    return console_table(
        f"{results['job']}: all classes together, seed {results['seed']}",
        ("", "accuracy", "classes", "kB up", "kB down", "seconds"),
        rows,
        "\n".join(notes),
    )


def classifiers_table(results: Mapping[str, Any]) -> Table | None:
    """The ways to read classes off the same memory; None where the job compared none.

    Args:
        results: Valid results; the rows are those of ``classifiers``.
    """
    parts = ("first", "later", "harmonic")
    rows = [
        (
            name,
            _percent(row["accuracy"], row.get("spread")),
            *(_percent(row[key], None) if key in row else "-" for key in parts),
            _kilobytes(row["bytes"]) if "bytes" in row else "-",
            _seconds(row.get("seconds")),
        )
        for name, row in results.get("classifiers", {}).items()
    ]
    if not rows:
        return None
    title = "Classifiers read off the same memory"
    columns = ("", "accuracy", "first phase", "later", "harmonic", "kB of memory", "seconds")
    return console_table(title, columns, rows)


METRICS = {
    "acc/avg": "average accuracy",
    "acc/all": "accuracy over all images",
    "acc/inc": "average incremental accuracy",
    "acc/balanced": "mean accuracy of the classes",
    "acc/first": "accuracy on the first phase",
    "acc/later": "accuracy on later phases",
    "acc/harmonic": "their harmonic mean",
    "learning": "accuracy just after learning",
    "forgetting/max": "forgetting, from the best",
    "forgetting/end": "forgetting, from just after learning",
    "bwt": "backward transfer",
    "fwt": "forward transfer",
    "drop": "drop from first to last",
    "forgetting/smith": "forgetting, weighted by classes",
    "min_acc": "lowest accuracy since learned",
    "wc_acc": "worst-case accuracy",
    "lca": "learning curve area",
    "unknown/auroc": "unknown classes, AUROC",
    "unknown/fpr95": "unknown classes, FPR at 95 % TPR",
}


def metrics_table(results: Mapping[str, Any]) -> Table:
    """The table at the end of a stream: what was learned, what was lost, what is kept.

    Args:
        results: Valid results of the continual job.
    """
    learner = results["learner"]
    rows = [
        (METRICS.get(name.removesuffix("_til"), name), f"{value:.1%}", name)
        for name, value in results["continual"].items()
    ]
    stored = learner["stored"]
    protocol = results["protocol"]
    caption = "\n".join(
        [
            f"{protocol['phases']} phases, {protocol['classes']} classes; "
            f"{protocol['label_space']}",
            f"kept: network {_kilobytes(stored['network'])} kB, beside it "
            f"{_kilobytes(stored['extra'])} kB, {learner['images_kept']} images "
            f"({_kilobytes(stored['images'])} kB); learned in {results['final']['seconds']:.1f} s",
            f"merge of what several nodes learned: {learner['merge']}",
        ]
    )
    title = f"{results['job']}: {learner['name']}, seed {results['seed']}"
    return console_table(title, ("", "value", "name"), rows, caption)


OVER_TIME = {
    "union_last10": "accuracy on all classes, last 10 looks",
    "own_last10": "accuracy on what is like a node's own, last 10 looks",
    "own_best": "accuracy on what is like a node's own, best look",
}


def federated_table(results: Mapping[str, Any]) -> Table:
    """The table at the end of a federated method: what it knows, what it took, what left a node.

    Args:
        results: Valid results of the federated job.
    """
    final, method = results["final"], results["method"]
    accuracy, lost, peak = final["accuracy"], final["forgetting"], final["peak_bytes"]
    epsilon = method.get("epsilon")
    rows = [
        ("accuracy on all classes", f"{accuracy['union']:.1%}"),
        ("accuracy on what is like a node's own", f"{accuracy['own']:.1%}"),
        *((text, f"{accuracy[key]:.1%}") for key, text in OVER_TIME.items() if key in accuracy),
        ("forgetting", "-" if lost is None else f"{lost:.1%}"),
        ("sent by nodes, kB", _kilobytes(final["bytes"]["up"])),
        ("sent to nodes, kB", _kilobytes(final["bytes"]["down"])),
        ("work of the nodes, s", _seconds(final["node_seconds"])),
        ("largest memory of a node's work, MB", "-" if peak is None else f"{peak / 1e6:,.0f}"),
        ("bound of what was sent, epsilon", "none" if epsilon is None else f"{epsilon:.3g}"),
    ]
    protocol = results["protocol"]
    caption = (
        f"{protocol['missions']} missions of {protocol['nodes']} nodes, {protocol['classes']} "
        f"classes; what leaves a node: {method['leaves']}"
    )
    title = f"{results['job']}: {method_name(method)}, seed {results['seed']}"
    return console_table(title, ("", "value"), rows, caption)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; columns in the order in which they first occur.

    Args:
        rows: Cells by column; a missing one stays empty, a float gets four digits.

    Example:
        >>> print(markdown_table([{"learner": "ncm", "accuracy": 0.93012}]))
        | learner | accuracy |
        |---|---:|
        | ncm | 0.9301 |
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = [
        all(isinstance(row[column], int | float) for row in rows if column in row)
        for column in columns
    ]
    lines = [
        _markdown_row(columns),
        "|" + "".join("---:|" if right else "---|" for right in numeric),
        *(_markdown_row([row.get(column, "") for column in columns]) for row in rows),
    ]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[object]) -> str:
    texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
    escaped = (text.replace("|", r"\|").replace("\n", " ") for text in texts)
    return "| " + " | ".join(escaped) + " |"


def _run_costs(results: Mapping[str, Any]) -> dict[str, Any]:
    steps = results["steps"]
    costs: dict[str, Any] = {"seconds": results["final"]["seconds"]}
    if steps:
        ways = ("up", "down")
        costs["bytes"] = {way: sum(step["bytes"][way] for step in steps) for way in ways}
        costs["classes"] = steps[-1]["classes"]
    return costs


def console_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
) -> Table:
    """A table for the console; a column of dashes alone is left out.

    Args:
        title: Above the table.
        columns: Their headings; the first column is for names.
        rows: Texts, as many as there are columns; ``-`` where there is nothing to say.
        caption: Below the table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption, style="dim") if caption else None,
        box=box.SIMPLE_HEAD,
        min_width=len(title) + 2,
        title_justify="left",
        caption_justify="left",
    )
    used = [index for index in range(len(columns)) if any(row[index] != "-" for row in rows)]
    for index in used:
        table.add_column(columns[index], justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        # As Text, because a class or node may be called "[b]", which is markup in a plain string.
        table.add_row(*(Text(row[index]) for index in used))
    return table


def _percent(fraction: float, spread: float | None) -> str:
    text = f"{fraction:.1%}"
    return text if spread is None else f"{text} ± {spread:.1%}"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value}"


def _kilobytes(size: float) -> str:
    return f"{size / 1000:,.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
