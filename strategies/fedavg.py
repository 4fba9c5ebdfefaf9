r"""Federated averaging of a whole network whose head grows with the classes that nodes meet.

.. math:: w \leftarrow \sum_k \frac{n_k}{\sum_j n_j}\, w_k

(McMahan et al. 2017, arXiv 1602.05629.) Each node trains on its mission alone and nothing protects
what was learned before: the lower bound of federated reconnaissance. A head row is averaged over
the nodes whose head has it, so nodes with different new classes still merge; Flower's own FedAvg
asks for the same arrays of every node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.backbones import Encoder
from clfed.errors import ConfigError, InvalidMessage
from clfed.federated import records
from clfed.federated.local_training import LocalTraining, Visit
from clfed.federated.networks import load_network, network_record
from clfed.learners.fine_tuning import FineTuning, Loss, Order, passes
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.prototypes.tables import checked_names
from clfed.strategies.base import TrainingStrategy

Floats = NDArray[Any]
HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Trained:
    """What one node trained in a round.

    Attributes:
        examples: Number of images.
        classes: Of the head's rows.
        model: Weights and buffers by name.
    """

    examples: int
    classes: tuple[str, ...]
    model: Mapping[str, Floats]


class FedAvg(TrainingStrategy[Trained]):
    """FedAvg over networks with a common backbone and heads over different classes.

    A request holds ``model`` (the network) beside ``round``, which names its classes as JSON. A
    reply holds ``model`` and, in ``status``, classes as JSON and the number of examples; 0 examples
    mean that nothing was trained.

    Args:
        encoder: The network that everybody starts from.
        options: Of :class:`~clfed.strategies.base.TrainingStrategy`.
    """

    leaves: ClassVar[str] = "weights of the whole network, number of images, class names"

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.classes: tuple[str, ...] = ()
        self._sent: dict[str, Floats] = {}

    def arrays(self) -> ArrayRecord:
        """Return the network of the encoder with a head without classes."""
        return network_record(FineTuning(self.encoder))

    def network(self, arrays: ArrayRecord) -> FineTuning:
        """Return the network that these arrays hold."""
        return load_network(self.encoder, arrays, self.classes)

    def content(self, server_round: int, arrays: ArrayRecord) -> RecordDict:
        """Return the current network."""
        self._sent = {key: array.numpy() for key, array in arrays.items()}
        return RecordDict({"model": arrays})

    def entries(self, server_round: int) -> dict[str, Any]:
        """Return the classes of the head."""
        return {"classes": json.dumps(self.classes)}

    def merge(
        self, server_round: int, found: Mapping[str, Trained]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the networks, weighted by their numbers of examples."""
        trained = list(found.values())
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

    def read(self, contributor: str, content: RecordDict) -> Trained | None:
        """Return what a node trained, None where it trained nothing.

        Raises:
            InvalidMessage: The reply does not fit the request.
        """
        status = records.config(content, "status")
        examples = records.integer(status, "examples")
        classes = _names(records.text(status, "classes"))
        model = _network(records.arrays(content, "model"))
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
        return Trained(examples, classes, model)


class FedAvgTraining(LocalTraining):
    """Trains the network that came on the mission's images alone and sends it back.

    Args:
        epochs: Passes over the images.
        batch_size: Images a step.
        lr: Learning rate.
        momentum: Momentum of the gradient descent.
        weight_decay: L2 penalty.
        logits: ``all``: the softmax is over all classes of the head; ``met``: over those of the
            mission, so that rows of classes that the node does not meet stay as they are.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        epochs: int = 5,
        batch_size: int = 64,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
        logits: str = "all",
    ) -> None:
        if logits not in ("all", "met"):
            raise ConfigError(f"strategy.local.logits must be all or met, got {logits!r}.")
        self.epochs, self.batch_size, self.logits = epochs, batch_size, logits
        self.optimiser = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}

    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Train and return ``model``, and in ``status`` classes and number of examples."""
        network = self.network(visit, request)
        if visit.labels:
            network.grow(sorted(set(visit.labels)))
            self.fit(network, visit, request)
        status = records.config_record(
            classes=json.dumps(network.classes), examples=len(visit.labels)
        )
        return RecordDict({"model": network_record(network), "status": status})

    def network(self, visit: Visit, request: RecordDict) -> FineTuning:
        """Return the network that the server sent."""
        classes = json.loads(records.text(records.config(request, "round"), "classes"))
        model = records.arrays(request, "model")
        return load_network(visit.encoder, model, classes, **self.optimiser)

    def fit(self, network: FineTuning, visit: Visit, request: RecordDict) -> None:
        """Train a network, whose head has all classes of the mission, in place."""
        network.fit(
            visit.images,
            network.label(visit.labels),
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=visit.rng("finetune"),
            loss=self.loss(network, visit, request),
            order=self.order(network, visit, request),
        )

    def loss(self, network: FineTuning, visit: Visit, request: RecordDict) -> Loss:
        """Return the loss of a batch, see :data:`~clfed.learners.fine_tuning.Loss`."""
        if self.logits == "all":
            return _cross_entropy
        met = torch.unique(network.label(visit.labels))

        def restricted(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(network(images)[:, met], torch.searchsorted(met, labels))

        return restricted

    def order(self, network: FineTuning, visit: Visit, request: RecordDict) -> Order:
        """Return how the images are divided into batches."""
        return passes


def _cross_entropy(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
    return network.training_step((images, labels), 0)


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
