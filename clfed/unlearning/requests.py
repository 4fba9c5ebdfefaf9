"""Requests to forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["class", "sample", "contributor"]


@dataclass(frozen=True)
class Request:
    """What somebody wants forgotten.

    Attributes:
        id: Name of the request, unique in a sequence.
        kind: Whole classes, single samples, or everything of a contributor.
        classes: Names, for classes.
        samples: Sample ids, for samples.
        contributor: Who is to be forgotten, for a contributor.
    """

    id: str
    kind: Kind
    classes: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()
    contributor: str = ""
