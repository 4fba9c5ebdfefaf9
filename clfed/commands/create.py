"""``clfed create``: a new federation folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SENTENCE = "make a federation folder: embedding, certificates, rules"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument(
        "--address",
        required=True,
        metavar="HOST:PORT",
        help="where nodes reach the server, e.g. hub.local:8000",
    )
    parser.add_argument("--name", help="for people to read; the folder's name when omitted")
    parser.add_argument(
        "--encoder", type=Path, metavar="FILE", help="a ready embedding instead of training one"
    )
    parser.add_argument(
        "--moments", choices=("none", "shared", "class"), default="none", help="second moments"
    )
    parser.add_argument(
        "--robust",
        choices=("none", "median", "trimmed"),
        default="none",
        help="let nodes that hold a class vote on its mean, instead of the exact sum",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(4, 8, 16),
        help="round the sums that nodes send; exact if omitted",
    )
    parser.add_argument("--norm", type=float, help="longest mean embedding a node may send")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="how the embedding is trained, as for plain clfed: data=folder data.root=PATH ...",
    )


def run(args: argparse.Namespace) -> None:
    """Make the folder."""
    from clfed.deploy.federation import Federation, Rules
    from clfed.deploy.founding import Founding, embedding

    Federation.refuse_existing(args.folder)
    rules = {
        "moments": args.moments,
        "robust": args.robust,
        "norm": args.norm,
        "message_bits": args.bits,
    }
    found: Founding = embedding(args.encoder, args.overrides)
    federation = Federation.create(
        args.folder,
        name=args.name or args.folder.resolve().name,
        address=args.address,
        encoder=found.encoder,
        rules=Rules(**rules, threshold=found.threshold),
    )
    sys.stdout.write(
        f"Made {federation.folder} for {federation.address}. {found.told}\n"
        f"Next: clfed invite {args.folder} NAME, one name a node; then clfed serve {args.folder}\n"
    )
