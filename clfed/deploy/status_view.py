"""The status of a federation or of a node as something that rich can draw.

Everything comes from the plain data of :mod:`clfed.deploy.watching` and
:mod:`clfed.deploy.node_status`, so a person sees nothing that ``--json`` does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clfed.reporting.tables import console_table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType
    from rich.table import Table
    from rich.text import Text

_SOON = 30  # days: a certificate should be renewed
_LEAST = 8  # letters in a line of a folded column
_UNLIMITED = 10_000  # columns of a console
_NAMED = 3  # names or hashes of a request that are written out


def federation_view(status: Mapping[str, Any], *, account: bool = False) -> Group:
    """The status of a federation for people.

    Args:
        status: What :func:`clfed.deploy.watching.federation_status` returns.
        account: Whether to show what each node did in the round that was asked for.
    """
    from rich.console import Group

    return Group(*_federation(status, account))


def node_view(status: Mapping[str, Any]) -> Group:
    """The status of a node for people.

    Args:
        status: What :func:`clfed.deploy.node_status.node_status` returns.
    """
    from rich.console import Group

    return Group(*_node(status))


def age(seconds: float | None) -> str:
    """Write how long something took or is ago, in its largest fitting unit.

    Example:
        >>> [age(s) for s in (None, -1, 7.4, 125, 9000, 200_000)]
        ['-', '0 s', '7 s', '2 min', '2 h', '2 days']
    """
    if seconds is None:
        return "-"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _federation(status: Mapping[str, Any], account: bool) -> Iterator[RenderableType]:
    since = _since(status["at"])
    last = status["round"]
    yield _line(f"{status['name']} at {status['address']}, clfed {status['clfed']}", "bold")
    if last is None:
        yield _line("no round has been finished yet")
    else:
        yield _line(
            f"round {last['number']}, finished {since(last['started'] + last['seconds'])} ago: "
            f"{last['classes']} classes, {last['examples']} examples, memory "
            f"{_short(last['memory'])}"
        )
    yield _certificate(status["certificate_days"])
    if status["nodes"]:
        yield from _nodes(status["nodes"], since)
    else:
        yield _line("no node has been invited: clfed invite DIR NAME")
    if account:
        yield _account(status["account"])
    if status["requests"]:
        yield _requests(status["requests"], since)
    if status["refusals"]:
        yield _refusals(status["refusals"], since)
    if status["rounds"]:
        yield _rounds(status["rounds"], since)


def _node(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    since = _since(status["at"])
    memory, classes = status["memory"], status["classes"]
    yield _line(f"{status['name']}, node of {status['federation']}", "bold")
    yield _line(f"state in {status['directory']}, embedding {status['embedding'][:12]}")
    yield _line(
        f"message {status['version']} was the last, {since(status['changed'])} ago; "
        f"{status['pictures']} pictures in the folder"
    )
    if status["unreadable"]:
        yield _line(f"{status['unreadable']} of them cannot be read", "yellow")
    if memory is None:
        yield _line("holds no merged memory yet")
    else:
        yield _line(
            f"holds memory {_short(memory['sha256'])}: {memory['classes']} classes, "
            f"{memory['examples']} examples, {memory['bytes'] / 1000:,.1f} kB with the encoder"
        )
    if status["forgotten"]:
        yield _line("everything of this node was forgotten on request", "yellow")
    elif status["retired"] or status["erased"]:
        retired = ", ".join(status["retired"]) or "no class"
        yield _line(f"left out on request: {retired}, {status['erased']} pictures")
    if classes:
        rows = [(name, str(count)) for name, count in classes.items()]
        yield _table("Classes of this node", ("class", "examples"), rows)
    if status["requests"]:
        rows = [(name, str(removed)) for name, removed in status["requests"].items()]
        yield _table("Requests carried out", ("request", "examples removed"), rows)
    if status["outbox"]:
        waiting = [(row["id"], row["kind"], _what(row["what"])) for row in status["outbox"]]
        columns = ("request", "kind", "what")
        yield _table("Waiting for the next round", columns, waiting, fold=("what",))


def _nodes(nodes: Sequence[Mapping[str, Any]], since: Callable[..., str]) -> Iterator[Any]:
    who = ("node", "state", "seen", "classes", "examples", "pictures", "memory")
    did = ("kB up", "kB down", "seconds", "accepted", "refused")
    states = [
        (
            node["name"],
            node["state"],
            since(node["last_seen"]),
            str(node["classes"]),
            str(node["examples"]),
            "-" if node["pictures"] is None else str(node["pictures"]),
            "current" if node["current"] else "old",
        )
        for node in nodes
    ]
    costs = [(*_costs(node), str(node["accepted"]), str(node["refused"] or "-")) for node in nodes]
    both = [(*state, *cost) for state, cost in zip(states, costs, strict=True)]
    names = [(node["name"],) for node in nodes]
    parts = [(*name, *cost) for name, cost in zip(names, costs, strict=True)]
    yield _Fitting(
        _table("Nodes", (*who, *did), both),
        (_table("Nodes", who, states), _table("Messages of nodes", ("node", *did), parts)),
    )
    for node in nodes:
        if node["note"]:
            yield _line(f"  {node['name']}: {node['note']}", "yellow")


class _Fitting:
    """A wide table where there is room for it, narrow ones elsewhere."""

    def __init__(self, wide: Table, narrow: Sequence[Table]) -> None:
        self._wide, self._narrow = wide, narrow

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        wanted = console.measure(self._wide, options=options.update(max_width=_UNLIMITED)).maximum
        yield from (self._wide,) if wanted <= options.max_width else self._narrow


def _account(rows: Sequence[Mapping[str, Any]]) -> Table | Text:
    if not rows:
        return _line("no node sent anything in this round")
    columns = ("node", "messages", "kB up", "kB down", "seconds", "classes accepted", "refused")
    return _table(
        f"Round {rows[0]['round']}",
        columns,
        [
            (
                row["node"],
                str(row["messages"]),
                *_costs(row),
                str(row["rows"]),
                str(row["refused"] or "-"),
            )
            for row in rows
        ],
    )


def _requests(requests: Sequence[Mapping[str, Any]], since: Callable[..., str]) -> Table:
    rows = []
    for row in requests:
        done, awaited = row["confirmed"], row["awaited"]
        text = f"confirmed by {len(done)} of {len(done) + len(awaited)}"
        if row["state"] == "waiting":
            text = "waits for the next round"
        elif row["state"] == "finished":
            text = f"finished {since(row['finished'])} ago, {sum(done.values())} examples"
        elif awaited:
            text += f", not by {', '.join(awaited)}"
        asked = f"{since(row['received'])} ago"
        rows.append((row["id"], row["kind"], _what(row["what"]), row["origin"], asked, text))
    columns = ("request", "kind", "what", "from", "asked", "state")
    return _table("Requests to forget", columns, rows, fold=("what", "from", "state"))


def _refusals(refusals: Sequence[Mapping[str, Any]], since: Callable[..., str]) -> Table:
    rows = [
        (row["node"], str(row["round"]), f"{since(row['at'])} ago", row["reason"])
        for row in refusals
    ]
    columns = ("node", "round", "when", "reason")
    return _table("Refused messages", columns, rows, fold=("reason",))


def _rounds(rounds: Sequence[Mapping[str, Any]], since: Callable[..., str]) -> Table:
    columns = ("round", "when", "nodes", "classes", "examples", "kB up", "kB down", "seconds")
    rows = [
        (
            str(row["number"]),
            f"{since(row['started'] + row['seconds'])} ago",
            f"{row['answered']} of {row['asked']}",
            str(row["classes"]),
            str(row["examples"]),
            *_costs(row),
        )
        for row in rounds
    ]
    return _table("Last rounds", columns, rows)


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    fold: Sequence[str] = (),
) -> Table:
    clean = [[_printable(cell) for cell in row] for row in rows]
    table = console_table(title, columns, clean)
    for column in table.columns:
        index = columns.index(str(column.header))
        if index == 0 or column.header in fold:  # names may be long, and none may be cut
            column.no_wrap, column.overflow, column.justify = False, "fold", "left"
            column.min_width = min(_LEAST, max(len(row[index]) for row in clean))
    return table


def _certificate(days: float) -> Text:
    if days < 0:
        return _line(f"the server's certificate expired {-days:.0f} days ago", "red")
    return _line(f"certificate good for {days:.0f} days", "yellow" if days < _SOON else "")


def _costs(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Kilobytes up and down, and seconds."""
    return f"{row['up'] / 1000:,.1f}", f"{row['down'] / 1000:,.1f}", f"{row['seconds']:.1f}"


def _what(what: str | Sequence[object]) -> str:
    if isinstance(what, str):
        return what
    names = [_short(str(name)) for name in what[:_NAMED]]
    more = [f"and {len(what) - _NAMED} more"] if len(what) > _NAMED else []
    return ", ".join([*names, *more])


def _short(text: str) -> str:
    """The first letters of a digest; anything else stays whole."""
    digest = len(text) in (32, 64) and not text.strip("0123456789abcdef")
    return text[:12] if digest else text


def _since(now: float) -> Callable[[float | None], str]:
    return lambda moment: age(None if moment is None else now - moment)


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(_printable(text), style=style)


def _printable(text: str) -> str:
    """What nodes send could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
