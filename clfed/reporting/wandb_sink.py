"""Weights & Biases: one run on the server, offline unless the user is logged in.

A run of the experiment must not die of a logging service, so a failure of W&B is caught here. It
is not hidden: it is reported once, on the console and in ``log.txt``, and the metrics stay
complete in ``metrics.csv``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clfed.reporting.console import console
from clfed.reporting.metrics import Sink

LOGGER = logging.getLogger(__name__)
ROUND = "fed/round"
STEP = "step"


def logged_in() -> bool:
    """Whether W&B holds credentials of this user; looks at no network and asks nothing.

    Credentials are the environment variable ``WANDB_API_KEY`` or ``WANDB_IDENTITY_TOKEN_FILE``,
    the settings file of W&B, or an entry for W&B's server in the netrc file.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return True
    try:
        from wandb.sdk.lib.wbauth import read_netrc_auth
    except ImportError:  # before that module existed the same question had a public name
        return bool(wandb.api.api_key)
    # wandb.login(prompt=False) would do too, but it also rewrites the user's settings file.
    return bool(read_netrc_auth(host=settings.base_url))


class WandbSink(Sink):
    """Sends metrics, figures and the final table to a W&B run.

    ``WANDB_MODE`` (``online``, ``offline``, ``disabled``) wins over ``mode``. Where neither is
    set, the run is online for a user who is logged in and offline for everybody else. An online
    run that cannot start is recorded offline. ``fed/*`` and ``node/*`` are drawn against
    ``fed/round``, everything else against ``step``.

    Args:
        folder: The run folder; files go to ``wandb/`` inside.
        config: The resolved configuration, as plain dictionaries and lists.
        project: W&B project.
        name: Name of the run; the run folder's name when omitted.
        group: Group of the run, to show several seeds together.
        tags: Tags of the run.
        mode: ``online``, ``offline``, ``disabled``, or None to find out.
        id: Of the run, for one that goes on after a restart; W&B's own when omitted. Offline each
            start leaves a folder of its own, all with this id.
        start_seconds: How long an online run may take to start.
        finish_seconds: How long the upload may take at the end; the rest stays in the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        config: Mapping[str, Any] | None = None,
        *,
        project: str = "clfed",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: str | None = None,
        id: str | None = None,
        start_seconds: float = 30.0,
        finish_seconds: float = 120.0,
    ) -> None:
        super().__init__(folder, config)
        self._run: Any = None
        self._failed = False
        self._arguments = {
            "dir": str(folder),
            "config": dict(config or {}),
            "project": project,
            "name": name or Path(folder).resolve().name,
            "group": group,
            "tags": list(tags or ()) or None,
            "id": id,
        }
        self._limits = {"init_timeout": start_seconds, "finish_timeout": finish_seconds}
        self._guarded("start", lambda: self._start(os.environ.get("WANDB_MODE") or mode))

    @property
    def active(self) -> bool:
        """Whether a W&B run is open."""
        return self._run is not None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        names = ("fed/", "node/")
        federated = {key: value for key, value in values.items() if key.startswith(names)}
        other = {key: value for key, value in values.items() if key not in federated}
        for part, axis in ((federated, ROUND), (other, STEP)):
            if part and self.active:
                row = {**part, axis: step}
                self._guarded("log", partial(self._run.log, row))

    def figure(self, path: Path) -> None:
        """Upload a finished figure as ``figures/NAME``."""

        def upload() -> None:
            import wandb

            self._run.log({f"figures/{path.stem}": wandb.Image(str(path))})

        if self.active:
            self._guarded("take a figure", upload)

    def summary(self, values: Mapping[str, float | int | str]) -> None:
        """Set the numbers of the final table, which W&B shows as columns of its run table."""
        if self.active:
            self._guarded("take the summary", lambda: self._run.summary.update(dict(values)))

    def close(self, *, failed: bool = False) -> None:
        """Finish the W&B run; a second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            self._guarded("finish", lambda: run.finish(exit_code=int(failed)))

    def _start(self, mode: str | None) -> None:
        if mode == "disabled":
            return
        import wandb

        mode = mode or ("online" if logged_in() else "offline")
        try:
            self._run = self._init(wandb, mode)
        except Exception as error:
            if mode == "offline":
                raise
            _report(f"W&B cannot be reached, so this run is recorded offline: {_line(error)}")
            self._run = self._init(wandb, "offline")
        for pattern, step in (("*", STEP), ("fed/*", ROUND), ("node/*", ROUND)):
            self._run.define_metric(pattern, step_metric=step)
        LOGGER.info("W&B run in %s (%s)", self._run.dir, mode)

    def _init(self, wandb: Any, mode: str) -> Any:
        # finish_timeout is younger than the oldest W&B that we accept.
        limits = {k: v for k, v in self._limits.items() if k in wandb.Settings.model_fields}
        settings = wandb.Settings(silent=True, console="off", **limits)
        # A run of its own: one that the caller has open in this process goes on.
        # Offline there is nothing to resume from, and W&B would say so in a warning.
        resume = "allow" if self._arguments["id"] and mode != "offline" else None
        return wandb.init(
            **self._arguments, mode=mode, resume=resume, settings=settings, reinit="create_new"
        )

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            if not self._failed:
                _report(f"W&B could not {what}; the run goes on without it: {_line(error)}")
            self._failed = True
            self.close(failed=True)


def _report(message: str) -> None:
    LOGGER.warning(message)
    console().print(message, style="yellow", markup=False, soft_wrap=True)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
