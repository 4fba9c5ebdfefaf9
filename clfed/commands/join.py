"""``clfed join``: be a node of a federation."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

SENTENCE = "be a node: share what a folder of pictures teaches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("invitation", type=Path, help="the file that clfed invite has made")
    parser.add_argument("folder", type=Path, help="pictures, FOLDER/CLASS/*.png")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="what the node remembers; beside the invitation, as NAME.node, when omitted",
    )
    parser.add_argument(
        "--wait", type=float, default=600.0, help="longest wait for the server, seconds"
    )


def run(args: argparse.Namespace) -> None:
    """Be a node until interrupted."""
    from clfed.deploy.invitation import Invitation
    from clfed.deploy.joining import join

    invitation = Invitation.read(args.invitation)
    state = args.state or args.invitation.with_suffix(".node")
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("clfed").setLevel(logging.INFO)
    sys.stdout.write(
        f"{invitation.name} joins {invitation.address} with {args.folder}; it remembers in "
        f"{state}. Ctrl-C ends it, and the next start goes on.\n"
    )
    sys.stdout.flush()
    join(invitation, args.folder, state, wait=args.wait)
