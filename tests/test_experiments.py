"""Every published set-up runs in its smoke form on the real data."""

import pytest
from hydra.utils import get_method

from clfed.config import choices, compose
from clfed.reporting.results import read

NAMES = [name for name, _ in choices("experiment")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_form_runs_on_the_pack(name, packs, tmp_path):
    cfg = compose(
        [
            f"experiment={name}",
            "smoke=true",
            f"data.root={packs}",
            f"run_dir={tmp_path / 'run'}",
            f"cache_dir={tmp_path / 'cache'}",
            "logger=none",
            "trainer.threads=1",
        ]
    )
    results = read(get_method(cfg.job._target_)(cfg) / "results.json")
    if results["job"] == "reconnaissance":
        assert results["merged_equals_pooled"] is True
        assert results["nodes_with_final_memory"] == results["nodes"]
        for step in results["steps"]:
            assert step["accuracy"]["merged"] == step["accuracy"]["pooled"]
        assert results["final"]["accuracy"]["merged"] == results["final"]["accuracy"]["ncm"]
    elif results["job"] == "unlearning":
        found = results["unlearning"]
        assert found["measures"].keys() >= found["original"].keys() >= {"ua", "ra", "ta", "avg_gap"}
        assert found["cost"]["oracle_seconds"] > 0
        assert len(found["trace"]) > 1
    elif results["job"] == "federated":
        missions = len(results["accuracy_by_mission"])
        assert missions == results["protocol"]["missions"]
        assert 1 < results["steps"][-1]["classes"] <= results["protocol"]["classes"]
        assert results["final"]["bytes"]["up"] > 0
    else:
        phases = len(results["accuracy_matrix"])
        assert phases == len(results["steps"]) == results["protocol"]["phases"] > 1
        assert results["steps"][-1]["classes"] == results["protocol"]["classes"]
