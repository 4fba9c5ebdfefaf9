"""Flower's own programs as children that never outlive their parent for long."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from clfed.errors import FederationError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Nodes and server run what is installed on them; nothing is fetched.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # How often Flower looks for a task to start, seconds; one second is its default.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "OMP_WAIT_POLICY": "PASSIVE",
}

_PR_SET_PDEATHSIG = 1
# Only Linux ends a child together with a parent that was killed; elsewhere the note helps.
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def program(name: str) -> str:
    """Return the path of one of Flower's programs in this environment.

    Raises:
        FederationError: It is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise FederationError(
            f"Expected Flower's {name} beside {sys.executable}, found none.",
            remedy="Install clfed with its dependencies into one environment.",
        )
    return str(path)


def environment(home: Path, *, direct: str = "localhost") -> dict[str, str]:
    """Return the environment of Flower's programs, with a home of its own.

    Args:
        home: Where Flower keeps its configuration; absolute.
        direct: A host that is reached without a proxy, beside this machine.
    """
    scripts = str(Path(sys.executable).parent)
    path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    # What a user has set wins over our defaults, but not over the folder and the environment.
    proxies = ",".join(filter(None, [os.environ.get("NO_PROXY"), direct, "127.0.0.1"]))
    own = {"PATH": path, "FLWR_HOME": str(home), "NO_PROXY": proxies, "no_proxy": proxies}
    return {**QUIET, **os.environ, **own}


def call(command: Sequence[str], env: Mapping[str, str], *, timeout: float = 120.0) -> str:
    """Run one of Flower's commands and return what it prints.

    Raises:
        FederationError: It failed or did not end in time; with its own words.
    """
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise FederationError(
            f"Expected {Path(command[0]).name} {command[1]} to end within {timeout:g} s."
        ) from None
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())
        raise FederationError(
            f"{Path(command[0]).name} {command[1]} failed with code {done.returncode}: "
            f"{words[-600:]}"
        )
    return done.stdout


def free_port() -> int:
    """Return a port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Child:
    """A program in a process group of its own, which ends as a whole.

    Its group is noted in a file, so that the next start can end what a killed parent left behind.

    Args:
        command: Program and arguments.
        env: Its environment.
        log: File that its output is appended to.
        note: File for the note.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, log: Path, note: Path
    ) -> None:
        end_leftover(note)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # One system call, which takes no lock that a thread could hold.
                preexec_fn=_die_with_parent if _LIBC else None,  # noqa: PLW1509
            )
        self._note, self.log = note, log
        started = _started(self._process.pid)
        note.write_text(json.dumps({"pid": self._process.pid, "started": started}))

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def ended(self) -> int | None:
        """Return the exit code, ``None`` while the program runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, and return as :meth:`ended`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self, patience: float = 10.0) -> None:
        """End the program and everything that it started."""
        if self.ended() is None:
            self._process.terminate()
            self.wait(patience)
        _kill_group(self._process.pid)
        self._process.wait()
        self._note.unlink(missing_ok=True)

    def last_words(self, lines: int = 12) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def end_leftover(note: Path) -> None:
    """End the process group that an earlier parent noted and could not end."""
    try:
        found = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        return
    # The number may belong to another process by now.
    if found["started"] is not None and _started(found["pid"]) == found["started"]:
        _kill_group(found["pid"])
    note.unlink(missing_ok=True)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _started(pid: int) -> str | None:
    """Return when a process was started, in ticks since the machine was; None if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
