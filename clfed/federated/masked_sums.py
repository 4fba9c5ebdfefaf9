"""The server's half of masked sums: four exchanges at the end of each round, and one sum.

The node's half is :func:`clfed.federated.discretion.take_part`; the protocol itself is in
:mod:`clfed.privacy.secure_aggregation`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from clfed.errors import FederationError, InvalidMessage
from clfed.federated.channels import Channel, Ground
from clfed.federated.noised_channels import NoisedTotal
from clfed.privacy.accountant import GaussianAccount
from clfed.privacy.mechanism import Mechanism
from clfed.privacy.release import SlotTable
from clfed.privacy.secagg_messages import secure_sum
from clfed.privacy.terms import LEAST, Terms, majority
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.prototypes.fixed_point import SCALE

logger = logging.getLogger(__name__)
_MOST = 2**32 - 1  # members times cap, see Terms


class MaskedSums(Channel):
    """The exact sum of all nodes' new evidence, of which no part is seen.

    A round in which too few nodes answer adds nothing. What a node has put into it is lost, since
    nothing is put into two sums; what a node has not put in yet comes in the next one. Both are
    said in the log.

    Args:
        ground: What is public.
        threshold: Fewest nodes in a sum; None: more than half.
    """

    leaves = "a masked table of counts and sums, of which only the sum over nodes can be read"

    def __init__(self, ground: Ground, *, threshold: int | None = None) -> None:
        super().__init__()
        self.ground, self._threshold = ground, threshold
        self._memory = ground.empty
        self._ready: dict[int, str] = {}
        self._grid: Grid | None = None
        self._head = ConfigRecord()

    @property
    def memory(self) -> PrototypeMemory | None:
        """The merged table."""
        return self._memory

    def settings(self) -> dict[str, Any]:
        """Return that nodes send nothing but masked tables."""
        return {"send": "sums", "mechanism": None}

    def begin(self, grid: Grid, head: ConfigRecord) -> None:
        """Keep the grid, for the exchanges at the end of the round."""
        self._grid, self._head, self._ready, self.seconds = grid, head, {}, 0.0

    def take(self, node: int, contributor: str, content: RecordDict) -> None:
        """Note that a node has something to put in."""
        self._ready[node] = contributor

    def finish(self, server_round: int, deltas: Mapping[str, PrototypeMemory]) -> None:
        """Let the nodes that are there add up what is new."""
        members = len(self._ready)
        if self._grid is None or members < max(LEAST, self._threshold or 0):
            logger.warning("Round %d: %d nodes are too few for a masked sum", server_round, members)
            return
        terms = Terms(
            round_id=f"{self.ground.session} {server_round}",
            classes=self.ground.classes,
            dim=self.ground.empty.dim,
            embedding_id=self.ground.empty.embedding_id,
            members=members,
            threshold=max(majority(members), self._threshold or 0),
            cap=self._cap(members),
        )
        try:
            found = secure_sum(
                self._grid,
                sorted(self._ready),
                terms,
                timeout=self.ground.timeout,
                head=self._head,
            )
        except (FederationError, InvalidMessage) as error:
            logger.warning("Round %d: there is no masked sum: %s", server_round, error)
            return
        self.seconds = found.seconds
        for node in sorted(set(self._ready) - set(found.contributors)):
            logger.warning(
                "Round %d: the masked sum is without %s: %s",
                server_round,
                self._ready[node],
                found.refused.get(node, "no reply came"),
            )
        self._add(found.memory, len(found.contributors), terms)

    def _cap(self, members: int) -> int:
        return min(DEFAULT_CAP, _MOST // members)

    def _add(self, memory: PrototypeMemory, contributors: int, terms: Terms) -> None:
        self._memory = self._memory + memory


class NoisedSums(MaskedSums):
    r"""Masked sums to which every node adds its part of the noise.

    With :math:`N(0, \sigma^2 / t)` of each, :math:`t` being the fewest nodes that can end up in the
    sum, the sum has at least :math:`\sigma^2`. Nodes that tell the server their own noise take
    that much of it away.

    Args:
        mechanism: The noise.
        ground: What is public.
        mistakes: As in :class:`~clfed.federated.noised_channels.NoisedTotal`.
        threshold: As in :class:`MaskedSums`.
    """

    leaves = "a masked table with noise, of which only the sum over nodes can be read"

    def __init__(
        self,
        mechanism: Mechanism,
        ground: Ground,
        *,
        mistakes: float,
        threshold: int | None = None,
    ) -> None:
        super().__init__(ground, threshold=threshold)
        self.total = NoisedTotal(mechanism, ground, mistakes=mistakes, pooled=True)

    @property
    def memory(self) -> PrototypeMemory:
        """The classes that stand out from the noise."""
        return self.total.memory

    def settings(self) -> dict[str, Any]:
        """Return how nodes clip, and the noise of the whole sum."""
        return self.total.settings("sums")

    def account(self, missions: int) -> GaussianAccount:
        """Return what so many missions have spent."""
        return self.total.account(missions)

    def _cap(self, members: int) -> int:
        # Counts travel in the resolution of the sums, or their noise would be too coarse.
        return _MOST // members

    def _add(self, memory: PrototypeMemory, contributors: int, terms: Terms) -> None:
        mechanism = self.total.mechanism
        table = SlotTable.of(memory, mechanism.classes)
        share = contributors / terms.threshold
        self.total.add(
            replace(
                table,
                counts=table.counts // int(SCALE),
                sum_variance=mechanism.sigma**2 * share,
                count_variance=(mechanism.sigma / mechanism.bounds.count_scale) ** 2 * share,
            )
        )
        self.total.read_off()
