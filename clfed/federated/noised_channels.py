"""Class statistics with noise: what gets to the server, and what it reads off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from clfed.errors import InvalidMessage
from clfed.federated.channels import Channel, Ground
from clfed.federated.records import arrays, integer
from clfed.federated.wire import decode_contribution
from clfed.privacy.accountant import GaussianAccount
from clfed.privacy.mechanism import Mechanism
from clfed.privacy.release import SlotTable
from clfed.prototypes import Contribution, PrototypeMemory
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.prototypes.fixed_point import RANGE, SCALE

logger = logging.getLogger(__name__)
_DEVIATIONS = 40  # of noise that a table may be off by; more has a probability of nothing at all


class NoisedTotal:
    """The sum of all noised tables so far, and what is read off it.

    Args:
        mechanism: The noise.
        ground: What is public.
        mistakes: Number of classes, on average, that nobody met and that the noise passes off as
            met.
        pooled: Whether the nodes' evidence of a mission is one release, not one each.

    Attributes:
        table: The sum.
        memory: The classes that stand out from the noise.
    """

    def __init__(
        self, mechanism: Mechanism, ground: Ground, *, mistakes: float, pooled: bool
    ) -> None:
        self.mechanism, self._exposure = mechanism, ground.exposure
        self._mistakes, self._pooled = mistakes, pooled
        self.table = SlotTable.of(ground.empty, mechanism.classes)
        self.memory = ground.empty

    def add(self, table: SlotTable) -> None:
        """Add a noised table."""
        self.table = self.table + table

    def read_off(self) -> None:
        """Look at the sum again; without noise there is none yet."""
        if self.table.count_variance:
            threshold = self.table.threshold(self._mistakes)
            norm = self.mechanism.bounds.clip_norm
            self.memory = self.table.memory(clip_norm=norm, threshold=threshold)

    def account(self, missions: int) -> GaussianAccount:
        """Return what so many missions have spent."""
        return self.mechanism.account(missions, self._exposure, pooled=self._pooled)

    def settings(self, send: str) -> dict[str, Any]:
        """Return how nodes clip, the noise that they add, and how they tell it."""
        mechanism = self.mechanism
        return {
            "send": send,
            "clip_norm": mechanism.bounds.clip_norm,
            "mechanism": mechanism.settings(),
        }


class TrustedNoise(Channel):
    """Rows in the open to a server that adds noise once a mission, before anybody else sees them.

    What is published is the noised sum alone, to nodes too.

    Args:
        mechanism: The noise.
        ground: What is public.
        mistakes: See :class:`NoisedTotal`.
    """

    def __init__(self, mechanism: Mechanism, ground: Ground, *, mistakes: float) -> None:
        super().__init__()
        self.total = NoisedTotal(mechanism, ground, mistakes=mistakes, pooled=True)
        self._empty = ground.empty

    @property
    def memory(self) -> PrototypeMemory:
        """The classes that stand out from the noise."""
        return self.total.memory

    def settings(self) -> dict[str, Any]:
        """Return the norm that nodes clip embeddings to."""
        return {"clip_norm": self.total.mechanism.bounds.clip_norm}

    def finish(self, server_round: int, deltas: Mapping[str, PrototypeMemory]) -> None:
        """Add what the round brought, and noise, also where it brought nothing."""
        mechanism = self.total.mechanism
        bounds = mechanism.bounds
        new = SlotTable.of(self._empty, mechanism.classes)
        for contributor, delta in deltas.items():
            strange = sorted(set(delta.classes) - set(mechanism.classes))
            if strange:
                logger.warning("Left out %r of %s: not in the list", strange[0], contributor)
            table = SlotTable.of(delta.without(strange), mechanism.classes)
            if bounds.message_norm is not None:
                table = table.clipped(bounds.message_norm, bounds.count_scale)
            new = new + table
        entropy = mechanism.entropy("server", server_round)
        self.total.add(new.noised(mechanism.sigma, bounds.count_scale, entropy))
        self.total.read_off()

    def account(self, missions: int) -> GaussianAccount:
        """Return what so many missions have spent."""
        return self.total.account(missions)


class NoisedTables(Channel):
    """One noised table a node and mission, over the public list: nobody has to be trusted.

    A table counts once however often it comes.

    Args:
        mechanism: The noise.
        ground: What is public.
        mistakes: See :class:`NoisedTotal`.
    """

    leaves = "for each class of a public list count and sum of embeddings, with noise"

    def __init__(self, mechanism: Mechanism, ground: Ground, *, mistakes: float) -> None:
        super().__init__()
        self.total = NoisedTotal(mechanism, ground, mistakes=mistakes, pooled=False)
        self._empty = ground.empty
        self._newest: dict[str, int] = {}
        self._round = 0

    @property
    def memory(self) -> PrototypeMemory:
        """The classes that stand out from the noise."""
        return self.total.memory

    def settings(self) -> dict[str, Any]:
        """Return how nodes clip, and the noise that they add."""
        return self.total.settings("releases")

    def entries(self, contributor: str) -> dict[str, int]:
        """Return the number of the newest table that has come."""
        return {"released": self._newest.get(contributor, 0)}

    def begin(self, grid: Grid, head: ConfigRecord) -> None:
        """Note the number of the round, beyond which no table can be."""
        self._round = integer(head, "round")

    def take(self, node: int, contributor: str, content: RecordDict) -> None:
        """Add the tables that are new.

        Raises:
            InvalidMessage: One is no table of this federation and sender; none is added.
        """
        found = [
            decode_contribution(arrays(content, name))
            for name in content
            if name.startswith("release-")
        ]
        for part in found:
            self._check(contributor, part)
        known = self._newest.get(contributor, 0)
        for part in sorted(found, key=lambda part: part.version):
            if part.version > known:
                known = part.version
                self.total.add(self._table(part))
        self._newest[contributor] = known

    def finish(self, server_round: int, deltas: Mapping[str, PrototypeMemory]) -> None:
        """Read off the tables that are there."""
        self.total.read_off()

    def account(self, missions: int) -> GaussianAccount:
        """Return what so many missions have spent."""
        return self.total.account(missions)

    def _table(self, part: Contribution) -> SlotTable:
        mechanism = self.total.mechanism
        sigma, scale = mechanism.sigma, mechanism.bounds.count_scale
        return SlotTable(
            part.classes,
            part.counts,
            part.sums,
            part.embedding_id,
            sum_variance=sigma**2,
            count_variance=(sigma / scale) ** 2,
        )

    def _check(self, contributor: str, part: Contribution) -> None:
        empty, mechanism = self._empty, self.total.mechanism
        shape = (len(mechanism.classes), empty.dim)
        told = (part.contributor, part.classes, part.embedding_id, part.moments)
        if told != (contributor, self.total.table.classes, empty.embedding_id, "none") or (
            tuple(part.sums.shape) != shape
        ):
            raise InvalidMessage(
                f"Expected a table of {contributor!r} over the public list of {shape[0]} classes "
                "and this embedding, got another one."
            )
        if not 1 <= part.version <= self._round:
            raise InvalidMessage(
                f"Expected a table of missions 1 to {self._round}, got {part.version}."
            )
        off = _DEVIATIONS * mechanism.sigma
        for values, most in (
            (part.counts, DEFAULT_CAP + off / mechanism.bounds.count_scale),
            (part.sums, DEFAULT_CAP * RANGE + off),
        ):
            # int64 has no magnitude for its smallest number.
            low, high = int(values.min()), int(values.max())
            if not -most * SCALE <= low <= high <= most * SCALE:
                raise InvalidMessage(
                    f"Expected entries of a table within ±{most:g}, got {low / SCALE:g} to "
                    f"{high / SCALE:g}."
                )
