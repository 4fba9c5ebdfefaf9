"""Curricula, against formulas and counts written out here, and in whole runs of a federation."""

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn import functional as F

from clfed.backbones import MLP, Conv4, Encoder
from clfed.config import choices, compose
from clfed.errors import ConfigError, FederationError
from clfed.federated import answering, records
from clfed.federated.client_app import app
from clfed.federated.field import field_settings, open_field
from clfed.federated.grid import LocalGrid
from clfed.federated.local_training import Visit
from clfed.federated.networks import network_record
from clfed.federated.node import briefing
from clfed.federated.rounds import run_rounds
from clfed.federated.wire import record_bytes
from clfed.jobs import federated
from clfed.jobs.method import make_method
from clfed.learners.curricula import (
    FLOOR,
    ORDERINGS,
    PACES,
    ExampleCurriculum,
    NodeCurriculum,
    Turns,
    difficulties,
)
from clfed.learners.fine_tuning import FineTuning, passes
from clfed.prototypes import PrototypeMemory
from clfed.strategies import FedAvg, FedProx
from clfed.strategies.fedavg import FedAvgTraining
from clfed.strategies.fedprox import FedProxTraining

FAMILIES = sorted(PACES)
E10 = 22026.465794806718  # e to the 10

families = st.sampled_from(FAMILIES)
shares = st.floats(0.01, 1.0)
starts = st.floats(0.0, 1.0)
counts = st.integers(1, 3000)
budgets = st.integers(1, 2000)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Pacing


def printed(family, n, a, b, t, budget):
    """The formulas as the paper's code has them, before they are clipped."""
    end = a * budget
    rest = (1 - b) * n
    return {
        "linear": lambda: b * n + rest * t / end,
        "quad": lambda: b * n + rest * (t / end) ** 2,
        "sqrt": lambda: b * n + rest * (t / end) ** 0.5,
        "exp": lambda: b * n + rest * (E10 ** (t / end) - 1) / (E10 - 1),
        "log": lambda: b * n + rest * (1 + 0.1 * np.log(t / end + 1 / E10)),
        "step": lambda: b * n + n * np.floor(t / end),
    }[family]()


@given(families, counts, shares, starts, budgets, st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_the_pace_is_the_printed_one_clipped(family, n, a, b, budget, when):
    t = when * budget
    g = ExampleCurriculum(pacing=family, full=a, start=b).available(t, budget, n)
    # Beyond the end everything is in use, and the printed exponential leaves the numbers.
    expected = n if t >= a * budget else printed(family, n, a, b, t, budget)
    assert g == pytest.approx(min(n, max(1, expected)), rel=1e-9)


@given(families, counts, shares, starts, budgets)
@settings(max_examples=200, deadline=None)
def test_it_begins_with_b_n_and_ends_with_n_and_never_shrinks(family, n, a, b, budget):
    curriculum = ExampleCurriculum(pacing=family, full=a, start=b)
    assert curriculum.available(0, budget, n) == pytest.approx(max(1, b * n), rel=1e-9)
    assert curriculum.available(a * budget, budget, n) == n
    assert curriculum.available(budget, budget, n) == n
    line = [curriculum.available(t, budget, n) for t in np.linspace(0, budget, 40)]
    assert all(1 <= g <= n for g in line)
    assert all(later >= earlier - 1e-9 * n for earlier, later in pairwise(line))


def test_the_families_differ_between_the_ends():
    halfway = {f: ExampleCurriculum(pacing=f, full=1.0).available(50, 100, 1000) for f in FAMILIES}
    assert len({round(g, 6) for g in halfway.values()}) == len(FAMILIES) == 6
    assert halfway["step"] < halfway["exp"] < halfway["quad"] < halfway["linear"]
    assert halfway["linear"] < halfway["sqrt"] < halfway["log"]


# The order of examples


def batches(curriculum, scores, epochs=3, batch_size=10, seed=0):
    order = curriculum.order(torch.tensor(scores, dtype=torch.float32))
    return [batch.tolist() for batch in order(len(scores), epochs, batch_size, seeded(seed))]


def first_pass(curriculum, scores, seed):
    """What is used before anything is used twice."""
    used = []
    for batch in batches(curriculum, scores, seed=seed):
        if set(batch) & set(used):
            break
        used += batch
    return used


@given(st.lists(st.integers(0, 5), min_size=65, max_size=200), st.floats(0, 0.49), families)
@settings(max_examples=60, deadline=None)
def test_easy_and_hard_prefixes_have_nothing_in_common(scores, b, family):
    setting = {"start": b, "pacing": family}
    easy = first_pass(ExampleCurriculum(ordering="curr", **setting), scores, 3)
    hard = first_pass(ExampleCurriculum(ordering="anti", **setting), scores, 3)
    assert (
        len(easy)
        == len(hard)
        == max(FLOOR, math.floor(Fraction(b) * len(scores) + Fraction(1, 10**9)))
    )
    assert not set(easy) & set(hard)
    assert max(scores[i] for i in easy) <= min(
        scores[i] for i in set(range(len(scores))) - set(easy)
    )
    assert min(scores[i] for i in hard) >= max(
        scores[i] for i in set(range(len(scores))) - set(hard)
    )


@given(st.integers(1, 150), st.integers(0, 5), st.integers(1, 40), families, st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_all_orderings_take_the_same_number_of_steps(n, epochs, batch_size, family, seed):
    scores = np.random.default_rng(seed).random(n).tolist()
    sizes = {}
    for ordering in ORDERINGS:
        curriculum = ExampleCurriculum(ordering=ordering, pacing=family)
        sizes[ordering] = [len(b) for b in batches(curriculum, scores, epochs, batch_size, seed)]
    assert sizes["curr"] == sizes["anti"] == sizes["rand"]
    assert len(sizes["curr"]) == (n // batch_size + 1) * epochs
    customary = len(list(passes(n, epochs, batch_size, seeded())))
    assert len(sizes["curr"]) - customary == (epochs if n % batch_size == 0 else 0)


def slow_order(n, epochs, batch_size, a, b):
    """How many of n examples each pass may use, and how many batches of it are used; exact."""
    t = 0
    budget = (n // batch_size + 1) * epochs
    while t < budget:
        size = min(n, max(32, math.floor(b * n + (1 - b) * n * t / (a * budget))))
        left = budget - t
        used = min(left, -(-size // batch_size))
        yield size, used
        t += used


@given(st.integers(33, 200), st.integers(1, 6), st.sampled_from([7, 10, 32]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_each_pass_goes_through_the_prefix_of_its_time(n, epochs, batch_size, seed):
    scores = np.random.default_rng(seed).permutation(n).astype(float).tolist()
    found = iter(batches(ExampleCurriculum(), scores, epochs, batch_size, seed))
    ranks = np.argsort(scores)
    for size, used in slow_order(n, epochs, batch_size, Fraction(4, 5), Fraction(1, 5)):
        seen = [i for _ in range(used) for i in next(found)]
        assert len(seen) == len(set(seen)) == min(size, used * batch_size)
        assert set(seen) <= set(ranks[:size].tolist())
    assert next(found, None) is None


def test_a_pass_is_shuffled():
    scores = [float(i) for i in range(200)]
    used = [i for batch in batches(ExampleCurriculum(), scores, 1, 10)[:4] for i in batch]
    assert sorted(used) == list(range(40)) != used
    # Hard examples of a prefix come early as often as late.
    assert 10 < np.mean(used[:20]) < 30


def test_what_is_equally_hard_comes_in_an_order_that_the_seed_decides():
    ties = [0.0] * 100
    one, same, other = (first_pass(ExampleCurriculum(), ties, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert sorted(one) != list(range(len(one)))


def test_a_random_order_does_not_look_at_scores():
    curriculum = ExampleCurriculum(ordering="rand")
    up = batches(curriculum, [float(i) for i in range(90)])
    down = batches(curriculum, [float(-i) for i in range(90)])
    drawn = [b.tolist() for b in curriculum.order(None)(90, 3, 10, seeded())]
    assert up == down == drawn and not curriculum.scored


# How hard examples are


def a_network(classes="abc", seed=0):
    torch.manual_seed(seed)
    config = {"_target_": "clfed.backbones.Conv4", "widths": [4, 4, 4, 4]}
    backbone = Conv4(1, 16, [4, 4, 4, 4])
    encoder = Encoder(backbone, config, input_shape=(1, 16, 16), mean=(0.5,), std=(0.25,))
    network = FineTuning(encoder, list(classes))
    with torch.no_grad():
        network.head.weight.copy_(torch.randn(len(classes), 4))
        network.head.bias.copy_(torch.randn(len(classes)))
    return network


def some_images(count=20, seed=0):
    return torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=seeded(seed))


@pytest.mark.parametrize("rows", [None, [0, 2]])
def test_difficulty_is_the_loss_of_each_image_alone(rows):
    network, images = a_network().train(), some_images()
    labels = torch.tensor([0, 2] * 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    chosen = None if rows is None else torch.tensor(rows)
    found = difficulties(network, images, labels, rows=chosen, batch_size=7)
    wrong = difficulties(network, images, labels, rows=chosen, predictions=True)
    assert network.training and not found.requires_grad and found.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    network.eval()
    for image, label, loss, error in zip(images, labels, found, wrong, strict=True):
        logits = network(image[None])[0].detach().double().numpy()
        allowed = rows if rows is not None else [0, 1, 2]
        total = sum(math.exp(logits[row]) for row in allowed)
        assert loss.item() == pytest.approx(math.log(total) - logits[label], abs=1e-5)
        assert error.item() == (max(allowed, key=lambda row: logits[row]) != label)


def test_no_images_have_no_difficulties():
    assert difficulties(a_network(), some_images(0), torch.zeros(0, dtype=torch.int64)).shape == (
        0,
    )


def visit(network_or_encoder, images, labels, state=None):
    encoder = network_or_encoder
    return Visit("n", 0, 1, 1, 0, encoder, images, labels, RecordDict() if state is None else state)


def an_encoder():
    torch.manual_seed(0)
    config = {"_target_": "clfed.backbones.Conv4", "widths": [4, 4, 4, 4]}
    return Encoder(
        Conv4(1, 16, [4, 4, 4, 4]), config, input_shape=(1, 16, 16), mean=(0.5,), std=(0.25,)
    )


def request(network):
    head = records.config_record(classes=json.dumps(network.classes))
    return RecordDict({"model": network_record(network), "round": head})


def losses(network, images, names):
    network.eval()
    with torch.no_grad():
        return F.cross_entropy(network(images), network.label(names), reduction="none")


def test_global_local_and_both_scores():
    images, names = some_images(40), ["b", "d"] * 20  # the class d is new to the node
    encoder, sent = an_encoder(), a_network("abc")
    found = {}
    for scoring in ("global", "local", "both"):
        half = FedAvgTraining(epochs=1, lr=0.1, curriculum={"scoring": scoring})
        stay = visit(encoder, images, names)
        now = half.network(stay, request(sent))
        now.grow(["b", "d"])
        first = half.difficulties(now, stay)
        half.train(stay, request(sent))
        found[scoring] = first, half.difficulties(now, stay), half, stay
    s_g = losses(now, images, names)
    torch.testing.assert_close(found["global"][0], s_g)
    torch.testing.assert_close(found["global"][1], s_g)
    torch.testing.assert_close(found["local"][0], s_g)  # there is no other model yet
    torch.testing.assert_close(found["both"][0], 2 * s_g)
    assert not found["global"][3].state  # nothing is kept that is not needed
    for scoring, more in (("local", 0), ("both", s_g)):
        _, second, half, stay = found[scoring]
        kept = FineTuning(encoder, json.loads(stay.state["trained-classes"]["json"]))
        kept.load_state_dict(stay.state["trained"].to_torch_state_dict())
        s_l = losses(kept, images, names)
        assert (s_l - s_g).abs().max() > 1e-3
        torch.testing.assert_close(second, s_l + more)
        mean = half.score(stay, request(sent))
        assert mean == pytest.approx(second.double().mean().item())


def test_scores_obey_the_same_softmax_as_the_training():
    images, names, sent = some_images(6), ["a", "c"] * 3, a_network("abc")
    half = FedAvgTraining(logits="met", curriculum={"predictions": False})
    stay = visit(an_encoder(), images, names)
    now = half.network(stay, request(sent))
    now.eval()
    logits = now(images).detach()[:, [0, 2]]
    expected = F.cross_entropy(logits, torch.tensor([0, 1] * 3), reduction="none")
    torch.testing.assert_close(half.difficulties(now, stay), expected)


def test_a_node_without_images_has_no_score():
    stay = visit(an_encoder(), some_images(0), [])
    assert math.isnan(FedAvgTraining().score(stay, request(a_network())))


# The order reaches the training, also that of other methods


@pytest.mark.parametrize("method", [FedAvgTraining, FedProxTraining])
def test_a_method_trains_on_what_the_curriculum_gives(method, monkeypatch):
    images, names = some_images(70), [*"ab"] * 35
    used = []
    inner = method.loss

    def recording(self, network, stay, content):
        loss = inner(self, network, stay, content)

        def kept(network, batch, labels):
            used.extend((batch[:, None] == images[None]).flatten(2).all(2).nonzero()[:, 1].tolist())
            return loss(network, batch, labels)

        return kept

    monkeypatch.setattr(method, "loss", recording)
    first = {}
    for ordering in ("curr", "anti"):
        used.clear()
        half = method(epochs=1, batch_size=8, curriculum={"ordering": ordering, "start": 0.1})
        half.train(visit(an_encoder(), images, names), request(a_network("ab")))
        first[ordering] = set(used[:FLOOR])
        assert len(first[ordering]) == FLOOR
    assert not first["curr"] & first["anti"]
    hard = losses(a_network("ab"), images, names)
    assert hard[[*first["curr"]]].max() < hard[[*first["anti"]]].min()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ordering": "sideways"}, "curriculum.examples.ordering must be one of curr, anti, rand"),
        ({"scoring": "expert"}, "curriculum.examples.scoring must be one of global, local, both"),
        ({"pacing": "cubic"}, "curriculum.examples.pacing must be one of linear, quad"),
        ({"full": 0}, "curriculum.examples.full must be above 0 and at most 1, got 0"),
        ({"full": 1.5}, "curriculum.examples.full"),
        ({"full": True}, "curriculum.examples.full"),
        ({"full": math.nan}, "curriculum.examples.full"),
        ({"start": -0.1}, "curriculum.examples.start must be from 0 to 1, got -0.1"),
        ({"start": "all"}, "curriculum.examples.start"),
        ({"predictions": "yes"}, "curriculum.examples.predictions must be true or false"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FedAvgTraining(curriculum=settings)
    if "scoring" not in settings and "predictions" not in settings:
        with pytest.raises(ConfigError, match=message.replace("examples", "nodes")):
            FedAvg(None, local={}, curriculum=settings)


# Turns of nodes


def turns(rounds=10, **options):
    return Turns(NodeCurriculum(**options), rounds, seed=0)


def hardness(count):
    """Nodes whose names, ids and scores are in different orders."""
    return {f"n{i:02}": (100 - i, float((i * 7) % count)) for i in range(count)}


def test_a_pool_is_gone_through_before_the_next():
    asked = []
    walk, found = turns(rounds=10), hardness(20)

    def ask():
        asked.append(len(groups))
        return found

    groups = []
    for round_ in range(1, 11):
        groups.append(walk.next(1, round_, range(200), 2, ask))
    by_score = sorted(found.values(), key=lambda pair: pair[1])
    # 20 % of 20 nodes for 2 rounds; then after 4 of 20 updates 4 + 16 * 4 / 16 = 8 for 4 rounds;
    # then after 12 updates 16, of which 4 rounds are left.
    assert asked == [0, 2, 6]
    for begin, end, size in ((0, 2, 4), (2, 6, 8), (6, 10, 16)):
        used = [node for group in groups[begin:end] for node in group]
        assert len(set(used)) == len(used) == (end - begin) * 2
        assert set(used) <= {node for node, _ in by_score[:size]}


@pytest.mark.parametrize("ordering", ["curr", "anti"])
def test_easy_or_hard_nodes_first(ordering):
    found = hardness(10)
    group = turns(ordering=ordering, start=0.3).next(1, 1, range(200), 3, lambda: found)
    hard = sorted(score for node, score in found.values() if node in group)
    assert hard == ([0, 1, 2] if ordering == "curr" else [7, 8, 9])


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_ids_decide_nothing_but_names_and_the_round_do(ordering):
    found = hardness(30)
    other = {name: (1000 - node, score) for name, (node, score) in found.items()}
    names = {node: name for name, (node, _) in found.items()}
    backwards = {1000 - node: name for node, name in names.items()}
    drawn = turns(ordering=ordering).next(1, 1, range(2000), 5, lambda: found)
    same = turns(ordering=ordering).next(
        1, 1, range(2000), 5, lambda: dict(reversed(other.items()))
    )
    later = turns(ordering=ordering).next(1, 2, range(2000), 5, lambda: found)
    assert [names[node] for node in drawn] == [backwards[node] for node in same]
    assert drawn != later


def test_who_left_is_skipped():
    found = hardness(10)
    walk = turns(start=1.0)
    everyone = {node for node, _ in found.values()}
    first = walk.next(1, 1, everyone, 4, lambda: found)
    (last, *gone) = everyone - set(first)
    there = everyone - set(gone)
    assert walk.next(1, 2, there, 4, lambda: pytest.fail("one still has its turn")) == [last]


def test_a_new_mission_starts_again():
    found, walk = hardness(10), turns(rounds=5, start=0.2)
    score_of = dict(found.values())
    scores = [
        {score_of[node] for node in walk.next((r - 1) // 5 + 1, r, range(200), 2, lambda: found)}
        for r in range(1, 11)
    ]
    assert scores[0] == scores[5] == {0, 1}
    assert max(set().union(*scores[1:5])) > 4 < max(set().union(*scores[6:]))


def test_random_turns_do_not_look_at_scores():
    found = hardness(30)
    zero = {name: (node, 0.0) for name, (node, _) in found.items()}
    one = turns(ordering="rand").next(1, 1, range(200), 6, lambda: found)
    assert one == turns(ordering="rand").next(1, 1, range(200), 6, lambda: zero)


# Whole federations

NODES = 5
DATA = {"_target_": "clfed.data.digits.load", "base_classes": 0}
SCENARIO = {"nodes": NODES, "tasks": 1, "beta": 0.3, "train_images": 40}
FIELD = field_settings(DATA, {"_target_": "clfed.scenarios.dirichlet", **SCENARIO}, 0)


class Watched(LocalGrid):
    """Remembers which kind of message went to which node, by the number of its mission's part."""

    def __init__(self, places):
        super().__init__(app, [{"partition-id": i, "num-partitions": NODES} for i in places])
        self.seen, self.places = [], dict(enumerate(places, start=1))
        self.down, self.up = Counter(), 0

    def push_messages(self, pushed):
        pushed = list(pushed)
        for message in pushed:
            kind = message.metadata.message_type
            self.seen.append((kind, self.places[message.metadata.dst_node_id]))
            self.down[kind] += record_bytes(message.content)
        return super().push_messages(pushed)

    def pull_messages(self, identities):
        replies = super().pull_messages(identities)
        self.up += sum(record_bytes(reply.content) for reply in replies)
        return replies


def play(tmp_path, curriculum, *, method=FedAvg, rounds=4, participation=0.4, places=range(NODES)):
    """Run a method on digits and return what it ends with, what passed, and reports."""
    torch.manual_seed(0)
    network = {"_target_": "clfed.backbones.MLP", "widths": [16]}
    encoder = Encoder(MLP(1, 8, [16]), network, input_shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
    node_settings = {"field": FIELD, "moments": "none", "cache_dir": str(tmp_path)}
    half = f"{method.__module__}.{method.__name__}Training"
    config = {
        "strategy": {
            "_target_": f"clfed.strategies.{method.__name__}",
            "local": {"_target_": half, "epochs": 2, "batch_size": 16},
            "rounds_per_mission": rounds,
            "participation": participation,
            "wait": 0.0,
        },
        "curriculum": curriculum,
        "privacy": None,
        "seed": 3,
    }
    session = f"{curriculum} {method} {list(places)}"
    server = make_method(
        config, encoder, briefing=briefing(node_settings, encoder), session=session, nodes=NODES
    )
    grid, reports = Watched(list(places)), []
    arrays = run_rounds(
        server,
        grid,
        server.arrays(),
        rounds=rounds,
        timeout=60.0,
        after=lambda report, _: reports.append(report),
    )
    return {key: array.numpy().tobytes() for key, array in arrays.items()}, grid, reports


def curriculum(name):
    return OmegaConf.to_container(compose([f"curriculum={name}"]).curriculum)


@pytest.mark.parametrize("method", [FedAvg, FedProx])
def test_vanilla_is_the_method_itself_bit_for_bit(method, tmp_path):
    plain, sent, _ = play(tmp_path, None, method=method)
    vanilla, same, _ = play(tmp_path, curriculum("vanilla"), method=method)
    curr, _, _ = play(tmp_path, curriculum("curr"), method=method)
    assert vanilla == plain != curr
    assert sent.seen == same.seen


@pytest.mark.parametrize("name", [name for name, _ in choices("curriculum")])
def test_every_choice_runs_and_repeats_whatever_the_ids(name, tmp_path):
    chosen = curriculum(name)
    one, _, _ = play(tmp_path, chosen)
    other, _, _ = play(tmp_path, chosen, places=[3, 0, 4, 2, 1])
    assert one == other


def test_the_easiest_nodes_train_first_and_scores_are_paid_for(tmp_path):
    chosen = curriculum("clients")
    _, grid, reports = play(tmp_path, chosen, participation=0.2, rounds=10)
    trained = [place for kind, place in grid.seen if kind == "train.local"]
    assert len(trained) == 10 and {r.asked for r in reports} == {1}
    # Nothing is learned yet, so the loss of a node is the logarithm of its number of classes.
    field = open_field(FIELD)
    classes = [len(set(field.images(place, 1)[1])) for place in range(NODES)]
    assert len(set(classes)) > 1 and classes[trained[0]] == min(classes)
    # 0.2 of 5 nodes; after 1 of 10 updates 1.5, after 2 it is 2, then 3 after 4, 4.5 after 7.
    asked = [i for i, report in enumerate(reports) if report.down > 3 * reports[-1].down]
    assert asked == [0, 1, 2, 4, 7]
    assert sum(kind == "query.score" for kind, _ in grid.seen) == NODES * len(asked)
    assert (
        sum(report.down for report in reports) == grid.down.total() > grid.down["query.score"] > 0
    )
    assert sum(report.up for report in reports) == grid.up
    assert not any(kind == "query.introduce" for kind, _ in grid.seen)


def test_a_random_order_of_nodes_asks_for_names_alone(tmp_path):
    chosen = {"examples": None, "nodes": {"ordering": "rand"}}
    _, grid, _ = play(tmp_path, chosen, participation=0.2)
    assert Counter(kind for kind, _ in grid.seen) == {"query.introduce": NODES, "train.local": 4}


@pytest.mark.parametrize("score", [math.inf, -1.0, math.nan, "easy", 1, None])
def test_a_score_that_makes_no_sense_leaves_the_node_out(score, tmp_path, monkeypatch):
    bad = {1, 3}
    honest = answering.score

    def lying(node, content):
        reply = honest(node, content)
        if node.number in bad:
            del reply["status"]["score"]
            if score is not None:
                reply["status"]["score"] = score
        return reply

    monkeypatch.setattr(answering, "ACTIONS", {**answering.ACTIONS, "score": lying})
    chosen = {"examples": None, "nodes": {"start": 1.0}}
    _, grid, _ = play(tmp_path, chosen, participation=1.0)
    assert {place for kind, place in grid.seen if kind == "train.local"} == {0, 2, 4}
    bad |= set(range(NODES))
    with pytest.raises(FederationError, match="No node could say how hard its images are"):
        play(tmp_path, chosen)


# Sums do not care


def test_sums_are_the_same_bits_in_every_order():
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((300, 8)).astype(np.float32))
    names, scores = [f"c{i % 4}" for i in range(300)], torch.from_numpy(rng.random(300))
    files = set()
    for ordering in ORDERINGS:
        order = ExampleCurriculum(ordering=ordering).arranged(scores, 300, seeded(1))
        memory = PrototypeMemory.empty(8, "e", "shared")
        for batch in order.split(37):
            memory = memory + memory.observe(z[batch], [names[i] for i in batch])
        files.add(memory.sha256())
    assert len(files) == 1


def test_a_method_of_sums_has_no_curriculum(tmp_path):
    overrides = ["job=federated", "data=digits", "backbone=mlp", "learner=none", "logger=none"]
    where = [f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    cfg = compose([*overrides, *where, "strategy=fedncm", "curriculum=curr"])
    with pytest.raises(ConfigError, match="Sums do not depend on their order"):
        federated.run(cfg)
