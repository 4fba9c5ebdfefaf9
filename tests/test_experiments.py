"""Every published set-up runs in its smoke form on the real data."""

import pytest

from clfed.config import choices, compose
from clfed.jobs import reconnaissance
from clfed.reporting.results import read


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in choices("experiment")])
def test_smoke_form_runs_on_the_pack(name, packs, tmp_path):
    folder = reconnaissance.run(
        compose(
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
    )
    results = read(folder / "results.json")
    assert results["merged_equals_pooled"] is True
    assert results["nodes_with_final_memory"] == results["nodes"]
    for step in results["steps"]:
        assert step["accuracy"]["merged"] == step["accuracy"]["pooled"]
    assert results["final"]["accuracy"]["merged"] == results["final"]["accuracy"]["ncm"]
