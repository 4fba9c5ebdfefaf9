"""What a strategy of Avalanche keeps between experiences, found by looking through it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clfed.scenarios.avalanche_benchmarks import quiet

with quiet():
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.training.plugins import EvaluationPlugin

# Present only while a strategy trains, or of the stream and not of the method.
PASSING = {
    "adapted_dataset",
    "batch_logits",
    "benchmark",
    "current_eval_stream",
    "dataloader",
    "evaluator",
    "experience",
    "loss",
    "mb_output",
    "mbatch",
    "optimized_param_id",
    "optimizer",
}


def held(
    strategy: Any, shape: tuple[int, ...], own: Collection[int]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return what a strategy keeps beside the network that answers.

    Args:
        strategy: After an experience.
        shape: Of one image, ``(C, H, W)`` or ``(D,)``.
        own: Addresses of the tensors that are counted elsewhere.

    Returns:
        Statistics, copies of networks and the like by where they were found, and stored images as
        tensors ``(N, *shape)``.
    """
    found: dict[str, Tensor] = {}
    images: list[Tensor] = []
    seen = set(own)
    for where, thing in _walk(strategy, "", set()):
        if isinstance(thing, Tensor):
            if not thing.numel() or thing.data_ptr() in seen:
                continue
            seen.add(thing.data_ptr())
            # Rows of ready features look like statistics; their place tells them apart.
            if thing.shape[1:] == shape and (len(shape) == 3 or "memory" in where):
                images.append(thing.detach())
            else:
                found[where] = thing.detach()
        elif len(thing):
            for place, values in enumerate(zip(*thing, strict=True)):
                if not isinstance(values[0], Tensor) or not values[0].dim():
                    continue  # labels
                if values[0].shape == shape:
                    images.append(torch.stack(values))
                else:  # what a network made of images
                    found[f"{where}.{place}"] = torch.stack(values)
    return found, images


def _walk(thing: Any, where: str, visited: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield every tensor and every set of samples that can be reached."""
    if id(thing) in visited or isinstance(thing, EvaluationPlugin):
        return
    visited.add(id(thing))
    if isinstance(thing, Tensor | AvalancheDataset):
        yield where, thing
        return
    buffer = getattr(thing, "buffer", None)
    if isinstance(buffer, AvalancheDataset):  # a storage policy, whose parts are in its whole
        yield f"{where}.buffer", buffer
        return
    if isinstance(thing, Mapping):
        parts = [*thing.items()]
    elif isinstance(thing, list | tuple | set | frozenset):
        parts = [*enumerate(thing)]
    elif isinstance(thing, nn.Module):
        parts = [*thing.named_parameters(), *thing.named_buffers()]
        parts += [(name, part) for name, part in vars(thing).items() if not name.startswith("_")]
    elif type(thing).__module__.startswith("avalanche"):
        parts = [*vars(thing).items()]
    else:
        return
    for name, part in parts:
        if name not in PASSING and not str(name).startswith("mb_"):
            yield from _walk(part, f"{where}.{name}".lstrip("."), visited)
