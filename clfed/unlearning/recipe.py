"""How originals and oracles are trained: the same recipe for all, each made only once."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError
from clfed.files import write_file
from clfed.learners import state
from clfed.learners.base import ContinualLearner
from clfed.learners.embedding import EmbeddingModule
from clfed.learners.fitting import learn
from clfed.learners.training import (
    BaseTraining,
    check_backbone,
    initial_backbone,
    make_learner,
)
from clfed.scenarios.streams import Experience

log = logging.getLogger(__name__)
# Raise it when a change of the code changes what the same settings train.
VERSION = 1


@dataclass(frozen=True, eq=False)
class Recipe:
    """Images and a seed in, a trained model out.

    Args:
        parts: Learner, backbone and trainer.
        benchmark: Whose pixels are seen; gives the input transform.
        cache: Folder of trained models, keyed by everything that decides them; None: none.
        progress: Told the seed and the seconds of every model that was trained.
    """

    parts: BaseTraining
    benchmark: Benchmark
    cache: Path | None = None
    progress: Callable[[int, float], None] | None = None

    def fresh(self, classes: tuple[str, ...], seed: int) -> ContinualLearner:
        """Return an untrained model with an output for each class.

        Raises:
            ConfigError: Learner, backbone and data do not fit together.
        """
        if not self.parts.learner.get("_target_"):
            raise ConfigError(
                "job=unlearning needs a learner, got learner=none.",
                remedy="Choose learner=naive, or another learner with a head.",
            )
        shape = tuple(self.benchmark.train.images.shape[1:])
        check_backbone(self.parts.backbone, shape, self.benchmark.name)
        backbone = initial_backbone(self.parts.backbone, shape, seed)
        transform = Transform(self.benchmark.mean, self.benchmark.std)
        probe = self.benchmark.train.images[:2]
        dim = EmbeddingModule(backbone, transform).embed_all(probe).shape[1]
        learner = make_learner(self.parts.learner, backbone, self.benchmark, dim=dim, seed=seed)
        learner.grow(classes)
        return learner

    def train(
        self, images: ImageSet, seed: int, *, start: ContinualLearner | None = None
    ) -> ContinualLearner:
        """Return a trained model in eval mode, see :class:`~clfed.unlearning.context.Train`."""
        if start is None:
            return self.timed(images, seed)[0]
        learner = copy.deepcopy(start)
        learner.seed = seed
        self._learn(learner, images)
        return learner.eval()

    def timed(self, images: ImageSet, seed: int) -> tuple[ContinualLearner, float]:
        """Return a model trained from scratch, and the seconds that it took when it was made."""
        learner = self.fresh(images.classes, seed)
        path = None if self.cache is None else self.cache / f"{self.key(images, seed)}.model"
        if path is not None and (known := _read(path, learner)) is not None:
            return learner.eval(), known
        start = time.perf_counter()
        self._learn(learner, images)
        seconds = time.perf_counter() - start
        if self.progress is not None:
            self.progress(seed, seconds)
        if path is not None:
            _write(path, learner, seconds)
        return learner.eval(), seconds

    def _learn(self, learner: ContinualLearner, images: ImageSet) -> None:
        number = learner.number + 1
        learn(learner, Experience(number, images, phase=number, upcoming=0), self.parts.trainer)

    def key(self, images: ImageSet, seed: int) -> str:
        """Return the SHA-256 of everything that decides a model's bits."""
        trainer = self.parts.trainer
        content = {
            "version": VERSION,
            "learner": dict(self.parts.learner),
            "backbone": dict(self.parts.backbone),
            "trainer": [trainer.resolved_precision(), trainer.threads, trainer.accelerator],
            "transform": [self.benchmark.mean, self.benchmark.std],
            "images": images.fingerprint,
            "seed": seed,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path, learner: ContinualLearner) -> float | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state.restore(learner, content["learner"])
        return float(content["seconds"])
    except Exception as error:  # torch raises whatever the damage leads to
        log.warning("%s is damaged, the model is trained again: %s", path, error)
        return None


def _write(path: Path, learner: ContinualLearner, seconds: float) -> None:
    file = io.BytesIO()
    torch.save({"learner": state.state_of(learner), "seconds": seconds}, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, file.getvalue())
