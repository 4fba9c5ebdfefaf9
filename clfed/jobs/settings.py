"""Whether a job's settings are of the right kind, before anything is opened or trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from clfed.errors import ConfigError
from clfed.prototypes import CLASSIFIERS, MERGES
from clfed.prototypes.tables import Moments


def check(cfg: DictConfig) -> None:
    """Refuse settings of the reconnaissance job that are of the wrong kind.

    Raises:
        ConfigError: Names the first key that does not fit.
    """
    whole(cfg, "job.draws", least=1)
    number(cfg, "job.timeout")
    if "wait" in cfg.strategy:  # a strategy of the user's own may have other settings
        number(cfg, "strategy.wait")
    for name in ("finetuned", "joint"):
        if cfg.job[name] is None:
            continue
        whole(cfg, f"job.{name}.epochs", least=0)
        whole(cfg, f"job.{name}.batch_size", least=1)
        for option in ("lr", "momentum", "weight_decay"):
            number(cfg, f"job.{name}.{option}")
        if cfg.job[name].draws is not None:
            whole(cfg, f"job.{name}.draws", least=0)
    one_of(cfg, "merge", MERGES)
    one_of(cfg, "memory.moments", get_args(Moments))
    one_of(cfg, "job.classifier", CLASSIFIERS)
    classifiers = cfg.job.classifiers
    if not isinstance(classifiers, DictConfig):
        raise _wrong("job.classifiers", "names with their options", classifiers)
    for name, options in ((str(key), value) for key, value in classifiers.items()):
        if name not in CLASSIFIERS:
            raise _wrong("job.classifiers", f"names among {', '.join(CLASSIFIERS)}", name)
        if not isinstance(options, Mapping | DictConfig):
            raise _wrong(f"job.classifiers.{name}", "options, {} for none", options)


def whole(cfg: DictConfig, key: str, *, least: int) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    value = OmegaConf.select(cfg, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(key, f"a whole number of at least {least}", value)


def number(cfg: DictConfig, key: str) -> None:
    """Refuse anything but a finite number of at least 0."""
    value = OmegaConf.select(cfg, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _wrong(key, "a number of at least 0", value)


def one_of(cfg: DictConfig, key: str, known: Iterable[str]) -> None:
    """Refuse anything but one of these names."""
    value = OmegaConf.select(cfg, key)
    if value not in tuple(known):
        raise _wrong(key, f"one of {', '.join(known)}", value)


def _wrong(key: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{key} must be {expected}, got {value!r}.")
