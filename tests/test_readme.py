"""Every command of the documentation composes, and every code block runs."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from clfed import data, learners, strategies, unlearning
from clfed.cli import COMMANDS, GROUPS
from clfed.config import choices, compose
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import InvalidMessage
from clfed.jobs.reconnaissance import run
from clfed.jobs.unlearning import run as unlearn
from clfed.learners.training import BaseTraining, train_base
from clfed.prototypes import Contribution, PrototypeMemory

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(
    r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(*languages):
    """Every code block of the documentation in one of these languages."""
    return [
        code for page in PAGES.values() for lang, code in BLOCK.findall(page) if lang in languages
    ]


def commands(program):
    """Arguments of every command line of a program in a shell block."""
    lines = [line for code in blocks("sh") for line in code.splitlines()]
    parsed = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in parsed if words and words[0] == program]


def swept(text):
    """The values of a key; Hydra sweeps over commas that stand in no bracket."""
    parts = [""]
    depth = 0
    for letter in text:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def runs(arguments):
    """The override lists of a command line: one for a run; of a sweep so many that each value of
    each key is in one."""
    words = list(arguments)
    if "--cfg" in words:
        del words[words.index("--cfg") : words.index("--cfg") + 2]
    if "-m" not in words:
        return [words]
    words.remove("-m")
    keys = [word.partition("=") for word in words]
    values = [[f"{key}={value}" for value in swept(values)] for key, _, values in keys]
    longest = max(map(len, values))
    return [[choice[row % len(choice)] for choice in values] for row in range(longest)]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The files that the README shows, importable from where it says that they lie."""
    files = dict(NAMED.findall(README))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for package in (learners, data, unlearning):
        folder = package.__name__.replace(".", "/")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / folder)])
    paths = [*strategies.__path__, str(tmp_path / "strategies")]
    monkeypatch.setattr(strategies, "__path__", paths)
    before = set(sys.modules)
    yield f"hydra.searchpath=[file://{tmp_path}/conf]"
    for name in set(sys.modules) - before:
        if name.rpartition(".")[2] in {Path(file).stem for file in files}:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            delattr(sys.modules[parent], child)


def test_every_command_composes(examples):
    lines = [words for words in commands("clfed") if words[:1] not in ([c] for c in COMMANDS)]
    assert len(lines) >= 8
    for arguments in lines:
        for overrides in runs(arguments):
            assert compose([examples, *overrides]).job.name, overrides


def test_every_line_for_real_nodes_parses():
    lines = [words for words in commands("clfed") if words and words[0] in COMMANDS]
    assert {words[0] for words in lines} == {*COMMANDS}
    for name, *arguments in lines:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"clfed.commands.{name}").add_arguments(parser)
        parsed = parser.parse_intermixed_args(arguments)
        assert not getattr(parsed, "overrides", None) or compose(parsed.overrides)


def test_every_target_of_make_exists():
    targets = {argument for arguments in commands("make") for argument in arguments}
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_choice_named_exists():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README, re.MULTILINE)
    assert {group for group, _ in rows} == set(GROUPS)
    for group, cell in rows:
        named = set(re.findall(r"`(\w+)`", cell))
        assert named and named <= {name for name, _ in choices(group)}, group


def test_every_override_in_the_text_composes():
    inline = re.findall(r"`((?:[a-z_]+\.)*[a-z_]+=[^`\s]+)`", README)
    assert inline
    for override in inline:
        assert compose([override]), override


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if not link.startswith("https://"):
                assert ((ROOT / page).parent / link).is_file(), link


def test_every_python_block_of_a_program_runs():
    files = [code for _, code in NAMED.findall(README)]
    programs = [code for code in blocks("python") if code not in files]
    assert programs
    for code in programs:
        exec(compile(code, "README.md", "exec"), {})


def test_examples_are_short():
    files = dict(NAMED.findall(README))
    assert len(files) == 8 and all(len(text.splitlines()) <= 20 for text in files.values())


def test_the_learner_trains(examples, tmp_path):
    cfg = compose([examples, "learner=supcon", "learner.epochs=1", "trainer.threads=1"])
    rng = torch.Generator().manual_seed(0)
    names = tuple(map(str, range(31)))
    labels = torch.arange(31).repeat_interleave(10)
    images = torch.randint(256, (len(labels), 1, 16, 16), generator=rng, dtype=torch.uint8)
    groups = {"base": names[:30], "validation": (), "field": names[30:]}
    benchmark = Benchmark(
        "noise", ImageSet(images, labels, names), None, groups, (0.5,), (0.3,), ""
    )
    settings = BaseTraining.from_config(cfg)
    trained = train_base(settings, benchmark, seed=0, cache=tmp_path / "cache")
    other = train_base(settings, benchmark, seed=1, cache=tmp_path / "cache")
    assert trained.summary.steps == 2
    assert trained.encoder.embedding_id != other.encoder.embedding_id


def test_the_unlearner_forgets(examples, tmp_path):
    places = [f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "logger=none"]
    small = ["learner.epochs=15", "job.oracles=1", "job.relearn=0"]
    folder = unlearn(compose([examples, "job=unlearning", "unlearner=uniform", *small, *places]))
    results = json.loads((folder / "results.json").read_text())
    measures = results["unlearning"]["measures"]
    assert measures["ua"]["mean"] > 0.9
    assert measures["ra"]["mean"] > 0.9


def test_the_data_set_and_the_strategy_run(examples, tmp_path):
    (line,) = [words for words in commands("clfed") if "data=wine" in words]
    folder = tmp_path / "run"
    places = [f"run_dir={folder}", f"cache_dir={tmp_path / 'cache'}"]
    run(compose([examples, *line, *places, "logger=none", "job.finetuned=null", "job.joint=null"]))
    results = json.loads((folder / "results.json").read_text())
    assert results["merged_equals_pooled"] and results["final"]["accuracy"]["merged"] > 0.8
    cautious = importlib.import_module("clfed.strategies.cautious").Cautious
    strategy = cautious(PrototypeMemory.empty(2, "demo"), most=2)
    seen = PrototypeMemory.empty(2, "demo").observe(torch.ones(3, 2), ["owl"] * 3)
    with pytest.raises(InvalidMessage, match="expected 0 to 2 examples of 'owl'"):
        strategy.ledger.receive(Contribution.of("liar", 1, seen))
