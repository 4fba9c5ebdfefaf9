"""The Flower ServerApp that ``flwr run`` starts, on whatever nodes are connected.

With ``federation`` it runs the rounds of a federation folder, as ``clfed serve`` does; otherwise
the job that ``overrides`` configures.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clfed.config import compose

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured job; ``--run-config 'overrides="data=digits seed=1"'`` sets it."""
    folder = str(context.run_config.get("federation", ""))
    if folder:
        from clfed.deploy.flower_run import run_app
        from clfed.deploy.pace import Pace

        pace = json.loads(str(context.run_config.get("pace", "")) or "{}")
        switches = {
            name: bool(context.run_config.get(name, False)) for name in ("wandb", "supervised")
        }
        run_app(grid, Path(folder), Pace(**pace), **switches)
        return
    from hydra.utils import get_method

    cfg = compose(shlex.split(str(context.run_config.get("overrides", ""))))
    get_method(cfg.job["_target_"])(cfg, engine=lambda serve, nodes: serve(grid))
