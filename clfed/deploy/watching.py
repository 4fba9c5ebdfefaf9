"""What an onlooker sees of a federation: read beside the running server, as plain data.

Nothing here imports torch or writes: a look takes some milliseconds and one short read
transaction, so the server is not held up.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clfed.deploy.keys import SERVER, days_left
from clfed.deploy.layout import (
    LEDGER,
    LEDGER_SCHEMA,
    NODES,
    no_answer,
    read_settings,
)
from clfed.errors import ConfigError, MissingData, RunFolderError
from clfed.files import read_file

SHOWN = 10  # rounds and refused messages in a status
Row = dict[str, Any]
_ROUND = "number, started, seconds, asked, answered, up, down, classes, examples, memory"
_MESSAGE = 'round, node, at, up, down, seconds, "rows", refused'
_NODE = (
    "name, last_seen, classes, examples, pictures, up, down, seconds, accepted, refused, holds, "
    "note"
)
_RESTORE = "Restore the file from a backup."


def federation_status(
    folder: Path, *, number: int | None = None, now: float | None = None
) -> dict[str, Any]:
    """Everything that ``clfed status`` tells of a federation, ready for JSON.

    Args:
        folder: The federation folder.
        number: The round whose account is wanted; the last finished one when omitted.
        now: Time of the look, seconds since 1970; the clock's when omitted.

    Returns:
        ``kind`` (``"federation"``), ``at`` (time of the look), ``name``, ``id``, ``address``,
        ``embedding``, ``clfed`` (version that made it), ``certificate_days`` (until the server's
        certificate expires), and

        - ``round``: the last finished round, a row of ``rounds``, or None
        - ``rounds``: the last ten, newest first: ``number``, ``started``, ``seconds``, ``asked``
          and ``answered`` (nodes), ``up`` and ``down`` (bytes from and to all nodes), and
          ``classes``, ``examples``, ``memory`` (SHA-256) of the merged memory after it
        - ``nodes``: ``name``, ``state`` (``connected``: heard of since the last round began;
          ``late``: asked, but silent; ``away``: not there in the last round; ``never seen``),
          ``last_seen``, ``classes`` and ``examples`` that the ledger holds of it, ``pictures`` in
          its folder, ``up`` and ``down`` (bytes), ``seconds`` from requests to replies,
          ``accepted`` and ``refused`` (messages), ``current`` (whether it holds the memory of the
          last round), ``note``
        - ``account``: what each node did in one round, see :func:`round_account`
        - ``refusals``: the last ten refused messages, newest first: ``round``, ``node``, ``at``,
          ``reason``
        - ``requests``: to forget, oldest first: ``id``, ``kind``, ``what`` (names or hashes),
          ``origin``, ``state`` (``waiting`` for a round, ``applied`` on the server, ``finished``
          at every node), ``received``, ``applied``, ``finished``, ``confirmed`` (examples removed,
          by node), ``awaited`` (nodes that have not confirmed)

        Times are seconds since 1970, durations seconds; what is not known is None.

    Raises:
        MissingData: There is no federation, or a file of it is missing.
        InvalidMessage: The settings or the certificate are damaged.
        VersionMismatch: Another version of clfed made it.
        RunFolderError: The ledger cannot be read.
        ConfigError: There has been no such round, finished or running.
    """
    settings = read_settings(folder)
    invited = sorted(path.stem for path in (folder / NODES).glob("*.pub"))
    with _looking(folder) as db:
        rounds = _rows(db, f"SELECT {_ROUND} FROM rounds ORDER BY number DESC LIMIT ?", SHOWN)
        last = rounds[0] if rounds else None
        nodes = _nodes(db, last, invited)
        newest = last["number"] if last else 0
        if number is not None and not 1 <= number <= newest + 1:
            raise ConfigError(
                f"Expected a round from 1 to {newest + 1}, got {number}.",
                remedy=f"{newest} rounds are finished; choose one of them, or the one that runs.",
            )
        account = _account(db, newest if number is None else number)
        refusals = _rows(
            db,
            "SELECT round, node, at, refused AS reason FROM messages WHERE refused != '' "
            "ORDER BY rowid DESC LIMIT ?",
            SHOWN,
        )
        requests = _requests(db)
    return {
        "kind": "federation",
        "at": time.time() if now is None else now,
        **settings,
        "certificate_days": days_left(read_file(folder / SERVER)),
        "round": last,
        "nodes": nodes,
        "account": account,
        "refusals": refusals,
        "requests": requests,
        "rounds": rounds,
    }


def round_account(folder: Path, number: int) -> list[Row]:
    """What each node did in one round, from the messages that came in it.

    Returns:
        For each node that sent something: ``round``, ``node``, ``messages``, ``up`` and ``down``
        (bytes), ``seconds`` from requests to replies, ``rows`` (classes that were accepted),
        ``refused`` (messages), and ``classes`` and ``examples`` that the ledger holds of it now.

    Raises:
        MissingData: There is no ledger.
        RunFolderError: It cannot be read.
    """
    with _looking(folder) as db:
        return _account(db, number)


def history(folder: Path) -> tuple[list[Row], list[Row]]:
    """Return all finished rounds and all messages, oldest first, with the columns of the ledger.

    Raises:
        MissingData: There is no ledger.
        RunFolderError: It cannot be read.
    """
    with _looking(folder) as db:
        return (
            _rows(db, f"SELECT {_ROUND} FROM rounds ORDER BY number"),
            _rows(db, f"SELECT {_MESSAGE} FROM messages ORDER BY rowid"),
        )


def named_thing(content: Mapping[str, Any]) -> Row:
    """Return ``id``, ``kind`` and ``what`` of a request to forget, as it stands in a file.

    Args:
        content: As ``Request.plain`` returns it; beside id and kind it names one thing.
    """
    (what,) = (value for key, value in content.items() if key not in ("id", "kind"))
    return {"id": content["id"], "kind": content["kind"], "what": what}


def _nodes(db: sqlite3.Connection, last: Row | None, invited: list[str]) -> list[Row]:
    known = {row["name"]: row for row in _rows(db, f"SELECT {_NODE} FROM nodes")}
    counters = ("classes", "examples", "up", "down", "seconds", "accepted", "refused")
    absent = {"last_seen": None, "pictures": None, "holds": None, "note": ""}
    nodes = []
    for name in sorted({*known, *invited}):
        row = known.get(name) or {"name": name, **dict.fromkeys(counters, 0), **absent}
        holds = row.pop("holds")
        current = last is not None and holds == last["memory"]
        nodes.append({**row, "state": _state(row, last), "current": current})
    return nodes


def _state(row: Row, last: Row | None) -> str:
    number = last["number"] if last else 0
    if row["note"] in (no_answer(number), no_answer(number + 1)):
        return "late"
    if row["last_seen"] is None:
        return "never seen"
    return "connected" if last is None or row["last_seen"] >= last["started"] else "away"


def _account(db: sqlite3.Connection, number: int) -> list[Row]:
    return _rows(
        db,
        "SELECT m.round, m.node, count(*) AS messages, sum(m.up) AS up, sum(m.down) AS down, "
        'sum(m.seconds) AS seconds, sum(m."rows") AS "rows", sum(m.refused != \'\') AS refused, '
        "coalesce(n.classes, 0) AS classes, coalesce(n.examples, 0) AS examples "
        "FROM messages m LEFT JOIN nodes n ON n.name = m.node WHERE m.round = ? "
        "GROUP BY m.node ORDER BY m.node",
        number,
    )


def _requests(db: sqlite3.Connection) -> list[Row]:
    confirmed: dict[str, dict[str, int]] = {}
    for row in _rows(db, "SELECT request, node, removed FROM confirmations ORDER BY node"):
        confirmed.setdefault(row["request"], {})[row["node"]] = row["removed"]
    awaited: dict[str, list[str]] = {}
    for row in _rows(db, "SELECT request, node FROM awaited ORDER BY node"):
        awaited.setdefault(row["request"], []).append(row["node"])
    requests = []
    for row in _rows(
        db, "SELECT content, origin, received, applied, finished FROM requests ORDER BY rowid"
    ):
        asked = named_thing(json.loads(row.pop("content")))
        state = "finished" if row["finished"] else "applied" if row["applied"] else "waiting"
        requests.append(
            {
                **asked,
                **row,
                "state": state,
                "confirmed": confirmed.get(asked["id"], {}),
                "awaited": awaited.get(asked["id"], []),
            }
        )
    return requests


def _rows(db: sqlite3.Connection, statement: str, *values: Any) -> list[Row]:
    return [dict(row) for row in db.execute(statement, values)]


@contextmanager
def _looking(folder: Path) -> Iterator[sqlite3.Connection]:
    """One state of the ledger, however long the looking takes."""
    path = folder / LEDGER
    if not path.is_file():
        raise MissingData(
            f"Expected the ledger of a federation at {path}, found none.", remedy=_RESTORE
        )
    db = None
    try:
        # Not mode=ro: after a kill SQLite must first take back what the server had half written.
        uri = f"file:{quote(str(path.absolute()))}?mode=rw"
        db = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA query_only = ON")
        db.execute("BEGIN")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != LEDGER_SCHEMA:
            raise RunFolderError(
                f"Expected {path} in schema {LEDGER_SCHEMA}, got {version}.",
                remedy="Use the version of clfed that wrote it.",
            )
        yield db
    except sqlite3.Error as error:
        raise RunFolderError(
            f"Expected to read {path}, got: {error}.",
            remedy="Check that the file is readable and undamaged, or restore it from a backup.",
        ) from error
    finally:
        if db is not None:
            db.close()
