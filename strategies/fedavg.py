r"""Federated averaging of a whole network whose head grows with the classes that nodes meet.

.. math:: w \leftarrow \sum_k \frac{n_k}{\sum_j n_j}\, w_k

(McMahan et al. 2017, arXiv 1602.05629.) Each node trains on its mission alone and nothing protects
what was learned before: the lower bound of federated reconnaissance. A head row is averaged over
the nodes whose head has it, so nodes with different new classes still merge.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from numpy.typing import NDArray

from clfed.errors import InvalidMessage
from clfed.federated import records
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.prototypes.tables import checked_names
from clfed.strategies.base import TrainOnly

logger = logging.getLogger(__name__)
Floats = NDArray[Any]
HEAD = ("head.weight", "head.bias")


class GrowingHeadFedAvg(TrainOnly):
    """FedAvg over networks with a common backbone and heads over different classes.

    A request holds ``model`` (the network), ``round`` (number, session, classes as JSON) and,
    for a node's first message, the briefing. A reply holds ``model`` and ``status`` (contributor,
    classes as JSON, number of examples; 0 examples mean that nothing was trained).

    Args:
        briefing: Records that a node needs once.
        options: Of :class:`~clfed.strategies.base.TrainOnly`.
    """

    def __init__(
        self, *, briefing: Mapping[str, ArrayRecord | ConfigRecord], **options: Any
    ) -> None:
        super().__init__(**options)
        self.classes: tuple[str, ...] = ()
        self._briefing = dict(briefing)
        self._briefed: set[int] = set()
        self._sent: dict[str, Floats] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the current network to every node that is there.

        Raises:
            FederationError: No node came within the waiting time.
        """
        ids = self.connected(grid)
        self._sent = {key: array.numpy() for key, array in arrays.items()}
        head = self.head(server_round, config, classes=json.dumps(self.classes))
        kind = f"{MessageType.TRAIN}.finetune"
        messages = []
        for node in ids:
            content = RecordDict({"model": arrays, "round": head})
            if node not in self._briefed:
                content.update(self._briefing)
            messages.append(Message(content, dst_node_id=node, message_type=kind))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the networks, weighted by their numbers of examples.

        A reply that is an error or breaks a rule is logged and left out.
        """
        trained: list[_Trained] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise InvalidMessage(str(reply.error.reason))
                found = self._read(node, reply.content)
            except InvalidMessage as error:
                logger.warning("Round %d: left out node id %d: %s", server_round, node, error)
                continue
            if found is not None:
                trained.append(found)
        if not trained:
            return None, None
        # Floating point sums depend on their order, and node ids are random in some engines.
        trained.sort(key=lambda part: part.contributor)
        before = self.classes
        self.classes = tuple(sorted(set().union(before, *(part.classes for part in trained))))
        place = {name: row for row, name in enumerate(self.classes)}
        rows = [np.array([place[name] for name in part.classes], int) for part in trained]
        held = np.array([place[name] for name in before], int)
        examples = np.array([part.examples for part in trained], np.float64)
        averaged: dict[str, Array] = {}
        for key, first in trained[0].model.items():
            values = [part.model[key] for part in trained]
            if key in HEAD:
                mean = np.zeros((len(place), *first.shape[1:]))
                if key in self._sent:
                    mean[held] = self._sent[key]
                _average_rows(mean, values, rows, examples)
            elif np.issubdtype(first.dtype, np.floating):
                mean = np.tensordot(examples / examples.sum(), np.stack(values), axes=1)
            else:
                mean = np.max(np.stack(values), axis=0)
            averaged[key] = Array(np.asarray(mean, first.dtype))
        metrics = {"classes": len(self.classes), "examples": int(examples.sum())}
        return ArrayRecord(averaged), MetricRecord(dict(metrics))

    def _read(self, node: int, content: RecordDict) -> _Trained | None:
        """Return what a node trained, ``None`` where it trained nothing or must be briefed.

        Raises:
            InvalidMessage: The reply does not fit the request.
        """
        status = records.config(content, "status")
        if status.get("needs-briefing"):
            self._briefed.discard(node)
            return None
        name, examples = records.text(status, "contributor"), records.integer(status, "examples")
        classes = _names(records.text(status, "classes"))
        model = _network(records.arrays(content, "model"))
        self._briefed.add(node)
        if examples == 0:
            return None
        if not 0 < examples <= DEFAULT_CAP:
            raise InvalidMessage(f"expected 0 to {DEFAULT_CAP} examples, got {examples}")
        for key in model.keys() | self._sent.keys():
            got, sent = model.get(key), self._sent.get(key)
            if got is None or sent is None:
                raise InvalidMessage(f"expected the arrays that were sent, {key!r} is not in both")
            shape = (len(classes), *sent.shape[1:]) if key in HEAD else sent.shape
            if (got.shape, got.dtype) != (shape, sent.dtype):
                raise InvalidMessage(
                    f"expected {key!r} of shape {shape} and {sent.dtype}, "
                    f"got {got.shape} and {got.dtype}"
                )
            if not np.isfinite(got).all():
                raise InvalidMessage(f"expected finite numbers in {key!r}")
        return _Trained(name, examples, classes, model)


@dataclass(frozen=True)
class _Trained:
    """What one node trained in a round."""

    contributor: str
    examples: int
    classes: tuple[str, ...]
    model: Mapping[str, Floats]


def _names(text: str) -> tuple[str, ...]:
    try:
        classes = checked_names(json.loads(text), "class name")
    except ValueError as error:
        raise InvalidMessage(f"expected class names as JSON: {error}") from error
    if len(set(classes)) < len(classes):
        raise InvalidMessage("expected every class once")
    return classes


def _network(record: ArrayRecord) -> dict[str, Floats]:
    try:
        return {key: array.numpy() for key, array in record.items()}
    except (ValueError, TypeError, EOFError) as error:
        raise InvalidMessage(f"an array of the network is unreadable: {error}") from error


def _average_rows(mean: Floats, values: list[Floats], rows: list[Floats], examples: Floats) -> None:
    """Average each head row over the nodes that have it; a row that nobody has stays."""
    total, weight = np.zeros_like(mean), np.zeros(len(mean))
    for value, place, count in zip(values, rows, examples, strict=True):
        total[place] += count * value
        weight[place] += count
    met = weight > 0
    mean[met] = total[met] / weight[met].reshape(-1, *[1] * (mean.ndim - 1))
