"""What the strategies share: training messages to nodes, evaluation at the server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from clfed import __version__
from clfed.errors import FederationError
from clfed.federated.grid import wait_for_nodes
from clfed.strategies.settings import check_weights

Records = Mapping[str, ArrayRecord | ConfigRecord]


class TrainOnly(Strategy):
    """A strategy whose training message carries everything; a separate one costs a round trip.

    Attributes:
        leaves: What leaves a node, in a few words.
        rounds_per_mission: Rounds in which nodes work on the same mission.

    Args:
        session: Text that tells nodes one federation from the next; a new one starts afresh.
        nodes: Number of nodes to wait for before a round starts.
        wait: Longest wait for them, seconds; then the round goes on with those that are there.

    Raises:
        ConfigError: A setting is out of range.
    """

    leaves: ClassVar[str]
    rounds_per_mission = 1

    def __init__(self, *, session: str = "", nodes: int = 1, wait: float = 600.0) -> None:
        check_weights(wait=wait)
        self.session, self.nodes, self.wait = session, nodes, wait

    def summary(self) -> None:
        """Do nothing: the run folder says what was configured."""

    def connected(self, grid: Grid) -> list[int]:
        """Return the sorted ids of the nodes that take part in a round.

        Raises:
            FederationError: No node came within the waiting time.
        """
        ids = wait_for_nodes(grid, self.nodes, timeout=self.wait)
        if not ids:
            raise FederationError(f"No node connected within {self.wait:g} s.")
        return ids

    def head(self, server_round: int, config: ConfigRecord, **entries: Any) -> ConfigRecord:
        """Return the record ``round`` of a request.

        Args:
            server_round: Its number.
            config: What the caller of the strategy adds.
            entries: What the strategy adds.
        """
        return ConfigRecord(
            {
                **config,
                "round": server_round,
                "session": self.session,
                "clfed": __version__,
                **entries,
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send nothing."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, as nothing was sent."""
        return None
