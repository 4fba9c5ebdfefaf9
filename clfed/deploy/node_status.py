"""What an onlooker sees of a node: read from its state directory, as plain data."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from clfed.deploy.watching import named_thing
from clfed.errors import MissingData, RequestError
from clfed.federated.bundle import BUNDLE, Bundle
from clfed.federated.folder_state import STATE, FolderState, read_state
from clfed.federated.outbox import outbox_of
from clfed.files import read_file
from clfed.unlearning.requests import Request

Stamp = tuple[int, int]  # time of change in ns, size in bytes


def node_status(directory: Path, *, now: float | None = None) -> dict[str, Any]:
    """Everything that ``clfed status`` tells of a node, ready for JSON.

    Args:
        directory: The state directory.
        now: Time of the look, seconds since 1970; the clock's when omitted.

    Returns:
        ``kind`` (``"node"``), ``at`` (time of the look), ``directory``, ``name``, ``federation``
        (its name) and ``federation_id``, ``embedding``, ``version`` (number of the last message
        made), ``changed`` (when the state was written, seconds since 1970), ``pictures`` and
        ``unreadable`` (files in the folder),
        ``classes`` (examples by class, as last sent), and

        - ``memory``: the merged memory that the node holds: ``sha256``, ``classes``, ``examples``,
          ``bytes`` (of the bundle), or None
        - ``requests``: examples removed by each request to forget that was carried out here
        - ``retired``: classes, ``erased``: number of pictures, and ``forgotten``: whether
          everything of this node was forgotten on request
        - ``outbox``: requests that wait for the next round, each ``id``, ``kind``, ``what``

    Raises:
        MissingData: The directory holds no state.
        InvalidMessage: The state or the bundle is damaged.
        RequestError: A request in the outbox is damaged.
    """
    path = directory / STATE
    if not path.is_file():
        raise MissingData(
            f"Expected a federation or the state of a node in {directory}, found neither.",
            remedy="clfed create makes a federation; a node has a state after its first round.",
        )
    stamp = _stamp(path)
    state = _state(directory, stamp)
    album = state.album
    bundle = directory / BUNDLE
    own = state.own
    return {
        "kind": "node",
        "at": time.time() if now is None else now,
        "directory": str(directory),
        "name": state.name,
        "federation": state.federation,
        "federation_id": state.session,
        "embedding": state.embedding_id,
        "version": state.version,
        "changed": stamp[0] / 1e9,
        "pictures": len(album.files),
        "unreadable": sum(content in album.unreadable for _, _, content in album.files.values()),
        "classes": dict(zip(own.classes, own.counts.tolist(), strict=True)),
        "memory": _held(bundle, _stamp(bundle)) if bundle.is_file() else None,
        "requests": dict(state.confirmed),
        "retired": sorted(state.retired),
        "erased": len(state.erased),
        "forgotten": state.forgotten,
        "outbox": [*_outbox(directory)],
    }


def _outbox(directory: Path) -> Iterator[dict[str, Any]]:
    for path in outbox_of(directory):
        try:
            yield named_thing(Request.parse(json.loads(read_file(path))).plain())
        except MissingData:  # sent since it was listed
            continue
        except (ValueError, RequestError) as error:
            raise RequestError(
                f"Expected a request to forget in {path}, got something else: {error}",
                remedy="Delete the file, and ask again with clfed forget.",
            ) from error


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


# A live view looks every second, and these files change once a round.
@lru_cache(maxsize=1)
def _state(directory: Path, stamp: Stamp) -> FolderState:
    state = read_state(directory)
    if state is None:  # gone since it was looked for
        raise MissingData(f"Expected the state of a node in {directory}, found none.")
    return state


@lru_cache(maxsize=1)
def _held(path: Path, stamp: Stamp) -> dict[str, Any]:
    memory = Bundle.load(path).memory
    return {
        "sha256": memory.sha256(),
        "classes": len(memory),
        "examples": memory.total_count,
        "bytes": stamp[1],
    }
