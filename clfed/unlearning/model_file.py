"""A model that has forgotten, as one file that a certificate can point at."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clfed.errors import CertificateError
from clfed.files import write_file
from clfed.learners import state
from clfed.learners.base import ContinualLearner


class ModelFile(NamedTuple):
    """What a file holds, without the network's code.

    Attributes:
        state: Of :func:`clfed.learners.state.state_of`.
        classifier: What is read off the memory, with its options; None: the head answers.
        sha256: Of the file's bytes.
        state_sha256: Of the state, as :func:`clfed.learners.state.sha256` of the learner.
    """

    state: dict[str, Any]
    classifier: dict[str, Any] | None
    sha256: str
    state_sha256: str

    def memory_bytes(self) -> bytes | None:
        """Return the canonical bytes of the class statistics; None where there are none."""
        memory = self.state["memory"]
        return None if memory is None else memory.numpy().tobytes()


def save_model(path: str | os.PathLike[str], learner: ContinualLearner) -> None:
    """Write all that a learner keeps, and who answers; whole or not at all.

    Raises:
        RunFolderError: The file cannot be written.
    """
    file = io.BytesIO()
    torch.save({"state": state.state_of(learner), "classifier": learner.classifier}, file)
    write_file(path, file.getvalue())


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read what :func:`save_model` wrote, believing nothing.

    Raises:
        CertificateError: There is no such file, or it is damaged or something else.
    """
    try:
        data = Path(path).read_bytes()
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = content["state"]
        return ModelFile(
            found, content["classifier"], hashlib.sha256(data).hexdigest(), state.sha256_of(found)
        )
    except Exception as error:  # torch raises whatever the damage leads to
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise CertificateError(f"Expected a model file at {path}, got: {reason}.") from error


def load_model(path: str | os.PathLike[str], learner: ContinualLearner) -> ContinualLearner:
    """Give a new learner of the same settings what a file holds, and return it in eval mode.

    Raises:
        CertificateError: There is no such file, or it is damaged or something else.
        EncoderError: The file is another learner's.
    """
    file = read_model(path)
    learner.memory, learner.buffer = None, None
    state.restore(learner, file.state)
    learner.classifier = file.classifier
    return learner.eval()
