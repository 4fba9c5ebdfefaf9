"""Requests to forget in a federation: what may be asked, and how a node carries one out.

A node leaves what was forgotten out of its rows for good, also where the file is still in its
folder or comes back: its state keeps the names of classes and the hashes of pictures as tombstones.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from clfed.errors import InvalidMessage, RequestError
from clfed.prototypes.contribution import check_contributor
from clfed.prototypes.tables import checked_names
from clfed.unlearning.requests import KEYS, Kind, Request

if TYPE_CHECKING:
    from clfed.federated.folder_state import FolderState
    from clfed.federated.pictures import Album

# One request of 15,000 pictures, or a hundred of usual ones; what is more waits for the next round.
REQUEST_BYTES, MESSAGE_BYTES, MESSAGE_REQUESTS = 2**20, 2**22, 100
KINDS: tuple[Kind, ...] = ("class", "picture", "contributor")


@dataclass(frozen=True)
class CarriedOut:
    """What one request meant at a node.

    Attributes:
        request: The request.
        removed: Number of examples that are left out from now on, by SHA-256 of the file.
    """

    request: Request
    removed: Mapping[str, int]

    @property
    def examples(self) -> int:
        """Number of examples that are left out from now on."""
        return sum(self.removed.values())


def carried_out(
    state: FolderState, request: Request, seen: Album
) -> tuple[FolderState, CarriedOut]:
    """Leave out what a request means.

    Args:
        state: State of the node.
        request: One that is not done yet, see :func:`is_done`.
        seen: What the folder holds now. A file counts whether it is there now or was at the last
            message.

    Returns:
        The state with the request's tombstones, and what was removed. Embeddings go with the next
        :meth:`~clfed.federated.pictures.Album.embed`.
    """
    examples = {
        (place, album.labels[place], stamp[2])
        for album in (state.album, seen)
        for place, stamp in album.without(state.retired, state.erased).files.items()
        if stamp[2] not in album.unreadable
    }
    mine = request.kind == "contributor" and request.contributor == state.name
    gone = Counter(
        content
        for _, label, content in examples
        if not state.forgotten and (mine or label in request.classes or content in request.pictures)
    )
    carried = CarriedOut(request, dict(sorted(gone.items())))
    state = replace(
        state,
        retired=state.retired | {*request.classes},
        erased=state.erased | {*request.pictures},
        forgotten=state.forgotten or mine,
        confirmed={**state.confirmed, request.id: carried.examples},
    )
    return state, carried


def is_done(state: FolderState, request: Request) -> bool:
    """Whether a node has carried a request out: by what it remembers, not by the id alone."""
    return request.id in state.confirmed and is_shut_out(state, request)


def is_shut_out(state: FolderState, request: Request) -> bool:
    """Whether a node's tombstones keep out what a request means."""
    mine = request.kind == "contributor" and request.contributor == state.name
    return (
        state.retired.issuperset(request.classes)
        and state.erased.issuperset(request.pictures)
        and (state.forgotten or not mine)
    )


def check_asked(request: Request) -> None:
    """Refuse a request that a federation cannot carry out.

    Raises:
        RequestError: It names sample ids, which no node knows, or names that no class or
            contributor can have, or it is longer than a message may be.
    """
    if request.kind not in KINDS:
        raise RequestError(
            f"Expected request {request.id!r} of a kind of {', '.join(KINDS)}, got "
            f"{request.kind!r}: nodes know pictures by their files, not by sample ids.",
            remedy="Name pictures: clfed forget WHERE --picture FILE",
        )
    try:
        if request.kind == "class":
            checked_names(request.classes, "class name")
        elif request.kind == "contributor":
            check_contributor(request.contributor)
    except InvalidMessage as error:
        raise RequestError(f"Request {request.id!r}: {error}.") from error
    size = _size(request)
    if size > REQUEST_BYTES:
        raise RequestError(
            f"Expected request {request.id!r} of at most {REQUEST_BYTES:,} bytes, got {size:,}.",
            remedy="Ask in several requests.",
        )


def sendable(requests: Iterable[Request]) -> list[Request]:
    """Return the first of some requests, as many as one message may bring."""
    found: list[Request] = []
    left = MESSAGE_BYTES
    for request in requests:
        left -= _size(request)
        if left < 0 or len(found) == MESSAGE_REQUESTS:
            break
        found.append(request)
    return found


def new_id(kind: Kind, what: object, *, salt: str = "") -> str:
    """Return a readable id of a new request: kind, day (UTC) and a hash of what is asked.

    Who asks the same again on one day, or at another node, gets the same id, and so one request.

    Args:
        kind: What kind of thing is to be forgotten.
        what: Its names, as JSON holds them.
        salt: Makes another id of the same.
    """
    told = hashlib.sha256(json.dumps([kind, what, salt]).encode()).hexdigest()
    return f"{kind}-{datetime.now(UTC):%Y%m%d}-{told[:8]}"


def renamed(request: Request) -> Request:
    """Return the same request under another id, where its own is that of somebody else's."""
    content = request.plain()
    identity = new_id(request.kind, content[KEYS[request.kind]], salt=request.id)
    return Request.parse({**content, "id": identity})


def _size(request: Request) -> int:
    return len(json.dumps(request.plain())) + 2
