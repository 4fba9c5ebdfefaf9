"""Which learners run in reconnaissance missions, and that their statistics merge exactly there."""

import pytest
from hydra.utils import get_class

from clfed.config import choices, compose
from clfed.errors import ConfigError
from clfed.jobs import reconnaissance
from clfed.reporting.results import read
from clfed.reporting.tables import summary_table

NOTHING_LEARNED = ("none", "from_file")
NAMES = [name for name, _ in choices("learner") if name not in NOTHING_LEARNED]
FIELD = [
    "data=digits",
    "data.as_features=true",
    "data.base_classes=0",
    "backbone=identity",
    "scenario.nodes=3",
    "scenario.rounds=2",
    "scenario.classes_per_mission=4",
    "scenario.overlap=null",
    "job.finetuned=null",
    "job.joint=null",
    "job.classifiers={}",
    "~job.classifiers.fedcof",
    "logger=none",
]


def settings(name, tmp_path, *more):
    places = [f"run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}"]
    return compose([*FIELD, f"learner={name}", *places, *more])


def kinds():
    for name in NAMES:
        cfg = compose([f"learner={name}"])
        yield name, get_class(cfg.learner._target_).merges, cfg.learner.get("classifier")


EXACT = [name for name, merge, _ in kinds() if merge == "exact"]
OWN_NETWORK = [name for name, _, classifier in kinds() if classifier is None]
REST = [name for name in NAMES if name not in EXACT and name not in OWN_NETWORK]


def test_the_statistics_family_is_exact():
    assert {"ncm", "slda", "fecam", "ranpac", "simplecil", "teen", "protonet"} <= set(EXACT)
    assert {"prd", "lwf", "ewc", "naive"} <= set(OWN_NETWORK)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_learner_merges_to_what_one_node_would_know(name, tmp_path):
    more = ["learner.feature_map.dim_out=64"] if name == "ranpac" else []
    folder = reconnaissance.run(settings(name, tmp_path, *more))
    results = read(folder / "results.json")
    assert results["merged_equals_pooled"] is True
    assert results["nodes_with_final_memory"] == 3
    final = results["final"]["accuracy"]
    assert final["merged"] == final["pooled"] > max(0.7, final["isolated"])
    assert results["learner"] == {"name": name, "merge": "exact"}


@pytest.mark.parametrize("name", OWN_NETWORK)
def test_a_learner_that_answers_with_its_network_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="does not merge exactly"):
        reconnaissance.run(settings(name, tmp_path))
    assert not (tmp_path / name).exists()


def test_what_merges_by_its_settings_says_so(tmp_path):
    results = read(reconnaissance.run(settings("protocl0", tmp_path)) / "results.json")
    assert results["merged_equals_pooled"] and results["learner"]["merge"] == "exact"


def test_a_learner_that_would_go_on_learning_says_what_is_left_of_it(tmp_path):
    assert "sdc" in REST
    folder = reconnaissance.run(settings("sdc", tmp_path))
    results = read(folder / "results.json")
    assert results["merged_equals_pooled"] and results["learner"]["merge"] == "approximate"
    assert "approximately" in str(summary_table(results).caption)
