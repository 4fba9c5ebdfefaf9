"""What a learner keeps between experiences: its bytes, its checkpoint, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clfed.errors import EncoderError
from clfed.prototypes import PrototypeMemory

if TYPE_CHECKING:
    from clfed.learners.base import ContinualLearner


def stored(learner: ContinualLearner) -> dict[str, int]:
    """Return the bytes kept after an experience.

    Returns:
        ``network``: weights and buffers that make predictions; ``extra``: frozen copies, anchors,
        importances and memories beside it; ``images``: images for replay.
    """
    tensors = {n: t for n, t in learner.state_dict().items() if isinstance(t, Tensor)}
    frozen = _size(t for name, t in tensors.items() if name.startswith("teacher."))
    memory = 0 if learner.memory is None else learner.memory.nbytes
    return {
        "network": _size(tensors.values()) - frozen,
        "extra": frozen + _size(learner.kept.values()) + memory,
        "images": 0 if learner.buffer is None else learner.buffer.nbytes,
    }


def state_of(learner: ContinualLearner) -> dict[str, Any]:
    """Return everything that a resumed stream needs, as tensors and plain values."""
    return {**beside_weights(learner), "model": dict(learner.state_dict())}


def beside_weights(learner: ContinualLearner) -> dict[str, Any]:
    """Return what a state dict leaves out."""
    memory = learner.memory
    return {
        "classes": list(learner.classes),
        "retired": list(learner.retired),
        "number": learner.number,
        "teacher": bool(learner.teacher),
        "kept": dict(learner.kept),
        "memory": None
        if memory is None
        else torch.frombuffer(bytearray(memory.to_bytes()), dtype=torch.uint8),
        "buffer": None if learner.buffer is None else learner.buffer.state(),
        "optimiser": learner.optimiser_state,
    }


def restore(learner: ContinualLearner, state: Mapping[str, Any]) -> None:
    """Give a new learner of the same settings the state of :func:`state_of`.

    Raises:
        EncoderError: The state is another learner's.
    """
    restore_beside_weights(learner, state)
    try:
        learner.load_state_dict(state["model"])
    except RuntimeError as error:
        raise EncoderError(f"The checkpoint does not fit this learner: {error}") from error


def restore_beside_weights(learner: ContinualLearner, state: Mapping[str, Any]) -> None:
    """Take over :func:`beside_weights`, so that the weights fit afterwards."""
    learner.classes, learner.number = tuple(state["classes"]), state["number"]
    learner.retired = tuple(state["retired"])
    if state["teacher"]:
        learner.snapshot()
    learner.kept = dict(state["kept"])
    if state["memory"] is not None:
        learner.memory = PrototypeMemory.from_bytes(state["memory"].numpy().tobytes())
    if state["buffer"] is not None and learner.buffer is not None:
        learner.buffer.restore(state["buffer"])
    learner.optimiser_state = state["optimiser"]


def sha256(learner: ContinualLearner) -> str:
    """Return the SHA-256 of everything that a learner keeps."""
    return sha256_of(state_of(learner))


def sha256_of(state: Mapping[str, Any]) -> str:
    """Return what :func:`sha256` gives for the learner of a state of :func:`state_of`."""
    classes, retired = tuple(state["classes"]), tuple(state["retired"])
    told = (classes, state["number"], *([retired] if retired else []))
    digest = hashlib.sha256(repr(told).encode())
    update(digest, state["model"])
    update(digest, state["kept"])
    if state["memory"] is not None:
        digest.update(state["memory"].numpy().tobytes())
    buffer = state["buffer"]
    if buffer is not None and buffer["images"] is not None:
        update(digest, {"images": buffer["images"], "labels": buffer["labels"]})
    return digest.hexdigest()


def update(digest: Any, tensors: Mapping[str, Any]) -> None:
    """Feed tensors into a digest: names, types, shapes and bytes."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, Tensor):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
