"""The report over many runs: what stands together, what is marked, what is left out."""

import copy
import json
import os
import re
import shlex
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from clfed.config import compose
from clfed.errors import ConfigError, RunFolderError
from clfed.jobs.report import run
from clfed.reporting.commands import ASIDE, Recipe, command_lines, differences, recipe, value_text
from clfed.reporting.report import markdown, tables
from clfed.reporting.results import SCHEMA_VERSION
from clfed.reporting.run_folder import RunFolder
from clfed.reporting.run_groups import find_runs

PROTOCOL = {
    "clfed": "0.1.0",
    "data": "Ten digits.",
    "scenario": {"_target_": "clfed.scenarios.split", "experiences": 2, "first_classes": None},
    "classes": 10,
    "pretrained": None,
    "seeds": [0],
    "embedding": "a" * 64,
}


def results(name="ncm", accuracy=0.9, seed=0, **learner):
    """What the continual job writes for one learner."""
    return {
        "job": "continual",
        "version": SCHEMA_VERSION,
        "seed": seed,
        "protocol": {**PROTOCOL, "seeds": [seed], "embedding": f"{seed:064x}"},
        "steps": [
            {
                "step": 1,
                "classes": 10,
                "accuracy": {name: accuracy},
                "bytes": {"up": 0, "down": 0},
                "seconds": 1.0,
            }
        ],
        "final": {
            "accuracy": {name: accuracy, "ncm_cosine": 0.123},
            "memory_sha256": "0" * 64,
            "memory_bytes": 1,
            "seconds": 2.0 + seed,
        },
        "accuracy_matrix": [[accuracy, None], [accuracy, accuracy]],
        "continual": {"acc/inc": accuracy / 2, "forgetting/max": 0.25},
        "learner": {
            "name": name,
            "options": {"_target_": f"clfed.learners.{name}", "lr": 0.1},
            "images_kept": 0,
            "merge": "exact",
            "transductive": False,
            "stored": {"network": 1000, "extra": 500, "images": 0},
            **learner,
        },
    }


def federated(seed=0, merged=0.8, **final):
    """What the reconnaissance job writes."""
    found = results("merged", merged, seed)
    for key in ("accuracy_matrix", "continual", "learner"):
        del found[key]
    found["job"] = "reconnaissance"
    found["protocol"]["training"] = {"steps": 5, "seconds": 1.5 + seed, "cached": bool(seed)}
    found["final"]["accuracy"] = {"merged": merged, "isolated": 0.25, "ncm_cosine": 0.7}
    found["final"] |= final
    costs = {"classes": 10, "bytes": {"up": 1500, "down": 2500}, "seconds": 0.5}
    found["alternatives"] = {"merged": costs, "isolated": {}}
    return found


def write(folder, found, config=None, age=0):
    """Write a run folder as a job would, some seconds ago."""
    target = RunFolder(folder)
    target.write_results(found)
    if config is not None:
        target.write_config(OmegaConf.to_yaml(config))
    moment = target.results.stat().st_mtime - age
    os.utime(target.results, (moment, moment))
    return target.path


def report(*folders, output=None):
    cfg = compose(["job=report"])
    cfg.job.runs, cfg.job.output = [str(f) for f in folders], output and str(output)
    return run(cfg)


def text_of(folder):
    return (report(folder) / "report.md").read_text(encoding="utf-8")


def rows_of(text, number=1):
    """The rows of a Markdown table, as dictionaries."""
    table = text.split(f"## Table {number}")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


# --- rows and columns -------------------------------------------------------------------------


def test_rows_are_means_and_sample_deviations_over_seeds_best_first(tmp_path):
    for seed, accuracy in enumerate((0.90, 0.92, 0.97)):
        write(tmp_path / f"ncm{seed}", results("ncm", accuracy, seed))
    write(tmp_path / "slda", results("slda", 0.95))
    write(tmp_path / "naive", results("naive", 0.19, merge="none"))
    rows = rows_of(text_of(tmp_path))
    assert [row["learner"] for row in rows] == ["slda", "ncm", "naive"]
    assert rows[0] == {
        "learner": "slda",
        "kept images": "0",
        "merge": "exact",
        "accuracy %": "95.00",
        "incremental %": "47.50",
        "forgetting %": "25.00",
        "stored kB": "1.5",
        "seconds": "2.0",
        "seeds": "0",
    }
    deviation = statistics.stdev([90, 92, 97])
    assert rows[1]["accuracy %"] == f"93.00 ± {deviation:.2f}"
    assert rows[1]["forgetting %"] == "25.00 ± 0.00"
    assert rows[1]["seconds"] == "3.0" and rows[1]["seeds"] == "0, 1, 2"
    assert rows[2]["merge"] == "none"


def test_rows_of_other_kinds_are_marked_and_the_marks_explained(tmp_path):
    write(tmp_path / "a", results("icarl", images_kept=200))
    write(tmp_path / "b", results("slk", 0.8, transductive=True))
    write(tmp_path / "c", results("prompt", 0.7, pretrained="imagenet"))
    write(tmp_path / "d", results("all", 0.6, images_kept=5, transductive=True, pretrained=True))
    write(tmp_path / "e", results("ncm", 0.5))
    text = text_of(tmp_path)
    assert [row["learner"] for row in rows_of(text)] == [
        "icarl (buffer)",
        "slk (transductive)",
        "prompt (pre-trained)",
        "all (buffer, transductive, pre-trained)",
        "ncm",
    ]
    assert [row["kept images"] for row in rows_of(text)] == ["200", "0", "0", "5", "0"]
    for mark in ("buffer", "transductive", "pre-trained"):
        assert f"\n- {mark}: " in text


def test_weights_of_the_backbone_mark_every_row(tmp_path):
    found = results()
    found["protocol"]["pretrained"] = "IMAGENET1K_V1"
    write(tmp_path / "a", found)
    assert rows_of(text_of(tmp_path))[0]["learner"] == "ncm (pre-trained)"


def test_the_worst_case_is_a_column_where_it_was_measured(tmp_path):
    watched = results("naive", 0.3)
    watched["stability"] = {"wc_acc": 0.125, "every": 5, "samples": 256}
    write(tmp_path / "a", watched)
    write(tmp_path / "b", results("ncm", 0.9))
    text = text_of(tmp_path)
    assert [row["WC-ACC %"] for row in rows_of(text)] == ["-", "12.50"]
    assert "different intervals" not in text
    watched = copy.deepcopy(watched)
    watched["seed"], watched["stability"]["every"] = 1, 10
    write(tmp_path / "c", watched)
    assert "**Warning:** WC-ACC was measured at different intervals" in text_of(tmp_path)


def test_numbers_of_task_incremental_streams_are_found_under_their_suffix(tmp_path):
    found = results()
    found["continual"] = {"acc/inc_til": 0.75, "forgetting/max_til": 0.125}
    write(tmp_path / "a", found)
    (row,) = rows_of(text_of(tmp_path))
    assert row["incremental %"] == "75.00" and row["forgetting %"] == "12.50"


def test_what_a_run_does_not_say_is_a_dash(tmp_path):
    found = results()
    found["learner"] = {"name": "ncm"}
    found["continual"] = {}
    write(tmp_path / "a", found)
    (row,) = rows_of(text_of(tmp_path))
    assert row["incremental %"] == row["merge"] == row["stored kB"] == "-"


# --- what stands together ---------------------------------------------------------------------


def test_another_protocol_is_another_table(tmp_path):
    write(tmp_path / "a", results("ncm"))
    other = results("slda")
    other["protocol"]["classes"] = 20
    write(tmp_path / "b", other)
    text = text_of(tmp_path)
    assert "## Table 1: continual, split" in text and "## Table 2: continual, split" in text
    assert "2 tables" in text
    assert "- classes: 10" in text and "- classes: 20" in text
    assert [row["learner"] for row in rows_of(text, 2)] == ["slda"]


def test_the_protocol_stands_in_plain_words(tmp_path):
    write(tmp_path / "a", results())
    text = text_of(tmp_path)
    assert "- data: Ten digits.\n- scenario: split (experiences 2)\n- classes: 10\n" in text
    for hidden in ("embedding", "- seeds", "_target_", "pretrained"):
        assert hidden not in text


def test_settings_of_a_learner_make_rows_of_their_own(tmp_path):
    for number, lr in enumerate((0.1, 0.2)):
        for seed in range(2):
            options = {"lr": lr, "head": {"kind": "linear"}, "epochs": 5}
            found = results("naive", 0.5 + 0.1 * number, seed, options=options)
            write(tmp_path / f"{number}{seed}", found)
    text = text_of(tmp_path)
    rows = rows_of(text)
    assert [row["learner"] for row in rows] == ["naive lr=0.2", "naive lr=0.1"]
    assert all(row["seeds"] == "0, 1" for row in rows) and "Warning" not in text


def test_equal_repetitions_count_once(tmp_path):
    write(tmp_path / "a", results(), age=10)
    again = results()
    again["final"]["seconds"] = 7.0  # time is no result
    write(tmp_path / "b", again)
    text = text_of(tmp_path)
    (row,) = rows_of(text)
    assert row["seeds"] == "0" and row["seconds"] == "7.0" and "Warning" not in text


@pytest.mark.parametrize("newer", ["a", "b"])
def test_unequal_repetitions_are_told_and_the_newest_counts(newer, tmp_path):
    config = compose(["job=reconnaissance"])
    changed = copy.deepcopy(config)
    changed.trainer.threads = 7
    values = {"a": 0.9, "b": 0.8}
    for name, settings in (("a", config), ("b", changed)):
        write(tmp_path / name, results("ncm", values[name]), settings, age=10 * (name != newer))
    text = text_of(tmp_path)
    (row,) = rows_of(text)
    assert row["accuracy %"] == f"{100 * values[newer]:.2f}"
    (warning,) = re.findall(r"\*\*Warning:\*\* (.*)", text)
    assert "ncm, seed 0" in warning and "different results (they differ in trainer.threads)" in (
        warning
    )
    assert warning.endswith(f"the newer one, {tmp_path / newer}, is used.")


def test_rows_with_other_seeds_are_told(tmp_path):
    write(tmp_path / "a", results("ncm", seed=0))
    write(tmp_path / "b", results("slda", seed=1))
    assert "**Warning:** the rows do not have the same seeds" in text_of(tmp_path)


# --- reconnaissance ---------------------------------------------------------------------------


def test_federations_have_a_table_of_alternatives(tmp_path):
    write(tmp_path / "a", federated(0, 0.8, spread={"merged": 0.01}))
    write(tmp_path / "b", results())
    text = text_of(tmp_path)
    assert "## Table 1: reconnaissance, split" in text and "## Table 2: continual" in text
    rows = rows_of(text)
    assert [row["alternative"] for row in rows] == ["merged", "isolated"]
    assert rows[0] == {
        "alternative": "merged",
        "accuracy %": "80.00 ± 1.00",  # over the draws of the one run
        "kB up": "1.5",
        "kB down": "2.5",
        "seconds": "0.5",
        "seeds": "0",
    }
    assert rows[1]["kB up"] == rows[1]["seconds"] == "-"


def test_repeated_federations_are_averaged_whatever_their_training_took(tmp_path):
    write(tmp_path / "a", federated(0, 0.8, spread={"merged": 0.01}))
    write(tmp_path / "b", federated(1, 0.9))
    text = text_of(tmp_path)
    assert rows_of(text)[0]["accuracy %"] == f"85.00 ± {statistics.stdev([80, 90]):.2f}"
    assert rows_of(text)[0]["seeds"] == "0, 1" and "1 table," in text


def test_federations_with_other_encoders_do_not_mix(tmp_path):
    for name in ("protonet", "cross_entropy"):
        config = compose(["job=reconnaissance", f"learner={name}"])
        write(tmp_path / name, federated(), config)
    assert "2 tables" in text_of(tmp_path)


def test_results_without_alternatives_show_their_accuracies(tmp_path):
    found = federated()
    del found["alternatives"]
    write(tmp_path / "a", found)
    names = [row["alternative"] for row in rows_of(text_of(tmp_path))]
    assert names == ["merged", "ncm_cosine", "isolated"]


# --- folders ----------------------------------------------------------------------------------


def test_broken_and_foreign_folders_are_counted_with_a_sentence_each(tmp_path, capsys):
    write(tmp_path / "good" / "deep", results())
    foreign = results()
    foreign["job"] = "draw"
    write(tmp_path / "foreign", foreign)
    nameless = results()
    nameless["final"]["accuracy"] = {"other": 0.5}
    write(tmp_path / "nameless", nameless)
    for number, broken in enumerate(("3 kB", True)):
        odd = results(stored={"network": broken})
        write(tmp_path / f"odd{number}", odd)
    for name, content in (("cut", '{"job": '), ("empty", ""), ("list", "[]"), ("schema", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(content)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "results.json").write_bytes(b"\xff\xfe\x00")
    text = text_of(tmp_path)
    assert len(rows_of(text)) == 1
    assert "## Left out: 9 folders" in text
    lines = text.split("## Left out")[1].strip().splitlines()[2:]
    assert len(lines) == 9 and all(line.endswith(".") for line in lines)
    assert any("job=draw has no table" in line for line in lines)
    assert "Runs: 1; folders left out: 9." in capsys.readouterr().out


def test_folders_that_overlap_count_once_and_output_can_lie_elsewhere(tmp_path):
    write(tmp_path / "runs" / "a", results())
    place = report(tmp_path / "runs", tmp_path / "runs" / "a", output=tmp_path / "out" / "here")
    assert place == tmp_path / "out" / "here"
    assert sorted(path.name for path in place.iterdir()) == ["report.md", "report.png"]
    assert not list((tmp_path / "runs").glob("report*"))
    runs, refused = find_runs([tmp_path / "runs", tmp_path / "runs" / "a"])
    assert len(runs) == 1 and not refused


def test_a_report_can_be_made_again(tmp_path):
    write(tmp_path / "a", results())
    first = text_of(tmp_path)
    assert text_of(tmp_path) == first and report(tmp_path) == tmp_path


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match="got none") as caught:
        report(tmp_path)
    assert "job=report" in caught.value.remedy
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunFolderError, match="the first of 1 left out"):
        report(tmp_path)
    with pytest.raises(RunFolderError, match="which is no folder"):
        report(tmp_path / "absent")
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("runs", [[], "runs", [1], [""], None, {"a": "b"}])
def test_bad_lists_of_folders_are_refused(runs):
    cfg = compose(["job=report"])
    cfg.job.runs = runs
    with pytest.raises(ConfigError, match=r"job\.runs"):
        run(cfg)


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    write(tmp_path / "a", results())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="Expected to write into"):
        report(tmp_path, output=tmp_path / "file")
    cfg = compose(["job=report"])
    cfg.job.output = 7
    with pytest.raises(ConfigError, match=r"job\.output"):
        run(cfg)


def test_texts_that_could_break_a_table_are_escaped(tmp_path):
    write(tmp_path / "a", results("a|b"))
    table = markdown(tables(find_runs([tmp_path])[0]), [])
    assert r"| a\|b |" in table


# --- commands ---------------------------------------------------------------------------------

COMMANDS = [
    [],
    ["seed=3", "job.classifier=ncm_cosine"],
    ["experiment=mini20"],
    ["experiment=omniglot600", "smoke=true"],
    ["trainer=fast", "learner=cross_entropy", r"data.root='/a b/it\'s'"],
    ["job=continual", "learner=naive", "learner.lr=0.01", "scenario=permuted"],
    ["job=continual", "learner=ncm", "+job.classifiers.lda={shrinkage: 1.0e-5}"],
]


def plain(overrides):
    config = OmegaConf.to_container(compose(overrides))
    return {key: value for key, value in config.items() if key not in ASIDE}


@pytest.mark.parametrize("overrides", COMMANDS, ids=" ".join)
def test_the_command_found_again_composes_to_the_same_configuration(overrides):
    made = recipe(OmegaConf.to_container(compose(overrides)))
    (line,) = command_lines([(made, [3])])
    program, *words = shlex.split(line)
    assert program == "clfed" and words[-1] == "seed=3"
    assert plain(words) == plain(overrides)


def test_choices_are_named_where_they_explain_everything():
    config = compose(["job=continual", "learner=naive", "scenario=permuted", "trainer=fast"])
    made = recipe(OmegaConf.to_container(config))
    assert made.shared == ("job=continual", "scenario=permuted", "trainer=fast")
    assert made.method == "naive" and made.options == ()


def test_a_setting_that_an_older_run_does_not_know_keeps_its_default():
    config = OmegaConf.to_container(compose(["data=digits"]))
    del config["trainer"]["threads"], config["strategy"]
    assert recipe(config).shared == ("job=reconnaissance", "data=digits")


def test_learners_and_seeds_become_one_sweep():
    shared = ("job=continual", "data=digits")
    found = command_lines(
        [
            (Recipe(shared, "ncm", ()), [0, 1]),
            (Recipe(shared, "naive", ("learner.lr=0.1",)), [0, 1]),
            (Recipe(shared, "slda", ()), [1, 0]),
            (Recipe(shared, "lwf", ()), [0]),
            (Recipe(shared, None, ()), [2]),
        ]
    )
    assert found == [
        "clfed -m job=continual data=digits learner=ncm,slda seed=0,1",
        "clfed -m job=continual data=digits learner=naive learner.lr=0.1 seed=0,1",
        "clfed job=continual data=digits learner=lwf seed=0",
        "clfed job=continual data=digits seed=2",
    ]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 3, -1, 0.5, 1e-5, 1e30, "word", "null", "true", "1.5", "", "a b"),
        *("C:\\data\\", r"a\b\'c'", "\\", "''"),
        *("it's", "x,y", "a=b", "[1]", "ω", [1, "a b", None], {"a": {"b": [1.5, "c d"]}}, [], {}),
    ],
    ids=repr,
)
def test_values_come_back_from_an_override(value):
    read = OmegaConf.to_container(compose([f"+extra={value_text(value)}"]))["extra"]
    assert read == value and type(read) is type(value)


def test_differences_are_overrides():
    old = {"a": 1, "b": {"c": 1, "d": [1]}, "gone": 1}
    new = {"a": 1.0, "b": {"c": 1, "d": [2]}, "new": None}
    assert [*differences(old, new, "k")] == ["k.a=1.0", "k.b.d=[2]", "~k.gone", "+k.new=null"]
    assert not [*differences(old, copy.deepcopy(old), "k")]


def test_the_commands_stand_above_the_table(tmp_path):
    for name in ("ncm", "naive"):
        for seed in (0, 1):
            config = compose(["job=continual", f"learner={name}", f"seed={seed}"])
            write(tmp_path / f"{name}{seed}", results(name, 0.5, seed), config)
    text = text_of(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block == "clfed -m job=continual learner=naive,ncm seed=0,1\n"
    assert text.index("```sh") < text.index("| learner |")


@pytest.mark.parametrize("content", [None, "a: [", "[]", "7", "job: 7", "job: {name: nothing}"])
def test_a_run_without_a_usable_configuration_has_no_command(content, tmp_path):
    folder = write(tmp_path / "a", results())
    if content is not None:
        (folder / "config.yaml").write_text(content)
    text = text_of(tmp_path)
    assert "```sh" not in text and len(rows_of(text)) == 1


# --- the command line -------------------------------------------------------------------------


def test_the_job_runs_from_the_command_line_where_hydra_is_busy(tmp_path):
    config = compose(["job=continual", "learner=ncm"])
    write(tmp_path / "runs" / "a", results(), config)
    arguments = [sys.executable, "-m", "clfed", "job=report"]
    ended = subprocess.run(
        arguments,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "90.00" in ended.stdout and "runs/report.md" in ended.stdout
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "clfed job=continual learner=ncm seed=0" in text
    assert json.loads((tmp_path / "runs" / "a" / "results.json").read_text()) == results()
    (tmp_path / "runs" / "a" / "results.json").unlink()
    ended = subprocess.run(
        arguments,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == RunFolderError.code
    assert len(ended.stderr.strip().splitlines()) == 2


def test_a_report_needs_no_torch():
    code = "import sys, clfed.jobs.report, clfed.reporting.continual"
    subprocess.run(
        [sys.executable, "-c", f"{code}\nassert 'torch' not in sys.modules"],
        check=True,
        cwd=ROOT,
    )
