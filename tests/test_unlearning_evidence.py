"""Evidence of unlearning: identities that hold by definition, slow loops, and real small models."""

import copy
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, InvalidEmbedding, NotEnoughData
from clfed.evaluation import evidence as evidence_module
from clfed.evaluation.evidence import MEASURES, Answers, Sheet, answers, evidence, floor
from clfed.evaluation.relearning import (
    SHARES,
    _attacks,
    anamnesis_index,
    prototypical_relearning,
    relearn_steps,
)
from clfed.evaluation.unlearning import (
    accuracy,
    activation_distance,
    adaptive_unlearning,
    jensen_shannon,
    linear_cka,
    losses,
    margins,
    tug_of_war,
    zero_retrain_forgetting,
)
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("forget", "retain", "validation", "test", "test_forget")
SIZES = {"forget": 40, "retain": 120, "validation": 30, "test": 90, "test_forget": 40}
CLASSES = 4


def labels_of(part, kind):
    """Class 3 goes in class requests."""
    count = SIZES[part]
    if kind != "class":
        count = 0 if part == "test_forget" else count
        return torch.arange(count) % CLASSES
    gone = part in ("forget", "test_forget")
    return torch.full((count,), 3) if gone else torch.arange(count) % 3


def sheet(seed, kind="class", *, lost=()):
    rng = torch.Generator().manual_seed(seed)
    parts = {}
    for part in PARTS:
        labels = labels_of(part, kind)
        logits = torch.randn(len(labels), CLASSES, generator=rng)
        logits[torch.arange(len(labels)), labels] += 1
        logits[:, list(lost)] = -torch.inf
        parts[part] = Answers(logits, torch.randn(len(labels), 6, generator=rng), labels)
    return Sheet(**parts)


def judge(subject, kind="class", *, original=None, oracles=None, untrained=None, seed=5):
    return evidence(
        subject,
        original=original or sheet(1, kind),
        oracles=oracles or [sheet(2, kind), sheet(3, kind)],
        untrained=untrained or sheet(4, kind),
        kind=kind,
        seed=seed,
        forgotten_rows=torch.tensor([3] if kind == "class" else [], dtype=torch.int64),
    )


# Identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "sample", "contributor"])
def test_a_copy_of_the_oracle_has_every_ideal(kind):
    found = judge(sheet(2, kind), kind, oracles=[sheet(2, kind)])
    for name in ("avg_gap", "js_forget", "js_retain", "js_test", "activation_distance"):
        assert found[name] == 0, name
    assert found["tow"] == found["tow_mia"] == 1
    assert found["cka"] == pytest.approx(1) and found["cka_test"] == pytest.approx(1)
    if kind == "class":
        kept = 1 - (accuracy(sheet(1).test) - accuracy(sheet(2).test))
        assert found["aus"] == pytest.approx(kept / (1 + accuracy(sheet(2).test_forget)))


def test_an_oracle_that_lost_the_class_keeps_its_test_accuracy_as_aus():
    oracle = sheet(2, lost=(3,))
    kept = 1 - (accuracy(sheet(1).test) - accuracy(oracle.test))
    assert judge(oracle, oracles=[oracle])["aus"] == pytest.approx(kept)


def test_doing_nothing_has_an_aus_of_one_over_one_plus_what_is_known():
    found = judge(sheet(1))
    assert found["ta_forget"] > 0
    assert found["aus"] == pytest.approx(1 / (1 + found["ta_forget"]))
    known = 1 - found["ua"]
    expected = 1 / (1 + abs(known - found["ta"]))
    assert found["aus_homogeneous"] == pytest.approx(expected)
    found = judge(sheet(1, "sample"), "sample")
    assert found["aus"] == pytest.approx(1 / (1 + abs(1 - found["ua"] - found["ta"])))
    assert "aus_homogeneous" not in found


@pytest.mark.parametrize(
    ("test", "forget", "expected"),
    [(77.55, 77.50, 0.563), (77.97, 0.0, 1.004), (71.57, 1.00, 0.931), (72.93, 2.00, 0.935)],
)
def test_published_adaptive_unlearning_scores(test, forget, expected):
    """CIFAR-100, ResNet-18, class removal, as percent."""
    assert round(adaptive_unlearning(0.7755, test / 100, forget / 100), 3) == expected


def test_average_gap_and_tug_of_war_by_hand():
    subject, oracles = sheet(7), [sheet(2), sheet(3)]
    found = judge(subject, oracles=oracles)
    theirs = [judge(oracle) for oracle in oracles]
    gaps = {
        name: abs(found[name] - sum(one[name] for one in theirs) / 2)
        for name in ("ua", "ra", "ta", "mia_confidence")
    }
    assert min(gaps.values()) > 0
    assert found["avg_gap"] == pytest.approx(sum(gaps.values()) / 4)
    stays = (1 - gaps["ra"]) * (1 - gaps["ta"])
    assert found["tow"] == pytest.approx((1 - gaps["ua"]) * stays)
    assert found["tow_mia"] == pytest.approx((1 - gaps["mia_confidence"]) * stays)
    assert tug_of_war([(0.25, 0.5), (0.5, 0.0)]) == 0.375


rows = st.lists(st.floats(-60, 20) | st.just(-math.inf), min_size=3, max_size=3).filter(
    lambda row: max(row) > -math.inf
)


@given(rows, rows)
def test_divergences_are_bounded_symmetric_and_those_of_scipy(a, b):
    p, q = (torch.softmax(torch.tensor([row], dtype=torch.float64), 1) for row in (a, b))
    found = float(jensen_shannon(p, q))
    assert found == float(jensen_shannon(q, p))
    assert 0 <= found <= math.log(2) + 1e-12
    assert found == pytest.approx(np.nan_to_num(jensenshannon(p[0], q[0])) ** 2, abs=1e-7)
    assert float(jensen_shannon(p, p)) == 0
    assert 0 <= float(activation_distance(p, q)) <= math.sqrt(2) + 1e-12


def test_the_largest_divergences_are_reached():
    p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2))
    assert float(activation_distance(p, q)) == pytest.approx(math.sqrt(2))
    assert zero_retrain_forgetting(p, q) == pytest.approx(1 - math.log(2))
    assert zero_retrain_forgetting(p, p) == 1


def test_the_untrained_network_has_a_zrf_of_one():
    assert judge(sheet(4))["zrf"] == 1
    assert 1 - math.log(2) <= judge(sheet(5))["zrf"] < 1


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=5), st.data())
def test_margins_are_log_odds(row, data):
    y = data.draw(st.integers(0, len(row) - 1))
    logits = torch.tensor([row], dtype=torch.float64)
    weights = [math.exp(v - max(row)) for v in row]
    odds = weights[y] / (sum(weights) - weights[y]) if sum(weights) > weights[y] else math.inf
    expected = max(-100.0, min(100.0, math.log(odds))) if 1e-10 < odds < 1e10 else None
    found = float(margins(logits, torch.tensor([y])))
    assert -100 <= found <= 100
    if expected is not None:
        assert found == pytest.approx(expected, abs=1e-4)


def test_margins_and_losses_are_finite_where_probabilities_are_not_inside():
    logits = torch.tensor([[500.0, 0, 0], [500.0, 0, 0], [-torch.inf, 0, 0], [0, -torch.inf, 0]])
    said = Answers(logits, torch.zeros(4, 1), torch.tensor([0, 1, 0, 0]))
    assert margins(logits, said.labels).tolist() == [100, -100, -100, 0]
    assert losses(said).tolist() == pytest.approx([0, 100, 100, math.log(2)])


def test_cka_agrees_with_centred_kernels_and_sees_no_rotation():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=rng), torch.randn(12, 3, generator=rng)
    centre = np.eye(12) - 1 / 12
    kernels = [centre @ (a @ a.T).double().numpy() @ centre for a in (x, y)]
    hsic = [[np.trace(a @ b) for a in kernels] for b in kernels]
    expected = hsic[0][1] / math.sqrt(hsic[0][0] * hsic[1][1])
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-5)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=rng)).Q
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert linear_cka(x, torch.ones(12, 2)) == 0


# The whole sheet ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "sample"])
def test_the_order_of_images_does_not_matter(kind):
    sheets = [sheet(seed, kind) for seed in (7, 1, 2, 3, 4)]
    rng = torch.Generator().manual_seed(0)
    orders = {p: torch.randperm(len(getattr(sheets[0], p).labels), generator=rng) for p in PARTS}

    def shuffled(one):
        parts = {p: getattr(one, p) for p in PARTS}
        return Sheet(
            **{
                p: Answers(a.logits[orders[p]], a.embeddings[orders[p]], a.labels[orders[p]])
                for p, a in parts.items()
            }
        )

    results = []
    for group in (sheets, [*map(shuffled, sheets)]):
        subject, original, first, second, untrained = group
        results.append(
            judge(subject, kind, original=original, oracles=[first, second], untrained=untrained)
        )
    assert results[0] == pytest.approx(results[1], abs=1e-12)


@pytest.mark.parametrize("kind", ["class", "sample", "contributor"])
def test_every_measure_is_finite_and_explained(kind):
    for lost in ((), (3,)):
        found = judge(sheet(7, kind, lost=lost), kind)
        assert all(math.isfinite(value) for value in found.values())
        known = [measure.name for measure in MEASURES]
        assert set(found) <= set(known) and len(set(known)) == len(known)
        only = {"ta_forget", "aus_homogeneous", "pra", "probe"}
        assert only & set(found) == (only if kind == "class" else set())
    assert {"mia_loss", "mia_threshold_auc", "mia_entropy", "avg_gap"} <= set(found)


def test_the_documentation_names_every_measure():
    text = (ROOT / "docs" / "unlearning_metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): row[-1].strip() for row in rows}
    for measure in MEASURES:
        assert table[measure.name] == measure.ideal, measure.name
    assert evidence_module.__doc__ and "docs/unlearning_metrics.md" in evidence_module.__doc__


def test_attacks_see_whether_the_forget_set_looks_trained():
    """Members are sure and right here, others are not; the forget set is like the one or other."""
    for sure in (True, False):
        parts = {part: getattr(sheet(7, "sample"), part) for part in PARTS}
        for part in ("forget", "retain", "test"):
            said, strength = (
                parts[part],
                9.0 if part == "retain" or sure > (part == "test") else 0.0,
            )
            logits = said.logits.scatter_add(
                1, said.labels[:, None], torch.full((len(said), 1), strength)
            )
            parts[part] = Answers(logits, said.embeddings, said.labels)
        found = judge(Sheet(**parts), "sample")
        assert (found["mia_entropy"] > 0.8) is sure and (found["mia_confidence"] < 0.2) is sure
        assert (found["mia_loss"] > 0.8) is (found["mia_threshold"] > 0.8) is sure
        assert (found["mia_threshold_auc"] > 0.9) is (found["mia_loss_gap"] > 0.3) is sure


def test_the_probe_is_judged_on_test_images():
    """The class stands apart in training, or on test images too."""
    for apart, expected in ((("forget",), (0.4, 0.6)), (("forget", "test_forget"), (0.95, 1.0))):
        parts = {part: getattr(sheet(7), part) for part in PARTS}
        for part in apart:
            said = parts[part]
            parts[part] = Answers(said.logits, said.embeddings + 9, said.labels)
        assert expected[0] <= judge(Sheet(**parts))["probe"] <= expected[1]


def test_what_is_not_defined_is_left_out():
    small = {
        part: Answers(
            *(
                getattr(getattr(sheet(1, "sample"), part), f)[:3]
                for f in ("logits", "embeddings", "labels")
            )
        )
        for part in PARTS
    }
    small["validation"] = small["test_forget"]
    few = Sheet(**small)
    found = judge(few, "sample", original=few, oracles=[few], untrained=few)
    assert not {"va", "mia_loss", "mia_confidence", "avg_gap", "pra"} & set(found)
    assert {"ua", "ra", "ta", "aus", "tow", "js_forget"} <= set(found)


def test_the_floor_is_that_of_each_oracle_against_the_others():
    oracles = [sheet(seed) for seed in (2, 3, 6)]
    around = {"original": sheet(1), "untrained": sheet(4), "kind": "class", "seed": 5}
    around["forgotten_rows"] = torch.tensor([3])
    mean, spread = floor(oracles, **around)
    each = [
        evidence(oracles[i], oracles=[o for j, o in enumerate(oracles) if j != i], **around)
        for i in range(3)
    ]
    for name in each[0]:
        values = [one[name] for one in each]
        assert mean[name] == pytest.approx(np.mean(values))
        assert spread[name] == pytest.approx(np.std(values, ddof=1))
    assert mean["js_forget"] > 0 and mean["avg_gap"] > 0
    alone, none = floor(oracles[:1], **around)
    assert not none and not {"avg_gap", "tow", "js_forget", "cka"} & set(alone)
    assert alone["pra"] == each[0]["pra"] and alone["mia_loss"] == each[0]["mia_loss"]


def test_models_that_were_not_asked_the_same_are_refused():
    other = sheet(2, "sample")
    with pytest.raises(InvalidEmbedding, match="same forget images"):
        judge(sheet(1), oracles=[other])
    with pytest.raises(NotEnoughData, match="at least one retrained"):
        evidence(
            sheet(1),
            original=sheet(1),
            oracles=[],
            untrained=sheet(4),
            kind="class",
            seed=0,
            forgotten_rows=torch.tensor([3]),
        )
    with pytest.raises(ConfigError, match="'client'"):
        judge(sheet(1), "client")


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all"])
def test_outputs_that_are_no_numbers_are_refused(bad):
    logits = torch.zeros(3, 2)
    logits[1] = -math.inf if bad == "all" else torch.tensor([0.0, bad])
    with pytest.raises(InvalidEmbedding, match="outputs that are numbers"):
        Answers(logits, torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidEmbedding, match=r"Expected logits \(N, K\)"):
        Answers(torch.zeros(3, 2), torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64))


def test_all_attacks_use_their_own_seed_only():
    subject = sheet(7)
    first = judge(subject)
    torch.rand(3)
    np.random.default_rng().normal()
    assert judge(subject) == first
    assert judge(subject, seed=6) != first


# Real small models ----------------------------------------------------------------------------

NAMES = ("ant", "bee", "cat", "dog")
CENTRES = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])


def points(seed=0, each=40):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(each)
    noise = 0.5 * torch.randn(len(labels), 2, generator=rng)
    return ImageSet(CENTRES[labels] + noise, labels, NAMES)


def trained(images, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = MLP(2, 0, (16, 8))
    settings = {"dim": 8, "epochs": 12, "batch_size": 16, "lr": 0.01, "moments": "none"} | options
    learner = Naive(backbone, Transform((), ()), name="naive", seed=seed, **settings)
    trainer = TrainerOptions(precision="32", threads=1, loop="fast")
    learn(learner, Experience(0, images, phase=0, upcoming=0), trainer)
    return learner.eval()


@functools.cache
def model():
    return trained(points())


def test_answers_embed_once_and_leave_the_mode(monkeypatch):
    learner, calls = copy.deepcopy(model()).train(), itertools.count()
    inner = learner.embed_all
    monkeypatch.setattr(learner, "embed_all", lambda images: (next(calls), inner(images))[1])
    data = points(1)
    said = answers(learner, data.images, data.labels)
    assert next(calls) == 1 and learner.training
    assert torch.equal(said.logits, model().scores_of(data.images, closed=False))
    assert torch.equal(said.embeddings, model().embed_all(data.images))
    assert accuracy(said) > 0.9
    none = answers(learner, data.images[:0], data.labels[:0])
    assert none.logits.shape == (0, 4) and len(none) == 0
    with pytest.raises(NotEnoughData):
        accuracy(none)


def asked(learner):
    """Answers on class 1, which goes, and on the others."""
    data = points(2)
    gone = data.labels == 1
    return [answers(learner, data.images[m], data.labels[m]) for m in (gone, ~gone)]


def wiped():
    learner = copy.deepcopy(model())
    with torch.no_grad():
        learner.head.column("weight")[1] = 0
        learner.head.column("bias")[1] = -20
    return learner


def test_five_examples_restore_a_class_of_which_only_the_row_went():
    forget, retain = asked(wiped())
    assert accuracy(forget) == 0
    assert prototypical_relearning(forget, retain, torch.tensor([1]), seed=0) > 0.9


def test_five_examples_restore_nothing_where_the_embedding_knows_nothing():
    forget, retain = asked(wiped())
    like_another = retain.embeddings[:40].flip(0)
    blind = Answers(retain.logits[:40], like_another, forget.labels)
    assert prototypical_relearning(blind, retain, torch.tensor([1]), seed=0) < 0.1


def test_a_lost_prototype_comes_back_from_five_examples():
    learner = trained(points(), classifier={"name": "ncm"}, moments="none")
    learner.memory = learner.memory.without(["bee"])
    forget, retain = asked(learner)
    assert bool((forget.logits[:, 1] == -torch.inf).all()) and accuracy(forget) == 0
    assert prototypical_relearning(forget, retain, torch.tensor([1]), seed=0) > 0.9


def test_relearning_agrees_with_a_changed_head():
    """With the rows in the head itself, a model answers as the attack says that it would."""
    forget = asked(wiped())[0]
    mean = forget.embeddings[:5].double().mean(0)
    found = _attacks(forget, torch.arange(len(forget)), torch.tensor([1]), mean[None])
    assert len(found) == 1 + 3 * len(SHARES) and float(found[0].mean()) == accuracy(forget)
    for number, share in enumerate(SHARES):
        for kind, (weight, bias) in enumerate(
            [(mean / mean.norm(), 0.0), (2 * mean, -mean @ mean)]
        ):
            changed = wiped()
            with torch.no_grad():
                for name, new in (("weight", weight), ("bias", bias)):
                    row = changed.head.column(name)
                    row[1] = share * new + (1 - share) * row[1]
            expected = accuracy(asked(changed)[0])
            assert float(found[1 + 3 * number + kind].mean()) == expected


def test_the_five_examples_are_not_judged():
    """Ten images without anything in common: what five of them teach says nothing of the rest."""
    rng = torch.Generator().manual_seed(0)
    images = torch.eye(10)[torch.randperm(10, generator=rng)]
    logits = torch.tensor([[-torch.inf, 0.05]])
    forget = Answers(logits.repeat(10, 1), images, torch.zeros(10, dtype=torch.int64))
    stays = torch.ones(10, dtype=torch.int64)
    retain = Answers(logits.repeat(10, 1), torch.zeros(10, 10), stays)
    assert prototypical_relearning(forget, retain, torch.tensor([0]), seed=0) == 0


def test_relearning_takes_enough_examples():
    forget, retain = asked(model())
    few = Answers(forget.logits[:9], forget.embeddings[:9], forget.labels[:9])
    with pytest.raises(NotEnoughData, match="10 images"):
        prototypical_relearning(few, retain, torch.tensor([1]), seed=0)
    with pytest.raises(NotEnoughData):
        prototypical_relearning(forget, retain, torch.tensor([], dtype=torch.int64), seed=0)


def test_steps_until_it_is_known_again():
    data = points()
    forget, retain = data.subset(data.labels == 1), data.subset(data.labels != 1)
    settings = {"target": 1.0, "lr": 0.1, "seed": 3}
    before = state.sha256(model())
    assert relearn_steps(model(), forget, retain, **settings) == 0
    assert state.sha256(model()) == before
    slight = copy.deepcopy(model())
    with torch.no_grad():
        slight.head.column("bias")[1] -= 8
    steps = [relearn_steps(one, forget, retain, **settings) for one in (slight, wiped())]
    assert 0 < steps[0] < steps[1] < 200
    assert relearn_steps(wiped(), forget, retain, **settings) == steps[1]
    assert relearn_steps(wiped(), forget, retain, **settings, most=2) == 2
    assert anamnesis_index(steps[0], steps[1]) < 1 == anamnesis_index(7, 7.0)
    with pytest.raises(NotEnoughData, match="knows it at once"):
        anamnesis_index(3, 0)
    with pytest.raises(ConfigError, match="from a memory"):
        reader = copy.deepcopy(model())
        reader.classifier = {"name": "ncm"}
        relearn_steps(reader, forget, retain, target=1.0)
