"""Optimisers and their schedules, and how a stream without boundaries goes on with one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

OPTIMISERS = ("adam", "sgd")
SCHEDULES = ("constant", "step", "cosine")


def make_optimiser(
    kind: str, groups: list[dict[str, Any]], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW (``adam``) or SGD with Nesterov momentum 0.9 (``sgd``)."""
    if kind == "adam":
        return torch.optim.AdamW(groups, lr, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def rate_at(step: int, schedule: str, *, warmup: int, halve_every: int, length: int) -> float:
    """Return the learning rate at a step as a fraction of the largest one."""
    rising = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "step":
        return rising * 0.5 ** (step // halve_every)
    if schedule == "cosine":
        return rising * 0.5 * (1 + math.cos(math.pi * step / max(length, 1)))
    return rising


def pack(optimiser: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return what an optimiser knows of each parameter, by the parameter's name."""
    names: dict[Any, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: {key: _copy(value) for key, value in known.items()}
        for parameter, known in optimiser.state.items()
        if parameter in names
    }


def unpack(
    optimiser: torch.optim.Optimizer, module: nn.Module, packed: Mapping[str, dict[str, Any]]
) -> None:
    """Let an optimiser go on from :func:`pack`; rows that were added since start from zero."""
    for name, parameter in module.named_parameters():
        if name not in packed:
            continue
        for key, value in packed[name].items():
            grown = value
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                grown = torch.zeros_like(parameter)
                grown[: len(value)] = value
            optimiser.state[parameter][key] = _copy(grown)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
