"""Local training: nodes learn alone and nothing leaves them, what personal methods must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from clfed.strategies.training import TrainingStrategy


class LocalOnly(TrainingStrategy[None]):
    """Asks nodes to train and takes nothing from them.

    A reply holds ``status`` with the node's name alone. What runs at nodes is
    :class:`~clfed.strategies.personal.PersonalTraining`.

    Args:
        encoder: The network that nodes start from, unless they have architectures of their own.
        options: Of :class:`~clfed.strategies.training.TrainingStrategy`.
    """

    leaves: ClassVar[str] = "nothing"
    personal: ClassVar[bool] = True

    def arrays(self) -> ArrayRecord:
        """Return nothing: the server has no state."""
        return ArrayRecord()

    def content(self, server_round: int, arrays: ArrayRecord) -> RecordDict:
        """Return nothing beside the record ``round``."""
        return RecordDict()

    def read(self, contributor: str, content: RecordDict) -> None:
        """Take nothing, whatever a node sent."""

    def merge(
        self, server_round: int, found: Mapping[str, None]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return nothing."""
        return None, None
