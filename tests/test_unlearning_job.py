"""The unlearning job from configuration to run folder."""

import json

import pytest
import torch

from clfed.config import compose
from clfed.errors import ClfedError, ConfigError
from clfed.jobs import unlearning, verify
from clfed.jobs.unlearning_stage import Stage
from clfed.learners import state
from clfed.reporting.progress import progress
from clfed.reporting.results import read
from clfed.unlearning.model_file import load_model

QUICK = [
    "job=unlearning",
    "logger=none",
    "backbone.widths=[32,16]",
    "learner.epochs=15",
    "job.oracles=2",
    "job.relearn=10",
    "job.ood_images=60",
]


def configured(tmp_path, *overrides, name="run"):
    where = [f"run_dir={tmp_path / name}", f"cache_dir={tmp_path.parent / 'cache'}"]
    return compose([*QUICK, *where, *overrides])


def run(tmp_path, *overrides, name="run"):
    return unlearning.run(configured(tmp_path, *overrides, name=name))


def without_times(folder):
    results = json.loads((folder / "results.json").read_text())

    def strip(node):
        if isinstance(node, dict):
            times = ("seconds", "ratio", "oracle_seconds", "spread_seconds", "cost")
            return {key: strip(value) for key, value in node.items() if key not in times}
        return [strip(value) for value in node] if isinstance(node, list) else node

    return strip(results)


def test_a_run_leaves_everything_that_is_promised(tmp_path):
    folder = run(tmp_path, "forget.classes=['3']")
    results = read(folder / "results.json")
    found = results["unlearning"]
    assert results["requests"][0]["kind"] == "class"
    assert results["steps"][0]["classes"] == 9
    assert found["kind"] == "class"
    for part in ("measures", "original", "oracle"):
        assert {"ua", "ra", "ta", "mia_confidence", "avg_gap", "aus", "pra"} <= set(found[part])
    assert found["oracle"]["ua"]["mean"] > 0.9  # never saw the class
    assert found["original"]["ua"]["mean"] < 0.2
    assert found["trace"][0]["forget"] > 0.8 > found["trace"][-1]["forget"]
    assert found["cost"]["ratio"] == pytest.approx(
        found["cost"]["seconds"] / found["cost"]["oracle_seconds"]
    )
    for file in ("config.yaml", "metrics.csv", "log.txt"):
        assert (folder / file).is_file()
    drawn = {path.name for path in (folder / "figures").glob("*.png")}
    assert drawn == {"accuracy.png", "attack.png", "embedding.png"}
    (request,) = (folder / "requests").iterdir()
    assert {"certificate.json", "model.pt"} <= {path.name for path in request.iterdir()}


def test_the_numbers_agree_with_a_slow_loop(tmp_path):
    folder = run(tmp_path, "forget=random", "unlearner=finetune", "unlearner.epochs=1")
    results = read(folder / "results.json")
    with progress() as track:
        stage = Stage(configured(tmp_path, "forget=random", name="again"), track)
    (request,) = (folder / "requests").iterdir()
    model = load_model(request / "model.pt", stage.recipe.fresh(stage.holdings.train.classes, 0))
    gone = set(stage.gone[0].tolist())
    right = {"forget": [], "retain": [], "test": []}
    train = stage.holdings.train
    for image, label, number in zip(
        train.images, train.labels.tolist(), stage.holdings.ids.tolist(), strict=True
    ):
        part = "forget" if number in gone else "retain"
        right[part].append(int(model.scores_of(image[None]).argmax()) == label)
    test = stage.holdings.test
    for image, label in zip(test.images, test.labels.tolist(), strict=True):
        right["test"].append(int(model.scores_of(image[None]).argmax()) == label)
    assert len(right["forget"]) == len(gone) == results["requests"][0]["images"]
    for part, answers in right.items():
        expected = sum(answers) / len(answers)
        assert results["steps"][0]["accuracy"][part] == pytest.approx(expected)
    assert results["final"]["memory_sha256"] == state.sha256(model)


def test_same_seed_same_numbers_and_another_seed_other_ones(tmp_path):
    first = run(tmp_path, "unlearner=random_label", name="a")
    second = run(tmp_path, "unlearner=random_label", name="b")
    third = run(tmp_path, "unlearner=random_label", "seed=1", name="c")
    assert without_times(first) == without_times(second)
    assert without_times(first) != without_times(third)


def test_each_seed_is_varied_alone_and_has_its_spread(tmp_path):
    folder = run(tmp_path, "job.originals=2", "job.unlearnings=2", "unlearner=random_label")
    found = read(folder / "results.json")["unlearning"]
    seeds = [(r["original_seed"], r["unlearning_seed"]) for r in found["runs"]]
    assert len(set(seeds)) == 3
    assert seeds[0][1] == seeds[1][1] and seeds[0][0] == seeds[2][0]
    ra = [r["evidence"]["ra"] for r in found["runs"]]
    assert found["measures"]["ra"]["mean"] == pytest.approx(sum(ra) / 3)
    assert found["measures"]["ra"]["original_spread"] == pytest.approx(
        torch.tensor(ra[:2], dtype=torch.float64).std().item()
    )
    assert found["measures"]["ra"]["unlearning_spread"] == pytest.approx(
        torch.tensor([ra[0], ra[2]], dtype=torch.float64).std().item()
    )


def sequence(tmp_path):
    path = tmp_path / "requests.json"
    requests = [
        {"id": "no-threes", "kind": "class", "classes": ["3"]},
        {"id": "north", "kind": "contributor", "contributor": "contributor01"},
        {"id": "no-fives", "kind": "class", "classes": ["5"]},
    ]
    path.write_text(json.dumps({"requests": requests}))
    return path


def test_requests_run_one_after_another_and_leave_a_chain(tmp_path):
    path = sequence(tmp_path)
    folder = run(tmp_path, "forget=file", f"forget.path={path}", "unlearner=random_label")
    results = read(folder / "results.json")
    told = results["unlearning"]["sequence"]
    assert [part["id"] for part in told] == ["no-threes", "north", "no-fives"]
    assert told[0]["earlier"] is None and told[2]["earlier"] is not None
    assert [step["classes"] for step in results["steps"]] == [9, 9, 8]
    names = sorted(path.name for path in (folder / "requests").iterdir())
    assert names == ["01-no-threes", "02-north", "03-no-fives"]
    assert (folder / "figures" / "sequence.png").is_file()
    for name in names:
        certificate = folder / "requests" / name / "certificate.json"
        verify.run(compose(["job=verify", f"job.certificate={certificate}"]))


def test_class_statistics_forget_exactly(tmp_path):
    folder = run(
        tmp_path, "unlearner=exact", "forget=contributor", "forget.contributor=contributor02"
    )
    results = read(folder / "results.json")
    assert results["unlearner"]["exact"] is True
    assert results["unlearner"]["reads"] == "memory"
    touched = results["unlearning"]["runs"][0]["touched"]
    assert set(touched) == {"class statistics"}


def test_evidence_that_costs_trainings(tmp_path):
    few = ["learner.epochs=3", "job.shadows=4", "job.klom=3", "forget=random"]
    folder = run(tmp_path, *few, "unlearner=random_label", "unlearner.epochs=1")
    found = read(folder / "results.json")["unlearning"]
    attacks = {f"{attack}_{part}" for attack in ("lira", "u_lira") for part in ("auc", "tpr")}
    divergences = {f"klom_{part}" for part in ("forget", "retain", "validation")}
    assert attacks | divergences <= set(found["measures"]) & set(found["oracle"])
    assert all(0 <= found["measures"][name]["mean"] <= 1 for name in attacks)
    assert all(0 <= found["measures"][name]["mean"] <= 11.6 for name in divergences)
    assert found["measures"]["challenge"]["mean"] >= 0


REFUSED = {
    "unknown class": ["forget.classes=['nothing']"],
    "no such id": ["forget=samples", "forget.samples=[99999]"],
    "no id": ["forget=samples", "forget.samples=[]"],
    "everything": ["forget=random", "forget.share=1.0"],
    "nobody": ["forget=contributor", "forget.contributor=nobody"],
    "no file": ["forget=file", "forget.path=nowhere.yaml"],
    "no unlearner": ["~unlearner"],
    "another scenario": ["scenario=split"],
    "no learner": ["learner=none"],
    "a learner without a head": ["learner=ncm"],
    "no model": ["job.originals=0"],
    "too few shadow models": ["job.shadows=3"],
    "too few pairs of models": ["job.klom=2"],
    "no such key": ["+unlearner.colour=red"],
}


@pytest.mark.parametrize("overrides", REFUSED.values(), ids=REFUSED)
def test_bad_requests_end_in_one_sentence_and_change_nothing(tmp_path, overrides):
    with pytest.raises(ClfedError) as caught:
        run(tmp_path, *overrides)
    assert caught.value.code > 1
    assert str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_request_file_with_an_extra_key_is_refused(tmp_path):
    path = sequence(tmp_path)
    content = json.loads(path.read_text())
    content["requests"][1]["colour"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(ClfedError, match="colour"):
        run(tmp_path, "forget=file", f"forget.path={path}")
    assert not (tmp_path / "run").exists()


def test_features_have_no_surrogate_images(tmp_path):
    with pytest.raises(ConfigError, match="ready features"):
        run(tmp_path, "unlearner=scar", "data.as_features=true")
