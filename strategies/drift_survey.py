r"""Asks nodes how their images moved from an older embedding to the present one.

.. math:: \sum_i h_i h_i^{-\top}, \qquad \sum_i h_i^- h_i^{-\top}

Sums over nodes, with which the server moves the classes of those that have no images any more
(Gomez-Villa et al. 2024, arXiv 2407.08536, in closed form). Nothing is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from clfed.backbones import Encoder
from clfed.errors import ConfigError, InvalidEmbedding, InvalidMessage
from clfed.federated import records
from clfed.federated.local_training import LocalTraining, Visit
from clfed.federated.wire import decode_memory, encode_memory
from clfed.prototypes.contribution import DEFAULT_CAP, check_evidence
from clfed.prototypes.drift_statistics import DriftStatistics
from clfed.strategies.training import TrainingStrategy

logger = logging.getLogger(__name__)


class DriftSurvey(TrainingStrategy[DriftStatistics]):
    """Adds up drift statistics of all nodes, one mission a round.

    A request holds ``before`` (the older encoder) beside ``round``; the present one is that of the
    briefing. A reply holds ``pairs``, the statistics of the mission's images.

    Attributes:
        shares: What came, by mission and contributor, so that a repeated message adds nothing.

    Args:
        encoder: The present embedding.
        before: The older embedding.
        options: Of :class:`~clfed.strategies.training.TrainingStrategy`.

    Raises:
        ConfigError: The embeddings have different sizes.
    """

    leaves: ClassVar[str] = "number of images, sums and second moments of their embeddings"

    def __init__(self, encoder: Encoder, *, before: Encoder, **options: Any) -> None:
        super().__init__(encoder, **options)
        if before.dim != encoder.dim:
            raise ConfigError(
                "Expected an older embedding of the same size as the present one, "
                f"{encoder.dim}, got {before.dim}."
            )
        self.before = before
        self.shares: dict[tuple[int, str], DriftStatistics] = {}
        self._empty = DriftStatistics.empty(encoder.dim, before.embedding_id, encoder.embedding_id)

    def statistics(self, *, without: Iterable[str] = ()) -> DriftStatistics:
        """Return the sum over contributors, some of them left out."""
        left_out = set(without)
        parts = [part for (_, name), part in self.shares.items() if name not in left_out]
        return sum(parts, start=self._empty)

    def arrays(self) -> ArrayRecord:
        """Return the older encoder."""
        weights = np.frombuffer(self.before.to_bytes(), np.uint8)
        return ArrayRecord({"encoder": Array(weights)})

    def content(self, server_round: int, arrays: ArrayRecord) -> RecordDict:
        """Return the older encoder."""
        return RecordDict({"before": arrays})

    def read(self, contributor: str, content: RecordDict) -> DriftStatistics | None:
        """Return what a node sent, None where it has too few images.

        Raises:
            InvalidMessage: No images can have these statistics, or they are of other embeddings.
        """
        if "pairs" not in content:
            return None
        pairs, zero = decode_memory(records.arrays(content, "pairs")), self._empty.pairs
        for what in ("embedding_id", "dim", "moments"):
            got, expected = getattr(pairs, what), getattr(zero, what)
            if got != expected:
                raise InvalidMessage(f"expected pairs with {what} {expected!r}, got {got!r}")
        check_evidence(pairs.classes, pairs.counts, pairs.sums, outer=pairs.outer, cap=DEFAULT_CAP)
        return DriftStatistics(self._empty.before, self._empty.after, pairs)

    def merge(
        self, server_round: int, found: Mapping[str, DriftStatistics]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep what came; a share with which the sum would leave 64 bits is left out."""
        for name, part in found.items():
            key = (self.mission(server_round), name)
            earlier = self.shares.get(key)
            self.shares[key] = part
            try:
                self.statistics()
            except InvalidEmbedding as error:
                logger.warning("Round %d: left out %s: %s", server_round, name, error)
                del self.shares[key]
                if earlier is not None:
                    self.shares[key] = earlier
        return None, MetricRecord({"images": self.statistics().count})


class DriftReport(LocalTraining):
    """Embeds the mission's images with both networks and sends sums alone.

    Args:
        least: Images below which a node sends nothing; the sums over one image are its embedding.

    Raises:
        ConfigError: Less than one image.
    """

    def __init__(self, *, least: int = 5) -> None:
        if type(least) is not int or least < 1:
            raise ConfigError(f"least must be a whole number of at least 1, got {least!r}.")
        self.least = least

    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Return ``pairs``, or nothing where there are too few images."""
        if len(visit.labels) < self.least:
            return RecordDict()
        sent = records.array(records.arrays(request, "before"), "encoder")
        before = Encoder.from_bytes(sent.numpy().tobytes())
        statistics = DriftStatistics.of(
            before.embed(visit.images),
            visit.encoder.embed(visit.images),
            before.embedding_id,
            visit.encoder.embedding_id,
        )
        return RecordDict({"pairs": encode_memory(statistics.pairs)})
