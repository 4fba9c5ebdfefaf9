"""What a node does in a round of a method that trains networks: the contract of its half.

The half of a method that runs at the nodes is a class beside the strategy, in the same file. The
server names it and its settings in the first message, and the node builds it from them. Real nodes
refuse this: they take part with class statistics alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from clfed.backbones import Encoder
from clfed.config import build
from clfed.errors import ConfigError
from clfed.seeding import generator


def open_training(settings: Any) -> LocalTraining:
    """Build the half of a method that runs at a node.

    Args:
        settings: The strategy's ``local``: ``_target_`` and settings.

    Raises:
        ConfigError: They do not fit, or it is something else.
    """
    method = build(settings) if isinstance(settings, Mapping) else settings
    if not isinstance(method, LocalTraining):
        raise ConfigError(
            f"Expected strategy.local to train at nodes, got {type(method).__name__}."
        )
    return method


@dataclass(frozen=True, eq=False)
class Visit:
    """What a node has before it in one round.

    Attributes:
        node: Its name.
        number: Its place in the simulation, from 0.
        mission: The mission that it is on, from 1.
        round: The exchange of the whole run, from 1; a mission may have several.
        seed: Seed of the run.
        encoder: The embedding that everybody starts from.
        images: ``(N, C, H, W)`` uint8 of this mission alone, or ready features ``(N, D)``.
        labels: Their ``N`` class names.
        state: Records that last from round to round at this node; a method writes its own.
    """

    node: str
    number: int
    mission: int
    round: int
    seed: int
    encoder: Encoder
    images: Tensor
    labels: Sequence[str]
    state: RecordDict

    def rng(self, purpose: str) -> torch.Generator:
        """Return what decides everything random of one purpose in this round at this node."""
        return generator(self.seed, purpose, self.node, self.round)


class LocalTraining(ABC):
    """The half of a method that runs at a node; its settings come from the strategy's ``local``."""

    @abstractmethod
    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Do one round and return the reply, without the record ``status`` that is added to it.

        Args:
            visit: What is there.
            request: What the server sent.
        """

    def score(self, visit: Visit, request: RecordDict) -> float:
        """Return how hard the node's images are for what the server sent: their mean loss.

        Raises:
            NotImplementedError: The method has no such score.
        """
        raise NotImplementedError(f"{type(self).__name__} does not score images")

    def predict(
        self, visit: Visit, request: RecordDict, images: Tensor
    ) -> tuple[Sequence[str], Tensor]:
        """Answer with the node's own model, for methods that have one a node.

        Args:
            visit: What is there.
            request: What the server sent.
            images: ``(M, C, H, W)`` uint8 or ``(M, D)``.

        Returns:
            Class names, and for each image the number of one of them, ``(M,)`` int64.

        Raises:
            NotImplementedError: The server answers for all.
        """
        raise NotImplementedError(f"{type(self).__name__} has no model of its own")
