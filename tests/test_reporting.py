"""Results, run folder, metrics, figures, tables, progress and W&B."""

import copy
import csv
import errno
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from clfed.errors import RunFolderError
from clfed.reporting import wandb_sink
from clfed.reporting.figures import accuracy_curves, bytes_curve, prototype_map
from clfed.reporting.maps import principal_plane, short_label
from clfed.reporting.metrics import MetricsLog, Sink, flatten
from clfed.reporting.progress import progress
from clfed.reporting.results import SCHEMA_VERSION, read, validate
from clfed.reporting.run_folder import RunFolder, default_path
from clfed.reporting.tables import classifiers_table, markdown_table, summary_table
from clfed.reporting.wandb_sink import WandbSink, logged_in


@pytest.fixture
def results():
    steps = [
        {
            "step": step,
            "classes": 5 * step,
            "accuracy": {"merged": 0.9 - 0.01 * step, "isolated": 0.5 / step},
            "spread": {"isolated": 0.05},
            "bytes": {"up": 1500, "down": 2500},
            "seconds": 0.5,
        }
        for step in (1, 2, 3)
    ]
    return {
        "job": "reconnaissance",
        "version": SCHEMA_VERSION,
        "seed": 0,
        "protocol": {"nodes": 3, "data": "glyphs", "shots": 5, "note": None},
        "steps": steps,
        "final": {
            "accuracy": {"merged": 0.87, "isolated": 0.1234},
            "spread": {"isolated": 0.05},
            "memory_sha256": "0123456789abcdef" * 4,
            "memory_bytes": 1000,
            "seconds": 2.25,
        },
        "accuracy_matrix": [[0.5, None], [0.25, 0.5]],
        "classifiers": {"ncm": {"accuracy": 0.87, "bytes": 4000}, "lda": {"accuracy": 1}},
    }


def changed(results, path, value):
    """A deep copy with one place changed; the value ... removes the key."""
    copied = copy.deepcopy(results)
    place = copied
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copied


# --- schema -----------------------------------------------------------------------------------


def test_schema_accepts_good_results_with_keys_of_the_job(results):
    validate(results)


@pytest.mark.parametrize(
    "path, value, named",
    [
        (("job",), ..., "job is missing"),
        (("job",), "", "in job"),
        (("version",), SCHEMA_VERSION + 1, "in version"),
        (("seed",), "0", "in seed"),
        (("seed",), True, "in seed"),
        (("seed",), -1, "in seed"),
        (("protocol",), "5-way", "in protocol"),
        (("protocol", "tensor"), torch.zeros(1), "in protocol.tensor"),
        (("protocol", 5), 1, "in protocol.5"),
        (("steps",), {}, "in steps"),
        (("steps",), [], "in steps"),
        (("steps", 1), 3, r"in steps\[1\]"),
        (("steps", 1, "step"), 1, "ascending"),
        (("steps", 0, "step"), 1.0, r"in steps\[0\].step"),
        (("steps", 2, "classes"), ..., r"steps\[2\].classes is missing"),
        (("steps", 0, "accuracy", "merged"), "0.9", r"in steps\[0\].accuracy.merged"),
        (("steps", 0, "accuracy", "merged"), 90, r"in steps\[0\].accuracy.merged"),
        (("steps", 0, "accuracy", "merged"), float("nan"), r"in steps\[0\].accuracy.merged"),
        (("steps", 0, "accuracy", "merged"), np.float32(0.5), r"in steps\[0\].accuracy.merged"),
        (("steps", 0, "spread", "pooled"), 0.1, r"in steps\[0\].spread.pooled"),
        (("steps", 0, "bytes", "up"), 1.5, r"in steps\[0\].bytes.up"),
        (("steps", 0, "bytes", "down"), -1, r"in steps\[0\].bytes.down"),
        (("steps", 0, "seconds"), float("inf"), r"in steps\[0\].seconds"),
        (("steps", 0, "seconds"), -0.1, r"in steps\[0\].seconds"),
        (("final",), ..., "final is missing"),
        (("final", "accuracy", "merged"), -0.1, "in final.accuracy.merged"),
        (("final", "memory_sha256"), "0" * 63, "in final.memory_sha256"),
        (("final", "memory_sha256"), "A" * 64, "in final.memory_sha256"),
        (("final", "memory_bytes"), 10.0, "in final.memory_bytes"),
        (("final", "seconds"), "2 s", "in final.seconds"),
        (("accuracy_matrix", 0, 1), float("nan"), r"in accuracy_matrix\[0\]\[1\]"),
        (("classifiers", "ncm"), 0.87, "in classifiers.ncm"),
        (("classifiers", "ncm", "accuracy"), 1.5, "in classifiers.ncm.accuracy"),
        (("alternatives",), {"merged": {"seconds": "1"}}, "in alternatives.merged.seconds"),
        (("alternatives",), {"merged": {"bytes": {"up": 1}}}, "alternatives.merged.bytes.down"),
    ],
)
def test_schema_names_the_offending_key(results, path, value, named):
    with pytest.raises(RunFolderError, match=f"results.json: .*{named}"):
        validate(changed(results, path, value))


def test_results_are_read_back_equal(results, tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_results(results)
    assert read(folder.results) == results


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_unreadable_results_are_refused(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunFolderError):
        read(path)


def test_reading_results_imports_nothing_heavy():
    code = "import sys, clfed.reporting.results, clfed.reporting.run_folder, clfed.reporting.tables"
    heavy = "{'torch', 'matplotlib', 'wandb', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"{code}\nassert not ({heavy}), {heavy}"], check=True, cwd=ROOT
    )


# --- run folder -------------------------------------------------------------------------------


def test_default_path_names_job_time_and_configuration():
    start = datetime(2026, 1, 2, 3, 4, 5)
    path = default_path("runs", "continual", "seed: 1", start)
    assert path.parent == Path("runs/continual") and path.name.startswith("20260102-030405-")
    assert path != default_path("runs", "continual", "seed: 2", start)


def test_a_folder_with_results_is_refused_unless_overwritten(results, tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.write_config("seed: 1\n")
    folder.write_results(results)
    (folder.figures / "old.png").write_bytes(b"")
    (folder.path / "notes.md").write_text("mine")
    with pytest.raises(RunFolderError, match="earlier"):
        RunFolder(folder.path)
    again = RunFolder(folder.path, overwrite=True)
    assert sorted(p.name for p in again.path.rglob("*")) == ["figures", "notes.md"]


def test_a_folder_of_an_unfinished_run_is_taken_up(tmp_path):
    RunFolder(tmp_path).write_config("seed: 1\n")
    assert RunFolder(tmp_path).config.read_text() == "seed: 1\n"


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_results(results, tmp_path, monkeypatch, call):
    folder = RunFolder(tmp_path)
    folder.write_results(results)
    before = folder.results.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunFolderError, match="No space left") as caught:
        folder.write_results(changed(results, ("seed",), 1))
    monkeypatch.undo()
    assert "space" in caught.value.remedy
    assert folder.results.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["results.json"]


def test_bad_results_are_refused_before_anything_is_written(results, tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError):
        folder.write_results(changed(results, ("seed",), None))
    assert not folder.results.exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="Expected to write"):
        RunFolder(tmp_path / "run")


def test_log_takes_everything_inside_the_block_and_nothing_outside(tmp_path):
    logger = logging.getLogger("clfed.somewhere")
    handlers, level = list(logging.getLogger("clfed").handlers), logging.getLogger("clfed").level
    with RunFolder(tmp_path) as folder:
        logger.debug("inside")
    logger.error("outside")
    text = folder.log.read_text()
    assert "DEBUG   clfed.somewhere: inside" in text and "outside" not in text
    assert text[:4].isdigit()
    assert logging.getLogger("clfed").handlers == handlers
    assert logging.getLogger("clfed").level == level


def test_log_ends_with_the_traceback_of_what_stopped_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path) as folder:
        _ = 1 / 0
    text = folder.log.read_text()
    assert "the run stopped: division by zero" in text and "Traceback" in text


class FullDisk(io.StringIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_fails_is_reported_once_and_the_run_goes_on(tmp_path, capsys):
    with RunFolder(tmp_path) as folder:
        handler = logging.getLogger("clfed").handlers[-1]
        stream, handler.stream = handler.stream, FullDisk()
        for word in ("one", "two"):
            logging.getLogger("clfed").info(word)
        handler.stream = stream
    assert capsys.readouterr().err.count("No space left") == 1
    assert folder.log.exists()


# --- metrics ----------------------------------------------------------------------------------


class Recorder(Sink):
    def __init__(self):
        super().__init__()
        self.calls = []

    def log(self, step, values):
        self.calls.append((step, dict(values)))

    def close(self, *, failed=False):
        self.calls.append(("closed", failed))


def test_metrics_are_written_as_rows_and_forwarded(tmp_path):
    sink = Recorder()
    with MetricsLog(tmp_path / "metrics.csv", [sink]) as metrics:
        metrics.log(1, {"fed/accuracy": 0.1 + 0.2, "fed/classes": 5})
        metrics.log(1, {"seconds": 2.0}, node="north, 1")
    with MetricsLog(tmp_path / "metrics.csv") as metrics:  # a resumed run appends
        metrics.log(2, {"loss": float("inf")})
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "name", "value"],
        ["1", "fed/accuracy", "0.30000000000000004"],
        ["1", "fed/classes", "5"],
        ["1", "node/north, 1/seconds", "2.0"],
        ["2", "loss", "inf"],
    ]
    assert sink.calls == [
        (1, {"fed/accuracy": 0.1 + 0.2, "fed/classes": 5}),
        (1, {"node/north, 1/seconds": 2.0}),
        ("closed", False),
    ]


def test_rows_are_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path / "metrics.csv") as metrics:
        metrics.log(1, {"a": 1})
        assert (tmp_path / "metrics.csv").read_text().endswith("1,a,1\n")


@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1.0)])
def test_a_metric_that_is_no_number_is_refused_with_its_whole_row(tmp_path, value):
    sink = Recorder()
    metrics = MetricsLog(tmp_path / "metrics.csv", [sink])
    with pytest.raises(RunFolderError, match="metric bad"):
        metrics.log(1, {"good": 1.0, "bad": value})
    metrics.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,name,value\n"
    assert sink.calls == [("closed", False)]


def test_sinks_are_closed_as_failed_when_the_run_fails(tmp_path):
    sink = Recorder()
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path / "metrics.csv", [sink]):
        raise KeyboardInterrupt
    assert sink.calls == [("closed", True)]


def test_unwritable_metrics_are_refused_and_the_sinks_closed(tmp_path):
    sink = Recorder()
    with pytest.raises(RunFolderError, match="Expected to write"):
        MetricsLog(tmp_path / "absent" / "metrics.csv", [sink])
    assert sink.calls == [("closed", True)]


def test_flatten_leaves_lists_out():
    nested = {"accuracy": {"a": 0.5}, "matrix": [1], "sha": "x"}
    assert flatten(nested, "final") == {"final/accuracy/a": 0.5, "final/sha": "x"}


# --- Weights & Biases -------------------------------------------------------------------------


def from_yaml(name, folder):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "logger" / f"{name}.yaml"))
    return instantiate({**config, "_partial_": True})(folder=folder, config={"seed": 1})


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """An environment in which nobody is logged in to W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


@pytest.fixture
def no_network(monkeypatch):
    """Sockets that connect to this machine alone."""
    import socket

    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"the network was touched: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def test_nobody_is_logged_in(nobody, no_network):
    assert not logged_in()


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_credentials_in_the_environment_count(nobody, variable):
    nobody.setenv(variable, "x" * 40)
    assert logged_in()


def test_credentials_in_the_netrc_file_count(nobody, no_network, tmp_path):
    import wandb

    host = wandb.setup().settings.base_url.split("//")[1]
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password secret\n")
    assert not logged_in()
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    assert logged_in()


def test_offline_run_is_recorded_in_the_run_folder(nobody, no_network, tmp_path, results, capfd):
    folder = RunFolder(tmp_path / "run")
    accuracy_curves(results, folder.figures / "accuracy.png")
    sink = from_yaml("wandb", folder.path)
    assert sink.active
    with MetricsLog(folder.metrics, [sink]) as metrics:
        metrics.log(1, {"fed/accuracy/merged": 0.5, "loss": 1.0})
        metrics.log(1, {"seconds": 2.0}, node="north")
        metrics.figure(folder.figures / "accuracy.png")
        metrics.summary(flatten(results["final"], "final"))
    assert not sink.active
    runs = list((folder.path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    # A process of W&B's own writes the file, on a busy machine some time after the end of the run.
    names, end = (b"merged", b"round", b"seconds", b"accuracy"), time.monotonic() + 60
    file = next(runs[0].glob("*.wandb"))
    while not all(name in file.read_bytes() for name in names):
        assert time.monotonic() < end, file.read_bytes()[:200]
        time.sleep(0.1)
    assert list(runs[0].rglob("*.png"))
    assert "could not" not in capfd.readouterr().out


def test_disabled_by_the_environment_leaves_nothing(nobody, tmp_path):
    nobody.setenv("WANDB_MODE", "disabled")
    sink = WandbSink(tmp_path, mode="online")
    assert not sink.active
    sink.log(1, {"a": 1.0})
    sink.close()
    assert list(tmp_path.iterdir()) == []


class FakeRun:
    """A W&B run that fails where it is told to."""

    dir = "nowhere"

    def __init__(self, fails=()):
        self.fails, self.calls, self.exit_code = fails, [], None
        self.summary = {}

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.calls.append(values)
        if "log" in self.fails:
            raise ConnectionError("broken pipe\nand more")

    def finish(self, exit_code):
        self.exit_code = exit_code
        if "finish" in self.fails:
            raise TimeoutError


def fake_init(monkeypatch, outcomes):
    """Let wandb.init give the outcomes one after another; returns the modes it was asked for."""
    import wandb

    modes, queue = [], list(outcomes)

    def init(mode, **_):
        modes.append(mode)
        outcome = queue.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(wandb, "init", init)
    return modes


def test_names_decide_the_axis(nobody, tmp_path):
    run = FakeRun()
    fake_init(nobody, [run])
    sink = WandbSink(tmp_path)
    sink.log(3, {"fed/a": 1.0, "node/n/b": 2.0, "c": 3.0})
    assert run.calls == [{"fed/a": 1.0, "node/n/b": 2.0, "fed/round": 3}, {"c": 3.0, "step": 3}]


def test_online_only_when_logged_in(nobody, tmp_path):
    modes = fake_init(nobody, [FakeRun(), FakeRun()])
    WandbSink(tmp_path)
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    WandbSink(tmp_path)
    assert modes == ["offline", "online"]


def test_an_unreachable_server_means_offline(nobody, tmp_path, capsys):
    nobody.setenv("WANDB_MODE", "online")
    modes = fake_init(nobody, [ConnectionError("no route"), FakeRun()])
    assert WandbSink(tmp_path).active
    assert modes == ["online", "offline"]
    assert "recorded offline: ConnectionError: no route" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [("log",), ("log", "finish")])
def test_a_failure_is_reported_once_and_ends_the_sink_alone(
    nobody, tmp_path, fails, capsys, caplog
):
    run = FakeRun(fails)
    fake_init(nobody, [run])
    sink = WandbSink(tmp_path)
    with caplog.at_level(logging.WARNING, "clfed"):
        for step in range(3):
            sink.log(step, {"a": 1.0})
        sink.close()
    message = "W&B could not log; the run goes on without it: ConnectionError: broken pipe"
    assert capsys.readouterr().out.replace("\n", " ").count("W&B could not") == 1
    assert [record.message for record in caplog.records] == [message]
    assert len(run.calls) == 1 and run.exit_code == 1 and not sink.active


def test_a_failing_start_is_reported_and_survived(nobody, tmp_path, capsys):
    fake_init(nobody, [OSError(errno.ENOSPC, "No space left on device")])
    sink = WandbSink(tmp_path, mode="offline")
    assert not sink.active and "W&B could not start" in capsys.readouterr().out


def test_logger_none_takes_everything_and_does_nothing(tmp_path):
    sink = from_yaml("none", tmp_path)
    sink.log(1, {"a": 1.0})
    sink.figure(tmp_path / "absent.png")
    sink.summary({})
    sink.close()
    assert list(tmp_path.iterdir()) == []


# --- figures ----------------------------------------------------------------------------------


def assert_png(path, size):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.size == size
        assert len(image.getcolors(maxcolors=2**24)) > 50  # something is drawn


def test_curves_are_pngs_of_the_promised_size(results, tmp_path):
    accuracy_curves(results, tmp_path / "a.png")
    bytes_curve(results, tmp_path / "b.png")
    assert_png(tmp_path / "a.png", (1200, 720))
    assert_png(tmp_path / "b.png", (1200, 720))


def test_curves_of_one_step_and_of_no_bytes(results, tmp_path):
    single = changed(results, ("steps",), results["steps"][:1])
    single["steps"][0]["bytes"] = {"up": 0, "down": 0}
    accuracy_curves(single, tmp_path / "a.png")
    bytes_curve(single, tmp_path / "b.png")
    assert_png(tmp_path / "a.png", (1200, 720))
    assert_png(tmp_path / "b.png", (1200, 720))


@pytest.mark.parametrize("classes, dim", [(60, 8), (2, 8), (1, 8), (5, 1)])
def test_map_of_prototypes(classes, dim, tmp_path):
    prototypes = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = [f"class {index}" for index in range(classes)]
    groups = [("north", "south", "several")[index % 3] for index in range(classes)]
    for name in ("a.png", "b.png"):
        prototype_map(prototypes, labels, groups, tmp_path / name)
    assert_png(tmp_path / "a.png", (1200, 1050))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_plane_agrees_with_sklearn():
    from sklearn.decomposition import PCA

    points = np.random.default_rng(0).normal(size=(30, 6)) * [5, 4, 3, 2, 1, 0.5]
    plane, shares = principal_plane(points)
    theirs = PCA(2, svd_solver="full").fit(points)
    np.testing.assert_allclose(np.abs(plane), np.abs(theirs.transform(points)), atol=1e-9)
    np.testing.assert_allclose(shares, theirs.explained_variance_ratio_)


def test_plane_does_not_depend_on_the_order_or_the_place_of_the_points():
    points = np.random.default_rng(0).normal(size=(30, 6)) * [5, 4, 3, 2, 1, 0.5]
    plane, _ = principal_plane(points)
    order = np.random.default_rng(1).permutation(30)
    np.testing.assert_allclose(principal_plane(points[order] + 7)[0], plane[order], atol=1e-9)


@pytest.mark.parametrize(
    "name, label",
    [
        ("ARMENIAN CAPITAL LETTER AYB", "Ա"),
        ("dog", "dog"),
        ("DOG", "DOG"),
        ("7", "7"),
        ("golden_retriever_12", "golden_re…ver_12"),
    ],
)
def test_short_label(name, label):
    assert short_label(name) == label


def test_figures_leave_the_users_matplotlib_alone(results, tmp_path):
    code = (
        "import sys, json, pathlib\n"
        "from clfed.reporting.figures import accuracy_curves\n"
        "accuracy_curves(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    arguments = [json.dumps(results), str(tmp_path / "a.png")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)


# --- tables -----------------------------------------------------------------------------------


def rendered(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_summary_table_holds_the_numbers(results):
    text = rendered(summary_table(results))
    merged = next(line for line in text.splitlines() if "merged" in line)
    isolated = next(line for line in text.splitlines() if "isolated" in line)
    # 3 steps of 1500 bytes up and 2500 down over 3 nodes, 2.25 s in all
    assert merged.split()[-6:] == ["merged", "87.0%", "15", "1.5", "2.5", "2.2"]
    assert "12.3% ± 5.0%" in isolated
    assert "kB: over the whole run, for each node" in text and "seed 0" in text


def test_summary_table_takes_costs_of_each_alternative(results):
    results["alternatives"] = {
        "isolated": {"description": "alone [b]", "classes": 4, "seconds": 9.0}
    }
    del results["protocol"]["nodes"]
    text = rendered(summary_table(results))
    isolated = next(line for line in text.splitlines() if "isolated" in line)
    assert "isolated: alone [b]" in text and isolated.split()[-4:] == ["4", "-", "-", "9.0"]
    assert "all nodes together" in text


def test_classifiers_table(results):
    text = rendered(classifiers_table(results))
    assert "87.0%" in text and "4.0" in text and "100.0%" in text
    assert classifiers_table({}) is None


def test_markdown_table():
    rows = [{"learner": "a|b", "accuracy": 0.123456}, {"learner": "ncm", "accuracy": 1, "n": 2}]
    assert markdown_table(rows).splitlines() == [
        "| learner | accuracy | n |",
        "|---|---:|---:|",
        r"| a\|b | 0.1235 |  |",
        "| ncm | 1 | 2 |",
    ]


# --- progress ---------------------------------------------------------------------------------


def paper(**options):
    return Console(file=io.StringIO(), width=100, **options)


def test_without_a_terminal_a_phase_is_two_lines():
    console = paper()
    with progress(console) as track:
        bar = track.phase("base [training]", 3)
        for step in (1, 2, 3):
            bar.update(step, f"loss {1 / step:.2f}")
        bar.close()
        track.phase("merging")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "base [training]: started, 3 steps"
    assert lines[1].startswith("base [training]: done in ") and lines[1].endswith(" s, loss 0.33")
    assert lines[2] == "merging: started" and lines[3].startswith("merging: done in ")
    assert len(lines) == 4


def test_a_phase_that_an_error_stops_says_so():
    console = paper()
    with pytest.raises(ValueError), progress(console) as track:
        track.phase("missions", 10).update(4, "node b")
        raise ValueError
    last = console.file.getvalue().splitlines()[-1]
    assert last.startswith("missions: stopped after 4 of 10 steps") and last.endswith("node b")


def test_a_phase_is_a_block_too():
    console = paper()
    with progress(console) as track, track.phase("tests", 2) as bar:
        bar.update(1)
    assert console.file.getvalue().count("tests: done") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_nested_progress_shares_the_outer_display(terminal):
    console = paper(force_terminal=terminal)
    with progress(console) as outer:
        outer.phase("outer", 2)
        with progress() as inner:
            inner.phase("inner", 1).update(1)
            assert inner is outer
        thread = threading.Thread(target=lambda: nested(outer))
        thread.start()
        thread.join()
        console.print("still alive")
    text = console.file.getvalue()
    assert all(word in text for word in ("outer", "inner", "thread", "still alive"))
    with progress(paper()) as later:
        assert later is not outer


def nested(outer):
    with progress() as track:
        assert track is outer
        track.phase("thread", 1).update(1)


def test_in_a_terminal_there_are_bars():
    console = paper(force_terminal=True)
    with progress(console) as track:
        track.phase("base training", 4).update(4, "loss 0.10")
    text = console.file.getvalue()
    assert "4/4" in text and "loss 0.10" in text and "started" not in text


def test_the_console_module_is_the_one_that_tables_offer():
    from clfed.reporting import console as module
    from clfed.reporting import tables

    assert tables.console is module.console and wandb_sink.console is module.console
    assert module.console() is module.console()
