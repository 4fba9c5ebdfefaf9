"""What surrounds every training: its threads, its silence, and lookups that are made only once."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

import torch

_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_entry_points = functools.cache(entry_points)
_has_gpu = functools.cache(torch.cuda.is_available)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with a fixed number of processor threads while the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about hardware, workers and the end of a training."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    # The level of a handler costs nothing to change; that of a logger empties every logger's cache.
    voices: list[logging.Handler | logging.Logger] = []
    for logger in loggers:
        voices += [*logger.handlers] if logger.handlers and not logger.propagate else [logger]
    levels = [voice.level for voice in voices]
    try:
        for voice in voices:
            voice.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for voice, level in zip(voices, levels, strict=True):
            voice.setLevel(level)


@contextmanager
def brisk() -> Iterator[None]:
    """Keep Lightning and torch from looking up again and again what does not change.

    Every Trainer searches all installed packages for callbacks, which takes longer than the rest
    of its making; and Lightning tells torch to ask the graphics driver whether there is a GPU,
    which torch then does before every step of an optimiser.
    """
    from lightning.fabric.utilities import registry

    before = os.environ.get(_NVML)
    if not _has_gpu():
        os.environ[_NVML] = "0"
    registry.entry_points = _entry_points  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        registry.entry_points = entry_points  # type: ignore[attr-defined]
        if before is None:
            os.environ.pop(_NVML, None)
        else:
            os.environ[_NVML] = before
