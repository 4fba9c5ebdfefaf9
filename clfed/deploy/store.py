"""What a server of real nodes must not lose, in one SQLite file.

The ledger is stored by contributor, in the same transaction as the account of the message that
changed it, and is on disk before the message is acknowledged. So a server that is killed at any
moment continues from the last message that it acknowledged. Deleted content is overwritten
(``secure_delete``), as what is forgotten must not stay in free pages of the file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clfed.deploy.layout import LEDGER_SCHEMA as SCHEMA
from clfed.errors import InvalidMessage, RequestError, RunFolderError
from clfed.prototypes import ContributorLedger, PrototypeMemory
from clfed.prototypes.shares import Share, pack_shares, unpack_shares
from clfed.unlearning.requests import Request

_TABLES = """
CREATE TABLE shares (name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE retired (class TEXT PRIMARY KEY) STRICT;
CREATE TABLE nodes (
    name TEXT PRIMARY KEY, node_id TEXT, last_seen REAL, holds TEXT, pictures INTEGER,
    classes INTEGER NOT NULL DEFAULT 0, examples INTEGER NOT NULL DEFAULT 0,
    up INTEGER NOT NULL DEFAULT 0, down INTEGER NOT NULL DEFAULT 0,
    seconds REAL NOT NULL DEFAULT 0, accepted INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0, note TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE messages (
    round INTEGER NOT NULL, node TEXT NOT NULL, at REAL NOT NULL, up INTEGER NOT NULL,
    down INTEGER NOT NULL, seconds REAL NOT NULL, rows INTEGER NOT NULL,
    refused TEXT NOT NULL) STRICT;
CREATE INDEX messages_by_round ON messages (round);
CREATE TABLE rounds (
    number INTEGER PRIMARY KEY, started REAL NOT NULL, seconds REAL NOT NULL,
    asked INTEGER NOT NULL, answered INTEGER NOT NULL, up INTEGER NOT NULL,
    down INTEGER NOT NULL, classes INTEGER NOT NULL, examples INTEGER NOT NULL,
    memory TEXT NOT NULL) STRICT;
CREATE TABLE requests (
    id TEXT PRIMARY KEY, content TEXT NOT NULL, origin TEXT NOT NULL, received REAL NOT NULL,
    applied REAL, before TEXT, after TEXT, finished REAL, ledger_before TEXT, ledger_after TEXT,
    subtracted TEXT, cleared REAL) STRICT;
CREATE TABLE confirmations (
    request TEXT NOT NULL, node TEXT NOT NULL, removed INTEGER NOT NULL, at REAL NOT NULL,
    held REAL, PRIMARY KEY (request, node)) STRICT;
CREATE VIEW awaited AS
    SELECT r.id AS request, n.name AS node, c.node IS NOT NULL AS confirmed
    FROM requests r JOIN nodes n LEFT JOIN confirmations c ON c.request = r.id AND c.node = n.name
    WHERE r.applied IS NOT NULL AND r.finished IS NULL AND c.held IS NULL
    AND (c.node IS NULL OR r.cleared IS NOT NULL)
    AND (n.accepted > 0 OR n.pictures IS NOT NULL OR n.holds IS NOT NULL)
    AND n.name NOT IN (
        SELECT json_extract(content, '$.contributor') FROM requests
        WHERE applied IS NOT NULL AND json_extract(content, '$.kind') = 'contributor');
"""


@dataclass(frozen=True)
class Asked:
    """A request to forget, as the server knows it.

    Attributes:
        request: What is to be forgotten.
        origin: The node that asked, or ``"operator"``.
        received: When, seconds since 1970.
        applied: When the ledger was changed; None before.
        before: Digest of the merged memory before.
        after: Digest of the merged memory when it was clear of what was asked.
        finished: When every awaited node held such a memory, and the certificate was written.
        ledger_before: Digest of the ledger before.
        ledger_after: Digest of the ledger when the merged memory was clear.
        subtracted: JSON, the number of examples that the server itself subtracted, by node; None
            where only the nodes can.
        cleared: When every awaited node had confirmed; None before.
    """

    request: Request
    origin: str
    received: float
    applied: float | None
    before: str | None
    after: str | None
    finished: float | None
    ledger_before: str | None
    ledger_after: str | None
    subtracted: str | None
    cleared: float | None


class Store:
    """The file, opened by one server and any number of onlookers.

    Args:
        path: The file; made where it is absent.

    Raises:
        RunFolderError: It cannot be used, or is of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: dict[str, Share] = {}
        with self._told():
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with self.transaction():
                    for statement in _TABLES.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            elif version != SCHEMA:
                raise RunFolderError(
                    f"Expected {path} in schema {SCHEMA}, got {version}.",
                    remedy="Use the version of clfed that wrote it.",
                )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is written inside, or nothing.

        Raises:
            RunFolderError: It cannot be written; nothing has changed.
        """
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def execute(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        """Run one statement and return its rows.

        Raises:
            RunFolderError: The file cannot be used.
        """
        with self._told():
            return self._db.execute(statement, values).fetchall()

    def read_ledger(self, zero: PrototypeMemory, *, cap: int) -> ContributorLedger:
        """Return the ledger as it was last written.

        Args:
            zero: Fixes embedding, dimension and kept moments.
            cap: See :class:`~clfed.prototypes.ContributorLedger`.

        Raises:
            InvalidMessage: A share is damaged or of another embedding.
        """
        shares: dict[str, Share] = {}
        for row in self.execute("SELECT name, data FROM shares"):
            source = f"{self.path} ({row['name']})"
            found, parts, _ = unpack_shares(row["data"], source)
            if found != zero or [*parts] != [row["name"]]:
                raise InvalidMessage(f"expected a share of this federation in {source}")
            shares |= parts
        retired = [row["class"] for row in self.execute("SELECT class FROM retired")]
        self._written = dict(shares)
        return ContributorLedger.assembled(zero, shares, retired, cap=cap)

    def write_ledger(self, ledger: ContributorLedger) -> None:
        """Write what has changed since it was last read or written; call it in a transaction."""
        zero = PrototypeMemory.empty(ledger.dim, ledger.embedding_id, ledger.moments)
        changed = {
            name: share
            for name, share in ledger.shares.items()
            if self._written.get(name) is not share
        }
        for name, share in changed.items():
            data = pack_shares(zero, {name: share}, frozenset())
            self.execute("INSERT OR REPLACE INTO shares VALUES (?, ?)", name, data)
        retired = {row["class"] for row in self.execute("SELECT class FROM retired")}
        for name in retired.symmetric_difference(ledger.retired_classes):
            if name in retired:
                self.execute("DELETE FROM retired WHERE class = ?", name)
            else:
                self.execute("INSERT INTO retired VALUES (?)", name)
        self._written |= changed

    def last_round(self) -> int:
        """Return the number of the last finished round; 0 before the first."""
        (row,) = self.execute("SELECT coalesce(max(number), 0) AS number FROM rounds")
        return int(row["number"])

    def node_names(self) -> dict[int, str]:
        """Return the name that belongs to each of Flower's node ids."""
        rows = self.execute("SELECT name, node_id FROM nodes WHERE node_id IS NOT NULL")
        return {int(row["node_id"]): row["name"] for row in rows}

    def update_node(self, name: str, **values: Any) -> None:
        """Set values of a node, known or new."""
        self.execute("INSERT OR IGNORE INTO nodes (name) VALUES (?)", name)
        settings = ", ".join(f"{key} = ?" for key in values)
        self.execute(f"UPDATE nodes SET {settings} WHERE name = ?", *values.values(), name)

    def count_node(self, name: str, **values: float) -> None:
        """Add to counters of a node, known or new."""
        self.execute("INSERT OR IGNORE INTO nodes (name) VALUES (?)", name)
        settings = ", ".join(f"{key} = {key} + ?" for key in values)
        self.execute(f"UPDATE nodes SET {settings} WHERE name = ?", *values.values(), name)

    def insert(self, table: str, values: Mapping[str, Any]) -> None:
        """Add a row to one of the tables."""
        marks = ", ".join("?" * len(values))
        keys = ", ".join(values)
        self.execute(f"INSERT INTO {table} ({keys}) VALUES ({marks})", *values.values())

    def ask(self, request: Request, origin: str) -> bool:
        """Note a request to forget, once however often it comes.

        Returns:
            Whether it is new.

        Raises:
            RequestError: Another request has this id.
        """
        known = self.execute("SELECT content FROM requests WHERE id = ?", request.id)
        content = json.dumps(request.plain(), sort_keys=True)
        if known and known[0]["content"] != content:
            raise RequestError(
                f"Expected request {request.id!r} of {origin} under an id of its own, got that of "
                "another request.",
                remedy="Ask again under another id, or under none: clfed forget chooses one.",
            )
        if not known:
            self.insert(
                "requests",
                {"id": request.id, "content": content, "origin": origin, "received": time.time()},
            )
        return not known

    def requests(self, identity: str | None = None) -> list[Asked]:
        """Return all requests to forget, or the one of an id, in the order in which they came."""
        return [
            Asked(
                _parsed(row["content"]),
                *(row[key] for key in [*Asked.__dataclass_fields__][1:]),
            )
            for row in self.execute(
                "SELECT * FROM requests WHERE ?1 IS NULL OR id = ?1 ORDER BY rowid", identity
            )
        ]

    def confirmed(self, node: str) -> dict[str, int]:
        """Return how many examples each request removed at a node, for those it confirmed."""
        rows = self.execute("SELECT request, removed FROM confirmations WHERE node = ?", node)
        return {row["request"]: row["removed"] for row in rows}

    def confirmations(self, request: str) -> dict[str, int]:
        """Return how many examples a request removed at each node that confirmed it."""
        rows = self.execute(
            "SELECT node, removed FROM confirmations WHERE request = ? ORDER BY node", request
        )
        return {row["node"]: row["removed"] for row in rows}

    def awaited(self, request: str) -> dict[str, bool]:
        """Return the nodes that an applied request waits for, and whether they have confirmed.

        A node is awaited if it has taken part and was not forgotten as a contributor: until it has
        confirmed, and then, when all have, until it holds a merged memory of afterwards.
        """
        rows = self.execute(
            "SELECT node, confirmed FROM awaited WHERE request = ? ORDER BY node", request
        )
        return {row["node"]: bool(row["confirmed"]) for row in rows}

    def ledger_sha256(self) -> str:
        """Return a digest of the ledger as it is stored: of all shares and retired classes."""
        found = hashlib.sha256()
        for row in self.execute("SELECT name, data FROM shares ORDER BY name"):
            found.update(hashlib.sha256(row["name"].encode()).digest())
            found.update(hashlib.sha256(row["data"]).digest())
        retired = [row["class"] for row in self.execute("SELECT class FROM retired ORDER BY class")]
        found.update(json.dumps(retired).encode())
        return found.hexdigest()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RunFolderError(
                f"Expected to use {self.path}, got: {error}.",
                remedy="Free some space, and check that the file is writable and undamaged.",
            ) from error


@lru_cache(maxsize=4096)  # the book is read for every message
def _parsed(content: str) -> Request:
    return Request.parse(json.loads(content))
