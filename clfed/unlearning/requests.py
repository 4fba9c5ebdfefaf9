"""Requests to forget: what they say, where they come from, and which samples they mean.

A file holds one request, or several under ``requests``, as YAML or JSON::

    requests:
    - {id: r1, kind: class, classes: [Sneaker]}
    - {id: r2, kind: sample, samples: [3, 14, 15]}
    - {id: r3, kind: contributor, contributor: contributor07}

Nodes of a federation know no sample ids: there a sample is a picture, named by the SHA-256 of its
file (``{id: r4, kind: picture, pictures: [9f86d0...]}``).

What was forgotten once stays forgotten: a later request means what is left of it, and one of which
nothing is left is refused.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clfed.errors import RequestError
from clfed.files import write_file
from clfed.learners.tables import rows_of

if TYPE_CHECKING:
    from clfed.scenarios.holdings import Holdings

Kind = Literal["class", "sample", "contributor", "picture"]

KEYS: Mapping[str, str] = {
    "class": "classes",
    "sample": "samples",
    "contributor": "contributor",
    "picture": "pictures",
}
_HASH = re.compile(r"[0-9a-f]{64}")
# An id names a folder.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """What somebody wants forgotten.

    Attributes:
        id: Name of the request, unique in a sequence: up to 64 letters, digits, ``_-.``.
        kind: Whole classes, single samples, everything of a contributor, or single pictures.
        classes: Names, for classes.
        samples: Sample ids, for samples; kept in ascending order.
        contributor: Who is to be forgotten, for a contributor.
        pictures: SHA-256 of files in hexadecimal, for pictures; kept in ascending order.

    Raises:
        RequestError: A value is missing, too many, of another type, or comes twice.
    """

    id: str
    kind: Kind
    classes: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()
    contributor: str = ""
    pictures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise RequestError(
                "Expected as id of a request up to 64 letters, digits, underscores, hyphens and "
                f"dots that start with a letter or digit, got {reprlib.repr(self.id)}."
            )
        if self.kind not in [*KEYS]:  # what cannot be hashed is no kind either
            raise RequestError(
                f"Expected request {self.id!r} of a kind of {', '.join(KEYS)}, got "
                f"{reprlib.repr(self.kind)}."
            )
        for kind, key in KEYS.items():
            if kind != self.kind and getattr(self, key):
                raise RequestError(
                    f"Expected request {self.id!r} of kind {self.kind} to name "
                    f"{KEYS[self.kind]} alone, got {key} too."
                )
        classes = self._listed("classes", str, "texts (in quotes where they look like numbers)")
        object.__setattr__(self, "classes", classes)
        samples = self._listed("samples", int, "whole numbers")
        if samples and not 0 <= min(samples) <= max(samples) <= _LARGEST:
            raise RequestError(
                f"Expected samples of request {self.id!r} of at least 0, got "
                f"{min(samples) if min(samples) < 0 else max(samples)}."
            )
        object.__setattr__(self, "samples", tuple(sorted(samples)))
        pictures = self._listed("pictures", str, "SHA-256 hashes")
        odd = [name for name in pictures if not _HASH.fullmatch(name)]
        if odd:
            raise RequestError(
                f"Expected pictures of request {self.id!r} as SHA-256 of their files, got "
                f"{reprlib.repr(odd[0])}."
            )
        object.__setattr__(self, "pictures", tuple(sorted(pictures)))
        if not isinstance(self.contributor, str):
            raise RequestError(
                f"Expected the contributor of request {self.id!r} as text, got "
                f"{reprlib.repr(self.contributor)}."
            )
        if "" in classes or not "".join((*classes, self.contributor)).isprintable():
            raise RequestError(
                f"Expected printable names in request {self.id!r}, got {reprlib.repr(self.what)}."
            )
        if not self.what:
            raise RequestError(f"Expected request {self.id!r} to name {KEYS[self.kind]}, got none.")

    @property
    def what(self) -> Any:
        """What the request names: classes, samples or a contributor."""
        return getattr(self, KEYS[self.kind])

    def plain(self) -> dict[str, Any]:
        """Return the request as it stands in a file."""
        what = self.what if isinstance(self.what, str) else [*self.what]
        return {"id": self.id, "kind": self.kind, KEYS[self.kind]: what}

    @classmethod
    def parse(cls, content: object) -> Request:
        """Read what :meth:`plain` returns, believing nothing.

        Raises:
            RequestError: Not a mapping, or a key is missing or unknown, or a value does not fit.
        """
        if not isinstance(content, Mapping):
            raise RequestError(f"Expected a request with id and kind, got {reprlib.repr(content)}.")
        unknown = [key for key in content if key not in ("id", "kind", *KEYS.values())]
        if unknown or not {"id", "kind"} <= content.keys():
            raise RequestError(
                f"Expected a request with id, kind and one of {', '.join(KEYS.values())}, got "
                f"{reprlib.repr(list(content))}."
            )
        return cls(**content)

    def _listed(self, key: str, kind: type, words: str) -> tuple[Any, ...]:
        values = getattr(self, key)
        # A bool is an int, and a text a sequence, which here would both hide a mistake.
        if not isinstance(values, list | tuple) or any(type(value) is not kind for value in values):
            raise RequestError(
                f"Expected {key} of request {self.id!r} as a list of {words}, got "
                f"{reprlib.repr(values)}."
            )
        if len(set(values)) < len(values):
            raise RequestError(f"Expected distinct {key} in request {self.id!r}, got one twice.")
        return tuple(values)


def check_sequence(requests: Sequence[Request]) -> None:
    """Refuse a sequence in which an id comes twice, or which is empty.

    Raises:
        RequestError: As it says.
    """
    ids = [request.id for request in requests]
    twice = [name for row, name in enumerate(ids) if name in ids[:row]]
    if twice or not ids:
        found = f"{twice[0]!r} twice" if twice else "none"
        raise RequestError(f"Expected requests with ids of their own, got {found}.")


def read_requests(path: str | os.PathLike[str]) -> list[Request]:
    """Read one request, or a list of them under ``requests``.

    Args:
        path: A JSON file if its name ends in ``.json``, else a YAML file.

    Raises:
        RequestError: It cannot be read, or a request in it does not fit; names the file.
    """
    try:
        content = _parsed(Path(path))
        listed = content
        if not isinstance(content, Mapping) or "requests" not in content:
            listed = [content]
        elif len(content) > 1 or not isinstance(listed := content["requests"], list):
            raise RequestError(
                f"Expected a list under requests alone, got {reprlib.repr(content)}."
            )
        requests = [Request.parse(part) for part in listed]
        check_sequence(requests)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    return requests


def to_file(requests: Sequence[Request], path: str | os.PathLike[str]) -> None:
    """Write requests as YAML that :func:`read_requests` reads; equal requests have equal bytes.

    Raises:
        RequestError: None, or two with one id.
        RunFolderError: The file cannot be written.
    """
    import yaml

    check_sequence(requests)
    text = yaml.safe_dump(
        {"requests": [request.plain() for request in requests]},
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )
    write_file(path, text.encode())


def resolve(request: Request, holdings: Holdings, gone: Tensor) -> Tensor:
    """Return the samples that a request means.

    Args:
        request: What is to be forgotten.
        holdings: Training images, their ids and owners.
        gone: ``(G,)`` int64 sample ids that earlier requests of the sequence made forgotten.

    Returns:
        Their ids, int64, ascending; those in ``gone`` are left out.

    Raises:
        UnknownClass: A class is not among those of the data.
        RequestError: A sample is not among the training images, nobody knows the contributor,
            nothing of what is named is there any more, or nothing else would stay.
    """
    live = ~torch.isin(holdings.ids, gone)
    goes = _MEANT[request.kind](request, holdings) & live
    if not bool(goes.any()):
        raise RequestError(
            f"Expected request {request.id!r} to name training images that are still there, got "
            f"{KEYS[request.kind]} {reprlib.repr(request.what)}, of which none is.",
            remedy="What was forgotten once stays forgotten: leave this request out.",
        )
    if bool((goes == live).all()):
        raise RequestError(
            f"Expected request {request.id!r} to leave training images, got one for all "
            f"{int(live.sum())} of them."
        )
    return holdings.ids[goes].sort().values


def _of_classes(request: Request, holdings: Holdings) -> Tensor:
    return torch.isin(holdings.train.labels, rows_of(holdings.train.classes, request.classes))


def _of_samples(request: Request, holdings: Holdings) -> Tensor:
    asked = torch.tensor(request.samples, dtype=torch.int64)
    unknown = asked[~torch.isin(asked, holdings.ids)]
    if len(unknown):
        raise RequestError(
            f"Expected samples of request {request.id!r} among the {len(holdings.ids)} training "
            f"images, got {len(unknown)} that are not, the first is {int(unknown[0])}.",
            remedy="Sample ids are positions in the training images of the data set; those that "
            "are held out were never learned from.",
        )
    return torch.isin(holdings.ids, asked)


def _of_contributor(request: Request, holdings: Holdings) -> Tensor:
    if request.contributor not in holdings.contributors:
        raise RequestError(
            f"Expected the contributor of request {request.id!r} among the "
            f"{len(holdings.contributors)} known ones, got {request.contributor!r}."
        )
    return holdings.owners == holdings.contributors.index(request.contributor)


def _of_pictures(request: Request, holdings: Holdings) -> Tensor:
    raise RequestError(
        f"Expected request {request.id!r} to name samples of the data set by their ids, got "
        "pictures by their files, which only the nodes of a federation know."
    )


_MEANT = {
    "class": _of_classes,
    "sample": _of_samples,
    "contributor": _of_contributor,
    "picture": _of_pictures,
}


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"Expected a file of requests, got: {reason}.") from error
    try:
        return _json(text) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise RequestError(f"Expected requests as YAML or JSON, got: {told}.") from error


def _json(text: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=distinct)


def _yaml(text: str) -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Refuses a key that comes twice, where YAML takes the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if len(set(map(str, keys))) < len(keys):
                raise ValueError("a key comes twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
