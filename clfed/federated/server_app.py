"""The Flower ServerApp that ``flwr run`` starts: the same job, on whatever nodes are connected."""

from __future__ import annotations

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clfed.config import compose

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured job; ``--run-config 'overrides="data=digits seed=1"'`` sets it."""
    from hydra.utils import get_method

    cfg = compose(shlex.split(str(context.run_config.get("overrides", ""))))
    get_method(cfg.job["_target_"])(cfg, engine=lambda serve, nodes: serve(grid))
