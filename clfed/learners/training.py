"""Base training: from a benchmark's base classes to a frozen encoder, once for each setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from clfed.backbones import MLP, Encoder, Identity
from clfed.backbones.encoder import Transform
from clfed.config import build
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.learners.base import ContinualLearner
from clfed.learners.encoder_files import TrainedBase, from_cache, from_file, save_base
from clfed.learners.loop import fit
from clfed.learners.options import Progress, TrainerOptions, TrainingSummary
from clfed.scenarios.streams import Experience
from clfed.seeding import derive_seed

# Raise it when a change of the code changes what the same settings train.
TRAINING_VERSION = 1
# Options of a learner that change what is read off a memory, and no weight.
NOT_TRAINING = ("name", "classifier", "moments", "feature_map")


@dataclass(frozen=True)
class BaseTraining:
    """What decides an encoder, next to the data and the seed.

    Args:
        learner: ``_target_`` and options of a learner; without ``_target_`` nothing is trained.
            ``path``: a file that holds the encoder.
        backbone: ``_target_`` and options of a backbone.
        trainer: How the training runs.
        feature_map: ``_target_`` and options of a map in ``clfed.prototypes.features``, or None.
    """

    learner: Mapping[str, Any]
    backbone: Mapping[str, Any]
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    feature_map: Mapping[str, Any] | None = None

    @classmethod
    def from_config(cls, cfg: Any) -> BaseTraining:
        """Read the groups ``learner``, ``backbone``, ``trainer`` and ``memory.feature_map``.

        Args:
            cfg: A resolved ``DictConfig``.

        Raises:
            ConfigError: The trainer has no such option.
        """
        from omegaconf import OmegaConf

        whole = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        trainer = whole.get("trainer") or {}
        known = {option.name for option in fields(TrainerOptions)}
        if unknown := sorted(set(trainer) - known):
            raise ConfigError(
                f"The trainer has no option {unknown[0]!r}; it has {', '.join(sorted(known))}."
            )
        return cls(
            learner=whole["learner"] or {},
            backbone=whole["backbone"],
            trainer=TrainerOptions(**trainer),
            feature_map=(whole.get("memory") or {}).get("feature_map"),
        )


def base_encoder(
    cfg: BaseTraining,
    benchmark: Benchmark,
    *,
    seed: int,
    cache: Path,
    progress: Progress | None = None,
) -> Encoder:
    """Return the encoder of :func:`train_base`."""
    return train_base(cfg, benchmark, seed=seed, cache=cache, progress=progress).encoder


def train_base(
    cfg: BaseTraining,
    benchmark: Benchmark,
    *,
    seed: int,
    cache: Path,
    progress: Progress | None = None,
) -> TrainedBase:
    """Train a backbone on the base classes, or take the encoder of the same settings from a cache.

    The validation classes alone choose the step whose weights are kept; the field is never looked
    at. A killed training goes on from its last checkpoint, to the same bits.

    Args:
        cfg: Learner, backbone and trainer.
        benchmark: Its groups ``base`` and ``validation`` are used.
        seed: Decides initial weights, episodes and the validation split.
        cache: Folder of encoders, made if needed; the key is a hash of everything above.
        progress: Called with step, steps and a sentence.

    Raises:
        ConfigError: Learner, backbone and data do not fit together.
        EncoderError: The file that the learner names is missing or damaged.
        NotEnoughData: Too few base classes or images for the learner.
        InvalidEmbedding: The training diverged.
        RunFolderError: The encoder cannot be written.
    """
    shape = tuple(benchmark.train.images.shape[1:])
    check_backbone(cfg.backbone, shape, benchmark.name)
    if "path" in cfg.learner:
        return from_file(
            cfg.learner["path"], cfg.backbone, input_shape=shape, feature_map=cfg.feature_map
        )
    backbone = initial_backbone(cfg.backbone, shape, seed)
    weights = any(True for _ in backbone.parameters())
    trained = bool(cfg.learner.get("_target_")) and len(shape) == 3 and weights
    base = benchmark.train.of_classes(benchmark.groups["base"])
    validation = benchmark.train.of_classes(benchmark.groups["validation"])
    if trained and not base.classes:
        raise NotEnoughData(
            f"Base training needs base classes, data={benchmark.name} has none.",
            remedy="Choose data with base classes, or learner=none.",
        )
    if not trained:
        return _untrained(backbone, cfg, benchmark)

    key = cache_key(cfg, benchmark, base, validation, seed)
    path = cache / "base" / f"{key}.safetensors"
    if (found := from_cache(path)) is not None:
        return found
    _make_folder(path.parent)
    dim = freeze(backbone, replace(cfg, feature_map=None), benchmark).dim
    learner = make_learner(cfg.learner, backbone, benchmark, dim=dim, seed=seed)
    learner.check_base(base)
    learner.begin_experience(Experience(0, base, phase=0))
    if not learner.length:  # a method that leaves the network as it is
        return _untrained(backbone, cfg, benchmark)
    best, summary = fit(
        learner,
        base,
        validation,
        cfg.trainer,
        seed=seed,
        checkpoint=path.with_suffix(".ckpt"),
        encode=lambda network: freeze(network, cfg, benchmark),
        progress=progress or (lambda step, total, text: None),
    )
    save_base(best, summary, path)
    path.with_suffix(".ckpt").unlink(missing_ok=True)
    return TrainedBase(best, summary, cached=False)


def cache_key(
    cfg: BaseTraining, benchmark: Benchmark, base: ImageSet, validation: ImageSet, seed: int
) -> str:
    """Return the SHA-256 of everything that decides the bits of an encoder."""
    content = {
        "version": TRAINING_VERSION,
        "learner": {key: v for key, v in cfg.learner.items() if key not in NOT_TRAINING},
        "backbone": dict(cfg.backbone),
        "feature_map": cfg.feature_map and dict(cfg.feature_map),
        "trainer": {
            "precision": cfg.trainer.resolved_precision(),
            "threads": cfg.trainer.threads,
            "validate_every": cfg.trainer.validate_every,
            "validation_shots": cfg.trainer.validation_shots,
            "accelerator": cfg.trainer.accelerator,
        },
        "base": base.fingerprint,
        "validation": validation.fingerprint,
        "transform": [benchmark.mean, benchmark.std],
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_backbone(config: Mapping[str, Any], shape: tuple[int, ...], data: str) -> None:
    """Refuse a backbone that cannot take the data.

    Raises:
        ConfigError: Ready features for a network of convolutions, or pixels for none at all.
    """
    target = str(config.get("_target_", "")).rpartition(".")[2]
    takes_features = target in (Identity.__name__, MLP.__name__)
    if len(shape) == 1 and not takes_features:
        raise ConfigError(
            f"data={data} holds ready features, which backbone {target} does not take.",
            remedy="Ready features go with backbone=identity or backbone=mlp.",
        )


@contextmanager
def initialisation(seed: int, purpose: str) -> Iterator[None]:
    """Let modules draw their initial weights from a seed and leave no trace of it behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, purpose))
        yield


def initial_backbone(config: Mapping[str, Any], shape: tuple[int, ...], seed: int) -> nn.Module:
    """Build a backbone for images ``(C, H, W)`` or features ``(D,)``, its weights from a seed."""
    channels, size = (*shape, 0)[:2]
    with initialisation(seed, "backbone"):
        built = build(config, in_channels=channels, image_size=size)
    return cast(nn.Module, built)


def make_learner(
    config: Mapping[str, Any], backbone: nn.Module, benchmark: Benchmark, *, dim: int, seed: int
) -> ContinualLearner:
    """Build the learner that a configuration names.

    Args:
        config: ``_target_`` and options of a learner.
        backbone: The network to train.
        benchmark: Whose pixels it will see.
        dim: Length of an embedding.
        seed: Decides everything random in the learner.

    Raises:
        ConfigError: No learner, or options that it does not take.
    """
    with initialisation(seed, "learner"):
        learner = build(
            config,
            backbone=backbone,
            transform=Transform(benchmark.mean, benchmark.std),
            dim=dim,
            seed=seed,
        )
    if not isinstance(learner, ContinualLearner):
        raise ConfigError(
            f"{type(learner).__name__} is not a learner.",
            remedy="clfed --help lists the learners.",
        )
    return learner


def freeze(network: nn.Module, cfg: BaseTraining, benchmark: Benchmark) -> Encoder:
    """Return the encoder that a trained backbone makes on a data set."""
    return Encoder(
        network,
        cfg.backbone,
        input_shape=benchmark.train.images.shape[1:],
        mean=benchmark.mean,
        std=benchmark.std,
        feature_map=cfg.feature_map,
    )


def _untrained(backbone: nn.Module, cfg: BaseTraining, benchmark: Benchmark) -> TrainedBase:
    encoder = freeze(backbone, cfg, benchmark)
    return TrainedBase(encoder, TrainingSummary(0, 0, [], "32", 0.0), cached=False)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The cache of encoders {folder} cannot be made: {error.strerror}.",
            remedy="Set cache_dir to a folder that can be written.",
        ) from error
