"""``clfed forget``: have pictures, classes or a whole contributor forgotten."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clfed.errors import MissingData, RequestError

if TYPE_CHECKING:
    from clfed.unlearning.requests import Kind, Request

SENTENCE = "have pictures, classes or a whole contributor forgotten by all nodes"
_HASH = re.compile(r"[0-9a-fA-F]{64}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "where",
        metavar="WHERE",
        type=Path,
        help="the federation folder on the server, or the state directory of a node",
    )
    parser.add_argument("--class", dest="classes", metavar="NAME", nargs="+", help="whole classes")
    parser.add_argument(
        "--picture",
        dest="pictures",
        metavar="FILE",
        nargs="+",
        help="pictures, as files or as the SHA-256 of files; every file of the same bytes is meant",
    )
    parser.add_argument("--contributor", metavar="NAME", help="everything that a node has given")
    parser.add_argument("--me", action="store_true", help="everything that this node has given")
    parser.add_argument(
        "--request", metavar="FILE", type=Path, help="requests in a YAML or JSON file"
    )
    parser.add_argument(
        "--id", metavar="ID", help="name of the request; kind, day and a hash when omitted"
    )


def run(args: argparse.Namespace) -> None:
    """Note requests to forget, all of them or none, and say what becomes of them.

    Args:
        args: What :func:`add_arguments` declares.

    Raises:
        MissingData: There is neither a federation nor the state of a node.
        RequestError: Nothing or several kinds of things are named, or what cannot be asked here.
        RunFolderError: It cannot be written.
    """
    from clfed.deploy.layout import SETTINGS
    from clfed.federated.folder_state import STATE
    from clfed.federated.forgetting import check_asked

    at_server = (args.where / SETTINGS).is_file()
    if not at_server and not (args.where / STATE).is_file():
        raise MissingData(
            f"Expected a federation or the state of a node at {args.where}, found neither.",
            remedy="Give the folder that clfed create has made, or the state directory of clfed "
            "join, which is there after its first round.",
        )
    if args.me and at_server:
        raise RequestError(
            "Expected --me with the state directory of a node, got it with a federation.",
            remedy="Name the node: clfed forget DIR --contributor NAME",
        )
    requests = _requests(args)
    for request in requests:
        check_asked(request)
    told = (_ask_server if at_server else _ask_node)(args.where, requests)
    for request, sentence in zip(requests, told, strict=True):
        sys.stdout.write(f"Request {request.id}: {sentence}\n")
    when = (
        "The server carries it out at its next round, or as soon as it serves again"
        if at_server
        else "It goes to the server with this node's next reply, and is carried out a round later"
    )
    sys.stdout.write(
        f"{when}; then every node leaves it out for good, and confirms. "
        f"Follow it with: clfed status {args.where}\n"
    )


def _requests(args: argparse.Namespace) -> list[Request]:
    from clfed.federated.folder_state import read_state
    from clfed.federated.forgetting import new_id
    from clfed.unlearning.requests import KEYS, Request, read_requests

    asked: dict[str, object] = {
        "--class": args.classes,
        "--picture": args.pictures,
        "--contributor": args.contributor,
        "--me": args.me,
        "--request": args.request,
    }
    given = [option for option, value in asked.items() if value not in (None, False)]
    if len(given) != 1:
        raise RequestError(
            f"Expected one of {', '.join(asked)}, got {' and '.join(given) or 'none'}.",
            remedy="Ask for one kind of thing at a time; classes and pictures may be several.",
        )
    if args.request is not None:
        if args.id is not None:
            raise RequestError("Expected ids in the file of --request, got --id too.")
        return read_requests(args.request)
    kind: Kind
    what: list[str] | str
    if args.classes is not None:
        kind, what = "class", args.classes
    elif args.pictures is not None:
        kind, what = "picture", sorted({*map(_content, args.pictures)})
    elif args.me:
        state = read_state(args.where)
        kind, what = "contributor", state.name if state is not None else ""
    else:
        kind, what = "contributor", args.contributor
    identity = new_id(kind, what) if args.id is None else args.id
    return [Request.parse({"id": identity, "kind": kind, KEYS[kind]: what})]


def _content(name: str) -> str:
    """Return the SHA-256 of a picture that is given as a file or as that."""
    path = Path(name)
    if path.is_file():
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise RequestError(f"Expected a picture at {name}, got: {error.strerror}.") from error
    if _HASH.fullmatch(name):
        return name.lower()
    raise RequestError(
        f"Expected a picture as a file or as the SHA-256 of one, got {name!r}.",
        remedy="Check the path; of a picture that is gone the hash is enough, which sha256sum "
        "tells of a copy.",
    )


def _ask_server(folder: Path, requests: list[Request]) -> list[str]:
    from clfed.deploy.federation import Federation
    from clfed.deploy.requests import examples_of

    federation = Federation.open(folder)
    store = federation.store()
    try:
        known = {asked.request.id for asked in store.requests()}
        _refuse_known(requests, known)
        empty = federation.empty(federation.encoder())
        ledger = store.read_ledger(empty, cap=federation.rules.cap)
        nodes = {row["name"] for row in store.execute("SELECT name FROM nodes")}
        nodes |= {*federation.public_keys(), *ledger.shares}
        sentences = []
        for request in requests:
            if request.kind == "contributor" and request.contributor not in nodes:
                raise RequestError(
                    f"Expected a contributor among {', '.join(sorted(nodes)) or 'none so far'}, "
                    f"got {request.contributor!r}, who was never invited and has sent nothing."
                )
            sentences.append(_meant(request, examples_of(ledger, request)))
        with store.transaction():
            for request in requests:
                store.ask(request, "operator")
    finally:
        store.close()
    return sentences


def _ask_node(directory: Path, requests: list[Request]) -> list[str]:
    from clfed.federated.folder_state import read_state
    from clfed.federated.outbox import outbox_of, put

    state = read_state(directory)
    if state is None:  # gone since it was looked for
        raise MissingData(f"Expected the state of a node at {directory}, found none.")
    if state.forgotten:
        raise RequestError(
            f"Expected a node that takes part, but {state.name!r} was forgotten as a contributor.",
            remedy="Let the operator ask: clfed forget DIR, on the server.",
        )
    _refuse_known(requests, {*state.confirmed, *(path.stem for path in outbox_of(directory))})
    others = [
        request.contributor
        for request in requests
        if request.kind == "contributor" and request.contributor != state.name
    ]
    if others:
        raise RequestError(
            f"Expected a request of {state.name!r} about itself, got one about {others[0]!r}.",
            remedy="A node may ask for itself alone (--me); the operator for every contributor.",
        )
    sentences = []
    for request in requests:
        rows = state.own
        held = [name for name in request.classes if name in rows]
        number = int(rows.counts[rows.rows(held)].sum()) if held else 0
        if request.kind == "contributor":
            number = rows.total_count
        if request.kind == "picture":
            number = sum(stamp[2] in request.pictures for stamp in state.album.files.values())
        sentences.append(_meant(request, {state.name: number} if number else {}))
    for request in requests:
        put(directory, request)
    return sentences


def _refuse_known(requests: list[Request], known: set[str]) -> None:
    for request in requests:
        if request.id in known:
            raise RequestError(
                f"Expected a new request, got the id {request.id!r} of one that was asked before.",
                remedy="Look with clfed status what became of it. What was forgotten stays "
                "forgotten; something else needs another --id.",
            )


def _meant(request: Request, examples: dict[str, int]) -> str:
    """Say what a request means, by the examples that are known of it at each node."""
    if request.kind == "picture":
        several = len(request.pictures) > 1
        meant = f"{len(request.pictures)} pictures" if several else "1 picture"
        held = f"; {sum(examples.values())} of this node's files are meant" if examples else ""
        return f"{meant}, at every node that has a file of the same bytes{held}."
    meant = (
        f"everything of contributor {request.contributor}"
        if request.kind == "contributor"
        else f"class {', '.join(request.classes)}"
    )
    if not examples:
        return (
            f"{meant}, of which nothing is known here so far, so nothing is subtracted; it is shut "
            "out wherever it comes from."
        )
    told = ", ".join(f"{number} of {node}" for node, number in sorted(examples.items()))
    return f"{meant}, now {sum(examples.values())} examples ({told})."
