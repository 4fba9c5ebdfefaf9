"""Whole networks as Flower records, for strategies that send weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord

from clfed.backbones import Encoder
from clfed.learners.fine_tuning import FineTuning


def network_record(learner: FineTuning) -> ArrayRecord:
    """Return all weights and buffers of a network."""
    return ArrayRecord(learner.state_dict())


def load_network(
    encoder: Encoder, record: ArrayRecord, classes: Sequence[str], **options: Any
) -> FineTuning:
    """Return the network of a record.

    Args:
        encoder: Gives the architecture and the input transform.
        record: Weights and buffers, as :func:`network_record` packs them.
        classes: Classes of the head's rows.
        options: Optimiser settings of :class:`FineTuning`.
    """
    learner = FineTuning(encoder, classes, **options)
    learner.load_state_dict(record.to_torch_state_dict())
    return learner
