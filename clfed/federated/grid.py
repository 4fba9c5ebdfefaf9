"""Flower's ``Grid`` on one machine, in one process, and a bounded exchange for every grid."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clfed.errors import ClfedError

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


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    timeout: float,
    poll: float = 0.2,
    arrived: Callable[[int], None] = lambda count: None,
) -> list[Message]:
    """Send messages and collect replies until all are there or the time is up.

    Flower's own ``send_and_receive`` looks only every three seconds.

    Args:
        grid: Any grid.
        messages: Messages to send.
        timeout: Longest wait, seconds; what has not come by then is left out.
        poll: Pause between looks, seconds.
        arrived: Called with the number of new replies whenever some arrive.
    """
    pending = set(grid.push_messages(messages))
    replies: list[Message] = []
    end = time.monotonic() + timeout
    while pending:
        new = list(grid.pull_messages(pending))
        replies += new
        pending -= {reply.metadata.reply_to_message_id for reply in new}
        if new:
            arrived(len(new))
        if not pending or time.monotonic() >= end:
            break
        time.sleep(poll)
    return replies


def wait_for_nodes(grid: Grid, count: int, *, timeout: float, poll: float = 0.2) -> list[int]:
    """Return the sorted node ids once at least ``count`` nodes are there or the time is up."""
    end = time.monotonic() + timeout
    while len(ids := sorted(grid.get_node_ids())) < count and time.monotonic() < end:
        time.sleep(poll)
    return ids
