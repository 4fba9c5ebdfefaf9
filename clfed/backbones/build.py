"""Building the parts of an encoder from metadata that may come from anybody."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from clfed.errors import ConfigError, EncoderError

FORMAT = 1
LARGEST = 2**22  # numbers in one image, a bound on what bytes from a network may ask for
KEYS = {"format", "backbone", "input_shape", "mean", "std", "feature_map"}
BACKBONES = ("clfed.backbones",)
FEATURES = ("clfed.prototypes.features", "clfed.prototypes.sketch")

FeatureMap = Callable[[Tensor], Tensor]


def check_metadata(meta: Mapping[str, Any]) -> None:
    """Refuse metadata that are not an encoder's, above all foreign things to build."""
    if not isinstance(meta, Mapping) or meta.get("format") != FORMAT or set(meta) != KEYS:
        raise EncoderError(f"Expected encoder format {FORMAT}.", remedy="Install the same clfed.")
    _safe_backbone(meta.get("backbone"))
    if meta.get("feature_map") is not None:
        _safe_object(meta["feature_map"], FEATURES)
    shape, mean, std = (meta.get(key) for key in ("input_shape", "mean", "std"))
    numbers = (int, float)
    if not (
        isinstance(shape, list)
        and len(shape) in (1, 3)
        and all(type(size) is int and size > 0 for size in shape)
        and math.prod(shape) <= LARGEST
        and isinstance(mean, list)
        and isinstance(std, list)
        and all(isinstance(value, numbers) for value in mean)
        and all(isinstance(value, numbers) and value > 0 for value in std)
        and len(mean) == len(std) == (shape[0] if len(shape) == 3 else 0)
    ):
        raise EncoderError(
            f"Input shape {shape}, mean {mean} and std {std} of the encoder do not fit, or "
            f"an image has more than {LARGEST} numbers."
        )


def _safe_object(config: Any, packages: tuple[str, ...]) -> Callable[..., Any]:
    """Return the class or function that a configuration names, if it is one of ours."""
    from hydra.utils import get_object

    target = config.get("_target_") if isinstance(config, Mapping) else None
    if not isinstance(target, str) or not target.startswith(tuple(f"{p}." for p in packages)):
        raise EncoderError(
            f"An encoder may only be built from {' or '.join(packages)}, got {target!r}.",
            remedy="Do not use this encoder: it may come from somebody who means harm.",
        )
    try:
        found = get_object(target)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise EncoderError(f"{target} is not known here.") from error
    # A module of ours also leads to everything that it imports.
    home = str(getattr(found, "__module__", ""))
    if not callable(found) or not home.startswith(packages):
        raise EncoderError(f"{target} is not defined in {' or '.join(packages)}.")
    return cast(Callable[..., Any], found)


def _safe_backbone(config: Any) -> tuple[type[nn.Module], dict[str, Any]]:
    found = _safe_object(config, BACKBONES)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise EncoderError(f"{config['_target_']} is not a backbone.")
    return found, _options(config)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_target_"}


def build_backbone(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the backbone and give it its weights; the tensors must fit before memory is used."""
    channels, size = ([*meta["input_shape"], 0])[:2]
    make, options = _safe_backbone(meta["backbone"])
    options |= {"in_channels": channels, "image_size": size}
    try:
        backbone = _without_memory(lambda: make(**options))
        backbone.load_state_dict(dict(tensors), strict=True, assign=True)
    except ConfigError:
        raise
    except Exception as error:
        raise EncoderError(f"The weights do not fit the backbone: {error}") from error
    return backbone


def _without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose weights are yet to come."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # a few models of torchvision look at their initial weights
        with torch.random.fork_rng(devices=[]):
            return build()


def build_feature_map(config: Mapping[str, Any] | None, dim: int) -> FeatureMap | None:
    """Build the map that a configuration names, for embeddings of length ``dim``."""
    if config is None:
        return None
    found = _safe_object(config, FEATURES)
    options = _options(config)
    try:
        if not isinstance(found, type):
            return cast(FeatureMap, partial(found, **options))
        if "dim_in" in signature(found).parameters:
            options.setdefault("dim_in", dim)
        return cast(FeatureMap, found(**options))
    except (TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(f"An option does not fit {config['_target_']}: {error}.") from error
