"""Who sent and got how much when: one row for each message, sums for each node."""

from __future__ import annotations

import time

from flwr.app import Message

from clfed.deploy.store import Store
from clfed.federated.wire import record_bytes

KEEP = 30 * 86_400.0  # seconds; sums for each node and the table of rounds stay


class Accounts:
    """Bytes and seconds of one exchange after the other; call the methods in transactions.

    Args:
        store: Where they are written.

    Attributes:
        up: Bytes that came since the last call of :meth:`clear`.
        down: Bytes that were sent.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sent: dict[int, tuple[int, float]] = {}
        self.up = self.down = 0

    def clear(self) -> None:
        """Begin the sums of a round."""
        self.up = self.down = 0

    def send(self, messages: list[Message]) -> None:
        """Note what is sent now."""
        now = time.monotonic()
        sizes = {m.metadata.dst_node_id: record_bytes(m.content) for m in messages}
        self._sent = {node: (size, now) for node, size in sizes.items()}
        self.down += sum(sizes.values())

    def settle(
        self, round_: int, node: int, name: str, *, up: int = 0, rows: int = 0, refused: str = ""
    ) -> None:
        """Write the account of a message that was answered, or not in time.

        Args:
            round_: Number of the round.
            node: Flower's id of the node.
            name: Its name.
            up: Bytes that it sent.
            rows: Classes that were accepted.
            refused: Why the reply was refused.
        """
        now = time.monotonic()
        # A late reply belongs to a message that was settled before.
        down, sent = self._sent.pop(node, (0, now))
        self.up += up
        self._store.count_node(
            name,
            up=up,
            down=down,
            seconds=now - sent,
            accepted=int(rows > 0),
            refused=int(bool(refused)),
        )
        self._store.insert(
            "messages",
            {
                "round": round_,
                "node": name,
                "at": time.time(),
                "up": up,
                "down": down,
                "seconds": now - sent,
                "rows": rows,
                "refused": refused,
            },
        )

    def forget_old(self) -> None:
        """Drop single messages after thirty days."""
        self._store.execute("DELETE FROM messages WHERE at < ?", time.time() - KEEP)


def bytes_of(reply: Message) -> int:
    """Return the payload of a reply; 0 for an error, and for what cannot be measured."""
    try:
        return record_bytes(reply.content) if reply.has_content() else 0
    except ValueError:  # such a reply is refused
        return 0
