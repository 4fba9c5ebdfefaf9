"""A federation of folders on one machine: the same apps and rules, without servers and keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clfed.deploy.federation import Federation
from clfed.deploy.pace import Pace
from clfed.deploy.serving import Server
from clfed.errors import MissingData
from clfed.federated.client_app import app
from clfed.federated.grid import LocalGrid


def rehearse(federation: Federation, folders: Mapping[str, Path], pace: Pace) -> None:
    """Run rounds with nodes in this process, one after the other.

    Args:
        federation: Settings; its store and memory are used as by a real server.
        folders: Pictures of each node, by its name. States are kept in ``NAME.node`` in the
            federation folder.
        pace: How long to wait for what.

    Raises:
        MissingData: A folder does not exist.
        ClfedError: What ends a real server's rounds.
    """
    for name, folder in folders.items():
        if not folder.is_dir():
            raise MissingData(
                f"Expected pictures of {name!r} at {folder}/CLASS/*.png, but {folder} is no folder."
            )
    nodes = [
        {
            "name": name,
            "folder": str(folder.resolve()),
            "state-dir": str((federation.folder / f"{name}.node").resolve()),
            "embedding": federation.embedding,
        }
        for name, folder in folders.items()
    ]
    store = federation.store()
    try:
        Server(federation, store, LocalGrid(app, nodes), pace).run()
    finally:
        store.close()
