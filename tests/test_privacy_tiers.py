"""Privacy tiers as settings of a run: what each sends, what is exact, what it spends."""

import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from private_federations import Federation
from scipy.optimize import brentq
from scipy.stats import norm

from clfed.config import build, compose
from clfed.errors import ConfigError, InvalidMessage
from clfed.federated.client_app import app
from clfed.federated.records import config_record
from clfed.federated.wire import decode_contribution, encode_contribution
from clfed.jobs import federated, reconnaissance
from clfed.jobs.protection import exposure
from clfed.jobs.settings import check_federated
from clfed.privacy.mechanism import Exposure, Mechanism, entropy
from clfed.privacy.noise_tiers import Noise
from clfed.privacy.secagg_messages import STEPS
from clfed.privacy.sensitivity import Bounds
from clfed.privacy.updates import NoisyUpdates
from clfed.prototypes import Contribution, PrototypeMemory
from clfed.prototypes.fixed_point import SCALE
from clfed.reporting.results import read
from clfed.scenarios.missions import Mission, MissionPlan

NOISE = ("privacy=noise", "privacy.clip_norm=3")
MASKS_AND_NOISE = ("privacy=secagg_noise", "privacy.clip_norm=3")
TRAIN = "train"


def exact_table(federation, memory):
    """Counts and sums of the public list in the units of the statistics, by plain loops."""
    classes = federation.field.plan.test.classes
    counts, sums = np.zeros(len(classes)), np.zeros((len(classes), memory.dim))
    for row, name in enumerate(memory.classes):
        counts[classes.index(name)] = int(memory.counts[row])
        sums[classes.index(name)] = memory.sums[row].numpy() / 65536
    return counts, sums


def clipped_truth(federation, missions=None):
    """What all nodes have met, clipped to the norm of the tier, as floats."""
    classes = federation.field.plan.test.classes
    counts, sums = np.zeros(len(classes)), np.zeros((len(classes), federation.encoder.dim))
    for node in range(federation.field.plan.nodes):
        for mission in range(1, (missions or federation.field.plan.rounds) + 1):
            embeddings, labels = federation.met(node, mission)
            for z, label in zip(embeddings.double().numpy(), labels, strict=True):
                counts[classes.index(label)] += 1
                sums[classes.index(label)] += z * min(1.0, 3 / np.linalg.norm(z))
    return counts, sums


# ---- masked sums


def test_masked_sums_give_the_plain_memory_to_the_byte_and_no_row_leaves_a_node(tmp_path):
    plain = Federation.of(tmp_path / "a").play()
    masked = Federation.of(tmp_path / "b", "privacy=secagg")
    assert masked.play().to_bytes() == plain.to_bytes()
    assert {name for reply in masked.grid.of(TRAIN) for name in reply.content} == {"status"}
    kinds = Counter(reply.metadata.message_type for reply in masked.grid.replies)
    assert kinds == {TRAIN: 12, **{f"query.{step}": 12 for step in STEPS}}
    assert not masked.strategy.ledger.contributors


class Failing(ClientApp):
    """The app of the nodes, of which some fail at some kinds of message while told to."""

    def __init__(self):
        super().__init__()
        self.fails = set()

    def __call__(self, message, context):
        if (int(context.node_config["partition-id"]), message.metadata.message_type) in self.fails:
            raise RuntimeError("the battery is empty")
        return app(message, context)


@pytest.mark.parametrize("step", STEPS[:3])
def test_a_node_that_drops_out_of_one_sum_is_in_the_next_one(step, tmp_path, caplog):
    failing = Failing()
    federation = Federation.of(tmp_path, "privacy=secagg", client_app=failing)
    whole = Federation.of(tmp_path / "plain")
    failing.fails = {(2, f"query.{step}")}
    first = federation.play(1)
    expected = sum(
        (whole.strategy.ledger.total.observe(*whole.met(node, 1)) for node in (0, 1, 3)),
        start=PrototypeMemory.empty(64, whole.encoder.embedding_id),
    )
    assert first == expected
    assert "without node-2" in caplog.text and "battery" in caplog.text
    failing.fails = set()
    assert federation.play() == whole.play()


def test_what_was_put_into_a_sum_is_in_no_other_one(tmp_path, caplog):
    federation = Federation.of(tmp_path, "privacy=secagg")
    lost = {"query.secagg_masked"}

    def meddle(reply):
        gone = reply.metadata.message_type in lost and reply.metadata.src_node_id == 3
        return None if gone else reply

    federation.grid.meddle = meddle
    without = federation.play(1)
    lost.clear()
    end = federation.play()
    whole = Federation.of(tmp_path / "plain").play()
    missing = PrototypeMemory.empty(64, federation.encoder.embedding_id).observe(
        *federation.met(2, 1)
    )
    assert end + missing == whole and "no reply came" in caplog.text
    assert without.total_count == 3 * 12


def test_too_few_nodes_for_a_sum_end_no_run(tmp_path, caplog):
    failing = Failing()
    federation = Federation.of(tmp_path, "privacy=secagg", client_app=failing)
    failing.fails = {(n, "query.secagg_shares") for n in (0, 1)}
    assert not len(federation.play(1))
    assert "no masked sum" in caplog.text
    failing.fails = {(n, TRAIN) for n in (0, 1)}
    assert not len(federation.play(1))
    assert "2 nodes are too few" in caplog.text
    failing.fails = set()
    assert federation.play() == Federation.of(tmp_path / "plain").play()


def test_a_node_briefed_for_other_messages_takes_no_part_in_sums(tmp_path):
    federation = Federation.of(tmp_path, *NOISE)
    federation.play(1)
    head = federation.strategy.head(1, ConfigRecord(), digest=b"1", terms=b"{}")
    ask = Message(RecordDict({"round": head}), dst_node_id=1, message_type=f"query.{STEPS[0]}")
    (reply,) = federation.grid.send_and_receive([ask])
    assert reply.has_error() and "not briefed to take part" in reply.error.reason


# ---- noise


def test_every_slot_of_every_table_has_noise_also_of_a_node_that_met_nothing(tmp_path):
    federation = Federation.of(tmp_path, *NOISE)
    plan = federation.field.plan
    plan._by_key.pop((2, 1))  # node 1 meets nothing in the second mission
    try:
        federation.play()
    finally:
        vars(plan).pop("_by_key")  # it is made anew when it is asked for
    tables = [
        decode_contribution(record)
        for reply in federation.grid.of(TRAIN)
        for name, record in reply.content.items()
        if name.startswith("release-")
    ]
    assert len(tables) == 4 * 3
    for table in tables:
        assert table.classes == plan.test.classes
        assert (table.counts != 0).all() and (table.sums != 0).float().mean() > 0.999
        assert (table.counts % int(SCALE) != 0).all()


def test_a_table_that_was_lost_comes_again_with_the_same_noise_and_counts_once(tmp_path):
    sound = Federation.of(tmp_path / "a", *NOISE)
    sound.play()
    federation = Federation.of(tmp_path / "b", *NOISE)
    lost = []

    def meddle(reply):
        if reply.metadata.src_node_id == 2 and not lost:
            lost.append(reply)
            return None
        return reply

    federation.grid.meddle = meddle
    federation.play()
    replies = [r for r in federation.grid.of(TRAIN) if r.metadata.src_node_id == 2]
    assert [{n for n in r.content if n != "status"} for r in replies] == [
        {"release-1", "release-2"},
        {"release-3"},
    ]
    again, first = replies[0].content["release-1"], lost[0].content["release-1"]
    assert {k: v.data for k, v in again.items()} == {k: v.data for k, v in first.items()}
    ours, theirs = (f.protection.channel.total.table for f in (federation, sound))
    assert torch.equal(ours.sums, theirs.sums) and torch.equal(ours.counts, theirs.counts)


def deviations(federation):
    """Standard deviations of the noise on sums and counts, over what a tier should have."""
    federation.play()
    table = federation.protection.channel.total.table
    mechanism = federation.protection.channel.total.mechanism
    counts, sums = clipped_truth(federation)
    scale = mechanism.bounds.count_scale
    off_sums = (table.sums.numpy() / 65536 - sums) / mechanism.sigma
    off_counts = (table.counts.numpy() / 65536 - counts) / mechanism.sigma * scale
    assert table.sum_variance == pytest.approx(table.count_variance * scale**2)
    return off_sums.std(), off_counts.std(), math.sqrt(table.sum_variance) / mechanism.sigma


def test_noise_of_nodes_adds_up_and_that_of_a_server_or_a_masked_sum_does_not(tmp_path):
    nodes, missions = 4, 3
    for number, (overrides, variance) in enumerate(
        [
            ((*NOISE,), nodes * missions),
            ((*NOISE, "privacy.where=server"), missions),
            ((*MASKS_AND_NOISE,), missions * 4 / 3),
            ((*MASKS_AND_NOISE, "privacy.threshold=4"), missions),
        ]
    ):
        sums, counts, promised = deviations(Federation.of(tmp_path / str(number), *overrides))
        assert promised == pytest.approx(math.sqrt(variance))
        assert sums == pytest.approx(promised, rel=0.12)  # 640 numbers
        assert 0.3 * promised < counts < 2 * promised  # ten numbers


def test_with_hardly_any_noise_every_tier_finds_the_clipped_statistics(tmp_path):
    for number, tier in enumerate([NOISE, (*NOISE, "privacy.where=server"), MASKS_AND_NOISE]):
        federation = Federation.of(tmp_path / str(number), *tier, "privacy.epsilon=1e8")
        memory = federation.play()
        counts, sums = clipped_truth(federation)
        told_counts, told_sums = exact_table(federation, memory)
        assert (told_counts == counts).all()
        assert np.abs(told_sums - sums).max() < 0.05


@pytest.mark.parametrize("where", ["node", "server"])
def test_a_node_s_message_is_clipped_as_a_whole(where, tmp_path):
    options = ("privacy.unit=node", "privacy.contribution=3", f"privacy.where={where}")
    federation = Federation.of(tmp_path, *NOISE, *options, "privacy.epsilon=1e9")
    federation.play(1)
    mechanism = federation.protection.channel.total.mechanism
    table = federation.protection.channel.total.table
    scale = mechanism.bounds.count_scale
    most = 3 * math.hypot(3, scale)
    assert mechanism.bounds.sensitivity == pytest.approx(most)
    expected = np.zeros(10)
    for node in range(4):
        z, labels = federation.met(node, 1)
        short = z.double() * (3 / z.double().norm(dim=1, keepdim=True)).clamp(max=1)
        sums = [short[[name == cls for name in labels]].sum(0) for cls in set(labels)]
        counts = [3.0 * scale] * 4
        length = math.sqrt(sum(float(s @ s) for s in sums) + sum(c * c for c in counts))
        for cls in labels:
            expected[federation.field.plan.test.classes.index(cls)] += min(1, most / length)
    assert length > most
    assert table.counts.numpy() / 65536 == pytest.approx(expected, abs=0.01)


def test_noise_is_that_of_the_seed_or_of_the_system(tmp_path):
    def tables(folder, *more):
        federation = Federation.of(tmp_path / folder, *NOISE, *more)
        federation.play(1)
        return federation.protection.channel.total.table.sums

    assert torch.equal(tables("a"), tables("b"))
    assert not torch.equal(tables("c", "privacy.repeatable=false"), tables("a"))
    assert entropy(None) is os.urandom
    assert entropy(1, "x")(8) != entropy(1, "y")(8)


@pytest.mark.parametrize(
    "change",
    [
        {"contributor": "node-1"},
        {"version": 9},
        {"classes": tuple("klmnopqrst")},
        {"embedding_id": "another"},
        {"counts": torch.full((10,), 2**62)},
        {"sums": torch.full((10, 64), -(2**63))},
        {"sums": torch.zeros(10, 3, dtype=torch.int64)},
    ],
    ids=str,
)
def test_a_table_that_breaks_a_rule_changes_nothing(change, tmp_path):
    federation = Federation.of(tmp_path, *NOISE)
    federation.play(1)
    channel = federation.protection.channel
    before = channel.total.table
    good = decode_contribution(federation.grid.of(TRAIN)[0].content["release-1"])
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__} | {"version": 2}
    head = federation.strategy.head(2, ConfigRecord())
    channel.begin(federation.grid, head)
    part = encode_contribution(Contribution(**(fields | change)))
    with pytest.raises(InvalidMessage):
        channel.take(1, "node-0", RecordDict({"release-2": part}))
    assert channel.total.table is before
    channel.take(
        1, "node-0", RecordDict({"release-2": encode_contribution(Contribution(**fields))})
    )
    assert channel.total.table is not before


# ---- account


def oracle_epsilon(mu, delta):
    def curve(e):
        return norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta

    return brentq(curve, 0, 200)


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_a_run_spends_what_its_releases_spend_together(delta):
    bounds = Bounds("example", 1.0, 0.5)
    once = Mechanism(("a",), bounds, 1.0, delta, 0)
    mu = bounds.sensitivity / once.sigma
    for missions in (1, 2, 7):
        for again, holders, pooled, releases in (
            (False, 1, False, 1),
            (False, 1, True, 1),
            (True, 1, False, missions),
            (True, 1, True, missions),
            (False, 3, False, 3),
            (True, 3, False, 3 * missions),
            (False, 3, True, 9),
            (True, 3, True, 9 * missions),
        ):
            spent = once.account(missions, Exposure(again, holders), pooled=pooled)
            expected = oracle_epsilon(mu * math.sqrt(releases), delta)
            assert spent.epsilon(delta) == pytest.approx(expected, rel=1e-6)
    node = Mechanism(("a",), Bounds("client", 1.0, 0.5, message_norm=4.0), 1.0, delta, 0)
    for missions in (1, 4):
        spent = node.account(missions, Exposure(), pooled=True).epsilon(delta)
        assert spent == pytest.approx(oracle_epsilon(mu * math.sqrt(missions), delta), rel=1e-6)


def test_epsilon_grows_over_missions_with_replacement_alone(tmp_path):
    fresh = Federation.of(tmp_path, *NOISE).protection
    assert [fresh.epsilon(n) for n in (1, 2, 3)] == pytest.approx([1.0] * 3)
    again = Federation.of(tmp_path, *NOISE, "scenario.replacement=true").protection
    spent = [again.epsilon(n) for n in (1, 2, 3)]
    assert spent == sorted(spent) and spent[0] < spent[1] < spent[2]
    assert Federation.of(tmp_path, "privacy=secagg").protection.epsilon(3) is None


def test_exposure_counts_images_that_come_again_and_that_several_nodes_hold():
    def plan(*held):
        missions = [Mission(n, r, ("a",), torch.tensor(i)) for n, r, i in held]
        return MissionPlan(2, 2, tuple(missions), None, None)

    assert exposure(plan((0, 1, [1, 2]), (1, 1, [3]), (0, 2, [4]))) == Exposure(False, 1)
    assert exposure(plan((0, 1, [1, 2]), (1, 1, [3]), (0, 2, [2]))) == Exposure(True, 1)
    assert exposure(plan((0, 1, [1, 2]), (1, 2, [1]))) == Exposure(False, 2)
    assert exposure(plan((0, 1, [1]), (0, 2, [1]), (1, 2, [1]))) == Exposure(True, 2)


# ---- minimum counts


def test_no_row_changes_by_less_than_the_minimum_and_nothing_is_lost(tmp_path):
    options = ("scenario.shots=1", "scenario.rounds=9", "scenario.classes_per_mission=6")
    federation = Federation.of(tmp_path, *options, "privacy=minimum_count", "privacy.least=3")
    total = federation.play()
    known = {}
    for reply in federation.grid.of(TRAIN):
        if "rows" not in reply.content:
            continue
        rows = decode_contribution(reply.content["rows"])
        for name, count in zip(rows.classes, rows.counts.tolist(), strict=True):
            before = known.get((rows.contributor, name), 0)
            assert count - before >= 3
            known[rows.contributor, name] = count
    assert known
    # By hand: a class is told whenever three or more wait.
    expected, waited = Counter(), 0
    for node in range(4):
        told, waiting = Counter(), Counter()
        for mission in range(1, 10):
            waiting.update(federation.met(node, mission)[1])
            for name in [name for name, count in waiting.items() if count >= 3]:
                told[name] += waiting.pop(name)
        expected += told
        waited += sum(waiting.values())
    assert dict(zip(total.classes, total.counts.tolist(), strict=True)) == dict(expected)
    assert waited and total.total_count + waited == 4 * 9 * 6


# ---- networks


def updates(**options):
    inner = {
        "_target_": "clfed.strategies.fedavg.FedAvgTraining",
        "epochs": 2,
        "lr": 0.5,
    }
    return NoisyUpdates(
        inner=inner, **{"classes": ["2", "0", "1"], "norm": 0.25, "sigma": 1e-6} | options
    )


@pytest.fixture
def visit(tmp_path):
    from simulations import Simulation

    simulation = Simulation.of(tmp_path, "strategy=fedavg", "scenario=dirichlet", *TASKS)
    visit = simulation.visit()
    assert len(set(visit.labels)) > 1
    return simulation, visit


TASKS = (
    "scenario.groups=all",
    "scenario.tasks=1",
    "scenario.nodes=3",
    "scenario.train_images=20",
    "scenario.test_images=10",
)


def request(simulation, round_=1):
    head = config_record(round=round_, classes="[]")
    return RecordDict({"round": head, "model": simulation.strategy.arrays()})


def test_an_update_is_clipped_as_one_vector_and_spread_over_the_public_list(visit):
    simulation, visit = visit
    classes = tuple(map(str, range(10)))
    local = updates(classes=[*classes])
    plain = local.inner.train(visit, request(simulation))
    sent = simulation.strategy.arrays()
    reply = local.train(visit, request(simulation))
    assert json.loads(reply["status"]["classes"]) == list(classes)
    assert reply["status"]["examples"] == 1
    own = json.loads(plain["status"]["classes"])
    moved, expected = [], []
    for key in sent:
        old, new = sent[key].numpy().astype(float), reply["model"][key].numpy().astype(float)
        trained = plain["model"][key].numpy().astype(float)
        if key.startswith("head."):
            old = np.zeros((10, *old.shape[1:]))
            whole = old.copy()
            for row, name in enumerate(own):
                whole[classes.index(name)] = trained[row]
            trained = whole
        moved.append((new - old).ravel())
        expected.append((trained - old).ravel())
    moved, expected = np.concatenate(moved), np.concatenate(expected)
    length = np.linalg.norm(expected)
    assert length > 0.25
    assert np.linalg.norm(moved) == pytest.approx(0.25, abs=1e-3)
    assert moved == pytest.approx(expected * 0.25 / length, abs=1e-5)


def test_a_node_without_images_sends_noise_that_looks_like_any_other(visit):
    simulation, visit = visit
    nothing = type(visit)(**{**vars(visit), "images": visit.images[:0], "labels": []})
    full, empty = (
        updates(classes=[*map(str, range(10))], sigma=0.5).train(v, request(simulation))
        for v in (visit, nothing)
    )
    assert full["status"] == empty["status"]
    shapes = [{k: a.numpy().shape for k, a in r["model"].items()} for r in (full, empty)]
    assert shapes[0] == shapes[1]
    sent = simulation.strategy.arrays()
    noise = np.concatenate(
        [
            (a.numpy() - (0 if k.startswith("head.") else sent[k].numpy())).ravel()
            for k, a in empty["model"].items()
        ]
    )
    assert noise.std() == pytest.approx(0.5, rel=0.1)


def test_the_same_round_gets_the_same_noise_and_the_next_one_another(visit):
    simulation, visit = visit
    local = updates(classes=[*map(str, range(10))], sigma=0.5, repeatable=False)

    def bytes_of(reply):
        return {k: a.data for k, a in reply["model"].items()}

    first = bytes_of(local.train(visit, request(simulation)))
    assert bytes_of(local.train(visit, request(simulation))) == first
    later = type(visit)(**{**vars(visit), "round": 2})
    assert bytes_of(local.train(later, request(simulation, 2))) != first


def test_what_sends_more_than_a_network_is_refused(visit):
    simulation, visit = visit
    local = updates(classes=[*map(str, range(10))])
    inner = local.inner.train
    extra = ArrayRecord({"z": Array(np.ones(2))})
    local.inner.train = lambda v, r: RecordDict({**inner(v, r), "prototypes": extra})
    with pytest.raises(ConfigError, match="sends prototypes"):
        local.train(visit, request(simulation))
    with pytest.raises(ConfigError, match="does not cover the loss"):
        local.score(visit, request(simulation))


def test_wrong_settings_of_updates_are_refused():
    for wrong in (
        {"norm": 0},
        {"sigma": -1.0},
        {"inner": {"_target_": "clfed.privacy.tiers.Plain"}},
    ):
        with pytest.raises(ConfigError):
            NoisyUpdates(
                **{
                    "inner": {"_target_": "clfed.strategies.fedavg.FedAvgTraining"},
                    "classes": ["a"],
                    "norm": 1.0,
                    "sigma": 1.0,
                }
                | wrong
            )


# ---- settings


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("strategy=fedavg", "privacy=minimum_count"), "FedAvg sends none"),
        (("strategy=fedavg", "privacy=secagg"), "FedAvg sends none"),
        (("strategy=fedavg", "privacy=secagg_noise"), "FedAvg sends none"),
        (("strategy=fedavg", "privacy=noise"), "hides nodes"),
        (("strategy=fedcof", "privacy=secagg"), "class means of single messages"),
        (("strategy=fedcof", "privacy=noise"), "class means of single messages"),
        (("strategy=fed3r", "privacy=noise"), "second moments"),
        (("strategy=fed3r", "privacy=secagg"), "second moments"),
        (("strategy=fed3r", "privacy=minimum_count"), "one matrix"),
        (("strategy=fedncm", "privacy=secagg", "merge=legacy_double_shrink"), "merge=pooled"),
        (("strategy=fedncm", "privacy=noise", "strategy.message_bits=8"), "message_bits"),
        (("privacy=minimum_count", "privacy.least=1"), r"privacy\.least"),
        (("privacy=secagg", "privacy.threshold=2"), r"privacy\.threshold"),
        (("privacy=noise", "privacy.unit=image"), r"privacy\.unit"),
        (("privacy=noise", "privacy.where=cloud"), r"privacy\.where"),
        (("privacy=noise", "privacy.epsilon=0"), "epsilon"),
        (("privacy=noise", "privacy.delta=1"), "delta"),
        (("privacy=noise", "privacy.clip_norm=all"), r"privacy\.clip_norm"),
        (("privacy=noise", "privacy.clip_norm=-1"), r"privacy\.clip_norm"),
        (("privacy=noise", "privacy.contribution=0"), r"privacy\.contribution"),
        (("privacy=noise", "privacy.repeatable=7"), r"privacy\.repeatable"),
        (("privacy=noise", "privacy.update_norm=0"), r"privacy\.update_norm"),
        (("privacy._target_=clfed.federated.channels.Channel",), "a tier"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_refused(overrides, match):
    with pytest.raises(ConfigError, match=match):
        check_federated(compose(["job=federated", *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=fedcof", "privacy=minimum_count"),
        ("strategy=fed3r", "privacy=minimum_count", "memory.moments=class"),
        ("strategy=fedprox", "privacy=noise", "privacy.unit=node"),
        ("strategy=prototype_averaging", "privacy=secagg_noise"),
    ],
    ids=" ".join,
)
def test_what_goes_together_is_taken(overrides):
    check_federated(compose(["job=federated", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("privacy=secagg", "scenario.nodes=2"), "at least 3 nodes, got 2"),
        (("privacy=secagg", "privacy.threshold=5"), "at least 5 nodes, got 4"),
        (("privacy=noise",), "base classes that no node meets, got 0"),
        (("privacy=noise", "privacy.clip_norm=1", "privacy.mistakes=10"), "below the number"),
    ],
)
def test_what_does_not_fit_the_scenario_is_refused_before_the_run_folder(
    overrides, match, tmp_path
):
    from private_federations import FEATURES

    cfg = compose([*FEATURES, *overrides, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=match):
        federated.run(cfg)
    assert not (tmp_path / "run").exists()


def test_other_jobs_send_in_the_open_alone(tmp_path):
    for run in (reconnaissance.run,):
        with pytest.raises(ConfigError, match="must be plain"):
            run(compose(["privacy=secagg", f"run_dir={tmp_path / 'run'}"]))


def test_the_results_say_what_was_spent(tmp_path):
    from private_federations import FEATURES

    places = [f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    tier = [*NOISE, "scenario.replacement=true", "privacy.epsilon=2"]
    results = read(federated.run(compose([*FEATURES, *places, *tier])) / "results.json")
    method = results["method"]
    assert method["privacy"] == "noise" and method["unit"] == "example"
    assert method["privacy_options"]["where"] == "node" and "noise" in method["leaves"]
    spent = [step["epsilon"] for step in results["steps"]]
    assert spent[0] < spent[1] < spent[2] == method["epsilon"] and method["delta"] == 1e-5
    assert isinstance(build(compose(["privacy=noise"]).privacy), Noise)


def test_base_embeddings_are_the_origin_and_give_the_norm(tmp_path):
    bases = ("data.base_classes=4", "privacy=noise", "privacy.where=server", "privacy.epsilon=1e6")
    world = Federation.of(tmp_path, *bases)
    source = world.field.benchmark
    public = source.train.of_classes(source.groups["base"]).images.double().numpy()
    centre = public.mean(0)
    limit = np.median(np.linalg.norm(public - centre, axis=1))
    sums, counts = {}, Counter()
    for node in range(world.field.plan.nodes):
        for z, name in zip(*world.met(node, 1), strict=True):
            moved = z.double().numpy() - centre
            sums[name] = sums.get(name, 0) + moved * min(1.0, limit / np.linalg.norm(moved))
            counts[name] += 1
    memory = world.play(1)
    assert set(memory.classes) == set(sums)
    for name, mean in zip(memory.classes, memory.means().numpy(), strict=True):
        np.testing.assert_allclose(mean, sums[name] / counts[name], atol=0.05 * limit)
    far = torch.from_numpy(centre + 3 * limit * np.eye(len(centre))[0])[None].float()
    assert abs(float(world.protection.seen(far).norm()) - limit) < 1e-3 * limit
