"""The folder that a run leaves behind; every file in it is whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clfed.errors import RunFolderError
from clfed.reporting.results import validate

LOGGER = logging.getLogger("clfed")
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def default_path(root: str | Path, job: str, config: str, now: datetime | None = None) -> Path:
    """Where a run goes when the user named no folder: ``root/job/time-hash``.

    Args:
        root: Folder of all runs, such as ``runs``.
        job: Name of the job.
        config: The resolved configuration as YAML; its hash tells apart runs of one second.
        now: Time of the start; the present one when omitted.

    Example:
        >>> default_path("runs", "continual", "seed: 1", datetime(2026, 1, 2, 3, 4, 5)).name
        '20260102-030405-e8b0d9'
    """
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    return Path(root) / job / f"{stamp}-{hashlib.sha256(config.encode()).hexdigest()[:6]}"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Raises:
        RunFolderError: The disk is full or the folder cannot be written; an older file is intact.
    """
    # The process id keeps two runs that write into one folder out of each other's way.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        _discard(part)
        raise _refused(path, error) from error


class RunFolder:
    """One run's files; as a context manager it also keeps the log.

    Inside ``with RunFolder(path) as folder:`` every record of the logger ``clfed`` and of its
    children goes to ``log.txt`` with a time stamp, and so does the traceback that ends the block.

    Args:
        path: The folder; made, with its parents, when absent.
        overwrite: Give up the files of an earlier run in this folder. Other files stay.

    Raises:
        RunFolderError: The folder holds the results of another run, or cannot be written.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._handler: _LogFile | None = None
        self._level = logging.NOTSET
        if self.results.exists() and not overwrite:
            raise RunFolderError(
                f"Expected a folder for a new run, got {self.path}, which holds the results of "
                "an earlier one.",
                remedy="Choose another run_dir, or allow run_dir to be overwritten.",
            )
        try:
            self.figures.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self._remove_earlier_run()
        except OSError as error:
            raise _refused(self.path, error) from error

    @property
    def config(self) -> Path:
        """``config.yaml``: the resolved configuration."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """``results.json``: the last file that a run writes."""
        return self.path / "results.json"

    @property
    def memory(self) -> Path:
        """``memory.safetensors``: the prototype memory at the end."""
        return self.path / "memory.safetensors"

    @property
    def learner(self) -> Path:
        """``learner.pt``: a continual learner after the last experience that it finished."""
        return self.path / "learner.pt"

    @property
    def metrics(self) -> Path:
        """``metrics.csv``: every metric of every step."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """``log.txt``: everything that the logger ``clfed`` was told."""
        return self.path / "log.txt"

    @property
    def figures(self) -> Path:
        """``figures/``: the plots, as PNG."""
        return self.path / "figures"

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_atomic(self.config, text.encode())

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Validate the results, then write ``results.json``.

        Raises:
            RunFolderError: They break the schema, or cannot be written.
        """
        validate(results)
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomic(self.results, f"{text}\n".encode())

    def __enter__(self) -> Self:
        try:
            handler = _LogFile(self.log, encoding="utf-8")
        except OSError as error:
            raise _refused(self.log, error) from error
        handler.setFormatter(logging.Formatter(_FORMAT))
        self._handler, self._level = handler, LOGGER.level
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.DEBUG)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        handler, self._handler = self._handler, None
        if handler is None:
            return
        if kind is not None and error is not None:
            # Straight to the file: the console gets its own, shorter sentence from the command.
            what = (kind, error, trace)
            message = f"the run stopped: {error or kind.__name__}"
            handler.handle(LOGGER.makeRecord("clfed", logging.ERROR, "", 0, message, (), what))
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(self._level)
        handler.close()

    def _remove_earlier_run(self) -> None:
        # Results go first: should the rest fail, no new file stands beside old results.
        files = (
            self.results,
            self.config,
            self.memory,
            self.learner,
            self.metrics,
            self.log,
        )
        for path in (*files, *sorted(self.figures.glob("*.png"))):
            path.unlink(missing_ok=True)


class _LogFile(logging.FileHandler):
    """A log file whose failure is said once and does not end the run."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            self.failed = True
            reason = sys.exc_info()[1]
            sys.stderr.write(f"{self.baseFilename} misses lines from here on: {reason}\n")

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self.handleError(logging.makeLogRecord({}))


def _refused(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"Expected to write {path}, got: {error.strerror or error}.",
        remedy="Choose another run_dir, check its permissions, or free some space.",
    )


def _discard(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError as error:
        LOGGER.warning("an unfinished file stays behind: %s (%s)", part, error)
