"""The main job from end to end, against plain numpy on the same digits."""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from golden import regenerate
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from clfed.config import compose
from clfed.errors import FederationError
from clfed.federated.client_app import app
from clfed.federated.field import field_settings, open_field
from clfed.federated.grid import LocalGrid
from clfed.jobs import reconnaissance
from clfed.prototypes import PrototypeMemory
from clfed.reporting.results import validate
from clfed.seeding import derive_seed

DIGITS = (
    "data=digits",
    "data.as_features=true",
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
BARE = (*DIGITS, "job.finetuned=null", "job.joint=null")
WITH_BASE = (*BARE, "data.base_classes=5", "scenario.include_base=true", "scenario.rounds=3")


@pytest.fixture
def job(tmp_path):
    """Run the job: ``results, folder, plans``, one plan a draw."""
    runs = 0

    def run(*overrides: str, engine=None):
        nonlocal runs
        runs += 1
        places = (f"run_dir={tmp_path / str(runs)}", f"cache_dir={tmp_path / 'cache'}")
        cfg = compose([*overrides, *places])
        folder = reconnaissance.run(cfg, engine)
        plain = OmegaConf.to_container(cfg)
        seeds = [derive_seed(cfg.seed, "draw", draw) for draw in range(cfg.job.draws)]
        drawn = [field_settings(plain["data"], plain["scenario"], seed) for seed in seeds]
        plans = [open_field(settings).plan for settings in drawn]
        return json.loads((folder / "results.json").read_text()), folder, plans

    return run


def untimed(results: object) -> object:
    """Results without what a clock measured."""
    if isinstance(results, dict):
        return {key: untimed(value) for key, value in results.items() if key != "seconds"}
    return [untimed(item) for item in results] if isinstance(results, list) else results


# The slow oracle: evidence as lists of vectors by class, nearest mean by looking at every class.

Evidence = Mapping[str, list[np.ndarray]]


def digits(part: int, names: Iterable[str]) -> list[tuple[str, np.ndarray]]:
    """Images of these classes at even (0) or odd (1) positions."""
    bunch = load_digits()
    pairs = zip(bunch.target[part::2], bunch.data[part::2] / 16, strict=True)
    return [(str(label), image) for label, image in pairs if str(label) in set(names)]


def evidence(pairs: Iterable[tuple[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for name, image in pairs:
        found.setdefault(name, []).append(image)
    return found


def met(plan, upto: int, node: int | None = None, since: int = 1) -> list[tuple[str, np.ndarray]]:
    """What a node, or all of them, met from one round to another."""
    return [
        (plan.support.classes[plan.support.labels[i]], plan.support.images[i].double().numpy())
        for mission in plan.missions
        if since <= mission.round <= upto and node in (None, mission.node)
        for i in mission.indices.tolist()
    ]


def score(means: Mapping[str, np.ndarray], names: Iterable[str]) -> float:
    """Accuracy over the test images of these classes; all classes with a mean compete."""
    right = [
        bool(means) and min(means, key=lambda c: float(np.sum((image - means[c]) ** 2))) == name
        for name, image in digits(1, names)
    ]
    return sum(right) / len(right)


def ncm(pairs: Iterable[tuple[str, np.ndarray]], names: Iterable[str]) -> float:
    means = {name: np.mean(images, axis=0) for name, images in evidence(pairs).items()}
    return score(means, names)


# What a run leaves


def test_everything_that_is_promised_is_in_the_run_folder(job):
    results, folder, _ = job(*DIGITS)
    validate(results)
    alternatives = {"merged", "pooled", "isolated", "finetuned"}
    assert [set(step["accuracy"]) for step in results["steps"]] == [alternatives] * 2
    classifiers = {"ncm", "ncm_cosine", "fedcof"}
    assert set(results["final"]["accuracy"]) == alternatives | classifiers | {"joint"}
    assert set(results["classifiers"]) == classifiers
    assert results["final"]["accuracy"]["ncm"] == results["final"]["accuracy"]["merged"]
    assert results["nodes_with_final_memory"] == results["nodes"] == 3
    stored = (folder / "memory.safetensors").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == results["final"]["memory_sha256"]
    for name in ("accuracy", "bytes", "prototypes"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "seed: 0" in (folder / "config.yaml").read_text()


def test_metrics_csv_holds_every_accuracy_of_every_step(job):
    results, folder, _ = job(*DIGITS)
    with (folder / "metrics.csv").open() as file:
        rows = {(int(r["step"]), r["name"]): float(r["value"]) for r in csv.DictReader(file)}
    for step in results["steps"]:
        number = step["step"]
        assert rows[number, "fed/classes"] == step["classes"]
        assert rows[number, "fed/bytes/up"] == step["bytes"]["up"]
        for name, value in step["accuracy"].items():
            assert rows[number, f"fed/accuracy/{name}"] == value


def test_alternatives_can_be_left_out(job):
    results, _, _ = job(*BARE)
    assert not {"finetuned", "joint"} & set(results["final"]["accuracy"])
    assert not {"finetuned", "joint"} & set(results["alternatives"])


# Numbers


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_merged_is_pooled_and_both_are_the_nearest_mean_of_numpy(job, seed):
    results, folder, (plan,) = job(*BARE, f"seed={seed}")
    assert results["merged_equals_pooled"] is True
    for step in results["steps"]:
        round_, known = step["step"], plan.known(step["step"])
        assert step["classes"] == len(known)
        assert step["accuracy"]["merged"] == step["accuracy"]["pooled"]
        assert step["accuracy"]["merged"] == ncm(met(plan, round_), known)
        alone = [ncm(met(plan, round_, node), known) for node in range(3)]
        assert step["accuracy"]["isolated"] == pytest.approx(np.mean(alone))
    memory = PrototypeMemory.load(folder / "memory.safetensors")
    by_hand = evidence(met(plan, plan.rounds))
    assert memory.classes == tuple(sorted(by_hand))
    for row, name in enumerate(memory.classes):
        assert memory.counts[row] == len(by_hand[name])
        # Pixels are sixteenths, so sums in units of 2**-16 are whole numbers.
        expected = (np.sum(by_hand[name], axis=0) * 2**16).astype(np.int64)
        assert memory.sums[row].tolist() == expected.tolist()


def test_base_classes_compete_and_each_stage_is_scored_as_the_paper_does(job):
    results, _, (plan,) = job(*WITH_BASE)
    base = ("0", "1", "2", "3", "4")
    home = digits(0, base)
    (stages,) = results["stages"]
    assert stages["eval0"] == {"base": ncm(home, base)}
    seen = []
    for entry in stages["eval1"]:
        round_, node = entry["step"], int(entry["node"].removeprefix("node-"))
        seen.append((round_, node))
        before = home + met(plan, round_ - 1)
        mission = met(plan, round_, node, since=round_)
        parts = {
            "base": ncm(before + mission, base),
            "mission": ncm(before + mission, {name for name, _ in mission}),
        }
        if plan.known(round_ - 1):
            parts["previous"] = ncm(before + mission, plan.known(round_ - 1))
        mean = pytest.approx(np.mean(list(parts.values())))
        assert entry == {"step": round_, "node": entry["node"], "mean": mean, **parts}
    assert seen == [(r, n) for r in (1, 2, 3) for n in range(3)]
    for entry, step in zip(stages["eval2"], results["steps"], strict=True):
        everything = home + met(plan, entry["step"])
        assert entry["base"] == ncm(everything, base)
        assert entry["field"] == ncm(everything, plan.known(entry["step"]))
        assert entry["field"] == step["accuracy"]["merged"] == step["accuracy"]["pooled"]
        alone = [
            ncm(home + met(plan, entry["step"], n), plan.known(entry["step"])) for n in range(3)
        ]
        assert step["accuracy"]["isolated"] == pytest.approx(np.mean(alone))


def test_classifiers_with_second_moments_agree_with_sklearn(job):
    results, _, (plan,) = job(
        *BARE,
        "memory.moments=shared",
        "+job.classifiers.lda={shrinkage: 0.1, target: trace, priors: empirical}",
        "+job.classifiers.ridge={penalty: 2.0}",
    )
    labels, images = zip(*met(plan, plan.rounds), strict=True)
    truth, queries = zip(*digits(1, plan.known(plan.rounds)), strict=True)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(images, labels)
    onehot = np.array([[label == name for name in plan.known(plan.rounds)] for label in labels])
    ridge = Ridge(alpha=2.0, fit_intercept=False).fit(images, onehot.astype(float))
    answers = np.array(plan.known(plan.rounds))[ridge.predict(queries).argmax(1)]
    accuracy = results["final"]["accuracy"]
    assert accuracy["lda"] == pytest.approx(lda.score(queries, truth), abs=1.5 / len(truth))
    assert accuracy["ridge"] == pytest.approx(np.mean(answers == truth), abs=1.5 / len(truth))


def legacy_means(plan) -> dict[str, np.ndarray]:
    """The published rule, retyped: clients merge into what was broadcast, the server merges that.

    nu = (n0 mu0 + m xbar) / (n0 + m);  mu += m / (n + m) (nu - mu);  n += m
    """
    count: dict[str, int] = {}
    mean: dict[str, np.ndarray] = {}
    for round_ in range(1, plan.rounds + 1):
        sent_count, sent_mean = dict(count), dict(mean)
        for node in range(plan.nodes):
            for name, images in evidence(met(plan, round_, node, since=round_)).items():
                m, own, n0 = len(images), np.mean(images, axis=0), sent_count.get(name, 0)
                nu = (n0 * sent_mean.get(name, 0) + m * own) / (n0 + m)
                n = count.get(name, 0)
                mean[name] = mean.get(name, 0) + m / (n + m) * (nu - mean.get(name, 0))
                count[name] = n + m
    return mean


def test_the_published_rule_weighs_classes_that_are_met_again_wrongly(job):
    again = (*BARE, "scenario.rounds=4", "scenario.overlap=null", "merge=legacy_double_shrink")
    results, folder, (plan,) = job(*again)
    assert results["merged_equals_pooled"] is False
    memory = PrototypeMemory.load(folder / "memory.safetensors")
    by_hand = legacy_means(plan)
    expected = np.array([by_hand[name] for name in memory.classes])
    # Four rounds of rounding sums to 2**-16.
    np.testing.assert_allclose(memory.means().numpy(), expected, atol=1e-4)
    pooled = evidence(met(plan, plan.rounds))
    exact = np.array([np.mean(pooled[name], axis=0) for name in memory.classes])
    assert np.abs(memory.means().numpy() - exact).max() > 0.01
    right = score(dict(zip(memory.classes, expected, strict=True)), memory.classes)
    assert results["final"]["accuracy"]["merged"] == pytest.approx(right, abs=1.5 / 898)


def test_the_published_rule_is_exact_where_every_class_is_met_in_one_round(job):
    once = (*BARE, "scenario=class_incremental", "scenario.classes=6", "scenario.shots=4")
    once = [o for o in once if not o.startswith(("scenario.nodes", "scenario.rounds"))]
    once = [o for o in once if not o.startswith("scenario.classes_per_mission")]
    exact, _, _ = job(*once, "scenario.test_images=null")
    legacy, _, _ = job(*once, "scenario.test_images=null", "merge=legacy_double_shrink")
    assert legacy["merged_equals_pooled"] is exact["merged_equals_pooled"] is True
    assert legacy["final"]["memory_sha256"] == exact["final"]["memory_sha256"]


def test_several_draws_give_mean_and_spread(job):
    results, folder, plans = job(*DIGITS, "job.draws=3", "job.joint.draws=1")
    assert len({plan.missions[0].classes for plan in plans}) > 1
    fields = [[ncm(met(plan, r), plan.known(r)) for r in (1, 2)] for plan in plans]
    for step, of_draws in zip(results["steps"], np.transpose(fields), strict=True):
        assert step["accuracy"]["merged"] == pytest.approx(np.mean(of_draws))
        assert step["spread"]["merged"] == pytest.approx(np.std(of_draws, ddof=1))
    final = results["final"]
    assert final["accuracy"]["ncm"] == pytest.approx(np.mean([f[-1] for f in fields]))
    assert set(final["accuracy"]) - set(final["spread"]) == {"joint"}
    assert results["protocol"]["draws"] == len(results["stages"]) == 3
    assert PrototypeMemory.load(folder / "memory.safetensors").classes == plans[0].known(2)


@pytest.mark.parametrize("draws", [2, 10])
def test_each_image_set_is_embedded_once_a_process(job, monkeypatch, draws):
    embedded = []
    encoder = reconnaissance.Encoder
    embed = encoder.embed
    monkeypatch.setattr(
        encoder, "embed", lambda self, images: embedded.append(len(images)) or embed(self, images)
    )
    job(*BARE, f"job.draws={draws}", f"seed={40 + draws}")
    assert len(embedded) == 2 * draws


# The same seed, the same numbers


class Backwards(LocalGrid):
    """Addresses nodes, and hands over replies, in the opposite order."""

    def get_node_ids(self):
        return list(super().get_node_ids())[::-1]

    def pull_messages(self, message_ids):
        return list(super().pull_messages(message_ids))[::-1]


def backwards(serve, nodes):
    serve(Backwards(app, [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]))


def test_the_same_seed_gives_the_same_numbers_in_any_order_of_nodes(job):
    first, again, reverse = (job(*DIGITS, engine=e)[0] for e in (None, None, backwards))
    assert untimed(first) == untimed(again) == untimed(reverse)
    other, _, _ = job(*DIGITS, "seed=1")
    assert other["final"]["memory_sha256"] != first["final"]["memory_sha256"]


def test_leaving_out_an_alternative_changes_no_other_number(job):
    whole, bare = job(*DIGITS)[0], job(*BARE)[0]
    kept = bare["final"]["accuracy"]
    assert kept.items() <= whole["final"]["accuracy"].items()
    assert bare["final"]["memory_sha256"] == whole["final"]["memory_sha256"]


class Dying(LocalGrid):
    """Loses its first node for good after the first round."""

    rounds = 0

    def get_node_ids(self):
        self.rounds += 1
        return [i for i in super().get_node_ids() if self.rounds == 1 or i != 1]


def test_a_node_that_dies_is_missed_and_the_run_goes_on(job):
    def engine(serve, nodes):
        serve(Dying(app, [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]))

    results, folder, (plan,) = job(*BARE, "strategy.wait=0.1", engine=engine)
    assert results["merged_equals_pooled"] is False and results["nodes_with_final_memory"] == 2
    memory = PrototypeMemory.load(folder / "memory.safetensors")
    left = met(plan, 1, node=0) + met(plan, 2, node=1) + met(plan, 2, node=2)
    by_hand = {name: len(images) for name, images in evidence(left).items()}
    assert dict(zip(memory.classes, memory.counts.tolist(), strict=True)) == by_hand


def test_without_any_node_the_run_stops_with_a_sentence_and_no_results(job, tmp_path):
    with pytest.raises(FederationError, match="No node"):
        job(*BARE, "strategy.wait=0.1", engine=lambda serve, nodes: serve(LocalGrid(app, [])))
    assert not list(tmp_path.rglob("results.json"))
    assert "No node" in (tmp_path / "1" / "log.txt").read_text()


@pytest.mark.slow
def test_flowers_simulation_gives_the_same_numbers(job):
    local, _, _ = job(*DIGITS)
    ray, _, _ = job(*DIGITS, "engine=ray")
    assert untimed(ray) == untimed(local)


# Golden


@pytest.mark.parametrize("name", sorted(p.stem for p in regenerate.HERE.glob("*.json")))
def test_golden_runs_still_give_their_numbers(name, tmp_path):
    golden = regenerate.read(name)
    assert golden["command"] == f"python tests/golden/regenerate.py {name}"
    for metric, value in regenerate.measure(golden, tmp_path).items():
        kept = golden["metrics"][metric]
        assert value == pytest.approx(kept["value"], rel=0, abs=kept["tolerance"]), metric
