"""A federated method as the jobs build and name it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from clfed.backbones import Encoder
from clfed.config import build
from clfed.errors import ConfigError
from clfed.federated.channels import Channel
from clfed.federated.local_training import open_training
from clfed.jobs.settings import statistics_alone
from clfed.prototypes import PrototypeMemory
from clfed.strategies.prototype_averaging import PrototypeAveraging
from clfed.strategies.training import TrainingStrategy

Method = PrototypeAveraging | TrainingStrategy[Any]


def make_method(
    config: Mapping[str, Any],
    encoder: Encoder,
    *,
    briefing: Mapping[str, ArrayRecord | ConfigRecord],
    session: str,
    nodes: int,
    channel: Channel | None = None,
    wrap: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> Method:
    """Build the strategy of a configuration.

    Args:
        config: The resolved configuration as plain dictionaries.
        encoder: The embedding that everybody starts from.
        briefing: Records that a node needs once.
        session: Text that tells this federation from every other one.
        nodes: Number of nodes.
        channel: How class statistics get to the server; None: as rows in the open.
        wrap: Makes of the settings of the half at nodes those of one that protects it.

    Raises:
        ConfigError: It is no strategy of this job.
    """
    common: dict[str, Any] = {"briefing": briefing, "session": session, "nodes": nodes}
    settings, curriculum = dict(config["strategy"]), config.get("curriculum")
    if statistics_alone(settings):
        empty = PrototypeMemory.empty(
            encoder.dim, encoder.embedding_id, config["memory"]["moments"]
        )
        strategy = build(settings, empty=empty, merge=config["merge"], channel=channel, **common)
    else:
        if curriculum is not None:
            settings["local"] = {**settings["local"], "curriculum": curriculum["examples"]}
            common["curriculum"] = curriculum["nodes"]
        open_training(settings.get("local"))  # refuses what every node would have to refuse
        settings["local"] = wrap(settings["local"])
        strategy = build(settings, encoder=encoder, seed=config["seed"], **common)
    if not isinstance(strategy, PrototypeAveraging | TrainingStrategy):
        raise ConfigError(
            f"{type(strategy).__name__} is no strategy that job=federated can run.",
            remedy="clfed --help lists the strategies.",
        )
    return strategy


def method_name(strategy: Method) -> str:
    """Return the name of a method: a method is one file."""
    return type(strategy).__module__.rpartition(".")[2]


def state_digest(arrays: ArrayRecord) -> str:
    """Return the SHA-256 (hex) of arrays, their names and types."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        values = arrays[key].numpy()
        digest.update(f"{key} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
