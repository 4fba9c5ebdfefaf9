"""How a run along a stream goes on after it was killed."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clfed.learners import state
from clfed.learners.base import ContinualLearner
from clfed.reporting.run_folder import write_atomic

logger = logging.getLogger(__name__)
FORMAT = 2
# What may differ between a run and the one that goes on with it.
FREE = ("run_dir", "overwrite", "cache_dir", "logger", "smoke", "when_smoke")


@dataclass
class Record:
    """What one phase of a stream showed.

    Attributes:
        phase: Its number, from 0.
        classes: Classes known at its end.
        updates: Steps of the optimiser.
        images: Images learned from.
        seconds: Time of the learning, without the exams.
        accuracy: Over the test images of all phases so far.
        phases: Accuracy over the test images of each phase, None where not asked.
        per_class: Accuracy of each class met so far.
        losses: Mean of each loss term.
        baselines: Accuracies before any training, in the first phase of a domain stream.
        unknown: How well images of later phases are told from known ones.
    """

    phase: int
    classes: int = 0
    updates: int = 0
    images: int = 0
    seconds: float = 0.0
    accuracy: float = 0.0
    phases: list[float | None] = field(default_factory=list)
    per_class: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    baselines: list[float | None] | None = None
    unknown: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside the learner.

    Attributes:
        experiences: Experiences that were learned.
        records: One a phase that ended.
        watch: State of the continual evaluation, None without one.
    """

    experiences: int
    records: list[Record]
    watch: Any


class Checkpoint:
    """The file that a killed run goes on from.

    Args:
        path: The file.
        config: The resolved configuration; only a run of the same one goes on.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        same = {key: part for key, part in config.items() if key not in FREE}
        self.path = path
        self.key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def write(
        self, learner: ContinualLearner, experiences: int, records: Sequence[Record], watch: Any
    ) -> None:
        """Write the learner and what it showed so far, whole or not at all.

        Raises:
            RunFolderError: The file cannot be written; the earlier one is intact.
        """
        content = {
            "format": FORMAT,
            "key": self.key,
            "experiences": experiences,
            "records": json.dumps([asdict(record) for record in records]),
            "watch": json.dumps(watch),
            "learner": state.state_of(learner),
        }
        file = io.BytesIO()
        torch.save(content, file)
        write_atomic(self.path, file.getvalue())

    def read(self, learner: ContinualLearner) -> Progress | None:
        """Give a new learner the saved state; None where there is nothing to go on from.

        A damaged file, or one of another configuration, is reported and the run starts anew.
        """
        if not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if content["format"] != FORMAT or content["key"] != self.key:
                logger.warning("%s is of another configuration: starting anew", self.path)
                return None
            records = [Record(**record) for record in json.loads(content["records"])]
            progress = Progress(content["experiences"], records, json.loads(content["watch"]))
        except Exception as error:  # torch raises whatever the damage leads to
            logger.warning("%s is damaged, starting anew: %s", self.path, error)
            return None
        state.restore(learner, content["learner"])
        return progress
