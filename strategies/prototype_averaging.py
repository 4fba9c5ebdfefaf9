r"""Exact averaging of class prototypes: federated reconnaissance without its two defects.

Nodes send what they have seen themselves, as cumulative counts and sums of embeddings by class; a
ledger keeps the newest row of each node and class, and the merged table is the sum of the rows:

.. math:: N_c = \sum_k n_{k,c}, \qquad S_c = \sum_k S_{k,c}, \qquad \mu_c = S_c / N_c

After Hendryx et al. 2021 (arXiv 2109.00150). Their published code merges already merged vectors,
which weighs classes that are met again wrongly; ``merge="legacy_double_shrink"`` reproduces it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from clfed.errors import ClfedError, ConfigError, InvalidMessage
from clfed.federated.records import arrays, config, text
from clfed.federated.wire import decode_contribution, encode_memory
from clfed.prototypes import MERGES, Contribution, ContributorLedger, PrototypeMemory
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.strategies.base import TrainOnly

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundSummary:
    """What became of the replies of one round.

    Attributes:
        deltas: New evidence by contributor, in the order of their names.
        refused: Reason by sender, for replies that were errors or broke a rule.
        stale: Number of rows that were already known, by contributor.
        unbriefed: Node ids that asked for the briefing again.
    """

    deltas: Mapping[str, PrototypeMemory] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    stale: Mapping[str, int] = field(default_factory=dict)
    unbriefed: tuple[int, ...] = ()


class PrototypeAveraging(TrainOnly):
    """Merges the class statistics of all nodes; the order of replies never matters.

    A request holds ``memory`` (the merged table), ``round`` (its number, the session and the
    version acknowledged for this node) and, for a node that has none yet, the records of the
    briefing. A reply holds ``status`` (contributor) and ``rows`` (a contribution), or asks for the
    briefing. Training and evaluation share this one message, so nothing is configured for
    evaluation.

    Args:
        empty: The empty memory that fixes embedding, dimension and kept moments.
        merge: A name in :data:`clfed.prototypes.MERGES`.
        initial: A contribution that is there before the first round, e.g. of base classes.
        briefing: Records that a node needs once, e.g. settings and encoder.
        cap: Largest number of examples of one class that a node may claim.
        options: Of :class:`~clfed.strategies.base.TrainOnly`.
    """

    def __init__(
        self,
        empty: PrototypeMemory,
        *,
        merge: str = "pooled",
        initial: Contribution | None = None,
        briefing: Mapping[str, ArrayRecord | ConfigRecord] | None = None,
        cap: int = DEFAULT_CAP,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if merge not in MERGES:
            raise ConfigError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}.")
        self.ledger = ContributorLedger(empty.dim, empty.embedding_id, empty.moments, cap=cap)
        self._reserved = None if initial is None else initial.contributor
        if initial is not None:
            self.ledger.receive(initial)
        self._merged = self.ledger.total
        self.last = RoundSummary()
        self._merge = merge
        self._briefing = dict(briefing or {})
        self._contributor: dict[int, str] = {}
        self._node: dict[str, int] = {}
        self._asked: set[int] = set()
        self._briefed: set[int] = set()

    @property
    def memory(self) -> PrototypeMemory:
        """The merged table; with ``merge="pooled"`` always the sum of the ledger's rows."""
        return self.ledger.total if self._merge == "pooled" else self._merged

    def arrays(self) -> ArrayRecord:
        """The merged memory as it is sent to nodes."""
        return encode_memory(self.memory)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address one message to every node that is there.

        Raises:
            FederationError: No node came within the waiting time.
        """
        messages = []
        ids = self.connected(grid)
        self._asked = set(ids)
        for node in ids:
            contributor = self._contributor.get(node)
            acknowledged = 0 if contributor is None else self.ledger.version_of(contributor)
            head = self.head(server_round, config, acknowledged=acknowledged)
            content = RecordDict({"memory": arrays, "round": head})
            if node not in self._briefed:
                content.update(self._briefing)
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take every acceptable contribution into the ledger; what is refused changes nothing."""
        arrived: dict[str, Contribution] = {}
        refused: dict[str, str] = {}
        unbriefed: list[int] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                refused[f"node id {node}"] = str(reply.error.reason)
                continue
            try:
                contribution = self._read(node, reply.content, unbriefed)
                if contribution is not None:
                    if contribution.contributor in arrived:
                        raise InvalidMessage(
                            f"Two nodes call themselves {contribution.contributor!r}."
                        )
                    arrived[contribution.contributor] = contribution
            except InvalidMessage as error:
                refused[f"node id {node}"] = str(error)
        deltas: dict[str, PrototypeMemory] = {}
        stale: dict[str, int] = {}
        for name in sorted(arrived):
            try:
                receipt = self.ledger.receive(arrived[name])
            except ClfedError as error:
                refused[name] = str(error)
                continue
            deltas[name] = receipt.delta
            if receipt.stale:
                stale[name] = len(receipt.stale)
        for sender, reason in refused.items():
            logger.warning("Round %d: refused the reply of %s: %s", server_round, sender, reason)
        self._briefed -= set(unbriefed)
        if self._merge != "pooled":
            self._merged = MERGES[self._merge](self._merged, list(deltas.values()))
        self.last = RoundSummary(deltas, refused, stale, tuple(unbriefed))
        metrics = {
            "classes": len(self.memory),
            "accepted": len(deltas),
            "refused": len(refused),
            "stale": sum(stale.values()),
        }
        return self.arrays(), MetricRecord(dict(metrics))

    def configure_broadcast(self, grid: Grid) -> Iterable[Message]:
        """Address the merged memory to every node, for after the last round."""
        content = RecordDict({"memory": self.arrays()})
        return [
            Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.merged")
            for node in sorted(grid.get_node_ids())
        ]

    def _read(self, node: int, content: RecordDict, unbriefed: list[int]) -> Contribution | None:
        status = config(content, "status")
        contributor = text(status, "contributor")
        if status.get("needs-briefing"):
            unbriefed.append(node)
            return None
        if contributor == self._reserved:
            raise InvalidMessage(f"No node may call itself {contributor!r}.")
        holder = self._node.get(contributor, node)
        # A restarted node comes back under another id; then its old id is not asked any more.
        if holder != node and holder in self._asked:
            raise InvalidMessage(f"{contributor!r} is the name of another connected node.")
        self._briefed.add(node)
        self._contributor[node] = contributor
        self._node[contributor] = node
        if "rows" not in content:
            return None
        contribution = decode_contribution(arrays(content, "rows"))
        if contribution.contributor != contributor:
            raise InvalidMessage(
                f"{contributor!r} sent rows in the name of {contribution.contributor!r}."
            )
        return contribution
