"""The page about strategies names every one, and its example runs; the results page can be made."""

import re
import sys

import pytest
from golden import strategies as golden
from test_federated_report import method
from test_report import write

from clfed import strategies
from clfed.config import choices, compose
from clfed.jobs import federated
from clfed.reporting.results import read

TEXT = golden.PAGE.read_text(encoding="utf-8")
NAMES = {name for name, _ in choices("strategy")}


def between(begin, end):
    return TEXT.partition(begin)[2].partition(end)[0].strip()


def test_the_table_of_strategies_is_up_to_date():
    shown = between(golden.BEGIN, golden.END)
    assert shown == golden.table(), "run python tests/golden/strategies.py"


def test_the_table_of_curricula_and_tiers_is_up_to_date():
    shown = between(golden.AROUND_BEGIN, golden.AROUND_END)
    assert shown == golden.around(), "run python tests/golden/strategies.py"


@pytest.mark.parametrize("heading", ["# Federated methods", "## What it costs"])
def test_every_strategy_has_a_row_and_every_row_a_strategy(heading):
    part = TEXT.partition(f"{heading}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == NAMES


def test_the_comparison_names_every_strategy():
    (line,) = re.findall(r"^clfed -m job=federated .*strategy=prototype_averaging\S*", TEXT, re.M)
    assert set(line.rpartition("strategy=")[2].split(",")) == NAMES


def test_papers_are_found_where_the_modules_name_them():
    papers = {name: golden._paper(cls) for name, _, cls in golden.classes()}
    assert papers["fedavg"] == "[McMahan et al. 2017](https://arxiv.org/abs/1602.05629)"
    assert papers["prototype_averaging"].startswith("[Hendryx et al. 2021](https://arxiv.org/")
    assert [name for name, paper in papers.items() if paper == "none"] == ["local"]


def test_the_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "uniform.py").write_text(code, encoding="utf-8")
    (tmp_path / "conf" / "strategy" / "uniform.yaml").write_text(settings, encoding="utf-8")
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    overrides = [
        *(f"hydra.searchpath=[file://{tmp_path}/conf]", "job=federated", "strategy=uniform"),
        *("data=digits", "backbone=mlp", "backbone.widths=[16]", "learner=none", "logger=none"),
        *("scenario=dirichlet", "scenario.groups=all", "scenario.tasks=1", "scenario.beta=null"),
        *(f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"),
        "+strategy.rounds_per_mission=4",
        "+strategy.local.lr=0.1",
    ]
    try:
        results = read(federated.run(compose(overrides)) / "results.json")
    finally:
        sys.modules.pop("clfed.strategies.uniform", None)
        vars(strategies).pop("uniform", None)
    assert results["method"]["name"] == "uniform"
    assert results["final"]["accuracy"]["union"] > 0.5


def test_the_results_page_is_made_from_runs(tmp_path):
    (tmp_path / "images").mkdir()
    for seed in (0, 1):
        for name, union in (("fedncm", 0.8), ("fedavg", 0.3)):
            config = compose(
                [
                    *("experiment=federated_cifar100", f"strategy={name}", f"seed={seed}"),
                    "data.root=/some/where",
                ]
            )
            write(tmp_path / "runs" / f"{name}{seed}", method(name, union, seed=seed), config)
    sections = [("federated_cifar100", tmp_path / "runs"), ("others", tmp_path / "runs")]
    golden.results(sections, tmp_path)
    text = (tmp_path / "federated_results.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == ["`experiment=federated_cifar100`", "others"]
    assert "/some/where" not in text
    made = text[text.index("\n## ") :]
    assert made.count("data.root=PATH") == 2
    assert "| fedncm | 80.00 ± 0.00 |" in text and "which choose nothing" in text
    for link in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
    (line, _) = re.findall(r"^clfed .*", made, re.MULTILINE)
    assert line.endswith("strategy=fedncm,fedavg seed=0,1")
