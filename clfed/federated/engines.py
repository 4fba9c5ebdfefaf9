"""Who carries the messages: this process, or Flower's simulation on Ray. Nothing else differs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clfed.federated.client_app import app as client_app
from clfed.federated.grid import LocalGrid

Serve = Callable[[Grid], None]


def local(serve: Serve, *, nodes: int) -> None:
    """Run a federation in this process, one node after the other.

    Args:
        serve: The server's side; it gets the grid that reaches the nodes.
        nodes: Number of simulated nodes.
    """
    configs = [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]
    serve(LocalGrid(client_app, configs))


def ray(
    serve: Serve, *, nodes: int, cpus_per_node: float = 1.0, gpus_per_node: float = 0.0
) -> None:
    """Run a federation on Flower's own simulation engine, in parallel worker processes.

    Args:
        serve: The server's side; it gets the grid that reaches the nodes.
        nodes: Number of simulated nodes.
        cpus_per_node: Processor cores that one node holds while it works.
        gpus_per_node: Share of a GPU that one node holds while it works.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    from flwr.server.superlink.fleet.vce.backend import BackendConfig
    from flwr.simulation import run_simulation

    server_app = ServerApp()
    failure: list[BaseException] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower reports the failure of a ServerApp as its own; the caller needs the original.
        try:
            serve(grid)
        except BaseException as error:
            failure.append(error)

    backend: BackendConfig = {
        "client_resources": {"num_cpus": cpus_per_node, "num_gpus": gpus_per_node},
        "init_args": {"logging_level": "error", "log_to_driver": False},
    }
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run_simulation(
            server_app,
            client_app,
            nodes,
            backend_config=backend,
        )
    if failure:
        raise failure[0]
