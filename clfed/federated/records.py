"""Typed reading of Flower records: what is missing or of another kind is refused."""

from __future__ import annotations

from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from clfed.errors import InvalidMessage

T = TypeVar("T")


def config_record(**values: str | int | float | bool | bytes) -> ConfigRecord:
    """Return a config record of these entries; underscores in names become hyphens."""
    return ConfigRecord({key.replace("_", "-"): value for key, value in values.items()})


def arrays(content: RecordDict, name: str) -> ArrayRecord:
    """Return the array record of this name.

    Raises:
        InvalidMessage: There is none.
    """
    return _typed(content.get(name), ArrayRecord, f"the record {name!r}")


def config(content: RecordDict, name: str) -> ConfigRecord:
    """Return the config record of this name.

    Raises:
        InvalidMessage: There is none.
    """
    return _typed(content.get(name), ConfigRecord, f"the record {name!r}")


def array(record: ArrayRecord, key: str) -> Array:
    """Return the array of this name.

    Raises:
        InvalidMessage: There is none.
    """
    return _typed(record.get(key), Array, f"the array {key!r}")


def text(record: ConfigRecord, key: str) -> str:
    """Return the text under this key.

    Raises:
        InvalidMessage: There is none.
    """
    return _typed(record.get(key), str, f"the entry {key!r}")


def integer(record: ConfigRecord, key: str) -> int:
    """Return the whole number under this key.

    Raises:
        InvalidMessage: There is none.
    """
    value = record.get(key)
    # bool is a subclass of int.
    return _typed(None if isinstance(value, bool) else value, int, f"the entry {key!r}")


def blob(record: ConfigRecord, key: str) -> bytes:
    """Return the bytes under this key.

    Raises:
        InvalidMessage: There are none.
    """
    return _typed(record.get(key), bytes, f"the entry {key!r}")


def _typed(value: object, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise InvalidMessage(
            f"Expected {what} of a message as {kind.__name__}, got {type(value).__name__}.",
            remedy="Install the same clfed on every node.",
        )
    return value
