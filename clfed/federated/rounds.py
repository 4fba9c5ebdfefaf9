"""The round loop: the same for every strategy and every grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from clfed.errors import FederationError
from clfed.federated.grid import Meter, exchange
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
) -> ArrayRecord:
    """Run rounds of a strategy: configure, exchange, aggregate.

    Args:
        strategy: Any strategy of the message API; its evaluation messages are not sent.
        grid: Any grid.
        arrays: What the first round starts from.
        rounds: Number of rounds.
        timeout: Longest wait for the replies of a round, seconds.
        after: Called after each round with its report and the new arrays.
        gauged: Whether nodes measure the time and memory that they take.

    Returns:
        The arrays after the last round.

    Raises:
        FederationError: Not one node answered a round without an error.
    """
    config = ConfigRecord({"gauge": True} if gauged else {})
    for number in range(1, rounds + 1):
        start, meter = time.perf_counter(), Meter(grid)
        messages = list(strategy.configure_train(number, arrays, config, meter))
        replies = exchange(meter, messages, timeout=timeout)
        good = [r for r in replies if r.has_content()]
        if not good:
            reasons = sorted({str(r.error.reason) for r in replies if r.has_error()})
            raise FederationError(
                f"None of {len(messages)} nodes answered round {number} within {timeout:g} s. "
                + (f"First error: {reasons[0]}" if reasons else "No reply came.")
            )
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


def _measured(replies: Iterable[Message], key: str) -> list[float]:
    found = [reply.content[COST].get(key) for reply in replies if COST in reply.content]
    return [value for value in found if isinstance(value, int | float)]
