"""The server's programs: Flower's SuperLink, and the gate in front of it.

The SuperLink listens on this machine alone; nodes reach it through the gate.
"""

from __future__ import annotations

import logging
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from clfed.deploy.address import parse_address
from clfed.deploy.federation import Federation
from clfed.deploy.flower_run import (
    Places,
    is_running,
    raise_failure,
    register,
    submit,
    write_configuration,
)
from clfed.deploy.keys import (
    AUTHORITY,
    SERVER,
    SERVER_KEY,
    days_left,
    issue_server_certificate,
)
from clfed.deploy.pace import Pace
from clfed.deploy.processes import Child, environment, free_port, program
from clfed.errors import FederationError

logger = logging.getLogger(__name__)
RENEW = 30.0  # days
START = 90.0  # seconds that the SuperLink may take to start


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
        write_configuration(federation, places, pace, wandb, port)
        register(federation, store, env)
        gate = stack.enter_context(_gate(federation, places, env, listen, port))
        places.failure.unlink(missing_ok=True)
        submit(places, env)
        while is_running(places):
            for name, child in (("SuperLink", superlink), ("gate", gate)):
                if child.ended() is not None:
                    raise FederationError(
                        f"The {name} ended with code {child.ended()}: {child.last_words(3)}",
                        remedy=f"Look at {child.log}, and start clfed serve again: nothing is "
                        "lost.",
                    )
            register(federation, store, env)
            tick()
            time.sleep(0.5)
        tick()
        raise_failure(places, pace, store)


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
