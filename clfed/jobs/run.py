"""What every job starts with: a run folder, a log, metrics, progress, and a trained encoder."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from clfed import __version__
from clfed.backbones import Encoder
from clfed.config import build
from clfed.federated.field import open_benchmark
from clfed.learners.training import BaseTraining, train_base
from clfed.reporting.metrics import MetricsLog
from clfed.reporting.progress import Track, progress
from clfed.reporting.run_folder import RunFolder, default_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The surroundings of one run.

    Attributes:
        folder: Where everything is written.
        metrics: CSV file and sinks.
        track: Progress bars.
        config: The resolved configuration as plain dictionaries and lists.
        cache_dir: Where encoders are kept between runs.
    """

    folder: RunFolder
    metrics: MetricsLog
    track: Track
    config: dict[str, Any]
    cache_dir: Path


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[Run]:
    """Open the run folder of a configuration and close everything at the end.

    Raises:
        RunFolderError: The folder holds the results of another run, or cannot be written.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    text = OmegaConf.to_yaml(cfg)
    path = Path(cfg.run_dir) if cfg.run_dir else default_path("runs", cfg.job.name, text)
    with RunFolder(path, overwrite=cfg.overwrite) as folder:
        # Rows of a run that failed here; jobs that start anew must not append to them.
        folder.metrics.unlink(missing_ok=True)
        folder.write_config(text)
        logger.info("clfed %s, Python %s", __version__, platform.python_version())
        sink = build(plain["logger"], folder=folder.path, config=plain)
        with MetricsLog(folder.metrics, [sink]) as metrics, progress() as track:
            yield Run(folder, metrics, track, plain, Path(cfg.cache_dir).expanduser())


def train_encoder(cfg: DictConfig, run: Run) -> tuple[Encoder, dict[str, Any] | None]:
    """Return the encoder of a configuration, from the cache where it was trained before.

    Returns:
        The encoder, and how it was trained: the fields of
        :class:`clfed.learners.options.TrainingSummary` and whether it was cached; ``None`` where
        nothing is trained.
    """
    benchmark = open_benchmark(run.config["data"])
    with run.track.phase("base training", run.config["learner"].get("steps")) as bar:
        trained = train_base(
            BaseTraining.from_config(cfg),
            benchmark,
            seed=cfg.seed,
            cache=run.cache_dir,
            progress=lambda step, total, text: bar.update(step, text),
        )
    logger.info("encoder %s, %s", trained.encoder.embedding_id, trained.summary)
    if not trained.summary.steps:
        return trained.encoder, None
    return trained.encoder, {**asdict(trained.summary), "cached": trained.cached}
