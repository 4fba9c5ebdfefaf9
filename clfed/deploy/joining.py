"""A node's programs: Flower's SuperNode, and this process, which answers its messages."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, RecordDict

from clfed.deploy.address import parse_address
from clfed.deploy.hello import say_hello
from clfed.deploy.invitation import Invitation
from clfed.deploy.processes import Child, environment, free_port, program
from clfed.errors import (
    EmbeddingMismatch,
    FederationError,
    MissingData,
    VersionMismatch,
)
from clfed.federated.answering import answer
from clfed.federated.folder_state import hold
from clfed.federated.relay import Agent
from clfed.files import write_file

logger = logging.getLogger(__name__)
# Flower counts a node as connected for 60 s after it was last heard, and lets its key in again only
# then; a node that was killed and comes back has to wait that long.
RETURN = 90.0
FINAL = (EmbeddingMismatch, VersionMismatch)  # what waiting cannot mend


def join(
    invitation: Invitation,
    folder: Path,
    directory: Path,
    *,
    wait: float = 600.0,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Be a node until interrupted.

    Args:
        invitation: Who one is, and whom to trust.
        folder: Pictures, ``FOLDER/CLASS/*.png``.
        directory: The node's state directory; made where it is absent.
        wait: Longest wait for the server, at the start and when it was lost, seconds.
        tick: Called about twice a second.

    Raises:
        MissingData: There is no such folder.
        ClfedError: The server cannot be reached or trusted, or refuses this node; see
            :func:`clfed.deploy.hello.say_hello`.
        FederationError: Flower's SuperNode fails again and again.
    """
    invitation.check_version()
    if not folder.is_dir():
        raise MissingData(
            f"Expected pictures at {folder}/CLASS/*.png, but {folder} is no folder.",
            remedy="Make the folder; it may be empty at first.",
        )
    with hold(directory):
        say_hello(invitation, wait=wait)
        config = {
            "name": invitation.name,
            "folder": str(folder.resolve()),
            "state-dir": str(directory.resolve()),
            "embedding": invitation.embedding,
        }

        def handle(action: str, content: RecordDict) -> RecordDict:
            context = Context(0, 0, dict(config), RecordDict(), {})
            return answer(action, content, context)

        agent = Agent(directory, handle)
        try:
            _stay(invitation, directory, config, agent, wait, tick)
        finally:
            agent.close()


def _stay(
    invitation: Invitation,
    directory: Path,
    config: dict[str, str],
    agent: Agent,
    wait: float,
    tick: Callable[[], None],
) -> None:
    """Keep a SuperNode running."""
    failing: float | None = None
    while True:
        started = time.monotonic()
        with _supernode(invitation, directory, config) as child:
            while child.ended() is None:
                if isinstance(agent.failure, FINAL):
                    raise agent.failure
                tick()
                time.sleep(0.5)
            words = child.last_words(3)
        now = time.monotonic()
        if now - started > RETURN or failing is None:
            failing = now
        logger.warning("Flower's SuperNode ended; starting it again. It said: %s", words)
        if now - failing > RETURN:
            raise FederationError(
                f"Flower's SuperNode could not stay connected for {RETURN:g} s: {words}",
                remedy=f"Look at {directory / 'supernode.log'}.",
            )
        time.sleep(3)
        say_hello(invitation, wait=wait)


def _supernode(invitation: Invitation, directory: Path, config: dict[str, str]) -> Child:
    key, authority = (directory / name for name in ("node.key", "ca.pem"))
    write_file(key, invitation.key.encode(), mode=0o600)
    write_file(authority, invitation.authority.encode())
    host, _ = parse_address(invitation.address)
    home = directory.resolve() / "flower"
    home.mkdir(exist_ok=True)
    command = [
        program("flower-supernode"),
        *("--superlink", invitation.address),
        *("--root-certificates", str(authority)),
        *("--auth-supernode-private-key", str(key)),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        *("--node-config", " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())),
    ]
    env = environment(home, direct=host)
    return Child(command, env, log=directory / "supernode.log", note=directory / "supernode.json")
