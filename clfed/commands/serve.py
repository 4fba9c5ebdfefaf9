"""``clfed serve``: the server of a federation."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clfed.deploy.federation import Federation
    from clfed.deploy.pace import Pace

SENTENCE = "serve a federation: rounds that go on whatever happens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", type=Path, help="the federation folder")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="where to listen; all addresses when omitted"
    )
    parser.add_argument("--every", type=float, default=10.0, help="seconds from round to round")
    parser.add_argument(
        "--patience", type=float, default=45.0, help="seconds that a round waits for replies"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes that the first round waits for")
    parser.add_argument(
        "--gather", type=float, default=600.0, help="longest wait for these nodes, seconds"
    )
    parser.add_argument("--rounds", type=int, help="stop after this many rounds in all")
    parser.add_argument(
        "--wandb", action="store_true", help="send accounts to Weights & Biases, or record them"
    )
    parser.add_argument(
        "--local",
        nargs="+",
        metavar="NAME=FOLDER",
        help="rehearse on this machine: nodes in this process, no network, one round by default",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until the rounds are done, or for ever."""
    from clfed.deploy.address import parse_address
    from clfed.deploy.federation import Federation
    from clfed.deploy.pace import Pace
    from clfed.deploy.superlink import serve

    federation = Federation.open(args.folder)
    pace = Pace(
        every=args.every,
        patience=args.patience,
        nodes=args.nodes,
        gather=args.gather,
        rounds=args.rounds,
    )
    if args.local:
        _rehearse(federation, args.local, pace)
        return
    _, port = parse_address(federation.address)
    listen = ("0.0.0.0", port) if args.listen is None else parse_address(args.listen)
    follow = Tail(federation.folder / "server.log")
    sys.stdout.write(f"Serving {federation.name} at {federation.address}; Ctrl-C ends it.\n")
    sys.stdout.flush()
    serve(federation, pace, listen, wandb=args.wandb, tick=follow.show)


def _rehearse(federation: Federation, named: list[str], pace: Pace) -> None:
    from clfed.deploy.rehearsal import rehearse
    from clfed.errors import ConfigError

    parts = [word.partition("=") for word in named]
    folders = {name: Path(folder) for name, _, folder in parts}
    if not all(name and folder for name, _, folder in parts) or len(folders) < len(parts):
        raise ConfigError(
            f"Expected NAME=FOLDER with names of their own after --local, got {named}."
        )
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("clfed").setLevel(logging.INFO)
    rounds = pace.rounds if pace.rounds is not None else last_round(federation) + 1
    rehearse(federation, folders, replace(pace, rounds=rounds, nodes=len(folders)))


def last_round(federation: Federation) -> int:
    """Return the number of the last round that a federation has finished."""
    store = federation.store()
    try:
        return store.last_round()
    finally:
        store.close()


class Tail:
    """Prints what is added to a log from now on.

    Args:
        path: The log; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.exists() else 0

    def show(self) -> None:
        """Print what is new."""
        if not self._path.exists():
            return
        with self._path.open() as log:
            log.seek(self._place)
            sys.stdout.write(log.read())
            self._place = log.tell()
        sys.stdout.flush()
