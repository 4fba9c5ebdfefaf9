"""Weights & Biases of a federation: a group, a run a node, and the same runs after a restart."""

import json
import os
import subprocess
import sys

import pytest

from clfed.deploy.serving import Report
from clfed.deploy.telemetry import Telemetry, run_id

ID = "0123456789abcdef" * 2


def report(number):
    return Report(
        number=number,
        started=1.0,
        seconds=0.5,
        asked=3,
        answered=2,
        up=100 * number,
        down=200,
        classes=7,
        examples=70,
        memory="ab" * 32,
    )


def account(number, *nodes):
    row = {"round": number, "messages": 2, "up": 30, "down": 40, "seconds": 0.25}
    row |= {"rows": 3, "refused": 1, "classes": 4, "examples": 40}
    return [{**row, "node": node} for node in nodes]


class FakeRun:
    """A W&B run that remembers what it was told, or fails."""

    dir = "nowhere"

    def __init__(self, arguments, fails):
        self.arguments, self.fails = arguments, fails
        self.rows, self.axes, self.exit_code = [], {}, None

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        if self.fails:
            raise ConnectionError("no route")
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """An environment in which nobody is logged in to W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


@pytest.fixture
def runs(nobody):
    """Let wandb.init give runs that remember; those of nodes named "bad" fail."""
    import wandb

    made = []

    def init(**arguments):
        made.append(FakeRun(arguments, fails=arguments["name"] == "bad"))
        return made[-1]

    nobody.setattr(wandb, "init", init)
    return made


def told(made, key="name"):
    return [run.arguments[key] for run in made]


def test_one_group_and_one_run_a_node(runs, tmp_path):
    with Telemetry(tmp_path, ID, "birds") as telemetry:
        assert told(runs) == ["server"]
        telemetry.log(report(1), account(1, "lodge"))
        telemetry.log(report(2), account(2, "lodge", "server"))
    assert told(runs) == ["server", "lodge", "server"]
    assert {*told(runs, "group")} == {"birds-01234567"}
    assert {*told(runs, "reinit")} == {"create_new"} and {*told(runs, "mode")} == {"offline"}
    assert len({*told(runs, "id")}) == 3 and {*told(runs, "dir")} == {str(tmp_path)}
    assert [config["role"] for config in told(runs, "config")] == ["server", "node", "node"]
    assert [run.exit_code for run in runs] == [0, 0, 0]


def test_the_numbers_are_those_of_the_round(runs, tmp_path):
    with Telemetry(tmp_path, ID, "birds") as telemetry:
        telemetry.log(report(5), account(5, "lodge", "mill"))
    server, lodge, mill = runs
    assert server.rows == [
        {
            "fed/classes": 7,
            "fed/examples": 70,
            "fed/bytes_up": 500,
            "fed/bytes_down": 200,
            "fed/seconds": 0.5,
            "fed/asked": 3,
            "fed/answered": 2,
            "fed/refused": 2,
            "fed/round": 5,
        }
    ]
    node = {
        "node/bytes_up": 30,
        "node/bytes_down": 40,
        "node/seconds": 0.25,
        "node/rows": 3,
        "node/refused": 1,
        "node/classes": 4,
        "node/examples": 40,
        "fed/round": 5,
    }
    assert lodge.rows == mill.rows == [node]
    assert lodge.axes["node/*"] == server.axes["fed/*"] == "fed/round"


def test_a_restarted_server_goes_on_in_the_same_runs(runs, tmp_path):
    for number in (1, 2):
        with Telemetry(tmp_path, ID, "birds", mode="online") as telemetry:
            telemetry.log(report(number), account(number, "lodge"))
    first, second = told(runs, "id")[:2], told(runs, "id")[2:]
    assert first == second and {*told(runs, "resume")} == {"allow"}
    with Telemetry(tmp_path, "f" * 32, "birds"):
        assert runs[-1].arguments["id"] not in first


@pytest.mark.parametrize("name", ["lodge", "a/b", "ß" * 128, "[x]"])
def test_ids_are_plain_and_tell_apart(name):
    found = run_id(ID, "node", name)
    assert len(found) == 16 and found.isalnum() and found.isascii()
    others = {run_id(ID, "server", name), run_id(ID[:-1], "node", name), run_id(ID, "node", "x")}
    assert len(others) == 3 and found not in others


def test_a_run_that_fails_stops_nothing(runs, tmp_path, capsys):
    with Telemetry(tmp_path, ID, "birds") as telemetry:
        for number in (1, 2):
            telemetry.log(report(number), account(number, "bad", "lodge"))
    server, bad, lodge = runs
    assert len(server.rows) == len(lodge.rows) == 2 and bad.rows == []
    assert capsys.readouterr().out.count("could not log") == 1
    assert (server.exit_code, bad.exit_code) == (0, 1)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 0), (RuntimeError, 1)])
def test_an_interrupt_is_a_good_end_and_an_error_is_not(runs, tmp_path, error, code):
    with pytest.raises(error), Telemetry(tmp_path, ID, "birds"):
        raise error
    assert runs[0].exit_code == code


def test_disabled_leaves_nothing(nobody, tmp_path):
    with Telemetry(tmp_path, ID, "birds", mode="disabled") as telemetry:
        telemetry.log(report(1), account(1, "lodge"))
    assert [*tmp_path.iterdir()] == []


def test_offline_runs_are_recorded_under_their_ids(nobody, tmp_path, capfd):
    for number in (1, 2):
        with Telemetry(tmp_path, ID, "birds") as telemetry:
            telemetry.log(report(number), account(number, "lodge"))
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    ids = {run_id(ID, role, name) for role, name in (("server", "server"), ("node", "lodge"))}
    # W&B numbers folders that were made within one second.
    found = [one for folder in folders for one in ids if f"-{one}" in folder.name]
    assert sorted(found) == sorted([*ids, *ids]) and len(folders) == 4
    records = b"".join(path.read_bytes() for one in folders for path in one.glob("*.wandb"))
    for name in (b"birds-01234567", b"lodge", b"bytes_up", b"examples", b"round"):
        assert name in records
    assert "could not" not in capfd.readouterr().out


def test_nothing_heavy_is_imported_before_a_run_begins():
    code = """
import sys, clfed.deploy.telemetry
heavy = {"torch", "flwr", "wandb", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_number_is_a_text(runs, tmp_path):
    with Telemetry(tmp_path, ID, "birds") as telemetry:
        telemetry.log(report(1), account(1, "lodge"))
    rows = [row for run in runs for row in run.rows]
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    json.dumps(rows)
