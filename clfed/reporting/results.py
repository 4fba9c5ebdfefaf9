"""The versioned schema of ``results.json``, which other tools read.

Accuracies are fractions in ``[0, 1]``, sizes are bytes, times are seconds; none is ever a string.
``bytes`` and ``seconds`` of a step are those of that step alone, summed over all nodes; those of
``final`` are of the whole run. Jobs add keys of their own beside these and never change these.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from clfed.errors import RunFolderError

SCHEMA_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "This is a mistake of the job that wrote the results, not of yours: please report it."


class Bytes(TypedDict):
    """Bytes sent by the nodes (``up``) and to the nodes (``down``), summed over the nodes."""

    up: int
    down: int


class Step(TypedDict):
    """State after one merge, mission or experience."""

    step: int
    classes: int
    accuracy: dict[str, float]
    bytes: Bytes
    seconds: float
    spread: NotRequired[dict[str, float]]


class Final(TypedDict):
    """State at the end of the run."""

    accuracy: dict[str, float]
    memory_sha256: str
    memory_bytes: int
    seconds: float
    spread: NotRequired[dict[str, float]]


class Alternative(TypedDict, total=False):
    """What one way of learning saw and cost, for the summary table; every key is optional."""

    description: str
    classes: int
    bytes: Bytes
    seconds: float


class Classifier(TypedDict):
    """One way to read classes off the same memory."""

    accuracy: float
    spread: NotRequired[float]
    first: NotRequired[float]
    later: NotRequired[float]
    harmonic: NotRequired[float]
    bytes: NotRequired[int]
    seconds: NotRequired[float]


class Results(TypedDict):
    """The whole of ``results.json``; ``protocol`` says what was measured, in any JSON."""

    job: str
    version: int
    seed: int
    protocol: dict[str, Any]
    steps: list[Step]
    final: Final
    alternatives: NotRequired[dict[str, Alternative]]
    classifiers: NotRequired[dict[str, Classifier]]


def validate(results: Mapping[str, Any]) -> None:
    """Refuse results that break the schema.

    Args:
        results: What is about to be written, or was read; see :class:`Results`.

    Raises:
        RunFolderError: A key is missing or holds something else; the message names it.

    Example:
        >>> validate({"job": "continual"})
        Traceback (most recent call last):
        clfed.errors.RunFolderError: results.json: version is missing.
    """
    _json_safe(results, "")
    if not _text(_get(results, "job", "")):
        raise _wrong("job", "a name", results["job"])
    if (version := _count(results, "version", "")) != SCHEMA_VERSION:
        raise _wrong("version", f"{SCHEMA_VERSION}", version)
    _count(results, "seed", "")
    _mapping(results, "protocol", "")
    steps = _get(results, "steps", "")
    if not _is_list(steps) or not steps:
        raise _wrong("steps", "a list of at least one step", steps)
    for index, step in enumerate(steps):
        _step(step, f"steps[{index}]")
    order = [step["step"] for step in steps]
    if any(later <= earlier for earlier, later in pairwise(order)):
        raise _wrong("steps", "ascending values of step", order)
    _final(_mapping(results, "final", ""))
    _table_rows(results)


def read(path: Path) -> Results:
    """Read and validate a ``results.json``.

    Raises:
        RunFolderError: The file is missing, is not JSON, or breaks the schema.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"Expected the results of a finished run in {path}, got: {error}",
            remedy="Name the folder of a run that finished; it holds results.json.",
        ) from error
    if not isinstance(results, dict):
        raise RunFolderError(f"Expected an object in {path}, got {_show(results)}.")
    validate(results)
    return cast(Results, results)


def _step(step: object, where: str) -> None:
    if not isinstance(step, Mapping):
        raise _wrong(where, "an object", step)
    _count(step, "step", where)
    _count(step, "classes", where)
    _accuracies(step, where)
    _bytes(_mapping(step, "bytes", where), f"{where}.bytes")
    _seconds(step, "seconds", where)


def _final(final: Mapping[str, Any]) -> None:
    _accuracies(final, "final")
    digest = _get(final, "memory_sha256", "final")
    if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise _wrong("final.memory_sha256", "64 lower-case hexadecimal digits", digest)
    _count(final, "memory_bytes", "final")
    _seconds(final, "seconds", "final")


def _table_rows(results: Mapping[str, Any]) -> None:
    for name in _mapping(results, "alternatives", "") if "alternatives" in results else ():
        where = f"alternatives.{name}"
        row = _mapping(results["alternatives"], name, "alternatives")
        if "description" in row and not _text(row["description"]):
            raise _wrong(f"{where}.description", "a text", row["description"])
        if "classes" in row:
            _count(row, "classes", where)
        if "bytes" in row:
            _bytes(_mapping(row, "bytes", where), f"{where}.bytes")
        if "seconds" in row:
            _seconds(row, "seconds", where)
    for name in _mapping(results, "classifiers", "") if "classifiers" in results else ():
        where = f"classifiers.{name}"
        row = _mapping(results["classifiers"], name, "classifiers")
        _fraction(row, "accuracy", where)
        for part in ("spread", "first", "later", "harmonic"):
            if part in row:
                _fraction(row, part, where)
        if "bytes" in row:
            _count(row, "bytes", where)
        if "seconds" in row:
            _seconds(row, "seconds", where)


def _accuracies(part: Mapping[str, Any], where: str) -> None:
    accuracy = _mapping(part, "accuracy", where)
    for name in accuracy:
        _fraction(accuracy, name, f"{where}.accuracy")
    if "spread" not in part:
        return
    spread = _mapping(part, "spread", where)
    for name in spread:
        _fraction(spread, name, f"{where}.spread")
        if name not in accuracy:
            raise _wrong(f"{where}.spread.{name}", "a name that accuracy has too", name)


def _bytes(part: Mapping[str, Any], where: str) -> None:
    _count(part, "up", where)
    _count(part, "down", where)


def _count(part: Mapping[str, Any], key: str, where: str) -> int:
    value = _get(part, key, where)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(_join(where, key), "a whole number, 0 or more", value)
    return value


def _seconds(part: Mapping[str, Any], key: str, where: str) -> None:
    value = _get(part, key, where)
    if not _is_number(value) or value < 0:
        raise _wrong(_join(where, key), "a number of seconds", value)


def _fraction(part: Mapping[str, Any], key: str, where: str) -> None:
    value = _get(part, key, where)
    if not _is_number(value) or not 0 <= value <= 1:
        raise _wrong(_join(where, key), "a fraction from 0 to 1", value)


def _mapping(part: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = _get(part, key, where)
    if not isinstance(value, Mapping):
        raise _wrong(_join(where, key), "an object", value)
    return value


def _get(part: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in part:
        raise RunFolderError(f"results.json: {_join(where, key)} is missing.", remedy=_REMEDY)
    return part[key]


def _json_safe(value: object, where: str) -> None:
    """Refuse what JSON cannot hold exactly, wherever it stands, the job's own keys included."""
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _wrong(where, "a finite number", value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _wrong(_join(where, str(key)), "a text as key", key)
            _json_safe(item, _join(where, key))
    elif _is_list(value):
        for index, item in enumerate(cast(Sequence[object], value)):
            _json_safe(item, f"{where}[{index}]")
    else:
        raise _wrong(where, "text, numbers, lists and objects", value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _wrong(where: str, expected: str, value: object) -> RunFolderError:
    message = f"results.json: expected {expected} in {where or 'the file'}, got {_show(value)}."
    return RunFolderError(message, remedy=_REMEDY)
