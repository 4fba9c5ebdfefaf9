"""The simulated field: what each node of a simulation can see, opened from plain settings.

Every process of a simulation opens the same field from the same settings, so no image ever has to
be sent. Opening is cached, and each image is embedded once a process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clfed.backbones import Encoder
from clfed.config import build
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError
from clfed.scenarios import MissionPlan


class Field:
    """Missions, images and their embeddings.

    Args:
        benchmark: The data set.
        plan: Who meets what when.
    """

    def __init__(self, benchmark: Benchmark, plan: MissionPlan) -> None:
        self.benchmark = benchmark
        self.plan = plan
        self._embedded: dict[tuple[str, str], Tensor] = {}

    def embed(self, images: ImageSet, encoder: Encoder) -> Tensor:
        """Return the embeddings of a whole image set, shape ``(N, D)``; computed once."""
        key = (encoder.embedding_id, images.fingerprint)
        if key not in self._embedded:
            self._embedded[key] = encoder.embed(images.images)
        return self._embedded[key]

    def evidence(self, node: int, round_: int, encoder: Encoder) -> tuple[Tensor, list[str]]:
        """Return embeddings ``(B, D)`` and class names of what a node meets in a round."""
        support = self.plan.support
        mission = self.plan.mission(node, round_)
        if mission is None:
            return torch.empty(0, encoder.dim), []
        met = names(support, mission.indices)
        whole = self._embedded.get((encoder.embedding_id, support.fingerprint))
        if whole is not None:
            return whole[mission.indices], met
        # An image's embedding does not depend on its neighbours, so a node needs only its own.
        return encoder.embed(support.images[mission.indices]), met

    def images(self, node: int, round_: int) -> tuple[Tensor, list[str]]:
        """Return images ``(B, C, H, W)`` and class names of what a node meets in a round."""
        support = self.plan.support
        mission = self.plan.mission(node, round_)
        if mission is None:
            return support.images[:0], []
        return support.images[mission.indices], names(support, mission.indices)


def names(images: ImageSet, indices: Tensor | slice = slice(None)) -> list[str]:
    """Return the class name of each of these images, of all if none are named."""
    return [*map(images.classes.__getitem__, images.labels[indices].tolist())]


def field_settings(data: Mapping[str, Any], scenario: Mapping[str, Any], seed: int) -> str:
    """Return the canonical text from which :func:`open_field` opens the same field anywhere."""
    return json.dumps({"data": data, "scenario": scenario, "seed": seed}, sort_keys=True)


@lru_cache(maxsize=2)
def _open_benchmark(settings: str) -> Benchmark:
    benchmark = build(json.loads(settings))
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(f"The data group must build a Benchmark, got {type(benchmark).__name__}.")
    return benchmark


def open_benchmark(data: Mapping[str, Any]) -> Benchmark:
    """Return the configured data set, loaded once a process."""
    return _open_benchmark(json.dumps(data, sort_keys=True))


@lru_cache(maxsize=8)
def open_field(settings: str) -> Field:
    """Return the field that these settings describe, see :func:`field_settings`."""
    parts = json.loads(settings)
    benchmark = open_benchmark(parts["data"])
    plan = build(parts["scenario"], benchmark=benchmark, seed=parts["seed"])
    return Field(benchmark, plan)
