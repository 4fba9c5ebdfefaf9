"""A little simulation, for tests: a strategy, the nodes of a scenario, and what passes between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from omegaconf import OmegaConf

from clfed.backbones import Encoder
from clfed.config import compose
from clfed.federated.client_app import app
from clfed.federated.field import Field, field_settings, open_field
from clfed.federated.grid import LocalGrid
from clfed.federated.local_training import Visit
from clfed.federated.node import briefing
from clfed.federated.rounds import run_rounds
from clfed.jobs.method import Method, make_method
from clfed.learners.training import initial_backbone
from clfed.seeding import derive_seed

SMALL = (
    "job=federated",
    "data=digits",
    "backbone=mlp",
    "backbone.widths=[16]",
    "learner=none",
    "logger=none",
)
TASKS = (
    "scenario=dirichlet",
    "scenario.groups=all",
    "scenario.tasks=2",
    "scenario.nodes=3",
    "scenario.train_images=20",
    "scenario.test_images=10",
)


@lru_cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return OmegaConf.to_container(compose(overrides))


def configuration(*overrides: str) -> dict[str, Any]:
    """Return what a command line after :data:`SMALL` means, as plain dictionaries."""
    return copy.deepcopy(_composed((*SMALL, *overrides)))


class RecordingGrid(LocalGrid):
    """A grid that keeps what nodes replied, and may change it on the way.

    Attributes:
        requests: All messages to nodes.
        replies: All replies, as the server got them.
        meddle: Called with each reply; gives the one that arrives, None for none.
    """

    def __init__(self, client_app: ClientApp, configs: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(client_app, configs)
        self.requests: list[Message] = []
        self.replies: list[Message] = []
        self.meddle: Callable[[Message], Message | None] = lambda reply: reply

    def push_messages(self, messages):
        messages = list(messages)
        self.requests += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        found = [self.meddle(reply) for reply in super().pull_messages(message_ids)]
        self.replies += [reply for reply in found if reply is not None]
        return [reply for reply in found if reply is not None]

    def of(self, kind: str) -> list[Message]:
        """Return the replies to one kind of request that hold content."""
        return [
            reply
            for reply in self.replies
            if reply.metadata.message_type == kind and reply.has_content()
        ]


@dataclass
class Simulation:
    """A strategy and its nodes."""

    config: dict[str, Any]
    field: Field
    encoder: Encoder
    strategy: Method
    grid: RecordingGrid
    arrays: ArrayRecord

    @classmethod
    def of(
        cls,
        folder: Path,
        *overrides: str,
        scenario: Sequence[str] = TASKS,
        local: Mapping[str, Any] | None = None,
        client_app: ClientApp = app,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> Simulation:
        """Build what a command line describes.

        Args:
            folder: For the cache of encoders.
            overrides: Of the configuration, after :data:`SMALL` and the scenario's.
            scenario: Overrides that say who meets what.
            local: Settings of the half at nodes that no YAML can say.
            client_app: Of every node.
            names: Of the nodes.
            options: Settings of the strategy that no YAML can say.
        """
        config = configuration(*scenario, *overrides)
        config["strategy"] |= options
        if local:
            config["strategy"]["local"] |= local
        settings = field_settings(
            config["data"], config["scenario"], derive_seed(config["seed"], "draw", 0)
        )
        field = open_field(settings)
        source = field.benchmark
        shape = source.train.images.shape[1:]
        network = initial_backbone(config["backbone"], shape, config["seed"])
        encoder = Encoder(
            network, config["backbone"], input_shape=shape, mean=source.mean, std=source.std
        )
        node_settings = {
            "field": settings,
            "moments": config["memory"]["moments"],
            "cache_dir": str(folder),
        }
        strategy = make_method(
            {"curriculum": None, **config},
            encoder,
            briefing=briefing(node_settings, encoder),
            session=f"{folder}",
            nodes=field.plan.nodes,
        )
        nodes = [
            {"partition-id": i, "num-partitions": field.plan.nodes} for i in range(field.plan.nodes)
        ]
        if names is not None:
            nodes = [{**node, "name": name} for node, name in zip(nodes, names, strict=True)]
        grid = RecordingGrid(client_app, nodes)
        return cls(config, field, encoder, strategy, grid, strategy.arrays())

    def play(self, rounds: int | None = None) -> ArrayRecord:
        """Run rounds from the first one on, by default all, and return the last arrays."""

        def after(report, arrays):
            self.arrays = arrays

        total = self.field.plan.rounds * self.strategy.rounds_per_mission
        return run_rounds(
            self.strategy,
            self.grid,
            self.strategy.arrays(),
            rounds=total if rounds is None else rounds,
            timeout=0.2,
            after=after,
        )

    def visit(self, node: int = 0, mission: int = 1, round_: int = 1) -> Visit:
        """Return what a node would have before it."""
        images, labels = self.field.images(node, mission)
        return Visit(
            node=f"node-{node}",
            number=node,
            mission=mission,
            round=round_,
            seed=self.config["seed"],
            encoder=self.encoder,
            images=images,
            labels=labels,
            state=RecordDict(),
        )


def support_of(field: Field, missions: int | None = None) -> dict[str, torch.Tensor]:
    """Return the images of each class that all nodes met together, by name."""
    support = field.plan.support
    upto = field.plan.rounds if missions is None else missions
    met = torch.cat([m.indices for m in field.plan.missions if m.round <= upto])
    return {
        name: support.images[met[support.labels[met] == row]]
        for row, name in enumerate(support.classes)
        if bool((support.labels[met] == row).any())
    }
