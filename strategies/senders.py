"""Who is behind a node id, as replies say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from flwr.app import Message

from clfed.errors import InvalidMessage
from clfed.federated import records
from clfed.prototypes.contribution import check_contributor

logger = logging.getLogger(__name__)
Part = TypeVar("Part")


class Senders:
    """The nodes that have answered, and their names.

    Attributes:
        briefed: Ids of the nodes that know what a node needs once.
        names: By node id.
    """

    def __init__(self) -> None:
        self.briefed: set[int] = set()
        self.names: dict[int, str] = {}
        self._holder: dict[str, int] = {}

    def gathered(
        self,
        server_round: int,
        replies: Iterable[Message],
        read: Callable[[str, Message], Part | None],
    ) -> dict[str, Part]:
        """Return what is in replies by who sent it; one that breaks a rule is left out.

        Of several nodes under one name only the one that had it before counts, if any did: which
        reply came first says nothing.

        Args:
            server_round: Number of the round, for the log.
            replies: Of nodes, errors among them.
            read: Called with name and reply, returns what is in it; None where there is nothing.
        """
        claims: dict[str, dict[int, Part | None]] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                name = self._sender(reply)
                part = None if name is None else read(name, reply)
            except InvalidMessage as error:
                logger.warning("Round %d: left out node id %d: %s", server_round, node, error)
                continue
            if name is not None:
                claims.setdefault(name, {})[node] = part
        found: dict[str, Part] = {}
        for name, parts in claims.items():
            holder = next(iter(parts)) if len(parts) == 1 else self._holder.get(name, -1)
            if len(parts) > 1:
                logger.warning(
                    "Round %d: %d nodes call themselves %r", server_round, len(parts), name
                )
            if holder in parts:
                self._holder[name] = holder
            if (part := parts.get(holder)) is not None:
                found[name] = part
        # Floating point sums depend on their order, and node ids are random in some engines.
        return dict(sorted(found.items()))

    def _sender(self, reply: Message) -> str | None:
        """Return who sent a reply, None where the node must be briefed again.

        Raises:
            InvalidMessage: The node reports an error, or the reply does not say who sent it.
        """
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise InvalidMessage(str(reply.error.reason))
        status = records.config(reply.content, "status")
        if status.get("needs-briefing"):
            self.briefed.discard(node)
            return None
        name = records.text(status, "contributor")
        check_contributor(name)
        self.briefed.add(node)
        self.names[node] = name
        return name
