"""Requests to forget that a node will ask for: files ``ID.json`` that wait for its next reply."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from clfed.errors import RequestError, RunFolderError
from clfed.federated.forgetting import check_asked, renamed
from clfed.files import write_file
from clfed.unlearning.requests import Request

logger = logging.getLogger(__name__)
OUTBOX = "outbox"


def outbox_of(directory: Path) -> list[Path]:
    """Return the files of requests that wait in a state directory, in the order of their names."""
    return sorted((directory / OUTBOX).glob("*.json"))


def waiting(directory: Path) -> Iterator[tuple[Path, Request]]:
    """Read the requests that wait; what is no request is left out, and named in the log."""
    for path in outbox_of(directory):
        try:
            request = Request.parse(json.loads(path.read_bytes()))
            check_asked(request)
        except (ValueError, RecursionError, RequestError) as error:
            logger.warning("Left out: %s is no request to forget: %s", path, error)
        else:
            yield path, request


def put(directory: Path, request: Request) -> None:
    """Let a request wait for the next round.

    Raises:
        RunFolderError: It cannot be written.
    """
    folder = directory / OUTBOX
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"Expected to write into {folder}, got: {error.strerror}.") from error
    content = json.dumps(request.plain(), sort_keys=True)
    write_file(folder / f"{request.id}.json", content.encode())


def settle(directory: Path, asked: Sequence[Request], confirmed: Collection[str]) -> None:
    """Take out what has come back from the server and was carried out.

    A request whose id belongs to another one of the federation is asked again under another id.

    Args:
        directory: The state directory.
        asked: What the server has asked for.
        confirmed: Ids of all requests that were carried out here.
    """
    for path, request in [*waiting(directory)]:
        if request in asked:
            path.unlink()
        elif request.id in confirmed:
            put(directory, renamed(request))
            path.unlink()
