"""The round loop as a Flower run: an app without code, submitted to the SuperLink.

Nodes and server run what is installed on them. The run is a process of the SuperLink; it holds a
lock as long as it lives, so that a watcher sees its end and a successor never works beside it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from flwr.serverapp import Grid

from clfed import __version__
from clfed.deploy.federation import Federation
from clfed.deploy.keys import AUTHORITY
from clfed.deploy.layout import FLOWER
from clfed.deploy.pace import Pace
from clfed.deploy.processes import call, program
from clfed.deploy.serving import Report, Server
from clfed.deploy.store import Store
from clfed.errors import ClfedError, FederationError, by_code
from clfed.files import write_file

logger = logging.getLogger(__name__)
START = 90.0  # seconds that the run may take to start
_NAME = "clfed"
_APP = f"""\
[project]
name = "clfed-nodes"
version = "{__version__}"
dependencies = []

[tool.flwr.app]
publisher = "clfed"

[tool.flwr.app.components]
serverapp = "clfed.federated.server_app:app"
clientapp = "clfed.federated.client_app:app"

[tool.flwr.app.config]
overrides = ""
federation = ""
pace = ""
wandb = false
supervised = false
"""


class Places:
    """The files of a federation's Flower folder.

    Args:
        federation: Settings.
    """

    def __init__(self, federation: Federation) -> None:
        self.folder = (federation.folder / FLOWER).resolve()
        self.home = self.folder / "home"
        self.app = self.folder / "app"
        self.run = self.folder / "run.toml"
        self.database = self.folder / "superlink.db"
        self.lock = self.folder / "lock"
        self.running = self.folder / "running.lock"
        self.failure = self.folder / "failure.json"


def run_app(
    grid: Grid, folder: Path, pace: Pace, *, wandb: bool = False, supervised: bool = False
) -> None:
    """Run the rounds; the body of the ServerApp.

    Args:
        grid: Reaches the nodes.
        folder: The federation folder.
        pace: How long to wait for what.
        wandb: Whether to send accounts to Weights & Biases.
        supervised: Whether ``clfed serve`` started it, whose end it must not outlive.

    Raises:
        ClfedError: What ended them; it is noted for :func:`serve`, too.
    """
    federation = Federation.open(folder)
    places = Places(federation)
    if supervised:
        threading.Thread(target=_end_with, args=(places.lock,), daemon=True).start()
    log = logging.FileHandler(federation.folder / "server.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("clfed").addHandler(log)
    logging.getLogger("clfed").setLevel(logging.INFO)
    with FileLock(places.running, timeout=START):
        store = federation.store()
        try:
            with ExitStack() as stack:
                report = _telemetry(federation, stack) if wandb else _nothing
                Server(federation, store, grid, pace, report=report).run()
        except ClfedError as error:
            note = {"code": error.code, "message": str(error), "remedy": error.remedy}
            write_file(places.failure, json.dumps(note).encode())
            logger.error("%s", error)
            raise
        finally:
            store.close()


def write_configuration(
    federation: Federation, places: Places, pace: Pace, wandb: bool, port: int
) -> None:
    """Write what Flower's commands and the run read.

    Args:
        federation: Settings.
        places: Where the files go.
        pace: How long to wait for what.
        wandb: Whether to send accounts to Weights & Biases.
        port: Of the SuperLink on this machine.
    """
    # JSON strings are TOML strings.
    authority = json.dumps(str((federation.folder / AUTHORITY).resolve()))
    home = (
        f'[superlink]\ndefault = "{_NAME}"\n\n[superlink.{_NAME}]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = {authority}\n'
    )
    write_file(places.home / "config.toml", home.encode())
    write_file(places.app / "pyproject.toml", _APP.encode())
    run = {
        "federation": str(federation.folder.resolve()),
        "pace": json.dumps(asdict(pace)),
        "wandb": wandb,
        "supervised": True,
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in run.items()]
    write_file(places.run, "".join(lines).encode())


def register(federation: Federation, store: Store, env: dict[str, str]) -> None:
    """Make the SuperLink know the keys of nodes that were invited since."""
    known = {*store.node_names().values()}
    for name, path in federation.public_keys().items():
        if name in known:
            continue
        command = [program("flwr"), "supernode", "register", str(path), _NAME, "--format", "json"]
        told = json.loads(call(command, env))
        if not told.get("success"):
            raise FederationError(f"Flower did not register the key of {name!r}: {told}.")
        store.update_node(name, node_id=str(told["node-id"]))
        logger.info("Registered the key of %s.", name)


def submit(places: Places, env: dict[str, str]) -> None:
    """Start the run, and wait until it is under way.

    Raises:
        FederationError: Flower refuses it, or it does not start in time.
    """
    command = [
        *(program("flwr"), "run", str(places.app), _NAME),
        *("--run-config", str(places.run), "--format", "json"),
    ]
    told = json.loads(call(command, env))
    if not told.get("success"):
        raise FederationError(f"Flower did not start the run: {told}.")
    end = time.monotonic() + START
    while not is_running(places):
        if places.failure.exists():
            return
        if time.monotonic() > end:
            raise FederationError(
                f"The rounds did not start within {START:g} s.",
                remedy=f"Look at {places.folder / 'superlink.log'}.",
            )
        time.sleep(0.1)


def is_running(places: Places) -> bool:
    """Return whether the process of the run is alive."""
    lock = FileLock(places.running, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def raise_failure(places: Places, pace: Pace, store: Store) -> None:
    """Raise what ended a run before its rounds were done.

    Raises:
        ClfedError: What the run noted.
        FederationError: It noted nothing.
    """
    if places.failure.exists():
        note = json.loads(places.failure.read_text())
        raise by_code(note["code"])(note["message"], remedy=note["remedy"])
    if pace.rounds is None or store.last_round() < pace.rounds:
        raise FederationError(
            f"The rounds ended by themselves after round {store.last_round()}.",
            remedy=f"Look at {places.folder / 'superlink.log'}, and start clfed serve again: "
            "nothing is lost.",
        )


def _end_with(lock: Path) -> None:
    """End this process when nobody holds a lock any more.

    Flower's client would go on looking for a SuperLink that has gone, and keep its successor out.
    """
    held = FileLock(lock, timeout=0)
    while True:
        time.sleep(1)
        with contextlib.suppress(Timeout), held:
            # Not sys.exit, which ends a thread alone; what was acknowledged is on disk.
            os._exit(1)


def _telemetry(federation: Federation, stack: ExitStack) -> Callable[[Report], None]:
    from clfed.deploy.telemetry import Telemetry
    from clfed.deploy.watching import round_account

    logging.getLogger("wandb").setLevel(logging.WARNING)
    telemetry = Telemetry(federation.folder, federation.id, federation.name)
    stack.enter_context(telemetry)
    return lambda report: telemetry.log(report, round_account(federation.folder, report.number))


def _nothing(report: Report) -> None:
    """Do nothing with the report of a round."""
