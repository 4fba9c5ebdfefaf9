"""A simulated federation under a privacy tier, for tests: digits as features, nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from simulations import RecordingGrid

from clfed.backbones import Encoder
from clfed.config import compose
from clfed.federated.client_app import app
from clfed.federated.field import Field, field_settings, open_field
from clfed.federated.node import briefing
from clfed.federated.rounds import run_rounds
from clfed.jobs.method import make_method
from clfed.jobs.protection import Protection, public_images
from clfed.learners.training import initial_backbone
from clfed.prototypes import PrototypeMemory
from clfed.seeding import derive_seed

FEATURES = (
    "job=federated",
    "strategy=fedncm",
    "data=digits",
    "data.as_features=true",
    "data.base_classes=0",
    "backbone=identity",
    "learner=none",
    "logger=none",
    "job.timeout=0.3",
    "scenario=multi_client",
    "scenario.nodes=4",
    "scenario.rounds=3",
    "scenario.classes_per_mission=4",
    "scenario.shots=3",
    "scenario.overlap=null",
)


@dataclass
class Federation:
    """What a command line describes, ready to be played, with everything that passes kept."""

    cfg: DictConfig
    field: Field
    encoder: Encoder
    protection: Protection
    strategy: Any
    grid: RecordingGrid

    @classmethod
    def of(cls, folder: Path, *overrides: str, client_app: Any = app) -> Federation:
        cfg = compose([*FEATURES, *overrides])
        plain = OmegaConf.to_container(cfg)
        seed = derive_seed(cfg.seed, "draw", 0)
        settings = field_settings(plain["data"], plain["scenario"], seed)
        field = open_field(settings)
        source = field.benchmark
        shape = source.train.images.shape[1:]
        network = initial_backbone(plain["backbone"], shape, cfg.seed)
        encoder = Encoder(
            network, plain["backbone"], input_shape=shape, mean=source.mean, std=source.std
        )
        session = f"{folder}"
        protection = Protection(
            cfg,
            field,
            PrototypeMemory.empty(encoder.dim, encoder.embedding_id, cfg.memory.moments),
            session=session,
            public=lambda: encoder.embed(public_images(field)),
        )
        nodes = field.plan.nodes
        strategy = make_method(
            plain,
            encoder,
            briefing=briefing(
                {
                    "field": settings,
                    "moments": cfg.memory.moments,
                    "cache_dir": str(folder),
                    **protection.node_settings(),
                },
                encoder,
            ),
            session=session,
            nodes=nodes,
            channel=protection.channel,
            wrap=protection.local,
        )
        places = [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]
        return cls(cfg, field, encoder, protection, strategy, RecordingGrid(client_app, places))

    def play(self, rounds: int | None = None) -> PrototypeMemory:
        """Run all rounds, or so many of them, from the first one on."""
        run_rounds(
            self.strategy,
            self.grid,
            self.strategy.arrays(),
            rounds=rounds or self.field.plan.rounds,
            timeout=0.3,
            after=lambda report, arrays: None,
        )
        return self.strategy.memory

    def met(self, node: int, round_: int) -> tuple[Any, list[str]]:
        """Embeddings and class names of one mission."""
        return self.field.evidence(node, round_, self.encoder)
