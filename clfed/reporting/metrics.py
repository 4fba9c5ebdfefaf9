"""Metrics of a run: one long CSV file, and the sinks that want them too."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clfed.errors import RunFolderError

_COLUMNS = ("step", "name", "value")


class Sink:
    """Where metrics go besides the CSV file; this one, ``logger=none``, drops them.

    Args:
        folder: The run folder, for a sink that writes files.
        config: The resolved configuration, as plain dictionaries and lists.
    """

    def __init__(
        self, folder: Path | str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.config = config

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of one step."""

    def figure(self, path: Path) -> None:
        """Take a finished figure."""

    def summary(self, values: Mapping[str, float | int | str]) -> None:
        """Take the numbers of the final table."""

    def close(self, *, failed: bool = False) -> None:
        """End; nothing is logged afterwards."""


class MetricsLog:
    """Appends ``step,name,value`` to a CSV file and forwards the same to the sinks.

    Names are paths: ``fed/accuracy/merged`` for the federation, ``node/NODE/seconds`` for one
    node. A value that is not finite is kept, for a diverging loss must be seen.

    Args:
        path: The CSV file; rows are appended when it exists, as a resumed run does.
        sinks: Who else gets the metrics.

    Raises:
        RunFolderError: The file cannot be written.
    """

    def __init__(self, path: Path, sinks: Iterable[Sink] = ()) -> None:
        self.path = path
        self.sinks = tuple(sinks)
        try:
            self._file = path.open("a", encoding="utf-8", newline="")
            self._writer = csv.writer(self._file, lineterminator="\n")
            if not self._file.tell():
                self._writer.writerow(_COLUMNS)
                self._file.flush()
        except OSError as error:
            for sink in self.sinks:
                sink.close(failed=True)
            raise self._refused(error) from error

    def log(self, step: int, values: Mapping[str, float], *, node: str | None = None) -> None:
        """Write the metrics of one step.

        Args:
            step: Round, experience or epoch.
            values: Metric by name.
            node: Whose metrics these are; their names then start with ``node/NODE/``.

        Raises:
            RunFolderError: A value is not a number, or the file cannot be written; none of the
                values was written then.
        """
        named = {f"node/{node}/{name}" if node else name: value for name, value in values.items()}
        for name, value in named.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise RunFolderError(f"Expected a number for metric {name}, got {value!r}.")
        self._write([(step, name, value) for name, value in named.items()])
        for sink in self.sinks:
            sink.log(step, named)

    def figure(self, path: Path) -> None:
        """Hand a finished figure to the sinks."""
        for sink in self.sinks:
            sink.figure(path)

    def summary(self, values: Mapping[str, float | int | str]) -> None:
        """Hand the numbers of the final table to the sinks."""
        for sink in self.sinks:
            sink.summary(values)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the sinks.

        Args:
            failed: Whether the run ended with an error.
        """
        try:
            self._file.close()
        except OSError as error:
            raise self._refused(error) from error
        finally:
            for sink in self.sinks:
                sink.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def _write(self, rows: Iterable[Iterable[object]]) -> None:
        try:
            self._writer.writerows(rows)
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> RunFolderError:
        return RunFolderError(f"Expected to write {self.path}, got: {error.strerror or error}.")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | str]:
    """Nested results as one level of names, lists left out: the shape that a summary takes.

    Example:
        >>> flatten({"accuracy": {"merged": 0.5}, "seconds": 2}, "final")
        {'final/accuracy/merged': 0.5, 'final/seconds': 2}
    """
    flat: dict[str, float | int | str] = {}
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            flat.update(flatten(value, name))
        elif isinstance(value, int | float | str):
            flat[name] = value
    return flat
