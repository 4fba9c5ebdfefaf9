r"""Federated averaging of a whole network whose head grows with the classes that nodes meet.

.. math:: w \leftarrow \sum_k \frac{n_k}{\sum_j n_j}\, w_k

(McMahan et al. 2017, arXiv 1602.05629.) Each node trains on its mission alone and nothing protects
what was learned before: the lower bound of federated reconnaissance. A head row is averaged over
the nodes whose head has it, so nodes with different new classes still merge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from clfed.strategies.base import TrainOnly
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

from clfed.federated import records

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

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the current network to every node that is there.

        Raises:
            FederationError: No node came within the waiting time.
        """
        head = self.head(server_round, config, classes=json.dumps(self.classes))
        content = RecordDict({"model": arrays, "round": head})
        if server_round == 1:
            content.update(self._briefing)
        return [
            Message(content, dst_node_id=node, message_type=f"{MessageType.TRAIN}.finetune")
            for node in self.connected(grid)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the networks, weighted by their numbers of examples."""
        trained = [reply.content for reply in replies if reply.has_content()]
        trained = [c for c in trained if "model" in c and _examples(c) > 0]
        # Floating point sums depend on their order, and node ids are random in some engines.
        trained.sort(
            key=lambda content: records.text(records.config(content, "status"), "contributor")
        )
        if not trained:
            return None, None
        examples = np.array([*map(_examples, trained)], np.float64)
        heads = [json.loads(records.text(records.config(c, "status"), "classes")) for c in trained]
        self.classes = tuple(sorted(set().union(self.classes, *heads)))
        place = {name: row for row, name in enumerate(self.classes)}
        rows = [np.array([place[name] for name in head]) for head in heads]
        models = [records.arrays(content, "model") for content in trained]
        averaged: dict[str, Array] = {}
        for key in models[0]:
            values = [records.array(model, key).numpy() for model in models]
            if key in HEAD:
                mean = _average_rows(values, rows, examples, len(place))
            elif np.issubdtype(values[0].dtype, np.floating):
                mean = np.tensordot(examples / examples.sum(), np.stack(values), axes=1)
            else:
                mean = np.max(np.stack(values), axis=0)
            averaged[key] = Array(np.asarray(mean, values[0].dtype))
        metrics = {"classes": len(self.classes), "examples": int(examples.sum())}
        return ArrayRecord(averaged), MetricRecord(dict(metrics))


def _average_rows(
    values: list[Floats], rows: list[Floats], examples: Floats, classes: int
) -> Floats:
    """Average each head row over the nodes that have it, weighted by examples."""
    total = np.zeros((classes, *values[0].shape[1:]))
    weight = np.zeros(classes)
    for value, place, count in zip(values, rows, examples, strict=True):
        total[place] += count * value
        weight[place] += count
    return total / weight.reshape(-1, *[1] * (total.ndim - 1))


def _examples(content: RecordDict) -> int:
    return records.integer(records.config(content, "status"), "examples")
