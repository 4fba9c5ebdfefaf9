"""Tables and a figure over finished runs: ``clfed job=report job.runs=[runs]``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from clfed.errors import ConfigError, RunFolderError
from clfed.reporting.console import console
from clfed.reporting.report import Table, markdown, tables
from clfed.reporting.report_console import console_tables
from clfed.reporting.run_folder import write_atomic
from clfed.reporting.run_groups import find_runs

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Path:
    """Write ``report.md`` and ``report.png``, and print what fits of each protocol's table.

    Where there are other tables, those of unlearners are drawn in ``unlearning.png`` and those of
    federated methods in ``federated.png``.

    Args:
        cfg: The resolved configuration; only ``job`` counts.

    Returns:
        The folder that holds the files.

    Raises:
        ConfigError: ``job.runs`` or ``job.output`` is no list of folders, or no folder.
        RunFolderError: There are no finished runs, or the report cannot be written.
    """
    folders, output = _folders(cfg)
    runs, refused = find_runs(folders)
    for sentence in refused:
        logger.warning("left out: %s", sentence)
    found = tables(runs)
    text = markdown(found, refused)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"Expected to write into {output}, got: {error.strerror or error}.",
            remedy="Choose another job.output.",
        ) from error
    write_atomic(output / "report.md", text.encode())
    figures = _draw(found, output)
    for table in console_tables(found, console().width):
        console().print(table)
    places = " and ".join(map(str, [output / "report.md", *figures]))
    console().print(
        f"Runs: {len(runs)}; folders left out: {len(refused)}. Protocols, commands and all columns "
        f"are in {places}",
        markup=False,
        soft_wrap=True,
    )
    return output


def _folders(cfg: DictConfig) -> tuple[list[Path], Path]:
    from omegaconf import ListConfig

    runs, output = cfg.job.runs, cfg.job.output
    listed = isinstance(runs, ListConfig) and all(isinstance(run, str) and run for run in runs)
    if not listed or not runs:
        raise ConfigError(
            f"Expected job.runs as a list of folders, got {runs!r}.",
            remedy="Name folders of runs: clfed job=report job.runs=[runs]",
        )
    if output is not None and not (isinstance(output, str) and output):
        raise ConfigError(f"Expected job.output as a folder or null, got {output!r}.")
    folders = [Path(run) for run in runs]
    absent = [folder for folder in folders if not folder.is_dir()]
    if absent:
        raise RunFolderError(
            f"Expected folders of finished runs, got {absent[0]}, which is no folder.",
            remedy="Name folders of runs: clfed job=report job.runs=[runs]",
        )
    return folders, folders[0] if output is None else Path(output)


def _draw(found: list[Table], output: Path) -> list[Path]:
    """Draw the tables, each kind of method in a figure of its own; the figures' paths."""
    from clfed.reporting.continual import learners_chart
    from clfed.reporting.federated_chart import methods_chart
    from clfed.reporting.unlearning_chart import evidence_chart

    rows = [
        {
            **bar,
            "job": table.job,
            "group": f"Table {number}: {table.title}" if len(found) > 1 else "",
        }
        for number, table in enumerate(found, 1)
        for bar in table.bars
    ]
    own = {"unlearning": evidence_chart, "federated": methods_chart}
    paths: list[Path] = []
    for job, chart in (("", learners_chart), *own.items()):
        shown = [row for row in rows if (row["job"] if row["job"] in own else "") == job]
        if shown:
            paths.append(output / (f"{job}.png" if paths else "report.png"))
            chart(shown, paths[-1])
    return paths
