"""Flower's ``Grid`` on one machine, in one process, and a bounded exchange for every grid."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import DEFAULT_TTL, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clfed.errors import ClfedError
from clfed.federated.wire import record_bytes

_CLIENT_FAILED = 2


class LocalGrid(Grid):
    """Carries messages to a ClientApp in this process: no servers, no copies, no start-up time.

    The apps cannot tell it from Flower's own grids: a node's state is committed only when its
    handler returns, and an exception at a node becomes an error reply that the strategy judges.
    Requests are shared, not copied, so a ClientApp must not change the message it receives.

    Args:
        client_app: The ClientApp of every node.
        node_configs: One entry a node, as a SuperNode's ``--node-config`` would give it.
        run_config: What ``flwr run --run-config`` would give.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
        self._contexts = {
            number: Context(1, number, dict(config), RecordDict(), dict(run_config or {}))
            for number, config in enumerate(node_configs, start=1)
        }

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message, as ``flwr.app.Message`` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every addressed node handle its message now; replies wait to be pulled."""
        return [self._handle(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return and forget the replies to these messages."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return all replies; nothing here can be late."""
        return self.pull_messages(self.push_messages(messages))

    def _handle(self, message: Message) -> str:
        # Flower assigns the id when a message enters the network, and keeps it read-only.
        message.metadata.__dict__["_message_id"] = identity = uuid.uuid4().hex
        kept = self._contexts[message.metadata.dst_node_id]
        work = Context(
            kept.run_id, kept.node_id, kept.node_config, copy.deepcopy(kept.state), kept.run_config
        )
        try:
            reply = self._app(message, work)
            kept.state = work.state
        except Exception as error:
            text = (
                str(error) if isinstance(error, ClfedError) else f"{type(error).__name__}: {error}"
            )
            reply = Message(Error(code=_CLIENT_FAILED, reason=text), reply_to=message)
        self._replies[identity] = reply
        return identity


class Meter(Grid):
    """Hands everything on to another grid and counts the payload bytes that pass.

    Args:
        grid: Any grid.

    Attributes:
        down: Bytes sent to nodes.
        up: Bytes of the replies that hold content.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.down = self.up = 0

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message, as ``flwr.app.Message`` does."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are there."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        messages = list(messages)
        self.down += sum(record_bytes(message.content) for message in messages)
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""
        replies = list(self._grid.pull_messages(message_ids))
        self.up += sum(record_bytes(reply.content) for reply in replies if reply.has_content())
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies."""
        return exchange(self, messages, timeout=DEFAULT_TTL if timeout is None else timeout)


class Mailbox:
    """Sends messages and collects replies, also those that come after their time.

    Flower's own ``send_and_receive`` looks only every three seconds, and forgets what is late.

    Args:
        grid: Any grid.
        poll: Pause between looks, seconds.
    """

    def __init__(self, grid: Grid, *, poll: float = 0.2) -> None:
        self._grid, self._poll = grid, poll
        self._late: dict[str, tuple[int, float]] = {}

    def exchange(
        self,
        messages: Iterable[Message],
        *,
        timeout: float,
        arrived: Callable[[Message], None] = lambda reply: None,
        waiting: Callable[[list[int], float], None] = lambda nodes, seconds: None,
        notice: float = 20.0,
    ) -> list[Message]:
        """Send messages and collect replies until all are there or the time is up.

        Args:
            messages: Messages to send.
            timeout: Longest wait, seconds; what has not come by then is taken by a later exchange.
            arrived: Called with each reply when it is there, late ones of earlier exchanges
                included.
            waiting: Called with the ids of the nodes that are still awaited and the seconds so
                far, each ``notice`` seconds.
            notice: Pause between these calls, seconds.
        """
        messages, start = list(messages), time.monotonic()
        sent = self._grid.push_messages(messages)
        pending = {
            identity: message.metadata.dst_node_id
            for identity, message in zip(sent, messages, strict=True)
        }
        self._late = {i: (n, t) for i, (n, t) in self._late.items() if start - t < DEFAULT_TTL}
        replies: list[Message] = []
        told = 0.0
        while True:
            new = list(self._grid.pull_messages([*pending, *self._late]))
            for reply in new:
                identity = reply.metadata.reply_to_message_id
                replies.append(reply)
                self._late.pop(identity, None)
                node = pending.pop(identity, None)
                # A node answers one message after the other: older ones are answered or lost.
                self._late = {i: (n, t) for i, (n, t) in self._late.items() if n != node}
                arrived(reply)
            seconds = time.monotonic() - start
            if not pending or seconds >= timeout:
                break
            if seconds - told >= notice:
                told = seconds
                waiting(sorted(pending.values()), seconds)
            time.sleep(self._poll)
        self._late |= {identity: (node, start) for identity, node in pending.items()}
        return replies


def exchange(grid: Grid, messages: Iterable[Message], *, timeout: float) -> list[Message]:
    """Send messages and collect replies until all are there or the time is up.

    Args:
        grid: Any grid.
        messages: Messages to send.
        timeout: Longest wait, seconds; what has not come by then is left out.
    """
    return Mailbox(grid).exchange(messages, timeout=timeout)


def wait_for_nodes(
    grid: Grid,
    count: int,
    *,
    timeout: float,
    poll: float = 0.2,
    waiting: Callable[[int], None] = lambda there: None,
    notice: float = 20.0,
) -> list[int]:
    """Return the sorted node ids once at least ``count`` nodes are there or the time is up.

    Args:
        grid: Any grid.
        count: Nodes to wait for.
        timeout: Longest wait, seconds.
        poll: Pause between looks, seconds.
        waiting: Called with the number of nodes that are there, each ``notice`` seconds.
        notice: Pause between these calls, seconds.
    """
    told = time.monotonic()
    end = told + timeout
    while len(ids := sorted(grid.get_node_ids())) < count and time.monotonic() < end:
        if time.monotonic() - told >= notice:
            told = time.monotonic()
            waiting(len(ids))
        time.sleep(poll)
    return ids
