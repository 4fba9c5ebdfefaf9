"""The strategy of real nodes: what the ledger holds outlives the process, and keys name nodes."""

from __future__ import annotations

import json
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message

from clfed.backbones import Encoder
from clfed.deploy.federation import Federation
from clfed.deploy.requests import Requests
from clfed.deploy.store import Store
from clfed.federated.node import briefing
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.robust import robust_total
from clfed.strategies import PrototypeAveraging


class LiveAveraging(PrototypeAveraging):
    """Prototype averaging whose ledger outlives the process and whose nodes have keys.

    Args:
        federation: Settings.
        encoder: The embedding.
        store: Where the ledger is.
        requests: Requests to forget.
    """

    def __init__(
        self, federation: Federation, encoder: Encoder, store: Store, requests: Requests
    ) -> None:
        rules = federation.rules
        empty = federation.empty(encoder)
        settings = {
            "federation": federation.name,
            "moments": rules.moments,
            "threshold": rules.threshold,
        }
        super().__init__(
            empty,
            cap=rules.cap,
            limits=rules.limits,
            message_bits=rules.message_bits,
            briefing=briefing(settings, encoder),
            session=federation.id,
        )
        self.ledger = store.read_ledger(empty, cap=rules.cap)
        self._rules, self._store, self._requests = rules, store, requests
        self._names: dict[int, str] = {}
        self._read_out: tuple[PrototypeMemory, PrototypeMemory] | None = None
        self._holds: dict[int, str] = {}

    @property
    def memory(self) -> PrototypeMemory:
        """The merged table: the sum of the ledger's rows, or what the robust rule makes of them."""
        total = self.ledger.total
        if self._read_out is None or self._read_out[0] is not total:
            rules = self._rules
            merged = robust_total(self.ledger, rules.robust, trim=rules.trim, norm=rules.norm)
            self._read_out = (total, merged)
        return self._read_out[1]

    def name_of(self, node: int) -> str:
        """Return what a node is called, its id where nobody knows yet."""
        return self._names.get(node) or self._contributor.get(node) or f"node id {node}"

    def sender(self, node: int) -> str | None:
        """Return the name that belongs to the node's key."""
        return self._names.get(node)

    def meet(self, ids: Iterable[int]) -> None:
        """Look up who the connected nodes are, and what an earlier server knew of them."""
        rows = self._store.execute("SELECT name, node_id, holds FROM nodes WHERE node_id NOT NULL")
        known = {int(row["node_id"]): row for row in rows}
        self._names = {node: row["name"] for node, row in known.items()}
        self._asked = {*ids}
        for node in self._asked & known.keys():
            self._contributor[node] = self._names[node]
            self._briefed.add(node)
            self._holds.setdefault(node, known[node]["holds"])

    def request(self, node: int, arrays: ArrayRecord | None, head: ConfigRecord) -> Message:
        """Add what the node has to forget."""
        confirmed = self._store.confirmed(self._contributor.get(node, ""))
        briefed = node in self._briefed
        asked = self._requests.open_for(confirmed if briefed else {})
        entries = ConfigRecord(
            {
                **head,
                "forget": json.dumps([request.plain() for request in asked]),
                "confirmed": len(confirmed),
            }
        )
        holds = self._holds.get(node) == self.memory.sha256()
        return super().request(node, None if holds else arrays, entries)

    def held(self, node: int, digest: str) -> None:
        """Note which merged memory a node has."""
        self._holds[node] = digest

    def without_memory(self, ids: Iterable[int]) -> list[int]:
        """Return the nodes among these that do not have the merged memory."""
        digest = self.memory.sha256()
        return [node for node in ids if self._holds.get(node) != digest]
