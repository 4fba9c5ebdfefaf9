"""The embedding that a federation is made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clfed.backbones import Encoder
from clfed.config import compose
from clfed.errors import ConfigError
from clfed.evaluation.rejection import calibrate
from clfed.federated.field import open_benchmark
from clfed.learners.training import BaseTraining, train_base
from clfed.reporting.progress import progress
from clfed.seeding import generator


@dataclass(frozen=True)
class Founding:
    """An embedding and what was learned about it.

    Attributes:
        encoder: The frozen embedding.
        threshold: Score below which a picture is of no known class; None: nothing is unknown.
        told: A sentence about both.
    """

    encoder: Encoder
    threshold: float | None
    told: str


def embedding(path: Path | None, overrides: Sequence[str]) -> Founding:
    """Return a ready embedding, or train one.

    The threshold is chosen on the validation classes of the base data, which are neither trained on
    nor tested on; without them nothing is ever unknown.

    Args:
        path: A file that :meth:`~clfed.backbones.Encoder.save` wrote; None trains.
        overrides: Configuration of data, backbone and learner, as ``clfed`` takes it.

    Raises:
        ConfigError: Both were given, or the configuration does not fit.
        ClfedError: What training refuses.
    """
    if path is not None:
        if overrides:
            raise ConfigError(
                f"Expected an encoder file or settings of training, got both: {overrides[0]}."
            )
        encoder = Encoder.load(path)
        return Founding(encoder, None, "Nothing is ever unknown: no validation data were given.")
    cfg = compose([*overrides])
    data: dict[str, Any] = OmegaConf.to_container(cfg.data)  # type: ignore[assignment]
    benchmark = open_benchmark(data)
    with progress() as track, track.phase("base training", cfg.learner.get("steps")) as bar:
        trained = train_base(
            BaseTraining.from_config(cfg),
            benchmark,
            seed=cfg.seed,
            cache=Path(cfg.cache_dir).expanduser(),
            progress=lambda step, total, text: bar.update(step, text),
        )
    validation = benchmark.train.of_classes(benchmark.groups["validation"])
    rng = generator(cfg.seed, "threshold")
    threshold = calibrate(trained.encoder, validation, generator=rng)
    told = (
        "Nothing is ever unknown: the data have no validation classes."
        if threshold is None
        else f"Unknown is what scores below {threshold:.3f}."
    )
    return Founding(trained.encoder, threshold, told)
