"""Protocols and settings in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(protocol: Mapping[str, Any]) -> list[str]:
    """Write a protocol as the lines of a list; what is None is left out.

    Example:
        >>> in_words({"test_images": 50, "scenario": {"_target_": "a.split", "way": 2}, "x": None})
        ['- test images: 50', '- scenario: split (way 2)']
    """
    return [f"- {_name(k)}: {words(v)}" for k, v in protocol.items() if v is not None]


def _name(key: str) -> str:
    return key.replace("_", " ")


def words(value: object) -> str:
    """Write a value of a protocol; of a ``_target_`` the last name is left."""
    if isinstance(value, Mapping):
        own = {k: v for k, v in value.items() if v is not None and k != "_target_"}
        rest = ", ".join(f"{_name(k)} {_inside(v)}" for k, v in own.items())
        target = str(value.get("_target_") or "").rpartition(".")[2]
        return f"{target} ({rest})" if target and rest else target or rest
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _inside(value: object) -> str:
    nameless = isinstance(value, Mapping) and not value.get("_target_")
    return f"({words(value)})" if nameless else words(value)
