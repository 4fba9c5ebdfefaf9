"""Weights & Biases for a federation of real nodes: one group a federation, one run a node.

Everything is sent by the server, from its own accounts, so nodes need no account and no internet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from clfed.reporting.wandb_sink import WandbSink

if TYPE_CHECKING:
    from clfed.deploy.serving import Report


class Telemetry:
    """Sends the account of each round; one run for the server, one for each node.

    The server's run has ``fed/classes``, ``fed/examples``, ``fed/bytes_up``, ``fed/bytes_down``,
    ``fed/seconds``, ``fed/asked``, ``fed/answered`` and ``fed/refused`` (messages of the round).
    A node's run has ``node/bytes_up``, ``node/bytes_down``, ``node/seconds``, ``node/rows``
    (classes accepted) and ``node/refused`` of the round, and ``node/classes`` and
    ``node/examples`` that the ledger holds of it. All are drawn against ``fed/round``.

    A failure of W&B is told once for each run and stops nothing: the ledger has all numbers.

    Args:
        folder: The federation folder; files go to ``wandb/`` inside.
        id: Of the federation.
        name: Of the federation.
        mode: ``online``, ``offline``, ``disabled``, or None to find out; ``WANDB_MODE`` wins.

    Example:
        ::

            with Telemetry(federation.folder, federation.id, federation.name) as telemetry:
                telemetry.log(report, round_account(federation.folder, report.number))
    """

    def __init__(self, folder: Path, id: str, name: str, *, mode: str | None = None) -> None:
        self._folder, self._federation, self._name, self._mode = folder, id, name, mode
        self._nodes: dict[str, WandbSink] = {}
        self._server = self._run("server", "server")

    def log(self, report: Report, account: Sequence[Mapping[str, Any]]) -> None:
        """Send what one finished round was.

        Args:
            report: The round.
            account: What each node did in it, see
                :func:`clfed.deploy.watching.round_account`.
        """
        self._server.log(
            report.number,
            {
                "fed/classes": report.classes,
                "fed/examples": report.examples,
                "fed/bytes_up": report.up,
                "fed/bytes_down": report.down,
                "fed/seconds": report.seconds,
                "fed/asked": report.asked,
                "fed/answered": report.answered,
                "fed/refused": sum(row["refused"] for row in account),
            },
        )
        for row in account:
            name = row["node"]
            if name not in self._nodes:
                self._nodes[name] = self._run(name, "node")
            self._nodes[name].log(
                report.number,
                {
                    "node/bytes_up": row["up"],
                    "node/bytes_down": row["down"],
                    **{
                        f"node/{key}": row[key]
                        for key in ("seconds", "rows", "refused", "classes", "examples")
                    },
                },
            )

    def close(self, *, failed: bool = False) -> None:
        """Finish all runs; a second call does nothing.

        Args:
            failed: Whether the server stopped because of an error.
        """
        for run in (self._server, *self._nodes.values()):
            run.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # To interrupt a server is how it is stopped.
        self.close(failed=kind is not None and not issubclass(kind, KeyboardInterrupt))

    def _run(self, name: str, role: str) -> WandbSink:
        return WandbSink(
            self._folder,
            {"federation": self._name, "federation_id": self._federation, "role": role},
            id=run_id(self._federation, role, name),
            name=name,
            group=f"{self._name}-{self._federation[:8]}",
            mode=self._mode,
        )


def run_id(federation: str, role: str, name: str) -> str:
    """Return the W&B id of a run: the same for the same node of the same federation.

    Args:
        federation: Id of the federation.
        role: ``server`` or ``node``; a node may be called "server".
        name: Of the node.
    """
    return hashlib.sha256("\0".join((federation, role, name)).encode()).hexdigest()[:16]
