"""Trained encoders as files, each with an account of its training beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clfed.backbones import Encoder
from clfed.errors import ConfigError, EncoderError
from clfed.files import write_file
from clfed.learners.options import TrainingSummary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedBase:
    """An encoder, how it came about, and whether it was there before."""

    encoder: Encoder
    summary: TrainingSummary
    cached: bool


def save_base(encoder: Encoder, summary: TrainingSummary, path: Path) -> None:
    """Write an encoder and, beside it, how it was trained.

    Args:
        encoder: The encoder.
        summary: Its training.
        path: File of the encoder; that of the summary ends in ``.json``.

    Raises:
        RunFolderError: A file cannot be written.
    """
    # The summary first: where there is an encoder, there is its summary.
    write_file(path.with_suffix(".json"), json.dumps(asdict(summary), indent=1).encode())
    encoder.save(path)


def from_cache(path: Path) -> TrainedBase | None:
    """Return what the cache holds; a damaged file is reported, to be made again."""
    if not path.is_file():
        return None
    try:
        return TrainedBase(Encoder.load(path), _summary(path.with_suffix(".json")), cached=True)
    except EncoderError as error:
        log.warning("The cached encoder is damaged and is trained again. %s", error)
        return None


def from_file(
    path: Any,
    backbone: Mapping[str, Any],
    *,
    input_shape: tuple[int, ...],
    feature_map: Mapping[str, Any] | None = None,
) -> TrainedBase:
    """Return the encoder of a file, if it is the one that a configuration describes.

    Args:
        path: The setting ``learner.path``.
        backbone: ``_target_`` and options of the backbone.
        input_shape: ``(C, H, W)`` of the images, or ``(D,)`` of ready features.
        feature_map: ``_target_`` and options of a map of the embeddings, or None.

    Raises:
        ConfigError: No path, or the file holds an encoder of another kind.
        EncoderError: The file, or the one beside it, is missing or damaged.
    """
    if not isinstance(path, str):
        raise ConfigError(
            f"learner.path must name a file, got {path!r}.",
            remedy="Name the encoder.safetensors of a run folder.",
        )
    file = Path(path).expanduser()
    encoder = Encoder.load(file)
    if encoder.input_shape != input_shape:
        raise ConfigError(
            f"{file} takes inputs of shape {encoder.input_shape}, the data have {input_shape}.",
            remedy="Choose the data set that the encoder was trained for.",
        )
    try:
        described = Encoder(
            encoder.backbone,
            backbone,
            input_shape=input_shape,
            mean=encoder.transform.mean,
            std=encoder.transform.std,
            feature_map=feature_map,
        )
        same = described.embedding_id == encoder.embedding_id
    except EncoderError:  # the feature map does not take what the network gives
        same = False
    if not same:
        raise ConfigError(
            f"{file} holds another backbone or feature map than the configuration describes.",
            remedy="Give the backbone and memory.feature_map of the run that made the file.",
        )
    account = file.with_suffix(".json")
    untold = TrainingSummary(0, 0, [], "32", 0.0)
    return TrainedBase(encoder, _summary(account) if account.is_file() else untold, cached=True)


def _summary(path: Path) -> TrainingSummary:
    try:
        return TrainingSummary(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(
            f"{path} does not say how an encoder was trained: {error}.",
            remedy="Delete the file; the encoder beside it can be used without.",
        ) from error
