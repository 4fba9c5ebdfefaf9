"""``flwr run .`` starts the same app from the checkout, offline, with the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clfed.config import compose
from clfed.deploy.processes import free_port
from clfed.jobs.reconnaissance import run

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "data=digits data.as_features=true data.base_classes=0 backbone=identity learner=none "
    "scenario.nodes=3 scenario.rounds=2 scenario.classes_per_mission=3 logger=none "
    "job.finetuned=null job.joint=null"
)


@pytest.fixture
def flower(tmp_path):
    """An environment with a Flower home of its own; its SuperLink is stopped afterwards."""
    scripts = str(Path(sys.executable).parent)
    port = str(free_port())
    yield {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().decode(errors="replace")
        except OSError:  # the process has ended meanwhile
            continue
        if "flower-superlink" in command and port in command.split("\0"):
            os.kill(int(entry.parent.name), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="stops the SuperLink through /proc")
def test_flwr_run_gives_the_same_memory(flower, tmp_path):
    command = [
        str(Path(sys.executable).parent / "flwr"),
        "run",
        str(ROOT),
        "--stream",
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=1",
        "--run-config",
        f'overrides="{SETTINGS} run_dir={tmp_path / "flower"} cache_dir={tmp_path / "cache"}"',
    ]
    (tmp_path / "flwr").mkdir()
    done = subprocess.run(
        command, cwd=tmp_path, env=flower, capture_output=True, text=True, timeout=300
    )
    # flwr run exits with 0 even where the run fails.
    assert re.search("Everything is in", done.stdout), done.stdout + done.stderr
    run(compose([*SETTINGS.split(), f"run_dir={tmp_path / 'local'}", f"cache_dir={tmp_path}"]))
    here, there = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("local", "flower")
    )
    assert here["final"]["memory_sha256"] == there["final"]["memory_sha256"]
    assert [s["accuracy"] for s in here["steps"]] == [s["accuracy"] for s in there["steps"]]
