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
from functools import partial
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from clfed.errors import ClfedError, ConfigError, InvalidMessage
from clfed.federated.channels import Channel
from clfed.federated.intake import Intake, Limits, take_in
from clfed.federated.node import digest, sendable
from clfed.federated.wire import encode_memory
from clfed.prototypes import MERGES, Contribution, ContributorLedger, PrototypeMemory
from clfed.prototypes.classifiers import nearest_mean
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.prototypes.heads import Classifier
from clfed.strategies.base import TrainOnly
from clfed.strategies.settings import check_whole

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

    A request holds ``round`` (its number, the session, what is acknowledged of this node: version
    and digest of its rows), ``memory`` (the merged table) where the node does not have it yet,
    and, for a node that has none yet, the records of the briefing. A reply holds ``status``
    (contributor) and ``rows`` (a contribution), or asks for the briefing. Training and evaluation
    share this one message, so nothing is configured for evaluation.

    Args:
        empty: The empty memory that fixes embedding, dimension and kept moments.
        merge: A name in :data:`clfed.prototypes.MERGES`.
        initial: A contribution that is there before the first round, e.g. of base classes.
        briefing: Records that a node needs once, e.g. settings and encoder.
        cap: Largest number of examples of one class that a node may claim.
        limits: What one message may hold at most.
        message_bits: Bits of an entry of a sum on the way to the server: 4, 8 or 16, rounded;
            None for exact sums.
        channel: How statistics get here; None: as rows in the open.
        options: Of :class:`~clfed.strategies.base.TrainOnly`.
    """

    leaves: ClassVar[str] = "class names, counts and sums of embeddings"

    def __init__(
        self,
        empty: PrototypeMemory,
        *,
        merge: str = "pooled",
        initial: Contribution | None = None,
        briefing: Mapping[str, ArrayRecord | ConfigRecord] | None = None,
        cap: int = DEFAULT_CAP,
        limits: Limits | None = None,
        message_bits: int | None = None,
        channel: Channel | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.channel = channel or Channel()
        if merge not in MERGES:
            raise ConfigError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}.")
        check_whole(1, cap=cap)
        self.ledger = ContributorLedger(empty.dim, empty.embedding_id, empty.moments, cap=cap)
        self.limits = limits or Limits()
        self._bits = message_bits or 0
        sendable(empty, self._bits)  # refuses what cannot be rounded
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
        """The merged table; with ``merge="pooled"`` and rows always the sum of the ledger's."""
        if (told := self.channel.memory) is not None:
            return told
        return self.ledger.total if self._merge == "pooled" else self._merged

    def classifier(self) -> Classifier:
        """Return what the method reads off the memory: the nearest class mean.

        Raises:
            NotEnoughData: Nothing has been merged yet.
        """
        return nearest_mean(self.memory)

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
        ids = self.connected(grid)
        self._asked = set(ids)
        head = self.head(server_round, config)
        self.channel.begin(grid, head)
        return [self.request(node, arrays, head) for node in ids]

    def request(self, node: int, arrays: ArrayRecord | None, head: ConfigRecord) -> Message:
        """Return the message that asks one node for what is new.

        Args:
            node: Its id.
            arrays: The merged memory; None where the node has it.
            head: What :meth:`~clfed.strategies.base.TrainOnly.head` made for the round.
        """
        contributor = self._contributor.get(node, "")
        entries = ConfigRecord(
            {
                **head,
                **self.channel.entries(contributor),
                "acknowledged": self.ledger.version_of(contributor),
                "held": digest(self.ledger.share(contributor)),
                "bits": self._bits,
            }
        )
        content = RecordDict({"round": entries})
        if arrays is not None:
            content["memory"] = arrays
        if node not in self._briefed:
            content.update(self._briefing)
        return Message(content, dst_node_id=node, message_type=MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take every acceptable contribution into the ledger; what is refused changes nothing."""
        deltas: dict[str, PrototypeMemory] = {}
        stale: dict[str, int] = {}
        refused: dict[str, str] = {}
        unbriefed: list[int] = []
        replies = list(replies)
        self._asked.update(reply.metadata.src_node_id for reply in replies)
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                found = self.take(reply)
                if found.briefed:
                    self.channel.take(node, found.contributor, reply.content)
            except ClfedError as error:
                refused[self._contributor.get(node, f"node id {node}")] = str(error)
                continue
            if not found.briefed:
                unbriefed.append(node)
            elif found.receipt is not None:
                deltas[found.contributor] = found.receipt.delta
                if found.receipt.stale:
                    stale[found.contributor] = len(found.receipt.stale)
        for sender, reason in sorted(refused.items()):
            logger.warning("Round %d: refused the reply of %s: %s", server_round, sender, reason)
        deltas = dict(sorted(deltas.items()))
        if self._merge != "pooled":
            self._merged = MERGES[self._merge](self._merged, list(deltas.values()))
        self.channel.finish(server_round, deltas)
        self.last = RoundSummary(deltas, refused, stale, tuple(unbriefed))
        metrics = {
            "classes": len(self.memory),
            "accepted": len(deltas),
            "refused": len(refused),
            "stale": sum(stale.values()),
        }
        return self.arrays(), MetricRecord(dict(metrics))

    def take(self, reply: Message) -> Intake:
        """Take one reply in, see :func:`clfed.federated.intake.take_in`.

        Raises:
            ClfedError: It is refused; nothing has changed.
        """
        node = reply.metadata.src_node_id
        found = take_in(
            reply,
            self.ledger,
            limits=self.limits,
            sender=self.sender(node),
            reserved=self._reserved,
            check=partial(self._check_holder, node),
        )
        if found.briefed:
            self._briefed.add(node)
            self._contributor[node] = found.contributor
            self._node[found.contributor] = node
        else:
            self._briefed.discard(node)
        return found

    def sender(self, node: int) -> str | None:
        """Return the only name that a node may use; None where its key names nobody."""
        return None

    def configure_broadcast(self, grid: Grid) -> Iterable[Message]:
        """Address the merged memory to every node, for after the last round."""
        head = self.head(0, ConfigRecord())
        memory = self.arrays()
        return [self.broadcast(node, memory, head) for node in sorted(grid.get_node_ids())]

    def broadcast(self, node: int, arrays: ArrayRecord, head: ConfigRecord) -> Message:
        """Return the message that brings one node the merged memory."""
        # Nothing is asked, so nothing of the node's own state has to be the newest.
        entries = ConfigRecord({**head, "acknowledged": 0, "confirmed": 0})
        content = RecordDict({"round": entries, "memory": arrays})
        return Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.merged")

    def _check_holder(self, node: int, contributor: str) -> None:
        # A restarted node comes back under another id; then its old id is not asked any more.
        holder = self._node.get(contributor, node)
        if holder != node and holder in self._asked:
            raise InvalidMessage(f"{contributor!r} is the name of another connected node.")
