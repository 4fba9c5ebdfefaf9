"""The command line: what it prints, what it refuses, and what is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clfed
from clfed import cli
from clfed.config import choices
from clfed.prototypes import PrototypeMemory

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "data=digits",
    "data.base_classes=0",
    "backbone=identity",
    "learner=none",
    "scenario.nodes=3",
    "scenario.rounds=2",
    "scenario.classes_per_mission=3",
    "scenario.shots=4",
    "logger=none",
    "job.finetuned.epochs=1",
    "job.joint.epochs=1",
)
FEATURES = (*TINY, "data.as_features=true")


class Ended:
    """What a command left: exit code, output, and the run folder."""

    def __init__(self, code: int, out: str, err: str, folder: Path) -> None:
        self.code, self.out, self.err, self.folder = code, out, err, folder

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def left(self) -> set[str]:
        return {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """The command in this process, in an empty working directory; it runs into ``run``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def call(*arguments: str, into: str | None = "run") -> Ended:
        extra = () if into is None else (f"run_dir={into}",)
        monkeypatch.setattr(sys, "argv", ["clfed", *arguments, *extra])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Ended(code, out, err, tmp_path / (into or "run"))

    return call


def assert_refused(ended: Ended, code: int, *said: str) -> None:
    """One sentence, one remedy, the documented code, and no result that looks like one."""
    assert ended.code == code, ended.err
    first, remedy = ended.err.splitlines()
    assert first.startswith("clfed: ") and remedy.startswith("  ") and remedy.strip()
    for words in said:
        assert words in first, first
    assert "Traceback" not in ended.out + ended.err and "Error executing" not in ended.err
    unfinished = {"results.json", "memory.safetensors"} & ended.left
    assert not unfinished and not [name for name in ended.left if name.endswith(".part")]


def spawn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# What is printed without a run


def test_help_lists_every_choice_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, clfed.cli; sys.argv = ['clfed', '--help']; clfed.cli.main();"
        "heavy = {'torch', 'lightning', 'flwr', 'wandb', 'hydra', 'numpy', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = spawn("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    for group, meaning in cli.GROUPS.items():
        section = done.stdout.split(f"\n{group}: {meaning}\n")[1].split("\n\n")[0]
        listed = {line.split()[0]: line for line in section.splitlines()}
        assert set(listed) == {name for name, _ in choices(group)}
        for name, sentence in choices(group):
            assert sentence and listed[name].endswith(sentence)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_wins_over_everything_else(command, flag):
    ended = command("data=nowhere", flag)
    assert ended.code == 0 and ended.out == cli.help_text() and not ended.err


def test_version(command):
    ended = command("--version")
    assert (ended.code, ended.out) == (0, f"clfed {clfed.__version__}\n")


def test_the_configuration_can_be_looked_at_without_a_run(command):
    ended = command("--cfg", "job", *FEATURES)
    assert ended.code == 0 and "_target_: clfed.data.digits.load" in ended.out
    assert not ended.folder.exists()


# A real run


def test_a_run_ends_with_its_table_and_its_folder(command):
    ended = command(*FEATURES)
    assert ended.code == 0 and not ended.err
    assert "merged" in ended.out and "byte for byte; 3 of 3 nodes" in ended.out
    assert ended.left == {
        "config.yaml",
        "log.txt",
        "metrics.csv",
        "memory.safetensors",
        "results.json",
        "figures/accuracy.png",
        "figures/bytes.png",
        "figures/prototypes.png",
    }
    memory = PrototypeMemory.load(ended.folder / "memory.safetensors")
    assert memory.sha256() == ended.results["final"]["memory_sha256"]


def test_without_a_run_dir_runs_go_under_runs_by_job(command, tmp_path):
    ended = command(*FEATURES, "job.finetuned=null", "job.joint=null", into=None)
    (folder,) = (tmp_path / "runs" / "reconnaissance").iterdir()
    assert ended.code == 0 and (folder / "results.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} <= {"runs", "cache"}


def test_smoke_settings_reach_the_run(command):
    ended = command(*FEATURES, "+when_smoke={seed: 7}", "smoke=true")
    assert ended.code == 0 and ended.results["seed"] == 7


def test_a_sweep_goes_on_after_a_bad_combination_and_ends_with_its_code(command, tmp_path):
    ended = command("-m", *FEATURES, "job.finetuned=null", "job.joint=null", "scenario.shots=4,999")
    assert ended.code == 12 and "999" in ended.err
    assert (tmp_path / "run" / "0" / "results.json").is_file()
    assert not (tmp_path / "run" / "1" / "results.json").exists()


def test_an_interrupt_ends_with_130_and_one_line(command, monkeypatch):
    def interrupt(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr("clfed.jobs.reconnaissance.run", interrupt)
    ended = command(*FEATURES)
    assert (ended.code, ended.err.splitlines()[-1]) == (130, "clfed: interrupted")
    assert "Traceback" not in ended.err


# What is refused


def test_a_refusal_in_a_process_of_its_own(tmp_path):
    done = spawn("-m", "clfed", "nonsense=1", cwd=tmp_path)
    assert done.returncode == 2 and "nonsense" in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense=1"], "nonsense"),
        (["scenario.magic=1"], "scenario.magic"),
        (["data=nowhere"], "data/nowhere"),
        (["engine=warp"], "local ray"),
        (["backbone=vgg99"], "backbone/vgg99"),
        (["experiment=mine"], "experiment/mine"),
        (["data"], "data"),
        (["seed=1,2"], "seed"),
        (["logger=null"], "group"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_configuration_that_does_not_exist_makes_no_folder(command, arguments, said):
    ended = command(*arguments)
    assert_refused(ended, 2, said)
    assert not ended.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["scenario.classes_per_mission=0"], 2, "classes_per_mission"),
        (["scenario.nodes=many"], 2, "nodes"),
        (["scenario.overlap=7"], 2, "overlap"),
        (["scenario.include_base=true"], 2, "include_base"),
        (["+scenario.magic=1"], 2, "magic"),
        (["+data.magic=1"], 2, "magic"),
        (["+trainer.magic=1"], 2, "magic"),
        (["data.base_classes=11"], 2, "base_classes"),
        (["backbone=conv4"], 2, "holds ready features, which backbone Conv4"),
        (["merge=magic"], 2, "magic"),
        (["job.classifier=magic"], 2, "magic"),
        (["+job.classifiers.magic={}"], 2, "magic"),
        (["+job.classifiers.lda={wizardry: 1}"], 2, "wizardry"),
        (["+job.classifiers.lda={}"], 23, "moments"),
        (["merge=legacy_double_shrink", "memory.moments=shared"], 23, "moments"),
        (["strategy._target_=clfed.nowhere"], 2, "clfed.nowhere"),
        (["scenario.classes_per_mission=11"], 12, "10 field classes"),
        (["scenario.shots=1000"], 12, "1000 images of each class"),
        (["data.base_classes=10"], 12, "no field classes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused(command, arguments, code, said):
    assert_refused(command(*FEATURES, *arguments), code, said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=abc"],
        ["seed=-1"],
        ["seed=1.5"],
        ["smoke=abc"],
        ["overwrite=abc"],
        ["job._target_=clfed.nowhere"],
        ["job.draws=0"],
        ["job.draws=abc"],
        ["job.timeout=abc"],
        ["job.classifiers=null"],
        ["job.classifiers.ncm=null"],
        ["job.finetuned.epochs=abc"],
        ["job.finetuned.batch_size=0"],
        ["job.joint.lr=abc"],
        ["job.joint.draws=abc"],
        ["memory.moments=bogus"],
        ["strategy.wait=abc"],
    ],
    ids=" ".join,
)
def test_a_setting_of_the_wrong_kind_is_refused_by_its_name(command, arguments):
    key = arguments[0].split("=")[0]
    assert_refused(command(*FEATURES, *arguments), 2, key.removesuffix("._target_"))


@pytest.mark.parametrize(("part", "code"), [("finetuned", 40), ("joint", 20)])
def test_a_diverged_alternative_is_not_reported_as_a_result(command, part, code):
    assert_refused(command(*FEATURES, f"job.{part}.lr=1e30"), code, "diverged")


# Data


def test_absent_and_damaged_data_are_told_apart(command, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ("data=omniglot", "scenario=class_incremental", "logger=none", "data.root=empty")
    ended = command(*arguments)
    assert_refused(ended, 10, "omniglot.npz")
    assert "data.download=true" in ended.err
    (tmp_path / "empty" / "omniglot.npz").write_bytes(b"not an archive")
    assert_refused(command(*arguments), 11, "omniglot.npz")


# The run folder


def test_a_folder_with_results_is_refused_and_untouched(command):
    first = command(*FEATURES)
    before = {name: (first.folder / name).read_bytes() for name in first.left}
    again = command(*FEATURES, "seed=1")
    assert again.code == 50 and "earlier" in again.err and len(again.err.splitlines()) == 2
    assert {name: (first.folder / name).read_bytes() for name in first.left} == before
    assert command(*FEATURES, "seed=1", "overwrite=true").results["seed"] == 1


def test_a_refused_setting_leaves_the_results_that_it_was_to_overwrite(command):
    before = command(*FEATURES).results
    ended = command(*FEATURES, "overwrite=true", "scenario.nodes=0")
    assert ended.code == 2 and ended.results == before


def test_a_second_try_in_the_folder_of_a_failed_run_mixes_nothing(command):
    assert command(*FEATURES, "+job.classifiers.lda={}").code == 23
    rows = (command(*FEATURES).folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == len({tuple(row.split(",")[:2]) for row in rows})


def test_a_folder_that_cannot_be_made_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    ended = command(*FEATURES, into="file")
    assert ended.code == 50 and len(ended.err.splitlines()) == 2 and "file" in ended.err
    assert (tmp_path / "file").read_text() == "mine"
    if sys.platform == "linux":  # root may write everywhere but here
        assert_refused(command(*FEATURES, into="/proc/clfed"), 50, "/proc/clfed")


# Base training and its cache


@pytest.fixture
def pictures(tmp_path):
    """Five classes of six noisy pictures, 16 x 16, as ``data=folder`` reads them."""
    rng = np.random.default_rng(0)
    for number in range(5):
        place = tmp_path / "pictures" / f"class-{number}"
        place.mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 80, (16, 16)) + 40 * number
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return (
        "data=folder",
        "data.root=pictures",
        "data.image_size=16",
        "data.base_classes=3",
        "backbone.widths=[4,4,4,4]",
        "learner=cross_entropy",
        "learner.steps=2",
        "trainer.threads=1",
        "scenario.nodes=2",
        "scenario.rounds=1",
        "scenario.classes_per_mission=1",
        "scenario.shots=2",
        "scenario.test_images=2",
        "job.finetuned=null",
        "job.joint=null",
        "logger=none",
    )


def test_an_encoder_is_trained_once_and_again_when_its_file_is_damaged(command, pictures, tmp_path):
    def run(name: str) -> tuple[dict, str]:
        ended = command(*pictures, into=name)
        assert ended.code == 0, ended.err
        return ended.results, (ended.folder / "log.txt").read_text()

    first, _ = run("first")
    second, quiet = run("second")
    (file,) = (tmp_path / "cache" / "base").glob("*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    third, told = run("third")
    assert [r["protocol"]["training"]["cached"] for r in (first, second, third)] == [
        False,
        True,
        False,
    ]
    assert "damaged" in told and "damaged" not in quiet
    assert first["final"]["memory_sha256"] == second["final"]["memory_sha256"]
    assert first["final"]["memory_sha256"] == third["final"]["memory_sha256"]
    assert bytes(damaged) != file.read_bytes()


def test_a_diverged_base_training_is_refused(command, pictures):
    ended = command(*pictures, "learner.lr=1e30", "learner.optimizer=sgd", "learner.steps=20")
    assert_refused(ended, 20)


def test_a_cache_that_cannot_be_made_is_refused(command, pictures, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(command(*pictures, "cache_dir=file/cache"), 2, "file/cache")
