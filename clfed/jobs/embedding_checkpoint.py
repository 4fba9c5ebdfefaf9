"""How the training of an embedding in a federation goes on after it was killed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from clfed.backbones import Encoder
from clfed.errors import ClfedError
from clfed.federated.rounds import RoundReport
from clfed.files import write_file
from clfed.jobs.checkpoint import FREE
from clfed.prototypes.storage import pack, unpack

logger = logging.getLogger(__name__)
KIND = "federated training"
FORMAT = 1
# Who carries the messages changes no number either.
OTHER = (*FREE, "engine")


@dataclass(frozen=True)
class Look:
    """What one round took, and what it led to.

    Attributes:
        report: What it took.
        classes: Classes of the head that is thrown away at the end.
        validation: Accuracy on the validation classes, None where nobody looked.
    """

    report: RoundReport
    classes: int
    validation: float | None


@dataclass
class TrainingState:
    """Everything that decides how the training goes on, and what it showed so far.

    Attributes:
        arrays: The network.
        classes: Of its head's rows.
        looks: One a round that is done.
        best: The encoder that did best on the validation classes so far.
        best_round: Its round.
        old: The encoder that stands for an older version of the embedding.
    """

    arrays: ArrayRecord
    classes: tuple[str, ...] = ()
    looks: list[Look] = field(default_factory=list)
    best: Encoder | None = None
    best_round: int = 0
    old: Encoder | None = None


class RoundCheckpoint:
    """The file that a killed training goes on from.

    Args:
        folder: Where such files are, made if needed.
        config: The resolved configuration; only a run of the same one goes on.
        start: Identity of the encoder that the training starts from.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], start: str) -> None:
        same = {key: part for key, part in config.items() if key not in OTHER}
        text = json.dumps([FORMAT, start, same], sort_keys=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.ckpt"

    def write(self, state: TrainingState) -> None:
        """Write the state, whole or not at all.

        Raises:
            RunFolderError: The file cannot be written; the earlier one is intact.
        """
        tensors: dict[str, Tensor] = {
            f"array {place}": torch.tensor(array.numpy())
            for place, array in enumerate(state.arrays.values())
        }
        for name, encoder in (("best", state.best), ("old", state.old)):
            if encoder is not None:
                tensors[name] = torch.frombuffer(bytearray(encoder.to_bytes()), dtype=torch.uint8)
        header = {
            "arrays": [*state.arrays],
            "classes": state.classes,
            "looks": [asdict(look) for look in state.looks],
            "best_round": state.best_round,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, pack(tensors, KIND, header))

    def read(self) -> TrainingState | None:
        """Return the saved state; None where there is nothing to go on from.

        A damaged file is reported and the training starts anew.
        """
        if not self.path.is_file():
            return None
        try:
            tensors, header = unpack(self.path.read_bytes(), KIND, str(self.path))
            encoders = {
                name: Encoder.from_bytes(tensors[name].numpy().tobytes())
                for name in ("best", "old")
                if name in tensors
            }
            looks = [
                Look(RoundReport(**look["report"]), look["classes"], look["validation"])
                for look in header["looks"]
            ]
            arrays = {name: tensors[f"array {i}"] for i, name in enumerate(header["arrays"])}
            return TrainingState(
                ArrayRecord(arrays),
                tuple(header["classes"]),
                looks,
                encoders.get("best"),
                header["best_round"],
                encoders.get("old"),
            )
        except (ClfedError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged, starting anew: %s", self.path, error)
            return None

    def remove(self) -> None:
        """Forget what is finished."""
        self.path.unlink(missing_ok=True)
