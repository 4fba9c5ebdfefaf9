"""The round loop: the same for every strategy and every grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from clfed.errors import ConfigError, FederationError
from clfed.federated.grid import Mailbox, Meter
from clfed.federated.wire import COST


@dataclass(frozen=True)
class RoundReport:
    """What one round cost.

    Attributes:
        round: Its number, from 1.
        down: Payload bytes sent to nodes.
        up: Payload bytes that came back.
        asked: Number of nodes addressed.
        answered: Number of replies without error.
        seconds: Wall-clock time of the round.
        node_seconds: Time that the nodes worked, summed over nodes, where they are gauged.
        peak: Largest memory that the work of one node took, bytes; None where it is not measured.
    """

    round: int
    down: int
    up: int
    asked: int
    answered: int
    seconds: float
    node_seconds: float = 0.0
    peak: int | None = None


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    rounds: int,
    timeout: float,
    after: Callable[[RoundReport, ArrayRecord], None],
    gauged: bool = False,
    first: int = 1,
    enough: float = 0.0,
    attempts: int = 1,
) -> ArrayRecord:
    """Run rounds of a strategy: configure, exchange, aggregate.

    A strategy addresses a node at most once a round. A round is over when every node has answered
    or the time is up; what comes later is never put together with a newer round.

    Args:
        strategy: Any strategy of the message API; its evaluation messages are not sent.
        grid: Any grid.
        arrays: What the first round starts from.
        rounds: Number of the last round.
        timeout: Longest wait for the replies of a round, seconds, each time that it is asked for.
        after: Called after each round with its report and the new arrays.
        gauged: Whether nodes measure the time and memory that they take.
        first: Number of the first round, larger than 1 where earlier ones are done.
        enough: Share of the nodes of a round that must answer it without an error; one node at
            least.
        attempts: How often the nodes of a round are asked; only those that have not answered are
            asked again.

    Returns:
        The arrays after the last round.

    Raises:
        ConfigError: A share outside 0 to 1, or less than one attempt.
        FederationError: Too few nodes answered a round without an error.
    """
    if not 0 <= enough <= 1 or attempts < 1:
        raise ConfigError(
            "Expected a share of nodes from 0 to 1 and at least 1 attempt, got "
            f"{enough} and {attempts}."
        )
    config = ConfigRecord({"gauge": True} if gauged else {})
    for number in range(first, rounds + 1):
        start, meter = time.perf_counter(), Meter(grid)
        messages = list(strategy.configure_train(number, arrays, config, meter))
        good, bad = _ask(meter, messages, timeout=timeout, enough=enough, attempts=attempts)
        if len(good) < _needed(messages, enough):
            raise FederationError(_too_few(number, messages, good, bad, timeout, enough, attempts))
        replies = [*good, *bad]
        merged, _ = strategy.aggregate_train(number, replies)
        arrays = arrays if merged is None else merged
        seconds, peaks = _measured(good, "seconds"), _measured(good, "peak")
        after(
            RoundReport(
                round=number,
                down=meter.down,
                up=meter.up,
                asked=len(messages),
                answered=len(good),
                seconds=time.perf_counter() - start,
                node_seconds=sum(seconds),
                peak=int(max(peaks)) if peaks else None,
            ),
            arrays,
        )
    return arrays


def _needed(messages: Sequence[Message], enough: float) -> int:
    return max(1, math.ceil(enough * len(messages)))


def _ask(
    grid: Grid, messages: Sequence[Message], *, timeout: float, enough: float, attempts: int
) -> tuple[list[Message], list[Message]]:
    """Return one reply with content of each node that sent one, and of the others their errors."""
    mailbox = Mailbox(grid)  # of this round alone, so nothing of another one gets in
    good: dict[int, Message] = {}
    bad: dict[int, Message] = {}
    asked = list(messages)
    for _ in range(attempts):
        for reply in mailbox.exchange(asked, timeout=timeout):
            # A node that is asked again may answer both times.
            (bad if reply.has_error() else good).setdefault(reply.metadata.src_node_id, reply)
        if len(good) >= _needed(messages, enough):
            break
        # A message carries the number of its first delivery, so it cannot be sent twice.
        asked = [
            Message(m.content, m.metadata.dst_node_id, m.metadata.message_type)
            for m in messages
            if m.metadata.dst_node_id not in good
        ]
    return list(good.values()), [reply for node, reply in bad.items() if node not in good]


def _too_few(
    number: int,
    messages: Sequence[Message],
    good: Sequence[Message],
    bad: Sequence[Message],
    timeout: float,
    enough: float,
    attempts: int,
) -> str:
    who = f"Only {len(good)}" if good else "None"
    often = f", asked {attempts} times" if attempts > 1 else ""
    need = f" {_needed(messages, enough)} would have been enough." if good else ""
    reasons = sorted({str(reply.error.reason) for reply in bad})
    why = f" First error: {reasons[0]}" if reasons else "" if good else " No reply came."
    return (
        f"{who} of {len(messages)} nodes answered round {number} within {timeout:g} s{often}."
        f"{need}{why}"
    )


def _measured(replies: Iterable[Message], key: str) -> list[float]:
    found = [reply.content[COST].get(key) for reply in replies if COST in reply.content]
    return [value for value in found if isinstance(value, int | float)]
