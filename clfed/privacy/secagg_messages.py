"""Secure aggregation as Flower messages: four queries, over any grid, for any strategy.

A client app answers the four actions of :data:`STEPS` with :func:`respond`; a strategy, or a
server app, calls :func:`secure_sum`. Names are Flower's node ids. Each message holds the record
``round`` (the digest of the terms; the terms themselves in the first step) and the record
``parts``, bytes by name. A node that does not answer in time, or with an error, is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clfed.errors import InvalidMessage
from clfed.federated.grid import exchange
from clfed.federated.records import blob, config
from clfed.federated.wire import COST, record_bytes
from clfed.privacy.aggregator import Aggregator
from clfed.privacy.secure_aggregation import Client
from clfed.privacy.terms import Terms, Words
from clfed.prototypes import PrototypeMemory

STEPS = ("secagg_keys", "secagg_shares", "secagg_masked", "secagg_unmask")
_KEYS, _SHARES, _MASKED, _UNMASK = STEPS
_STATE = "secagg"
Parts = Mapping[str, bytes]
Request = ConfigRecord | None


@dataclass(frozen=True)
class SecureSum:
    """What one round of secure aggregation brought.

    Attributes:
        memory: Sum of the deltas of all contributors, exact.
        contributors: Node ids whose deltas are in it, sorted.
        refused: Reason by node id, for replies that were errors or broke a rule.
        down: Payload bytes sent to nodes.
        up: Payload bytes that came back.
        seconds: Time that nodes worked, where they are gauged.
    """

    memory: PrototypeMemory
    contributors: tuple[int, ...]
    refused: Mapping[int, str]
    down: int
    up: int
    seconds: float = 0.0


def respond(
    action: str, content: RecordDict, context: Context, delta: Callable[[Terms], PrototypeMemory]
) -> RecordDict:
    """Answer one step as a node; what it has to keep until the next lies in the context's state.

    Args:
        action: One of :data:`STEPS`.
        content: The request.
        context: Of the node.
        delta: What this node adds to the sum of these terms; asked for in the third step.

    Returns:
        The reply.

    Raises:
        ClfedError: The request breaks a rule, see :class:`Client`; the state stays as it was.
    """
    digest = blob(config(content, "round"), "digest")
    name = str(context.node_id)
    if action == _KEYS:
        # A new round is begun, whatever became of the last one.
        client = Client(name, Terms.from_bytes(blob(config(content, "round"), "terms")))
    else:
        client = Client.from_bytes(blob(config(context.state, _STATE), "client"))
    if client.terms.digest != digest:
        raise InvalidMessage("Expected a request of the round that this node takes part in.")
    if action == _KEYS:
        parts = {name: client.advertise()}
    elif action == _SHARES:
        parts = client.share(_bytes(config(content, "parts")))
    elif action == _MASKED:
        table = client.mask(_bytes(config(content, "parts")), delta(client.terms))
        parts = {name: table.astype("<u8", copy=False).tobytes()}
    elif action == _UNMASK:
        parts = client.unmask(_truths(config(content, "parts")))
    else:
        raise InvalidMessage(f"Expected one of {', '.join(STEPS)}, got {action!r}.")
    context.state[_STATE] = ConfigRecord({"client": client.to_bytes()})
    return RecordDict({"parts": ConfigRecord(dict(parts))})


def secure_sum(
    grid: Grid,
    nodes: Iterable[int],
    terms: Terms,
    *,
    timeout: float,
    head: ConfigRecord | None = None,
) -> SecureSum:
    """Let nodes add up their deltas without showing them.

    Args:
        grid: Any grid.
        nodes: Ids of the nodes to ask.
        terms: Of the round, see :class:`Terms`.
        timeout: Longest wait for the replies of each of the four steps, seconds.
        head: What the record ``round`` of every request holds besides.

    Raises:
        FederationError: Too few nodes answered a step, or one sent false shares.
        InvalidMessage: No honest contributors can have the sum that came out.
    """
    server, post = Aggregator(terms), _Post(grid, terms, timeout, head)
    first = {str(node): None for node in nodes}
    keys = server.take_keys(post.own(_KEYS, first))
    roster = ConfigRecord(dict(keys))
    sealed = server.take_shares(post.ask(_SHARES, dict.fromkeys(keys, roster)))
    tables = post.own(_MASKED, {name: ConfigRecord(dict(p)) for name, p in sealed.items()})
    arrived = server.take_masked({name: _words(data) for name, data in tables.items()})
    fates = ConfigRecord(dict(arrived))
    memory = server.take_unmasked(post.ask(_UNMASK, dict.fromkeys(server.contributors, fates)))
    contributors = sorted(map(int, server.contributors))
    refused = {int(name): reason for name, reason in (server.refused | post.failed).items()}
    return SecureSum(memory, tuple(contributors), refused, post.down, post.up, post.seconds)


class _Post:
    """Carries the messages of one round and counts their bytes."""

    def __init__(self, grid: Grid, terms: Terms, timeout: float, head: ConfigRecord | None) -> None:
        self._grid, self._terms, self._timeout = grid, terms, timeout
        self._head = head or ConfigRecord()
        self.failed: dict[str, str] = {}
        self.down = self.up = 0
        self.seconds = 0.0

    def ask(self, action: str, requests: Mapping[str, Request]) -> dict[str, dict[str, bytes]]:
        """Return the parts of every reply, by name; errors are noted as failed."""
        head = ConfigRecord({**self._head, "digest": self._terms.digest})
        if action == _KEYS:
            head["terms"] = self._terms.to_bytes()
        messages = []
        for name, parts in requests.items():
            content = RecordDict({"round": head})
            if parts is not None:
                content["parts"] = parts
            kind = f"{MessageType.QUERY}.{action}"
            messages.append(Message(content, dst_node_id=int(name), message_type=kind))
            self.down += record_bytes(content)
        replies = {}
        for reply in exchange(self._grid, messages, timeout=self._timeout):
            name = str(reply.metadata.src_node_id)
            if reply.has_error():
                self.failed[name] = str(reply.error.reason)
                continue
            try:
                replies[name] = _bytes(config(reply.content, "parts"))
                self.up += record_bytes(reply.content)
                spent = reply.content[COST].get("seconds") if COST in reply.content else 0.0
                self.seconds += spent if isinstance(spent, int | float) else 0.0
            except (InvalidMessage, ValueError) as error:  # ValueError: it cannot be measured
                self.failed[name] = str(error)
        return replies

    def own(self, action: str, requests: Mapping[str, Request]) -> dict[str, bytes]:
        """As :meth:`ask`, for steps in which every node sends one part, its own."""
        replies = self.ask(action, requests)
        return {name: parts.get(name, b"") for name, parts in replies.items()}


def _bytes(record: ConfigRecord) -> dict[str, bytes]:
    return {name: blob(record, name) for name in record}


def _truths(record: ConfigRecord) -> dict[str, bool]:
    for name, value in record.items():
        if not isinstance(value, bool):
            raise InvalidMessage(f"Expected whether the table of {name!r} came, got {value!r}.")
    return {name: value is True for name, value in record.items()}


def _words(data: bytes) -> Words:
    # No table is empty, so bytes that are no whole words are refused like any of a wrong length.
    return np.frombuffer(b"" if len(data) % 8 else data, "<u8").astype(np.uint64, copy=False)
