"""Where the configuration lies and how it is composed; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clfed.errors import ConfigError

TECHNICAL = ("full_key:", "object_type=", "See http", "Config search path:", "provider=")

if TYPE_CHECKING:
    from omegaconf import DictConfig


def config_dir() -> Path:
    """Return the folder of the configuration files: in a wheel, a checkout or a Flower app bundle.

    Raises:
        ConfigError: The installation is incomplete.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"No configuration files beside {here}.", remedy="Install clfed again.")


def choices(group: str) -> Iterator[tuple[str, str]]:
    """Yield each choice of a group with its sentence, the first comment of its file."""
    for path in sorted((config_dir() / group).glob("*.yaml")):
        comments = [
            line.removeprefix("#").strip()
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("#") and "@package" not in line
        ]
        yield path.stem, comments[0] if comments else ""


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the resolved configuration for some overrides, without a command line.

    Raises:
        ConfigError: A group, key or value does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            return settle(hydra_compose("config", overrides=list(overrides)))
    # Hydra raises ValueError for group choices that are no names, such as logger=null.
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(one_sentence(error)) from error


def settle(cfg: DictConfig) -> DictConfig:
    """Return the configuration that counts: smoke settings merged in, interpolations resolved.

    Raises:
        ConfigError: The smoke settings name a key that does not exist, or a switch or the seed
            is of another kind.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for switch in ("smoke", "overwrite"):
        if not isinstance(cfg[switch], bool):
            raise ConfigError(f"{switch} must be true or false, got {cfg[switch]!r}.")
    try:
        merged = OmegaConf.merge(cfg, cfg.when_smoke) if cfg.smoke else cfg.copy()
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(one_sentence(error)) from error
    assert isinstance(merged, type(cfg))
    if isinstance(merged.seed, bool) or not isinstance(merged.seed, int) or merged.seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, got {merged.seed!r}.")
    return merged


def one_sentence(error: BaseException) -> str:
    """Return what a Hydra or OmegaConf error says as one line, without its technical tail."""
    if not str(error) and error.__cause__ is not None:
        return one_sentence(error.__cause__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(TECHNICAL)]
    return " ".join(told).rstrip(".") + "."


def build(config: Mapping[str, Any], /, **arguments: Any) -> Any:
    """Call what a configuration names with its settings and these arguments.

    Args:
        config: ``_target_`` and settings, as Hydra's ``instantiate`` takes them.
        arguments: Objects that only the program knows; Hydra never sees them, because it would
            turn data classes into configurations.

    Raises:
        ConfigError: The target does not exist, or the settings do not fit it.
    """
    import inspect

    target, call = config.get("_target_"), _partial(config)
    given = {**call.keywords, **arguments}
    try:
        inspect.signature(call.func).bind(*call.args, **given)
    except TypeError as error:
        raise ConfigError(f"The settings of {target} do not fit: {error}.") from error
    try:
        return call(**arguments)
    except TypeError as error:
        # A class may hand its options on, so its signature alone does not tell. A function runs
        # whole jobs here, whose own mistakes are not the settings'.
        if not inspect.isclass(call.func) or "argument" not in str(error):
            raise
        raise ConfigError(f"The settings of {target} do not fit: {error}.") from error


def target(config: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what a configuration names, without calling it.

    Raises:
        ConfigError: The target does not exist.
    """
    return _partial({"_target_": config.get("_target_")}).func


def _partial(config: Mapping[str, Any]) -> partial[Any]:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        found = instantiate({**config, "_partial_": True}, _recursive_=False, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(
            f"{config.get('_target_')} cannot be used: {one_sentence(error)}"
        ) from error
    return cast("partial[Any]", found)
