"""``clfed invite``: one file that makes a machine a node."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SENTENCE = "make the one file that a machine needs to become a node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", type=Path, help="the federation folder")
    parser.add_argument("names", nargs="+", metavar="NAME", help="name of a new node")
    parser.add_argument(
        "--to", type=Path, default=Path(), metavar="DIR", help="where NAME.invitation is written"
    )


def run(args: argparse.Namespace) -> None:
    """Write the invitations."""
    from clfed.deploy.federation import Federation

    federation = Federation.open(args.folder)
    for name in args.names:
        path = args.to / f"{name}.invitation"
        federation.invite(name, path)
        sys.stdout.write(
            f"Wrote {path}. Bring it to the machine in secret: whoever has it is {name!r}.\n"
            f"There: clfed join {path.name} FOLDER, with pictures in FOLDER/CLASS/*.png\n"
        )
