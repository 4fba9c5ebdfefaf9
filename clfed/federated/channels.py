"""How class statistics get from nodes to the server, and what the server sees of them.

Here is the plain way, which :mod:`clfed.federated.noised_channels` and
:mod:`clfed.federated.masked_sums` build on. The node's half is :mod:`clfed.federated.discretion`;
what a user chooses, and which promise it makes, is in :mod:`clfed.privacy.tiers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from clfed.privacy.accountant import GaussianAccount
from clfed.privacy.mechanism import Exposure
from clfed.prototypes import PrototypeMemory


@dataclass(frozen=True)
class Ground:
    """What everybody knows before the first mission.

    Attributes:
        empty: The empty memory: embedding, its size, and kept moments.
        classes: Names of all classes that nodes may meet, a public list.
        nodes: Number of nodes.
        exposure: How often one image may be met.
        session: Text that tells this federation from every other one.
        seed: Of the run.
        timeout: Longest wait for the replies of one exchange, seconds.
    """

    empty: PrototypeMemory
    classes: tuple[str, ...]
    nodes: int
    exposure: Exposure
    session: str
    seed: int
    timeout: float


class Channel:
    """Rows in the open: the strategy's ledger keeps them by contributor.

    Attributes:
        leaves: What leaves a node, in a few words; None: what the strategy says.
        seconds: Time that nodes worked in exchanges of the channel's own in the last round, where
            they are gauged.

    Args:
        least: By how many examples a row must have changed before it is sent.
    """

    leaves: ClassVar[str | None] = None

    def __init__(self, *, least: int = 1) -> None:
        self._least, self.seconds = least, 0.0

    @property
    def memory(self) -> PrototypeMemory | None:
        """The merged table, where the ledger does not hold it."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the settings ``privacy`` of a node's briefing; empty: everything in the open."""
        return {}

    def entries(self, contributor: str) -> dict[str, int]:
        """Return what the record ``round`` of a request to one node holds besides."""
        return {"least": self._least} if self._least > 1 else {}

    def begin(self, grid: Grid, head: ConfigRecord) -> None:
        """Start a round.

        Args:
            grid: That carries its messages.
            head: What the record ``round`` of every request holds.
        """

    def take(self, node: int, contributor: str, content: RecordDict) -> None:
        """Take in what a node told other than rows.

        Raises:
            ClfedError: It breaks a rule; nothing has changed.
        """

    def finish(self, server_round: int, deltas: Mapping[str, PrototypeMemory]) -> None:
        """End a round.

        Args:
            server_round: Its number.
            deltas: What the rows of each contributor brought.
        """

    def account(self, missions: int) -> GaussianAccount | None:
        """Return what so many missions have spent; None: nothing bounds it."""
        return None
