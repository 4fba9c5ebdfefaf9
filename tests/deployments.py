"""Real federations on this machine: programs of their own, TLS and keys, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from federations import encoder

from clfed.deploy.federation import Federation
from clfed.deploy.processes import free_port
from clfed.deploy.store import Store

CLFED = str(Path(sys.executable).parent / "clfed")


def clfed(*arguments: object, timeout: float = 120, check: bool = True):
    done = subprocess.run(
        [CLFED, *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert not (check and done.returncode), done.stdout + done.stderr
    return done


def until(condition: Callable[[], object], seconds: float, what: str):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


class Deployment:
    """A federation folder with invitations, and the processes that use them."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names
        self.folder = root / "federation"
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen] = {}
        (root / "pictures").mkdir(exist_ok=True)
        encoder().save(root / "encoder.safetensors")
        clfed(
            *("create", self.folder, "--address", self.address),
            *("--encoder", root / "encoder.safetensors"),
        )
        clfed("invite", self.folder, *names, "--to", root)

    def start(self, name: str, *arguments: object) -> subprocess.Popen:
        log = (self.root / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [CLFED, *map(str, arguments)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.processes[name] = process
        return process

    def serve(self, **options: object) -> subprocess.Popen:
        flags = [text for key, value in options.items() for text in (f"--{key}", value)]
        return self.start("server", "serve", self.folder, *flags)

    def join(self, name: str, folder: Path | None = None, state: Path | None = None):
        folder = folder or self.root / "pictures" / name
        more = [] if state is None else ["--state", state]
        label = name if state is None else state.name
        return self.start(label, "join", self.root / f"{name}.invitation", folder, *more)

    def state(self, name: str) -> Path:
        return self.root / f"{name}.node"

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def rounds(self) -> int:
        store = Store(self.folder / "ledger.db")
        try:
            return store.last_round()
        finally:
            store.close()

    def wait_for_round(self, number: int, seconds: float = 120) -> None:
        until(lambda: self.rounds() >= number, seconds, f"round {number}\n{self.log('server')}")

    def kill(self, name: str, *, family: bool = True) -> None:
        """End a command without a word, and everything that it started."""
        process = self.processes.pop(name)
        members = psutil.Process(process.pid).children(recursive=True) if family else []
        process.send_signal(signal.SIGKILL)
        for member in members:
            if member.is_running():
                member.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(30)
        until(lambda: not self.leftovers(), 20, f"the end of {self.leftovers()}")

    def leftovers(self) -> list[str]:
        """Programs of this federation that are still running."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("FLWR_HOME", "")
                if home.startswith(str(self.root)) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()[:2]))
            except psutil.Error:  # it has ended, or is somebody else's
                continue
        return found

    def federation(self) -> Federation:
        return Federation.open(self.folder)

    def predict(self, name: str, images: Path) -> list[dict]:
        return json.loads(clfed("predict", self.state(name), images, "--json", "--truth").stdout)
