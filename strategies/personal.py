"""Nodes with a network of their own, which lasts from round to round and never leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from clfed.backbones import Encoder
from clfed.errors import ConfigError
from clfed.federated import records
from clfed.federated.local_training import Visit
from clfed.federated.networks import load_network, network_record
from clfed.learners.fine_tuning import FineTuning
from clfed.learners.training import initial_backbone
from clfed.seeding import derive_seed
from clfed.strategies.fedavg import FedAvgTraining

MODEL, CLASSES = "model", "model-classes"


def check_backbones(backbones: Any) -> Sequence[Mapping[str, Any]]:
    """Return architectures of nodes, none where all have that of everybody.

    Raises:
        ConfigError: They are no list of configurations.
    """
    found = () if backbones is None else backbones
    if not isinstance(found, list | tuple) or not all(isinstance(b, Mapping) for b in found):
        raise ConfigError(
            "strategy.local.backbones must be null or a list of settings with a _target_, "
            f"got {backbones!r}."
        )
    return found


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
        self.backbones = check_backbones(backbones)

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
        config = json.dumps(dict(self.backbones[visit.number % len(self.backbones)]))
        norm = (common.transform.mean, common.transform.std)
        if MODEL in visit.state:
            # Weights that were kept replace the initial ones, so that any will do.
            return _architecture(config, common.input_shape, *norm)
        return _draw(
            config, common.input_shape, *norm, derive_seed(visit.seed, "personal", visit.node)
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


def _draw(
    config: str,
    shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> Encoder:
    """Return an architecture (JSON) with initial weights of a seed."""
    backbone = json.loads(config)
    network = initial_backbone(backbone, shape, seed)
    return Encoder(network, backbone, input_shape=shape, mean=mean, std=std)


@lru_cache(maxsize=16)
def _architecture(
    config: str, shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> Encoder:
    """Return an architecture with some weights; building a large one takes half a second."""
    return _draw(config, shape, mean, std, 0)
