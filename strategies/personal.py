"""Nodes with a network of their own, which lasts from round to round and never leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from clfed.backbones import Encoder
from clfed.federated import records
from clfed.federated.local_training import Visit
from clfed.federated.networks import load_network, network_record
from clfed.learners.fine_tuning import FineTuning
from clfed.learners.training import initial_backbone
from clfed.seeding import derive_seed
from clfed.strategies.fedavg import FedAvgTraining

MODEL, CLASSES = "model", "model-classes"


class PersonalTraining(FedAvgTraining):
    """Trains the node's own network, whose head grows with the classes that the node meets.

    Args:
        backbones: Architectures, ``_target_`` and options each; node ``k`` takes number ``k``
            modulo their number, with initial weights of its own. None: every node starts from the
            weights that everybody has.
        options: Of :class:`~clfed.strategies.fedavg.FedAvgTraining`.
    """

    def __init__(
        self, *, backbones: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.backbones = backbones

    def network(self, visit: Visit, request: RecordDict) -> FineTuning:
        """Return the node's network as it was kept last, or a new one."""
        encoder = self.encoder(visit)
        if MODEL not in visit.state:
            return FineTuning(encoder, (), **self.optimiser)
        classes = json.loads(records.text(records.config(visit.state, CLASSES), "json"))
        model = records.arrays(visit.state, MODEL)
        return load_network(encoder, model, classes, **self.optimiser)

    def encoder(self, visit: Visit) -> Encoder:
        """Return architecture and initial weights of the node's network."""
        common = visit.encoder
        if not self.backbones:
            return common
        config = self.backbones[visit.number % len(self.backbones)]
        seed = derive_seed(visit.seed, "personal", visit.node)
        return Encoder(
            initial_backbone(config, common.input_shape, seed),
            config,
            input_shape=common.input_shape,
            mean=common.transform.mean,
            std=common.transform.std,
        )

    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Train, keep the network, and return what :meth:`message` makes of it."""
        network = self.network(visit, request)
        if visit.labels:
            network.grow(sorted(set(visit.labels)))
            self.fit(network, visit, request)
        visit.state[MODEL] = network_record(network)
        visit.state[CLASSES] = records.config_record(json=json.dumps(network.classes))
        return self.message(network, visit, request)

    def message(self, network: FineTuning, visit: Visit, request: RecordDict) -> RecordDict:
        """Return what leaves the node: here nothing."""
        return RecordDict()

    def predict(
        self, visit: Visit, request: RecordDict, images: Tensor
    ) -> tuple[Sequence[str], Tensor]:
        """Answer with the node's own head; a node without classes answers nothing rightly."""
        network = self.network(visit, request)
        if not network.classes:
            return ("",), torch.zeros(len(images), dtype=torch.int64)
        return network.classes, network.predict(images)
