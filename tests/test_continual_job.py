"""The continual job from configuration to run folder."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from clfed.cli import main
from clfed.config import compose
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, UnsupportedStatistics
from clfed.evaluation.exam import Exam
from clfed.jobs import continual
from clfed.reporting.results import read

QUICK = ["job=continual", "trainer=fast", "logger=none"]
PIXELS = ["data.as_features=true", "backbone=identity", "learner=slda"]


def run(tmp_path, *overrides, name="run", base=("learner=naive", "learner.epochs=2")):
    chosen = [] if any(o.startswith("learner=") for o in overrides) else list(base)
    cfg = compose([*QUICK, *chosen, f"run_dir={tmp_path / name}", *overrides])
    return continual.run(cfg)


def same(first, second):
    """Results without times."""
    found = []
    for folder in (first, second):
        results = json.loads((folder / "results.json").read_text())
        results["final"].pop("seconds")
        for step in results["steps"]:
            step.pop("seconds")
        found.append(results)
    return found[0] == found[1]


def test_a_run_leaves_everything_that_is_promised(tmp_path):
    folder = run(tmp_path, "job.stability.every=5")
    results = read(folder / "results.json")
    assert [step["classes"] for step in results["steps"]] == [2, 4, 6, 8, 10]
    matrix = results["accuracy_matrix"]
    assert all(
        (value is None) == (i > t) for t, row in enumerate(matrix) for i, value in enumerate(row)
    )
    assert results["final"]["accuracy"]["naive"] == results["steps"][-1]["accuracy"]["naive"]
    assert results["continual"]["acc/all"] == pytest.approx(results["final"]["accuracy"]["naive"])
    assert 0 <= results["continual"]["wc_acc"] <= results["continual"]["learning"]
    assert results["learner"]["images_kept"] == 0
    assert results["learner"]["stored"]["extra"] == 0
    for file in ("config.yaml", "learner.pt", "metrics.csv", "log.txt"):
        assert (folder / file).is_file()
    drawn = {path.name for path in (folder / "figures").glob("*.png")}
    assert drawn == {"accuracy.png", "accuracy_matrix.png", "stability.png"}
    names = {line.split(",")[1] for line in (folder / "metrics.csv").read_text().splitlines()}
    assert {"cl/acc/all", "cl/loss/classification", "cl/acc/experience0"} <= names


def test_the_exam_agrees_with_a_slow_loop(tmp_path):
    cfg = compose([*QUICK, *PIXELS, f"run_dir={tmp_path / 'run'}"])
    results = read(continual.run(cfg) / "results.json")
    benchmark = continual.open_benchmark(OmegaConf.to_container(cfg.data))
    stream = continual.open_stream(OmegaConf.to_container(cfg.scenario), benchmark, cfg.seed)
    learner = continual.new_learner(cfg, benchmark, stream)
    saved = torch.load(tmp_path / "run" / "learner.pt", weights_only=True)
    from clfed.learners import state

    state.restore(learner, saved["learner"])
    right = total = 0
    for test in stream.tests:
        for image, label in zip(test.images, test.labels.tolist(), strict=True):
            scores = learner.scores_of(image[None])
            right += learner.classes[int(scores.argmax())] == test.classes[label]
            total += 1
    assert total == results["protocol"]["test_images"]
    assert right / total == pytest.approx(results["final"]["accuracy"]["slda"])
    assert state.sha256(learner) == results["final"]["memory_sha256"]


def test_a_run_that_was_killed_goes_on_to_the_same_results(tmp_path, monkeypatch):
    options = ("job.stability.every=4",)
    whole = run(tmp_path, *options, name="whole")
    learn, calls = continual.learn, []

    def killed(learner, experience, *rest, **more):
        calls.append(experience.number)
        if experience.number == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return learn(learner, experience, *rest, **more)

    monkeypatch.setattr(continual, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *options, name="cut")
    assert not (tmp_path / "cut" / "results.json").exists()
    cut = run(tmp_path, *options, name="cut")
    assert calls == [0, 1, 2, 3, 3, 4]
    assert same(whole, cut)
    assert (whole / "learner.pt").stat().st_size == (cut / "learner.pt").stat().st_size
    rows = [(p / "metrics.csv").read_text().splitlines() for p in (whole, cut)]
    kept = [[line for line in part if "seconds" not in line] for part in rows]
    assert kept[0] == kept[1]


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_not_used(tmp_path, monkeypatch):
    learn = continual.learn

    def killed(learner, experience, *rest, **more):
        if experience.number == 2:
            raise KeyboardInterrupt
        return learn(learner, experience, *rest, **more)

    for case, change in (("other", ["seed=1"]), ("damaged", [])):
        monkeypatch.setattr(continual, "learn", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, name=case)
        if case == "damaged":
            file = tmp_path / case / "learner.pt"
            file.write_bytes(file.read_bytes()[:-100])
        monkeypatch.setattr(continual, "learn", learn)
        folder = run(tmp_path, *change, name=case)
        assert "starting anew" in (folder / "log.txt").read_text()
        assert same(folder, run(tmp_path, *change, name=f"fresh {case}"))


def test_looking_changes_nothing(tmp_path):
    plain = read(run(tmp_path, name="plain") / "results.json")
    watched = read(run(tmp_path, "job.stability.every=1", name="watched") / "results.json")
    assert plain["final"]["memory_sha256"] == watched["final"]["memory_sha256"]
    assert plain["accuracy_matrix"] == watched["accuracy_matrix"]


def test_both_loops_give_the_same_results(tmp_path):
    fast = run(tmp_path, name="fast")
    lightning = run(tmp_path, "trainer.loop=lightning", name="lightning")
    assert same(fast, lightning)


def test_task_incremental_answers_within_the_task(tmp_path):
    class_wise = read(run(tmp_path, name="class") / "results.json")
    task_wise = read(run(tmp_path, "scenario.setting=task", name="task") / "results.json")
    assert task_wise["continual"]["acc/avg_til"] > class_wise["continual"]["acc/avg"] + 0.2
    assert "acc/avg" not in task_wise["continual"]
    assert "own experience" in task_wise["protocol"]["label_space"]


def test_domain_incremental_has_forward_transfer(tmp_path):
    results = read(run(tmp_path, "scenario=permuted", "scenario.experiences=3") / "results.json")
    assert all(value is not None for row in results["accuracy_matrix"] for value in row)
    assert "fwt" in results["continual"]


ONLINE = ("scenario=online", "scenario.size=50", "learner.epochs=1", "learner.batch_size=10")


def test_an_online_stream_is_examined_where_its_phases_end(tmp_path):
    results = read(run(tmp_path, "learner=naive", *ONLINE) / "results.json")
    assert results["protocol"]["experiences"] > results["protocol"]["phases"] == 5
    assert len(results["accuracy_matrix"]) == len(results["steps"]) == 5
    assert sum(step["images"] for step in results["steps"]) == 899
    assert sum(step["updates"] for step in results["steps"]) >= 89


def test_an_online_stream_forgets_no_optimiser_between_its_pieces(tmp_path):
    """Adam's count of steps goes on from piece to piece."""
    from clfed.learners.fitting import learn
    from clfed.learners.options import TrainerOptions

    cfg = compose([*QUICK, "learner=naive", *ONLINE, f"run_dir={tmp_path}"])
    benchmark = continual.open_benchmark(OmegaConf.to_container(cfg.data))
    stream = continual.open_stream(OmegaConf.to_container(cfg.scenario), benchmark, 0)
    learner = continual.new_learner(cfg, benchmark, stream)
    options = TrainerOptions(precision="32", threads=1, loop="fast")
    for number, experience in enumerate(stream.experiences[:3], start=1):
        learn(learner, experience, options)
        step = learner.optimiser_state["backbone.layers.1.weight"]["step"]
        assert int(step) == 5 * number


@pytest.mark.parametrize("name", ["lwf", "prd", "sdc", "ewc"])
def test_a_learner_that_needs_boundaries_refuses_an_online_stream(tmp_path, name):
    with pytest.raises(ConfigError, match="where an experience ends"):
        run(tmp_path, f"learner={name}", *ONLINE)


@pytest.mark.parametrize("scenario", ["rotated", "power_law"])
def test_other_streams_run(tmp_path, scenario):
    results = read(run(tmp_path, f"scenario={scenario}", "scenario.experiences=2") / "results.json")
    assert results["protocol"]["replay_free_stream"] is (scenario != "power_law")
    assert len(results["accuracy_matrix"]) == 2


def test_few_classes_of_few_images_are_reported_apart(tmp_path):
    few = ["scenario=few_shot", "scenario.base_classes=4", "scenario.way=2", "scenario.sessions=3"]
    pixels = ["data.as_features=true", "backbone=identity", "learner=teen", "learner.train=none"]
    results = read(run(tmp_path, *few, *pixels, "+job.classifiers.ncm={}") / "results.json")
    rows = results["classifiers"]
    assert set(rows) == {"teen", "ncm"}
    matrix, tests = results["accuracy_matrix"][-1], results["protocol"]["test_images"]
    assert rows["teen"]["first"] == matrix[0] == results["continual"]["acc/first"]
    both = rows["teen"]
    share = (both["accuracy"] - both["later"]) / (both["first"] - both["later"])
    assert 0.35 < share < 0.45 and tests == 898
    assert both["harmonic"] == pytest.approx(2 / (1 / both["first"] + 1 / both["later"]), abs=1e-12)


def test_further_classifiers_are_read_off_the_same_memory(tmp_path):
    results = read(run(tmp_path, *PIXELS, "+job.classifiers.ncm={}") / "results.json")
    assert results["final"]["accuracy"]["ncm"] == pytest.approx(0.8987, abs=2e-3)
    assert results["final"]["accuracy"]["slda"] == pytest.approx(0.9421, abs=2e-3)
    assert results["classifiers"]["ncm"]["accuracy"] == results["final"]["accuracy"]["ncm"]


def test_unknown_classes_are_told_from_known_ones(tmp_path):
    folder = run(tmp_path, "learner=palm", "learner.epochs=5", "learner.batch_size=32")
    results = read(folder / "results.json")
    assert 0.6 < results["continual"]["unknown/auroc"] <= 1
    assert 0 <= results["continual"]["unknown/fpr95"] < 0.95
    assert [bool(step["unknown"]) for step in results["steps"]] == [True] * 4 + [False]


def test_retrieval_is_reported_when_asked_for(tmp_path):
    results = read(run(tmp_path, *PIXELS, "job.recall_at=[1,4]") / "results.json")
    found = results["continual"]
    assert 0.9 < found["recall@1"] <= found["recall@4"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scenario=multi_client"], "stream of experiences"),
        (["learner=none"], "learner=none"),
        (["data.as_features=true", "backbone=conv4"], "ready features"),
        (["job.stability.every=0"], "job.stability.every"),
        (["job.stability.every=true"], "job.stability.every"),
        (["job.stability.windows=[1]"], "job.stability.windows"),
        (["job.recall_at=[0]"], "job.recall_at"),
        (["job.resume=7"], "job.resume"),
        (["+job.classifiers.magic={}"], "magic"),
        (["learner.logits=some"], "learner.logits"),
        (["learner.loss=hinge"], "learner.loss"),
        (["learner.train=twice"], "learner.train"),
        (["learner.epochs=-1"], "epochs"),
        (["+learner.magic=1"], "magic"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *overrides)
    assert not (tmp_path / "run").exists()


def test_rotations_are_refused_where_they_would_be_ignored(tmp_path):
    with pytest.raises(ConfigError, match=r"learner\.rotations"):
        run(tmp_path, "learner=ncm", "+learner.rotations=true")


def test_the_recursion_of_streaming_lda_runs(tmp_path):
    results = read(run(tmp_path, *PIXELS, "learner.mode=paper") / "results.json")
    assert results["final"]["accuracy"]["slda"] == pytest.approx(0.94, abs=5e-3)
    assert results["learner"]["merge"] == "none"


def test_a_classifier_without_its_statistics_is_refused(tmp_path):
    with pytest.raises(UnsupportedStatistics):
        run(tmp_path, *PIXELS, "learner.moments=none")
    assert not (tmp_path / "run").exists()


def test_the_command_runs_the_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["clfed", *QUICK, "learner=naive", f"run_dir={tmp_path / 'run'}"]
    )
    main()
    shown = capsys.readouterr().out
    assert "average incremental accuracy" in shown and "run folder:" in shown


class Parrot:
    """Answers always the same."""

    classes = ("a", "b", "c")

    def scores_of(self, images):
        return torch.tensor([[0.0, 2.0, 1.0]]).repeat(len(images), 1)


def test_marks_by_hand():
    def tests(*labels, names):
        return ImageSet(torch.zeros(len(labels), 3), torch.tensor(labels), names)

    parts = [tests(0, 1, 1, names=("a", "b")), tests(0, names=("c",)), tests(0, names=("z",))]
    marks = Exam(parts).take(Parrot(), met=2)
    assert marks.phases == [pytest.approx(2 / 3), 0.0, None]
    assert marks.images == 0.5 and marks.per_class == {"a": 0.0, "b": 1.0, "c": 0.0}
    assert marks.balanced == pytest.approx(1 / 3)
    assert Exam(parts, restricted=True).take(Parrot(), met=1).phases[1] == 1.0
    assert Exam(parts).take(Parrot(), met=1).images == pytest.approx(2 / 3)
