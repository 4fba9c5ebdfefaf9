"""``clfed status``: what a federation or a node has done, once or as a live view."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clfed.deploy.layout import SETTINGS
from clfed.errors import ConfigError, MissingData, NotEnoughData, RunFolderError
from clfed.files import write_file

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SENTENCE = "show rounds, nodes, refused messages and requests to forget, once or live"
EVERY = 1.0  # seconds between two looks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``clfed status`` takes."""
    parser.add_argument(
        "where",
        metavar="WHERE",
        type=Path,
        help="a federation folder, or the state directory of a node",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--watch", action="store_true", help="look every second until Ctrl-C")
    form.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.add_argument(
        "--round", metavar="N", type=int, help="show what each node did in this round"
    )
    parser.add_argument("--figures", metavar="DIR", type=Path, help="draw all rounds as PNG files")
    parser.add_argument(
        "--csv", metavar="DIR", type=Path, help="write rounds.csv and messages.csv, all of them"
    )


def run(args: argparse.Namespace) -> None:
    """Print the status and write the files that are asked for.

    The JSON object is what :func:`clfed.deploy.watching.federation_status` returns for a
    federation and :func:`clfed.deploy.node_status.node_status` for a node; ``kind`` tells which.
    It goes to standard output alone.

    Args:
        args: What :func:`add_arguments` declares.

    Raises:
        MissingData: There is neither a federation nor a node's state, or a file is missing.
        InvalidMessage: A file is damaged.
        VersionMismatch: Another version of clfed made the federation.
        RunFolderError: The ledger cannot be read, or a file cannot be written.
        ConfigError: There has been no such round, a node has no rounds, or there is no terminal
            for a live view.
        NotEnoughData: There are no rounds to draw.
        RequestError: A request in a node's outbox is damaged.
    """
    from clfed.reporting.console import console

    look, view = _onlooker(args)
    written = _write(args)
    if args.json:
        sys.stdout.write(json.dumps(look(), indent=1) + "\n")
        return
    if args.watch:
        watch(lambda: view(look()), console())
    console().print(view(look()))
    for path in written:
        console().print(f"wrote {path}", markup=False, soft_wrap=True)


def watch(
    draw: Callable[[], RenderableType],
    console: Console,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Keep a live view up to date until an interrupt.

    Args:
        draw: Looks, and returns what is to be seen.
        console: The terminal.
        pause: Waits so many seconds between two looks.

    Raises:
        ConfigError: The console is not a terminal.
    """
    from rich.live import Live

    if not console.is_terminal:
        raise ConfigError(
            "Expected a terminal for a live view, got a file or a pipe.",
            remedy="Leave --watch out, or use --json.",
        )
    with Live(draw(), console=console, auto_refresh=False) as live:
        while True:
            pause(EVERY)
            live.update(draw(), refresh=True)


def _onlooker(
    args: argparse.Namespace,
) -> tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], RenderableType]]:
    from clfed.deploy.status_view import federation_view, node_view

    where: Path = args.where
    if (where / SETTINGS).is_file():
        from clfed.deploy.watching import federation_status

        return (
            lambda: federation_status(where, number=args.round),
            lambda status: federation_view(status, account=args.round is not None),
        )
    if not where.is_dir():
        raise MissingData(
            f"Expected a federation folder or a node's state directory at {where}, found no "
            "folder.",
            remedy="Give the DIR of clfed create, or the --state of clfed join.",
        )
    asked = [f"--{key}" for key in ("round", "figures", "csv") if getattr(args, key) is not None]
    if asked:
        raise ConfigError(
            f"Expected a federation folder with {asked[0]}, got {where}, which holds none.",
            remedy="Rounds are known to the server alone; ask its operator.",
        )
    from clfed.deploy.node_status import node_status

    return lambda: node_status(where), node_view


def _write(args: argparse.Namespace) -> list[Path]:
    """Write the figures and CSV files that are asked for, and return their paths."""
    if args.figures is None and args.csv is None:
        return []
    from clfed.deploy.watching import history

    rounds, messages = history(args.where)
    if not rounds:
        raise NotEnoughData(
            f"Expected at least one finished round in {args.where}, got none.",
            remedy="Run one: clfed serve DIR",
        )
    written = []
    if args.csv is not None:
        _make(args.csv)
        for name, rows in (("rounds", rounds), ("messages", messages)):
            written.append(args.csv / f"{name}.csv")
            write_file(written[-1], _csv(rows))
    if args.figures is not None:
        from clfed.deploy.charts import federation_charts

        _make(args.figures)
        written += federation_charts(rounds, messages, args.figures)
    return written


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"Expected to write into {folder}, got: {error}.") from error
