"""The federated job from configuration to run folder, against loops and a grid that listens."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from clfed.config import compose
from clfed.errors import ConfigError, RunFolderError
from clfed.evaluation import continual
from clfed.federated.client_app import app
from clfed.federated.field import field_settings, open_field
from clfed.federated.grid import LocalGrid
from clfed.jobs import federated, federated_summary, reconnaissance
from clfed.jobs.federated_summary import forgetting
from clfed.reporting.console import console
from clfed.reporting.results import read
from clfed.reporting.tables import federated_table
from clfed.seeding import derive_seed

TINY = ["job=federated", "data=digits", "learner=none", "scenario=dirichlet", "logger=none"]
TINY += ["scenario.groups=all", "scenario.tasks=3", "scenario.nodes=3"]
FEATURES = ["data.as_features=true", "backbone=identity"]
NETWORK = ["backbone=mlp", "backbone.widths=[12]"]
TRAINED = [*NETWORK, "strategy=fedavg", "strategy.local.epochs=1"]


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Leaves figures out, which take most of the time of a tiny run, but where they are meant."""
    if "promised" not in request.node.name:
        for name in ("accuracy_curves", "bytes_curve"):
            monkeypatch.setattr(federated_summary, name, lambda results, path: path.touch())


class Listener(LocalGrid):
    """Keeps the kind, the node, the request and the reply of every message."""

    heard = None

    def _handle(self, message):
        identity = super()._handle(message)
        reply = self._replies[identity]
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        self.heard.append((kind, node, message.content, reply.content))
        return identity


def run(folder, *overrides, heard=None):
    cfg = compose([*TINY, f"run_dir={folder}", f"cache_dir={folder.parent / 'cache'}", *overrides])
    if heard is None:
        return read(federated.run(cfg) / "results.json")

    def engine(*, serve, nodes):
        configs = [{"partition-id": n, "num-partitions": nodes} for n in range(nodes)]
        grid = Listener(app, configs)
        grid.heard = heard
        serve(grid)

    return read(federated.run(cfg, engine=engine) / "results.json")


def plan_of(*overrides):
    cfg = OmegaConf.to_container(compose([*TINY, *overrides]))
    seed = derive_seed(cfg["seed"], "draw", 0)
    return open_field(field_settings(cfg["data"], cfg["scenario"], seed)).plan


def measured(results):
    """Results without times and memory."""
    found = json.loads(json.dumps(results))
    for part in (found["final"], *found["steps"]):
        for key in ("seconds", "node_seconds", "peak_bytes"):
            part.pop(key, None)
    return found


def size(content):
    """Payload bytes of one message."""
    return sum(record.count_bytes() for name, record in content.items() if name != "cost")


# --- what is measured -------------------------------------------------------------------------


def nearest_means(plan, mission):
    """For each test image that is asked about, whether the nearest pooled mean is of its class."""
    images, labels = plan.support.images.double().numpy(), plan.support.labels.numpy()
    tests, truth = plan.test.images.double().numpy(), plan.test.labels.numpy()
    met = [m for m in plan.missions if m.round <= mission]
    positions = np.concatenate([m.indices.numpy() for m in met])
    known = sorted({int(labels[p]) for p in positions})
    means = {c: images[[p for p in positions if labels[p] == c]].mean(0) for c in known}
    right = {}
    for place in range(len(tests)):
        if truth[place] in known:
            nearest = min(known, key=lambda c: float(((tests[place] - means[c]) ** 2).sum()))
            right[place] = bool(nearest == truth[place])
    return right


def by_hand(plan, right_of):
    """Union, own and accuracies by mission; ``right_of(mission)``: node -> image -> right."""
    truth = plan.test.labels.tolist()
    names = plan.support.classes
    first = {}
    for mission in plan.missions:
        for name in mission.classes:
            first.setdefault(name, mission.round)
    found = []
    for mission in range(1, plan.rounds + 1):
        right = right_of(mission)
        union = [mark for marks in right.values() for mark in marks.values()]
        own = [
            marks[place]
            for node, marks in right.items()
            for place in plan.test_shares[node].tolist()
            if place in marks
        ]
        parts = [
            [
                mark
                for marks in right.values()
                for place, mark in marks.items()
                if first[names[truth[place]]] == number
            ]
            for number in range(1, mission + 1)
        ]
        found.append((np.mean(union), np.mean(own), [np.mean(part) for part in parts]))
    return found


def check(results, expected):
    for step, (union, own, _) in zip(results["steps"], expected, strict=True):
        assert step["accuracy"] == {"union": pytest.approx(union), "own": pytest.approx(own)}
    rows = [row for _, _, row in expected]
    for row, mine in zip(results["accuracy_by_mission"], rows, strict=True):
        assert row == pytest.approx(mine)
    matrix = np.full((len(rows), len(rows)), np.nan)
    for number, row in enumerate(rows):
        matrix[number, : len(row)] = row
    assert results["final"]["forgetting"] == pytest.approx(continual.forgetting(matrix))
    last = expected[-1]
    assert results["final"]["accuracy"] == pytest.approx({"union": last[0], "own": last[1]})


def test_the_numbers_of_one_model_for_all_are_those_of_a_loop(tmp_path):
    few = ["scenario.train_images=20", "scenario.test_images=15"]
    results = run(tmp_path / "run", *FEATURES, *few)
    plan = plan_of(*FEATURES, *few)
    answers = {m: nearest_means(plan, m) for m in range(1, plan.rounds + 1)}
    expected = by_hand(plan, lambda mission: dict.fromkeys(range(plan.nodes), answers[mission]))
    check(results, expected)
    assert results["final"]["accuracy"]["union"] > 0.7
    saved = load_file(tmp_path / "run" / "memory.safetensors")
    assert saved["counts"].sum() == results["protocol"]["support_images"] == len(plan.support)


def test_the_numbers_of_a_model_a_node_are_those_of_a_loop(tmp_path):
    few = ["scenario.test_images=15", "strategy=local", "strategy.local.epochs=2"]
    heard = []
    results = run(tmp_path / "run", *NETWORK, *few, heard=heard)
    plan = plan_of(*NETWORK, *few)
    told = [(node, reply) for kind, node, _, reply in heard if kind == "query.predict"]
    assert len(told) == plan.rounds * plan.nodes
    truth = [plan.test.classes[label] for label in plan.test.labels.tolist()]

    def right_of(mission):
        found = {}
        for node, reply in told[(mission - 1) * plan.nodes : mission * plan.nodes]:
            classes = json.loads(reply["status"]["classes"])
            rows = reply["answers"]["predicted"].numpy().tolist()
            known = {n for m in plan.missions if m.round <= mission for n in m.classes}
            asked = [place for place, name in enumerate(truth) if name in known]
            named = zip(asked, rows, strict=True)
            found[node - 1] = {place: classes[row] == truth[place] for place, row in named}
        return found

    expected = by_hand(plan, right_of)
    check(results, expected)
    assert results["final"]["accuracy"]["own"] > results["final"]["accuracy"]["union"]


accuracies = st.floats(0, 1)


@given(
    st.integers(1, 6).flatmap(
        lambda t: st.tuples(
            *[st.lists(st.none() | accuracies, min_size=n, max_size=n) for n in range(1, t + 1)]
        )
    ),
    st.data(),
)
def test_forgetting_is_that_of_a_slow_loop(rows, data):
    missing = {n for n, row in enumerate(rows) if data.draw(st.booleans())}
    # A mission either brings classes, which are asked about ever after, or it does not.
    rows = [
        [None if i in missing else (0.5 if value is None else value) for i, value in enumerate(row)]
        for row in rows
    ]
    drops = []
    for i in range(len(rows) - 1):
        if i not in missing:
            best = -math.inf
            for row in rows[i:-1]:
                best = max(best, row[i])
            drops.append(best - rows[-1][i])
    expected = sum(drops) / len(drops) if drops else None
    assert forgetting(rows) == (None if expected is None else pytest.approx(expected))


# --- what it took -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [FEATURES, TRAINED, [*TRAINED, "strategy.participation=0.5"], [*NETWORK, "strategy=local"]],
    ids=["statistics", "weights", "some nodes", "nothing"],
)
def test_bytes_are_those_of_the_messages(overrides, tmp_path):
    heard = []
    results = run(tmp_path / "run", *overrides, heard=heard)
    # What a node is asked about test images belongs to the measurement, not to the method.
    counted = [parts for parts in heard if parts[0] != "query.predict"]
    assert {kind for kind, *_ in counted} <= {"train", "train.local", "query.introduce"}
    down = sum(size(request) for _, _, request, _ in counted)
    up = sum(size(reply) for *_, reply in counted)
    assert results["final"]["bytes"] == {"up": up, "down": down} and min(up, down) > 0
    for way, total in (("up", up), ("down", down)):
        assert sum(step["bytes"][way] for step in results["steps"]) == total


def test_no_image_and_no_test_image_is_in_a_message(tmp_path):
    heard = []
    few = ["scenario.train_images=10", "scenario.test_images=10"]
    run(tmp_path / "run", *TRAINED, *few, heard=heard)
    plan = plan_of(*TRAINED, *few)
    images = {image.numpy().tobytes() for image in (*plan.support.images, *plan.test.images)}
    sent = b"".join(
        array.data
        for *_, request, reply in heard
        for content in (request, reply)
        for record in content.array_records.values()
        for array in record.values()
    )
    assert len(sent) > 10_000 and not any(image in sent for image in images)


def test_nodes_are_gauged(tmp_path):
    results = run(tmp_path / "run", *TRAINED)
    final = results["final"]
    assert 0 < final["node_seconds"] < final["seconds"]
    assert final["node_seconds"] == pytest.approx(sum(s["node_seconds"] for s in results["steps"]))
    assert final["peak_bytes"] is None or final["peak_bytes"] >= 0


# --- looks ------------------------------------------------------------------------------------


def test_looks_within_missions_change_nothing_but_the_steps(tmp_path):
    rounds = [*TRAINED, "strategy.rounds_per_mission=4"]
    rare = run(tmp_path / "rare", *rounds)
    often = run(tmp_path / "often", *rounds, "job.every=3")
    assert [step["step"] for step in rare["steps"]] == [4, 8, 12]
    assert [step["step"] for step in often["steps"]] == [3, 4, 6, 8, 9, 12]
    assert often["accuracy_by_mission"] == rare["accuracy_by_mission"]
    for key in ("accuracy", "forgetting", "bytes", "memory_sha256"):
        assert often["final"][key] == rare["final"][key]
    at = {step["step"]: step["accuracy"] for step in often["steps"]}
    assert [at[step["step"]] for step in rare["steps"]] == [s["accuracy"] for s in rare["steps"]]


def test_one_mission_that_is_looked_at_often_shows_its_course(tmp_path):
    often = [*TRAINED, "scenario.tasks=1", "strategy.rounds_per_mission=12", "job.every=1"]
    results = run(tmp_path / "run", *often)
    union = [step["accuracy"]["union"] for step in results["steps"]]
    own = [step["accuracy"]["own"] for step in results["steps"]]
    found = results["final"]["accuracy"]
    assert len(union) == 12 and found["union"] == union[-1]
    assert found["union_last10"] == pytest.approx(sum(union[2:]) / 10)
    assert found["own_last10"] == pytest.approx(sum(own[2:]) / 10)
    assert found["own_best"] == max(own)
    assert results["final"]["forgetting"] is None


# --- what it leaves ---------------------------------------------------------------------------


def test_a_run_leaves_everything_that_is_promised(tmp_path):
    results = run(tmp_path / "run", *FEATURES, "strategy=fedncm")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "log.txt", "memory.safetensors", "figures"} <= names
    drawn = {path.name for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert drawn == {"accuracy.png", "bytes.png"}
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    assert "fed/accuracy/union" in logged and "fed/bytes/up" in logged
    assert results["method"]["name"] == "fedncm"
    assert results["method"]["leaves"] == "class names, counts and sums of embeddings"
    assert results["method"]["options"]["_target_"] == "clfed.strategies.FedNCM"
    protocol = results["protocol"]
    assert (protocol["nodes"], protocol["missions"], protocol["classes"]) == (3, 3, 10)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(tmp_path):
    first = run(tmp_path / "first", *TRAINED)
    again = run(tmp_path / "again", *TRAINED)
    other = run(tmp_path / "other", *TRAINED, "seed=1")
    assert measured(first) == measured(again)
    assert measured(first)["final"] != measured(other)["final"]


def test_the_table_shows_what_was_measured(tmp_path):
    results = run(tmp_path / "run", *FEATURES)
    results["method"] |= {"privacy": "noise", "epsilon": 2.0}
    results["final"]["accuracy"] |= {"own_best": 0.4321}
    results["final"]["peak_bytes"] = None
    with console().capture() as caught:
        console().print(federated_table(results))
    text = caught.get()
    assert "federated: prototype_averaging + noise, seed 0" in text
    assert f"{results['final']['accuracy']['union']:.1%}" in text and "43.2%" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["bound", "of", "what", "was", "sent,", "epsilon", "2"] in rows
    assert any(row[-2:] == ["MB", "-"] for row in rows)


# --- refusals ---------------------------------------------------------------------------------

WRONG = {
    "job.every=0": "job.every",
    "job.every=1.5": "job.every",
    "job.timeout=-1": "job.timeout",
    "job.timeout=soon": "job.timeout",
    "strategy.wait=null": "strategy.wait",
    "merge=other": "merge",
    "memory.moments=all": "memory.moments",
    "strategy._target_=clfed.strategies.NoSuch": "NoSuch",
    "curriculum=vanilla": "has no curriculum",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_settings_are_refused(override, tmp_path):
    with pytest.raises(ConfigError, match=WRONG[override]):
        run(tmp_path / "run", *FEATURES, "strategy=fedncm", override)
    assert not (tmp_path / "run" / "results.json").exists()


def test_strategies_that_train_do_not_run_in_reconnaissance(tmp_path):
    cfg = compose(["job=reconnaissance", "strategy=fedavg", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="job=reconnaissance merges class statistics") as caught:
        reconnaissance.run(cfg)
    assert "job=federated" in caught.value.remedy and not (tmp_path / "run").exists()


def test_results_are_not_overwritten_unasked(tmp_path):
    first = run(tmp_path / "run", *FEATURES)
    with pytest.raises(RunFolderError, match="results"):
        run(tmp_path / "run", *FEATURES, "seed=1")
    with pytest.raises(ConfigError):
        run(tmp_path / "run", *FEATURES, "job.every=0", "overwrite=true")
    assert read(tmp_path / "run" / "results.json") == first
    assert run(tmp_path / "run", *FEATURES, "seed=1", "overwrite=true")["seed"] == 1
