"""The server's programs: Flower's SuperLink, the gate in front of it, and the run inside it.

The SuperLink listens on this machine alone; nodes reach it through the gate. The round loop is a
Flower run, and so a process of the SuperLink. It holds a lock as long as it lives, so that a
watcher sees its end and a successor never works beside it.
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from flwr.serverapp import Grid

from clfed import __version__
from clfed.deploy.address import parse_address
from clfed.deploy.federation import Federation
from clfed.deploy.keys import (
    AUTHORITY,
    SERVER,
    SERVER_KEY,
    days_left,
    issue_server_certificate,
)
from clfed.deploy.layout import FLOWER
from clfed.deploy.processes import Child, call, environment, program
from clfed.deploy.serving import Pace, Report, Server
from clfed.deploy.store import Store
from clfed.errors import ClfedError, FederationError, by_code
from clfed.files import write_file

logger = logging.getLogger(__name__)
RENEW = 30.0  # days
START = 90.0  # seconds that the SuperLink or the run may take to start
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


def serve(
    federation: Federation,
    pace: Pace,
    listen: tuple[str, int],
    *,
    wandb: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Serve a federation until its rounds are done.

    Args:
        federation: Settings.
        pace: How long to wait for what.
        listen: Host and port of the gate.
        wandb: Whether to send accounts to Weights & Biases.
        tick: Called about twice a second, such as to show progress.

    Raises:
        FederationError: One of Flower's programs failed, or another server uses the folder.
        ClfedError: What ended the run.
    """
    places = Places(federation)
    for folder in (places.folder, places.home, places.app):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_alone(places.lock, federation.folder))
        renew_certificate(federation)
        store = federation.store()
        stack.callback(store.close)
        env = environment(places.home)
        port = free_port()
        if not places.database.exists():
            store.execute("UPDATE nodes SET node_id = NULL")
        superlink = stack.enter_context(_superlink(federation, places, env, port))
        _write_configuration(federation, places, pace, wandb, port)
        _register(federation, store, env)
        gate = stack.enter_context(_gate(federation, places, env, listen, port))
        places.failure.unlink(missing_ok=True)
        _submit(places, env)
        while _is_running(places):
            for name, child in (("SuperLink", superlink), ("gate", gate)):
                if child.ended() is not None:
                    raise FederationError(
                        f"The {name} ended with code {child.ended()}: {child.last_words(3)}",
                        remedy=f"Look at {child.log}, and start clfed serve again: nothing is "
                        "lost.",
                    )
            _register(federation, store, env)
            tick()
            time.sleep(0.5)
        tick()
        _raise_failure(places, pace, store)


def renew_certificate(federation: Federation) -> None:
    """Issue a new server certificate where the old one has less than thirty days left.

    Raises:
        ExpiredCertificate: The federation's authority itself is at its end.
    """
    folder = federation.folder
    if days_left((folder / SERVER).read_bytes()) < RENEW:
        host, _ = parse_address(federation.address)
        issue_server_certificate(folder, [host], renew=True)
        logger.info("Renewed the server's certificate.")


def run_app(grid: Grid, folder: Path, pace: Pace, *, wandb: bool = False) -> None:
    """Run the rounds; the body of the ServerApp.

    Args:
        grid: Reaches the nodes.
        folder: The federation folder.
        pace: How long to wait for what.
        wandb: Whether to send accounts to Weights & Biases.

    Raises:
        ClfedError: What ended them; it is noted for :func:`serve`, too.
    """
    federation = Federation.open(folder)
    places = Places(federation)
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


def _telemetry(federation: Federation, stack: ExitStack) -> Callable[[Report], None]:
    from clfed.deploy.telemetry import Telemetry
    from clfed.deploy.watching import round_account

    logging.getLogger("wandb").setLevel(logging.WARNING)
    telemetry = Telemetry(federation.folder, federation.id, federation.name)
    stack.enter_context(telemetry)
    return lambda report: telemetry.log(report, round_account(federation.folder, report.number))


def _nothing(report: Report) -> None:
    """Do nothing with the report of a round."""


@contextmanager
def _alone(path: Path, folder: Path) -> Iterator[None]:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FederationError(
            f"Expected {folder} for this server alone, but another clfed serve uses it."
        ) from None
    with lock:
        yield


@contextmanager
def _superlink(
    federation: Federation, places: Places, env: dict[str, str], port: int
) -> Iterator[Child]:
    folder = federation.folder.resolve()
    command = [
        program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(folder / SERVER), "--ssl-keyfile", str(folder / SERVER_KEY)),
        *("--ssl-ca-certfile", str(folder / AUTHORITY)),
        "--enable-supernode-auth",
        *("--database", str(places.database)),
    ]
    log, note = places.folder / "superlink.log", places.folder / "superlink.json"
    with Child(command, env, log=log, note=note) as child:
        trusted = ssl.create_default_context(cafile=str(folder / AUTHORITY))
        end = time.monotonic() + START
        while not _healthy(port, trusted):
            if child.ended() is not None or time.monotonic() > end:
                raise FederationError(
                    f"Flower's SuperLink did not start: {child.last_words(3)}",
                    remedy=f"Look at {log}.",
                )
            time.sleep(0.2)
        yield child


def _gate(
    federation: Federation, places: Places, env: dict[str, str], listen: tuple[str, int], port: int
) -> Child:
    host, public = listen
    shown = f"[{host}]" if ":" in host else host
    command = [
        *(sys.executable, "-m", "clfed.deploy.gate", str(federation.folder.resolve())),
        *("--listen", f"{shown}:{public}", "--superlink", f"127.0.0.1:{port}"),
    ]
    return Child(command, env, log=places.folder / "gate.log", note=places.folder / "gate.json")


def _healthy(port: int, trusted: ssl.SSLContext) -> bool:
    try:
        address = f"https://127.0.0.1:{port}/health"
        with urllib.request.urlopen(address, context=trusted, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _write_configuration(
    federation: Federation, places: Places, pace: Pace, wandb: bool, port: int
) -> None:
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
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in run.items()]
    write_file(places.run, "".join(lines).encode())


def _register(federation: Federation, store: Store, env: dict[str, str]) -> None:
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


def _submit(places: Places, env: dict[str, str]) -> None:
    command = [
        *(program("flwr"), "run", str(places.app), _NAME),
        *("--run-config", str(places.run), "--format", "json"),
    ]
    told = json.loads(call(command, env))
    if not told.get("success"):
        raise FederationError(f"Flower did not start the run: {told}.")
    end = time.monotonic() + START
    while not _is_running(places):
        if places.failure.exists():
            return
        if time.monotonic() > end:
            raise FederationError(
                f"The rounds did not start within {START:g} s.",
                remedy=f"Look at {places.folder / 'superlink.log'}.",
            )
        time.sleep(0.1)


def _is_running(places: Places) -> bool:
    lock = FileLock(places.running, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def _raise_failure(places: Places, pace: Pace, store: Store) -> None:
    if places.failure.exists():
        note = json.loads(places.failure.read_text())
        raise by_code(note["code"])(note["message"], remedy=note["remedy"])
    if pace.rounds is None or store.last_round() < pace.rounds:
        raise FederationError(
            f"The rounds ended by themselves after round {store.last_round()}.",
            remedy=f"Look at {places.folder / 'superlink.log'}, and start clfed serve again: "
            "nothing is lost.",
        )


def free_port() -> int:
    """Return a port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
