r"""Federated averaging of a whole network whose head grows with the classes that nodes meet.

.. math:: w \leftarrow \sum_k \frac{n_k}{\sum_j n_j}\, w_k

(McMahan et al. 2017, arXiv 1602.05629.) Each node trains on its mission alone and nothing protects
what was learned before: the lower bound of federated reconnaissance. A head row is averaged over
the nodes whose head has it, so nodes with different new classes still merge; Flower's own FedAvg
asks for the same arrays of every node.
"""

from __future__ import annotations

import json
import math
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
from clfed.federated.checked import class_names, table
from clfed.federated.local_training import LocalTraining, Visit
from clfed.federated.networks import load_network, network_record
from clfed.learners.curricula import ExampleCurriculum, difficulties
from clfed.learners.fine_tuning import FineTuning, Loss, Order, passes
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.strategies.settings import check_rates, check_weights, check_whole
from clfed.strategies.training import TrainingStrategy

Floats = NDArray[Any]
HEAD = ("head.weight", "head.bias")
TRAINED, CLASSES = "trained", "trained-classes"


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
        options: Of :class:`~clfed.strategies.training.TrainingStrategy`.
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
        classes = class_names(records.text(status, "classes"))
        model = records.arrays(content, "model")
        if examples == 0:
            return None
        if not 0 < examples <= DEFAULT_CAP:
            raise InvalidMessage(f"expected 0 to {DEFAULT_CAP} examples, got {examples}")
        if model.keys() != self._sent.keys():
            differing = sorted(model.keys() ^ self._sent.keys())
            raise InvalidMessage(
                f"expected the arrays that were sent, {differing[0]!r} is not in both"
            )
        trained: dict[str, Floats] = {}
        for key, sent in self._sent.items():
            shape = (len(classes), *sent.shape[1:]) if key in HEAD else sent.shape
            trained[key] = table(model, key, sent.dtype, shape)
            if not np.isfinite(trained[key]).all():
                raise InvalidMessage(f"expected finite numbers in {key!r}")
        return Trained(examples, classes, trained)


class FedAvgTraining(LocalTraining):
    """Trains the network that came on the mission's images alone and sends it back.

    Args:
        epochs: Passes over the images.
        batch_size: Images a step, at least 2.
        lr: Learning rate.
        momentum: Momentum of the gradient descent.
        weight_decay: L2 penalty.
        logits: ``all``: the softmax is over all classes of the head; ``met``: over those of the
            mission, so that rows of classes that the node does not meet stay as they are.
        curriculum: Settings of an :class:`~clfed.learners.curricula.ExampleCurriculum`; None:
            shuffled passes over all images.

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
        curriculum: Mapping[str, Any] | None = None,
    ) -> None:
        if logits not in ("all", "met"):
            raise ConfigError(f"strategy.local.logits must be all or met, got {logits!r}.")
        check_whole(0, **{"local.epochs": epochs})
        check_whole(2, **{"local.batch_size": batch_size})  # one image is no batch, see fit
        check_rates(**{"local.lr": lr})
        check_weights(**{"local.momentum": momentum, "local.weight_decay": weight_decay})
        self.epochs, self.batch_size, self.logits = epochs, batch_size, logits
        self.optimiser = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.curriculum = None if curriculum is None else ExampleCurriculum(**curriculum)

    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Train and return ``model``, and in ``status`` classes and number of examples."""
        network = self.network(visit, request)
        if visit.labels:
            network.grow(sorted(set(visit.labels)))
            self.fit(network, visit, request)
            if self.curriculum is not None and self.curriculum.scoring != "global":
                visit.state[TRAINED] = network_record(network)
                visit.state[CLASSES] = records.config_record(json=json.dumps(network.classes))
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
        met = self._met(network, visit)
        if met is None:
            return _cross_entropy

        def restricted(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(network(images)[:, met], torch.searchsorted(met, labels))

        return restricted

    def order(self, network: FineTuning, visit: Visit, request: RecordDict) -> Order:
        """Return how the images are divided into batches."""
        if self.curriculum is None:
            return passes
        scored = self.curriculum.scored
        return self.curriculum.order(self.difficulties(network, visit) if scored else None)

    def score(self, visit: Visit, request: RecordDict) -> float:
        """Return the mean difficulty of the node's images, nan where it has none."""
        if not visit.labels:
            return math.nan
        network = self.network(visit, request)
        network.grow(sorted(set(visit.labels)))
        return float(self.difficulties(network, visit).double().mean())

    def difficulties(self, network: FineTuning, visit: Visit) -> Tensor:
        """Return how hard each image is, as the curriculum scores it, ``(N,)`` float32.

        Args:
            network: As it was sent, with all classes of the mission.
            visit: Images, and the model that the node trained last, if it kept one.
        """
        how = self.curriculum or ExampleCurriculum()
        judges = []
        if how.scoring != "local":
            judges.append(network)
        if how.scoring != "global":
            judges.append(self._last(network, visit))
        found = [
            difficulties(
                judge,
                visit.images,
                judge.label(visit.labels),
                rows=self._met(judge, visit),
                predictions=how.predictions,
            )
            for judge in judges
        ]
        return torch.stack(found).sum(0)

    def _last(self, network: FineTuning, visit: Visit) -> FineTuning:
        """Return the network that the node trained last, the one that was sent before it did."""
        if TRAINED not in visit.state:
            return network
        classes = json.loads(records.text(records.config(visit.state, CLASSES), "json"))
        last = load_network(visit.encoder, records.arrays(visit.state, TRAINED), classes)
        last.grow(sorted(set(visit.labels)))
        return last

    def _met(self, network: FineTuning, visit: Visit) -> Tensor | None:
        """Return the head's rows that compete, sorted; None where all do."""
        return None if self.logits == "all" else torch.unique(network.label(visit.labels))


def _cross_entropy(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
    return network.training_step((images, labels), 0)


def _average_rows(mean: Floats, values: list[Floats], rows: list[Floats], examples: Floats) -> None:
    """Average each head row over the nodes that have it; a row that nobody has stays."""
    total, weight = np.zeros_like(mean), np.zeros(len(mean))
    for value, place, count in zip(values, rows, examples, strict=True):
        total[place] += count * value
        weight[place] += count
    met = weight > 0
    mean[met] = total[met] / weight[met].reshape(-1, *[1] * (mean.ndim - 1))
