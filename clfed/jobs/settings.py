"""Whether a job's settings are of the right kind, before anything is opened or trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf

from clfed.config import build, target
from clfed.errors import ConfigError
from clfed.prototypes import CLASSIFIERS, MERGES
from clfed.prototypes.tables import Moments

if TYPE_CHECKING:
    from clfed.privacy.tiers import Tier


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
    if not statistics_alone(cfg.strategy):
        raise ConfigError(
            f"job=reconnaissance merges class statistics, which {cfg.strategy._target_} does not.",
            remedy="Run it with job=federated.",
        )
    one_of(cfg, "merge", MERGES)
    one_of(cfg, "memory.moments", get_args(Moments))
    in_the_open(cfg)
    answering(cfg)
    _check_classifiers(cfg)


def check_unlearning(cfg: DictConfig) -> None:
    """Refuse settings of the unlearning job that are of the wrong kind.

    Raises:
        ConfigError: Names the first key that does not fit.
    """
    in_the_open(cfg)
    for group in ("unlearner", "forget"):
        if cfg.get(group) is None:
            raise _wrong(group, "one of the choices that clfed --help lists", None)
    for key in ("originals", "unlearnings", "oracles", "ood_images"):
        whole(cfg, f"job.{key}", least=1)
    whole(cfg, "job.relearn", least=0)
    for key, least in (("shadows", 4), ("klom", 3)):
        if cfg.job[key] is not None:
            whole(cfg, f"job.{key}", least=least)


def check_federated(cfg: DictConfig) -> None:
    """Refuse settings of the federated job that are of the wrong kind.

    Raises:
        ConfigError: Names the first key that does not fit.
    """
    number(cfg, "job.timeout")
    if cfg.job.every is not None:
        whole(cfg, "job.every", least=1)
    number(cfg, "strategy.wait")
    one_of(cfg, "merge", MERGES)
    one_of(cfg, "memory.moments", get_args(Moments))
    tier(cfg)
    if OmegaConf.select(cfg, "curriculum") is not None and statistics_alone(cfg.strategy):
        raise ConfigError(
            f"Sums do not depend on their order, so {cfg.strategy._target_} has no curriculum.",
            remedy="Leave curriculum= out, or choose a strategy that trains networks.",
        )


def tier(cfg: DictConfig) -> Tier:
    """Return the privacy tier of the federated job, refused where the strategy does not fit it.

    Raises:
        ConfigError: A setting is out of range, or tier and strategy do not go together.
    """
    from clfed.privacy.tiers import Plain, Tier

    settings: dict[str, Any] = OmegaConf.to_container(cfg.privacy)  # type: ignore[assignment]
    found, strategy = build(settings), target(cfg.strategy)
    if not isinstance(found, Tier):
        raise _wrong("privacy", "a tier of clfed.privacy.tiers", settings["_target_"])
    if not isinstance(strategy, type):
        raise _wrong("strategy", "a class of clfed.strategies", cfg.strategy._target_)
    found.check(
        strategy,
        moments=cfg.memory.moments,
        merge=cfg.merge,
        bits=cfg.strategy.get("message_bits"),
    )
    if not isinstance(found, Plain) and OmegaConf.select(cfg, "curriculum.nodes") is not None:
        raise ConfigError(
            f"Nodes tell how hard their images are for the curriculum, which privacy={found.name} "
            "does not cover.",
            remedy="Leave curriculum= out, or set privacy=plain.",
        )
    return found


def in_the_open(cfg: DictConfig) -> None:
    """Refuse every privacy tier but plain, in jobs that have no other.

    Raises:
        ConfigError: It is another one.
    """
    chosen = str(OmegaConf.select(cfg, "privacy._target_", default="Plain"))
    if chosen.rpartition(".")[2] != "Plain":
        raise ConfigError(
            f"privacy must be plain in job={cfg.job.name}, got {chosen}.",
            remedy="Privacy tiers are settings of job=federated.",
        )


def statistics_alone(strategy: Mapping[str, Any]) -> bool:
    """Whether nodes of a strategy send class statistics and train nothing.

    Args:
        strategy: Its ``_target_`` and settings.

    Raises:
        ConfigError: There is no such strategy.
    """
    from clfed.strategies.prototype_averaging import PrototypeAveraging

    found = target(strategy)
    return isinstance(found, type) and issubclass(found, PrototypeAveraging)


def answering(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """Return name and options of the classifier that answers in reconnaissance missions.

    Raises:
        ConfigError: It does not exist, or the learner answers with more than exact statistics.
    """
    found = cfg.job.classifier
    if found is None:
        raise ConfigError(
            f"learner={cfg.learner.get('name', '?')} answers with its own network, which does not "
            "merge exactly, so it cannot run in reconnaissance missions.",
            remedy="Choose a learner of exact statistics (ncm, slda, fecam, ranpac, teen, ...), or "
            "set job.classifier to what is to be read off the merged statistics.",
        )
    options = dict(found) if isinstance(found, Mapping | DictConfig) else {"name": found}
    name = options.pop("name", None)
    if name not in CLASSIFIERS:
        raise _wrong("job.classifier", f"one of {', '.join(CLASSIFIERS)}", name)
    return str(name), options


def check_continual(cfg: DictConfig) -> None:
    """Refuse settings of the continual job that are of the wrong kind.

    Raises:
        ConfigError: Names the first key that does not fit.
    """
    in_the_open(cfg)
    stability = cfg.job.stability
    if stability.every is not None:
        whole(cfg, "job.stability.every", least=1)
    if stability.samples is not None:
        whole(cfg, "job.stability.samples", least=1)
    windows = OmegaConf.select(cfg, "job.stability.windows")
    if not isinstance(windows, ListConfig) or not all(
        isinstance(w, int) and not isinstance(w, bool) and w > 1 for w in windows
    ):
        raise _wrong("job.stability.windows", "a list of whole numbers of at least 2", windows)
    ks = cfg.job.recall_at
    if ks is not None and not (
        isinstance(ks, ListConfig)
        and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in ks)
    ):
        raise _wrong("job.recall_at", "a list of whole numbers of at least 1", ks)
    if not isinstance(cfg.job.resume, bool):
        raise _wrong("job.resume", "true or false", cfg.job.resume)
    _check_classifiers(cfg)


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


def _check_classifiers(cfg: DictConfig) -> None:
    classifiers = cfg.job.classifiers
    if not isinstance(classifiers, DictConfig):
        raise _wrong("job.classifiers", "names with their options", classifiers)
    for name, options in ((str(key), value) for key, value in classifiers.items()):
        if name not in CLASSIFIERS:
            raise _wrong("job.classifiers", f"names among {', '.join(CLASSIFIERS)}", name)
        if not isinstance(options, Mapping | DictConfig):
            raise _wrong(f"job.classifiers.{name}", "options, {} for none", options)
