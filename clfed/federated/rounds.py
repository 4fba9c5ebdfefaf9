"""The round loop: the same for every strategy and every grid."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from clfed.errors import FederationError
from clfed.federated.grid import exchange
from clfed.federated.wire import record_bytes


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
    """

    round: int
    down: int
    up: int
    asked: int
    answered: int
    seconds: float


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    rounds: int,
    timeout: float,
    after: Callable[[RoundReport, ArrayRecord], None],
) -> ArrayRecord:
    """Run rounds of a strategy: configure, exchange, aggregate.

    Args:
        strategy: Any strategy of the message API; its evaluation messages are not sent.
        grid: Any grid.
        arrays: What the first round starts from.
        rounds: Number of rounds.
        timeout: Longest wait for the replies of a round, seconds.
        after: Called after each round with its report and the new arrays.

    Returns:
        The arrays after the last round.

    Raises:
        FederationError: Not one node answered a round without an error.
    """
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        down = sum(record_bytes(m.content) for m in messages)
        replies = exchange(grid, messages, timeout=timeout)
        good = [r for r in replies if r.has_content()]
        if not good:
            reasons = sorted({str(r.error.reason) for r in replies if r.has_error()})
            raise FederationError(
                f"None of {len(messages)} nodes answered round {number} within {timeout:g} s. "
                + (f"First error: {reasons[0]}" if reasons else "No reply came.")
            )
        up = sum(record_bytes(r.content) for r in good)
        merged, _ = strategy.aggregate_train(number, replies)
        arrays = arrays if merged is None else merged
        seconds = time.perf_counter() - start
        after(RoundReport(number, down, up, len(messages), len(good), seconds), arrays)
    return arrays
