"""Training the embedding in a federation: shares, stragglers, a killed run, what others make of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clfed.backbones import Encoder
from clfed.config import compose
from clfed.data import digits
from clfed.errors import ConfigError, EncoderError, FederationError, NotEnoughData
from clfed.federated.client_app import app as node_app
from clfed.federated.field import open_benchmark
from clfed.federated.grid import LocalGrid
from clfed.federated.rounds import run_rounds
from clfed.jobs import (
    embedding,
    embedding_summary,
    federated,
    federated_summary,
    reconnaissance,
    summary,
)
from clfed.learners.encoder_files import from_file
from clfed.learners.loop import nearest_mean_accuracy
from clfed.learners.training import BaseTraining, train_base
from clfed.prototypes import PrototypeMemory
from clfed.scenarios.base_shares import base_shares, validation_split
from clfed.strategies.base import TrainOnly

DATA = {"base_classes": 8, "validation_classes": 3}
SMALL = ["data=digits", "backbone=mlp", "backbone.widths=[6]", "logger=none"]
JOB = [
    "job=embedding",
    *SMALL,
    *(f"data.{key}={value}" for key, value in DATA.items()),
    "job.rounds=4",
    "strategy.local.epochs=1",
    "strategy.local.lr=0.3",  # large, so that the last round is not the best
    "job.old=1",
    "strategy.participation=0.6",
]


# Who holds what


@pytest.mark.parametrize("beta", [None, 0.3])
def test_base_images_are_divided_and_nothing_else_is_there(beta):
    benchmark = digits.load(**DATA)
    plan = base_shares(benchmark, seed=3, nodes=4, beta=beta, validation_shots=5)
    base, held_out = benchmark.groups["base"], benchmark.groups["validation"]
    pool = plan.support
    for mission, names, images in (
        (1, base, benchmark.train.of_classes(base)),
        (2, held_out, benchmark.train.of_classes(held_out)),
    ):
        parts = [m for m in plan.missions if m.round == mission]
        assert set().union(*(m.classes for m in parts)) == set(names)
        indices = torch.cat([m.indices for m in parts])
        assert len(indices.unique()) == len(indices)
        kept = images
        if mission == 2:
            kept = images.subset(validation_split(images, 5, 3))
        got = sorted(
            (pool.classes[label], image.numpy().tobytes())
            for label, image in zip(
                pool.labels[indices].tolist(), pool.images[indices], strict=True
            )
        )
        expected = sorted(
            (kept.classes[label], image.numpy().tobytes())
            for label, image in zip(kept.labels.tolist(), kept.images, strict=True)
        )
        assert got == expected
    asked = benchmark.train.of_classes(held_out)
    asked = asked.subset(~validation_split(asked, 5, 3))
    assert plan.test.fingerprint == asked.fingerprint and plan.rounds == 2
    assert not {*pool.classes, *plan.test.classes} & {*benchmark.groups["field"]}


def test_shares_follow_the_seed_and_the_concentration():
    benchmark = digits.load(base_classes=10)

    def counts(seed, beta):
        plan = base_shares(benchmark, seed=seed, nodes=4, beta=beta, validation_shots=5)
        assert plan.rounds == 1 and len(plan.test) == 0
        return [torch.bincount(plan.support.labels[m.indices], minlength=10) for m in plan.missions]

    even = torch.stack(counts(0, None))
    assert int((even.amax(0) - even.amin(0)).max()) <= 1
    first, again, other = counts(0, 0.2), counts(0, 0.2), counts(1, 0.2)
    assert all(map(torch.equal, first, again))
    assert len(first) != len(other) or not all(map(torch.equal, first, other))
    assert float(torch.stack(first).float().std(0).mean()) > 5 * float(even.float().std(0).mean())
    with pytest.raises(NotEnoughData, match="base classes"):
        base_shares(digits.load(base_classes=0), seed=0, nodes=2, beta=None, validation_shots=5)
    for bad in ({"nodes": 0}, {"beta": 0.0}, {"beta": float("nan")}, {"validation_shots": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            base_shares(
                benchmark, **{"seed": 0, "nodes": 2, "beta": 1.0, "validation_shots": 5, **bad}
            )


# Rounds with stragglers

echo = ClientApp()


@echo.train()
def _(message: Message, context: Context) -> Message:
    if context.node_config.get("broken"):
        raise ValueError("out of paper")
    said = int(message.content["round"]["round"])
    return Message(RecordDict({"said": ConfigRecord({"round": said})}), reply_to=message)


class Recorder(TrainOnly):
    """Asks everybody, and remembers what it was to put together in which round."""

    leaves = "nothing"

    def __init__(self):
        super().__init__(session="s", wait=0.0)
        self.seen = {}

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"round": self.head(server_round, config)})
        return [Message(content, node, "train") for node in self.connected(grid)]

    def aggregate_train(self, server_round, replies):
        self.seen[server_round] = sorted(
            (reply.metadata.src_node_id, reply.content["said"]["round"])
            for reply in replies
            if reply.has_content()
        )
        return None, None


class Slow(LocalGrid):
    """Withholds the first replies of a node to some rounds until the next messages are sent."""

    def __init__(self, nodes, node=2, rounds=(), broken=()):
        super().__init__(
            echo, [{"broken": True} if n in broken else {} for n in range(1, nodes + 1)]
        )
        self.node, self.rounds, self.withheld, self.pushed = node, {*rounds}, set(), []

    def push_messages(self, messages):
        messages = list(messages)
        self.withheld.clear()
        identities = super().push_messages(messages)
        for identity, message in zip(identities, messages, strict=True):
            number = message.content["round"]["round"]
            self.pushed.append((number, message.metadata.dst_node_id))
            if message.metadata.dst_node_id == self.node and number in self.rounds:
                self.rounds.discard(number)
                self.withheld.add(identity)
        return identities

    def pull_messages(self, message_ids):
        return super().pull_messages([i for i in message_ids if i not in self.withheld])


def rounds(grid, count=3, **options):
    strategy, reports = Recorder(), []
    run_rounds(
        strategy,
        grid,
        None,
        rounds=count,
        timeout=0.05,
        after=lambda report, arrays: reports.append(report),
        **options,
    )
    return strategy.seen, reports


def test_a_round_goes_on_without_stragglers_and_never_sees_their_late_replies():
    grid = Slow(4, rounds=[1])
    seen, reports = rounds(grid, enough=0.75)
    assert seen[1] == [(1, 1), (3, 1), (4, 1)]
    assert len(grid._replies) == 1  # it came, and nobody asked for it any more
    assert seen[2] == [(n, 2) for n in (1, 2, 3, 4)] and seen[3] == [(n, 3) for n in (1, 2, 3, 4)]
    assert [(r.asked, r.answered) for r in reports] == [(4, 3), (4, 4), (4, 4)]


def test_too_few_answers_end_the_run_and_nothing_is_put_together():
    with pytest.raises(FederationError, match=r"Only 3 of 4 nodes answered round 2.*4 would"):
        rounds(Slow(4, rounds=[2]), enough=0.76)
    with pytest.raises(FederationError, match=r"None of 1 nodes.*No reply came"):
        rounds(Slow(1, node=1, rounds=[1]))
    with pytest.raises(FederationError, match=r"Only 1 of 2 .*out of paper"):
        rounds(Slow(2, broken=[2]), enough=1.0)
    with pytest.raises(FederationError, match=r"None of 2 .*, asked 3 times.*out of paper"):
        rounds(Slow(2, broken=[1, 2]), attempts=3)
    for wrong in ({"enough": 1.1}, {"enough": -0.1}, {"enough": float("nan")}, {"attempts": 0}):
        with pytest.raises(ConfigError):
            rounds(Slow(2), **wrong)


def test_only_those_that_have_not_answered_are_asked_again_and_count_once():
    grid = Slow(3, rounds=[1])
    seen, reports = rounds(grid, count=2, enough=1.0, attempts=2)
    assert grid.pushed == [(1, 1), (1, 2), (1, 3), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert seen == {r: [(n, r) for n in (1, 2, 3)] for r in (1, 2)}
    assert [r.answered for r in reports] == [3, 3]
    # As before: without a share, one answer is enough and nobody is asked twice.
    grid = Slow(3, rounds=[1], broken=[3])
    seen, _ = rounds(grid, count=1)
    assert seen == {1: [(1, 1)]} and len(grid.pushed) == 3


def test_rounds_go_on_from_a_number():
    seen, reports = rounds(Slow(1), count=5, first=4)
    assert [*seen] == [4, 5] == [r.round for r in reports]


# The job


def run(tmp_path, name, *overrides, engine=None):
    """Run the job and return its folder."""
    cfg = compose(
        [*JOB, f"run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}", *overrides]
    )
    return embedding.run(cfg, engine)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("embedding"), "whole")


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take longer than everything else together."""
    for name in ("accuracy_curves", "bytes_curve"):
        for job in (embedding_summary, federated_summary):
            monkeypatch.setattr(job, name, lambda *given: None)
    drawn = ("accuracy_curves", "bytes_curve", "prototype_map")
    nothing = SimpleNamespace(**dict.fromkeys(drawn, lambda *given, **options: None))
    monkeypatch.setattr(summary, "figures", nothing)


def test_the_run_leaves_an_encoder_that_the_validation_classes_chose(finished):
    found, encoder = results(finished), Encoder.load(finished / "encoder.safetensors")
    curve = [step["accuracy"]["validation"] for step in found["steps"]]
    assert len(curve) == 4 and max(curve) == found["final"]["accuracy"]["validation"]
    assert found["encoder"]["round"] == 4 - int(np.argmax(curve[::-1])) < 4
    assert found["encoder"]["embedding"] == encoder.embedding_id
    held_out = digits.load(**DATA)
    images = held_out.train.of_classes(held_out.groups["validation"])
    accuracy = nearest_mean_accuracy(
        encoder.embed(images.images), images.labels, validation_split(images, 15, 0)
    )
    assert accuracy == max(curve)
    assert [(step["asked"], step["answered"]) for step in found["steps"]] == [(3, 3)] * 4
    assert all(step["bytes"]["up"] > 3 * found["encoder"]["bytes"] for step in found["steps"][1:])
    assert (finished / "figures" / "accuracy.png").is_file()
    assert not [*(finished.parent / "cache" / "embedding").iterdir()]


def test_recomputed_prototypes_are_those_of_all_images_under_the_new_embedding(finished):
    found, encoder = results(finished), Encoder.load(finished / "encoder.safetensors")
    memory = PrototypeMemory.load(finished / "memory.safetensors")
    benchmark = digits.load(**DATA)
    plan = base_shares(benchmark, seed=0, nodes=5, beta=0.5, validation_shots=15)
    empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id)
    labels = [plan.support.classes[label] for label in plan.support.labels.tolist()]
    assert memory == empty.observe(encoder.embed(plan.support.images), labels)
    replaced = found["replacement"]
    assert replaced["accuracy"]["recomputed"] == found["final"]["accuracy"]["validation"]
    assert set(replaced["accuracy"]) == {"before", "recomputed", "carried", "moved", "stale"}
    assert replaced["old"] != replaced["new"] and replaced["old_round"] == 1
    assert len(replaced["departed"]) == 2 and 0 < replaced["misfit"] < 1
    share = sum(
        len(m.indices)
        for m in plan.missions
        if m.round == 1 and f"node-{m.node}" not in replaced["departed"] and len(m.indices) >= 5
    )
    assert replaced["images"] == share
    whole = sum(step["bytes"]["up"] for step in found["steps"])
    assert 0 < replaced["bytes"]["recomputed"]["up"] < whole


class Killed(Exception):
    pass


def dying(after):
    """An engine whose server is killed when it sends the training messages of a round."""

    class Grid(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train.local":
                    trained.append(message.content["round"]["round"])
                    if trained[-1] > after:
                        raise Killed
            return super().push_messages(messages)

    trained = []

    def engine(serve, nodes):
        serve(Grid(node_app, [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]))

    return engine, trained


def leavings(folder):
    found = results(folder)
    curve = [step["accuracy"] for step in found["steps"]]
    return (
        (folder / "encoder.safetensors").read_bytes(),
        (folder / "memory.safetensors").read_bytes(),
        curve,
        found["replacement"]["accuracy"],
    )


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, without_figures, finished, after):
    engine, _ = dying(after)
    with pytest.raises(Killed):
        run(tmp_path, "first", engine=engine)
    assert not (tmp_path / "first" / "encoder.safetensors").exists()
    engine, trained = dying(99)
    folder = run(tmp_path, "second", engine=engine)
    assert min(trained[:-5]) == after + 1  # the last five are asked for drift statistics
    assert leavings(folder) == leavings(finished)
    rows = (folder / "metrics.csv").read_text().count("validation")
    assert rows == (finished / "metrics.csv").read_text().count("validation")


def test_a_damaged_checkpoint_is_told_and_starts_anew(tmp_path, without_figures, finished, caplog):
    engine, _ = dying(2)
    with pytest.raises(Killed):
        run(tmp_path, "first", engine=engine)
    (path,) = (tmp_path / "cache" / "embedding").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    engine, trained = dying(99)
    folder = run(tmp_path, "second", engine=engine)
    assert trained[0] == 1 and "is damaged, starting anew" in caplog.text
    assert leavings(folder) == leavings(finished)


def test_only_the_same_configuration_goes_on(tmp_path, without_figures):
    engine, _ = dying(2)
    with pytest.raises(Killed):
        run(tmp_path, "first", engine=engine)
    for number, override in enumerate(("seed=1", "job.resume=false", "strategy=fedprox")):
        engine, trained = dying(1)
        with pytest.raises(Killed):
            run(tmp_path, f"other {number}", override, engine=engine)
        assert trained[0] == 1


def poisoned(**options):
    """The digits with other pictures of the field classes and of the test split."""
    benchmark = digits.load(**options)
    field = [benchmark.train.classes.index(name) for name in benchmark.groups["field"]]
    images = benchmark.train.images.clone()
    images[torch.isin(benchmark.train.labels, torch.tensor(field))] = 99
    test = replace(benchmark.test, images=torch.full_like(benchmark.test.images, 7))
    return replace(benchmark, train=replace(benchmark.train, images=images), test=test)


def test_field_classes_and_test_images_change_nothing(tmp_path, without_figures, finished):
    folder = run(tmp_path, "poisoned", f"data._target_={__name__}.poisoned")
    assert leavings(folder) == leavings(finished)


def test_without_validation_classes_the_last_round_is_kept(tmp_path):
    folder = run(tmp_path, "none", "data.validation_classes=0", "job.rounds=2", "job.old=0")
    found = results(folder)
    assert found["encoder"]["round"] == 2 and found["final"]["accuracy"] == {}
    assert "replacement" not in found and not (folder / "memory.safetensors").exists()
    assert (folder / "figures" / "bytes.png").is_file()


def test_looks_and_the_older_round_are_chosen(tmp_path, without_figures, finished):
    overrides = ("job.validate_every=3", "job.old=0", "strategy=fedprox", "strategy.local.mu=0.5")
    found = results(run(tmp_path, "prox", *overrides))
    assert [bool(step["accuracy"]) for step in found["steps"]] == [False, False, True, True]
    start = train_base(
        BaseTraining.from_config(compose(JOB)), digits.load(**DATA), seed=0, cache=tmp_path
    )
    assert found["replacement"]["old"] == start.encoder.embedding_id
    assert found["method"]["name"] == "fedprox"
    assert found["encoder"]["embedding"] != results(finished)["encoder"]["embedding"]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("job.rounds=0", "job.rounds"),
        ("job.validate_every=0", "job.validate_every"),
        ("job.attempts=0", "job.attempts"),
        ("job.enough=1.5", "job.enough"),
        ("job.departed=-1", "job.departed"),
        ("job.penalty=-1", "job.penalty"),
        ("job.timeout=x", "job.timeout"),
        ("job.old=5", "job.old"),
        ("job.resume=1", "job.resume"),
        ("strategy._target_=clfed.strategies.FedNCM", "one network"),
        ("strategy._target_=clfed.strategies.Nobody", "Nobody"),
        ("data.base_classes=0", "base classes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, override, match):
    extra = ["data.validation_classes=0"] if override.startswith("data") else []
    with pytest.raises((ConfigError, NotEnoughData), match=match):
        run(tmp_path, "x", override, *extra)
    assert not (tmp_path / "x").exists()


# What other jobs make of the encoder


RECONNAISSANCE = (
    "scenario.rounds=1",
    "scenario.classes_per_mission=2",
    "scenario.shots=3",
    "job.finetuned=null",
    "job.joint=null",
)
FEDERATED = ("scenario=dirichlet", "scenario.nodes=2", "scenario.tasks=1")


@pytest.mark.parametrize("job", [reconnaissance, federated])
def test_other_jobs_take_the_encoder_of_the_file(tmp_path, without_figures, finished, job):
    name = job.__name__.rpartition(".")[2]
    cfg = compose(
        [
            f"job={name}",
            *SMALL,
            "data.base_classes=5",
            "data.validation_classes=1",
            "learner=from_file",
            f"learner.path={finished / 'encoder.safetensors'}",
            f"run_dir={tmp_path / 'run'}",
            f"cache_dir={tmp_path / 'cache'}",
            *(RECONNAISSANCE if job is reconnaissance else FEDERATED),
        ]
    )
    found = results(job.run(cfg))
    protocol = found["protocol"]
    assert protocol["embedding"] == results(finished)["encoder"]["embedding"]
    assert protocol["training"]["steps"] == 4
    assert protocol["training"]["best_step"] == results(finished)["encoder"]["round"]


def test_a_file_must_hold_what_the_configuration_describes(tmp_path, finished):
    file = tmp_path / "encoder.safetensors"
    file.write_bytes((finished / "encoder.safetensors").read_bytes())
    config = {"_target_": "clfed.backbones.MLP", "widths": [6]}
    there = from_file(str(file), config, input_shape=(1, 8, 8))
    assert there.encoder.embedding_id == results(finished)["encoder"]["embedding"]
    assert there.summary.steps == 0  # nothing beside it tells how it was trained
    file.with_suffix(".json").write_text("{")
    with pytest.raises(EncoderError, match="does not say"):
        from_file(str(file), config, input_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=r"learner\.path"):
        from_file(None, config, input_shape=(1, 8, 8))
    with pytest.raises(EncoderError, match="Cannot read"):
        from_file(str(tmp_path / "none"), config, input_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match="inputs of shape"):
        from_file(str(file), config, input_shape=(1, 28, 28))
    with pytest.raises(ConfigError, match="another backbone"):
        from_file(str(file), {**config, "widths": [5]}, input_shape=(1, 8, 8))
    projection = {"_target_": "clfed.prototypes.features.RandomProjection", "dim": 16}
    with pytest.raises(ConfigError, match="another backbone or feature map"):
        from_file(str(file), config, input_shape=(1, 8, 8), feature_map=projection)


@pytest.mark.slow
def test_flowers_own_simulation_gives_the_same_bytes(tmp_path, finished):
    assert leavings(run(tmp_path, "ray", "engine=ray")) == leavings(finished)


def test_the_data_set_is_what_the_tests_think():
    benchmark = open_benchmark({"_target_": "clfed.data.digits.load", **DATA})
    assert [len(benchmark.groups[g]) for g in ("base", "validation", "field")] == [5, 3, 2]
