"""The command that makes a run, found again from the configuration that the run wrote down."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from clfed.config import choices, compose, config_dir

#: Groups whose choice decides numbers, in the order in which a command names them.
GROUPS = (
    *("data", "scenario", "backbone", "learner", "trainer", "strategy", "curriculum", "privacy"),
    *("engine", "forget", "unlearner"),
)
#: Where a run writes, and who watches it; and smoke settings, which are merged in by then.
ASIDE = ("seed", "run_dir", "cache_dir", "overwrite", "logger", "smoke", "when_smoke")
_BARE = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][\w./-]*")
_WORDS = {"null", "true", "false", "nan", "inf"}


@dataclass(frozen=True)
class Recipe:
    """A command in parts, so that runs that differ in method and seed become one sweep.

    Attributes:
        shared: Overrides that have nothing to do with the method.
        method: The choice of the group that is compared; None where the job's own one is taken.
        options: Overrides of the method's settings.
        group: The one that the job compares.
    """

    shared: tuple[str, ...]
    method: str | None
    options: tuple[str, ...]
    group: str = "learner"


def recipe(config: Mapping[str, Any]) -> Recipe:
    """Find the overrides that compose to a resolved configuration.

    Args:
        config: What ``config.yaml`` of a run folder holds, as plain dictionaries and lists.

    Raises:
        ConfigError: The job does not exist here.
    """
    start = [f"job={config['job']['name']}"]
    # Settings that follow the seed are no differences.
    composing = [*start, f"seed={config['seed']}"]
    default = _plain(*composing)
    chosen = {
        group: choice
        for group in GROUPS
        if (choice := _choice(group, config.get(group), default.get(group), composing)) is not None
    }
    composed = _plain(*composing, *(f"{group}={choice}" for group, choice in chosen.items()))
    values = [
        override
        for key in config.keys() | composed.keys()
        if key not in ASIDE
        for override in differences(composed.get(key, ...), config.get(key, ...), key)
        # A setting that the run did not know, because it is newer, keeps its default.
        if not re.fullmatch(r"~\w+(\.\w+)?", override)
    ]
    compared = "strategy" if config["job"]["name"] == "federated" else "learner"
    if config.get("unlearner"):
        compared = "unlearner"
    usual = default.get(compared)
    method = chosen.get(compared) or _name_of(compared, usual)
    if method is None and compared == "strategy":
        method = _choice(compared, usual, None, composing)
    options = sorted(v for v in values if v.lstrip("+~").startswith(f"{compared}."))
    rest = sorted(v for v in values if v not in options)
    groups = [f"{group}={choice}" for group, choice in chosen.items() if group != compared]
    return Recipe((*start, *groups, *rest), method, tuple(options), compared)


def command_lines(recipes: Sequence[tuple[Recipe, Sequence[int]]]) -> list[str]:
    """Write recipes and their seeds as shell commands, as few as there can be.

    Example:
        >>> shared = ("job=continual", "data=digits")
        >>> command_lines([(Recipe(shared, name, ()), [0, 1]) for name in ("ncm", "slda")])
        ['clfed -m job=continual data=digits learner=ncm,slda seed=0,1']
    """
    sweeps: dict[tuple[object, ...], list[str]] = {}
    for made, seeds in recipes:
        key = (made.shared, made.options, tuple(sorted(seeds)), made.method is None, made.group)
        sweeps.setdefault(key, []).extend([made.method] if made.method else [])
    return [_line(key, methods) for key, methods in sweeps.items()]


def differences(old: object, new: object, key: str) -> Iterator[str]:
    """Yield the overrides that turn one configuration into another.

    Args:
        old: What is composed so far; ``...`` where the key is absent.
        new: What it shall be; ``...`` where the key shall be absent.
        key: Where both stand.

    Example:
        >>> [*differences({"lr": 0.1, "head": "linear"}, {"lr": 0.2, "clip": None}, "learner")]
        ['learner.lr=0.2', '~learner.head', '+learner.clip=null']
    """
    if old == new and type(old) is type(new):
        return
    if new is ...:
        yield f"~{key}"
    elif old is ...:
        yield f"+{key}={value_text(new)}"
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys((*old, *new)):
            yield from differences(old.get(name, ...), new.get(name, ...), f"{key}.{name}")
    else:
        yield f"{key}={value_text(new)}"


def value_text(value: object) -> str:
    r"""Write a value as an override takes it.

    Example:
        >>> value_text({"name": "lda", "sizes": [1, 2.5], "note": "it's", "on": True, "off": None})
        "{name: lda, sizes: [1, 2.5], note: 'it\\'s', on: true, off: null}"
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return repr(value)
    if _BARE.fullmatch(value) and value.lower() not in _WORDS:
        return value
    # A backslash counts only before a quote, and must then be doubled.
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"


def _choice(group: str, wanted: Any, default: Any, start: list[str]) -> str | None:
    """The choice of a group that is nearest to its settings; None keeps the job's own."""
    if wanted == default or not isinstance(wanted, Mapping):
        return None
    best, fewest = None, _distance(default, wanted)
    for name in _same_target(group, wanted.get("_target_")):
        distance = _distance(_plain(*start, f"{group}={name}")[group], wanted)
        if distance < fewest:
            best, fewest = name, distance
    return best


def _distance(old: object, new: object) -> float:
    same = isinstance(old, Mapping) and isinstance(new, Mapping)
    # Settings of another target have nothing to do with these.
    if not same or old.get("_target_") != new.get("_target_"):  # type: ignore[attr-defined]
        return float("inf")
    return sum(1 for _ in differences(old, new, ""))


def _same_target(group: str, target: str | None) -> list[str]:
    """Choices that may build this target, without the time that composing each would take."""
    named = [
        name
        for name, _ in choices(group)
        if re.search(
            rf"^_target_: {re.escape(target or '')}\s*(#.*)?$",
            (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    ]
    return named if target else [name for name, _ in choices(group)]


def _name_of(group: str, method: object) -> str | None:
    name = method.get("name") if isinstance(method, Mapping) else None
    return name if isinstance(name, str) and name in dict(choices(group)) else None


def _line(key: tuple[Any, ...], methods: Sequence[str]) -> str:
    shared, options, seeds, _, group = key
    words = [*shared, *([f"{group}={','.join(dict.fromkeys(methods))}"] if methods else [])]
    words += [*options, f"seed={','.join(map(str, seeds))}"]
    sweep = ["-m"] if len(set(methods)) > 1 or len(seeds) > 1 else []
    return " ".join(["clfed", *sweep, *map(shlex.quote, words)])


@cache
def _plain(*overrides: str) -> dict[str, Any]:
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    # Within a job Hydra is busy with the job's own configuration, which must come back.
    place = GlobalHydra.instance()
    busy = place.hydra
    place.clear()
    try:
        plain: dict[str, Any] = OmegaConf.to_container(compose(overrides))  # type: ignore[assignment]
    finally:
        GlobalHydra.instance().hydra = busy
    return plain
