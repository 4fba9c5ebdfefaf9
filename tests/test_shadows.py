"""Measures over many models, against scipy, scikit-learn and slow loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_curve

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation.challenge import challenge_points, challenge_score, epsilons
from clfed.evaluation.shadow_models import balanced_halves, shadow_margins
from clfed.evaluation.shadows import (
    attack_summary,
    klom,
    klom_floor,
    lira,
    summarised,
    tpr_at_fpr,
    u_lira,
)
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience


def shadows(seed=0, models=12, samples=40):
    rng = np.random.default_rng(seed)
    inside = rng.permuted(np.arange(models)[:, None] % 2 == np.zeros((1, samples)), axis=0)
    means = rng.normal(size=samples) * 3
    return rng.normal(means + 2 * inside), inside, rng.normal(means + 1)


@pytest.mark.parametrize("shared", [False, True])
def test_likelihood_ratio_agrees_with_scipy(shared):
    values, inside, target = shadows()
    residuals = {True: [], False: []}
    for i in range(values.shape[1]):
        for side in (True, False):
            part = values[inside[:, i] == side, i]
            residuals[side].extend(part - part.mean())
    freedom = values.shape[0] // 2 * values.shape[1] - values.shape[1]
    pooled = {side: math.sqrt(np.square(r).sum() / freedom) for side, r in residuals.items()}
    expected, shares = [], []
    for i in range(values.shape[1]):
        density = {}
        for side in (True, False):
            part = values[inside[:, i] == side, i]
            spread = pooled[side] if shared else part.std(ddof=1)
            density[side] = norm.pdf(target[i], part.mean(), spread)
        expected.append(math.log(density[True] / density[False]))
        shares.append(density[True] / (density[True] + density[False]))
    found = lira(values, inside, target, shared_variance=shared)
    assert found == pytest.approx(expected)
    assert u_lira(values, inside, target, shared_variance=shared) == pytest.approx(shares)


def test_likelihood_ratio_finds_members_and_is_blind_where_nothing_differs():
    rng = np.random.default_rng(1)
    models, samples = 64, 2000
    inside = np.arange(models)[:, None] % 2 == np.zeros((1, samples))
    members = np.arange(samples) % 2 == 0
    hard = rng.normal(size=samples) * 3
    for shift in (0.0, 3.0):
        values = rng.normal(hard + shift * inside)
        target = rng.normal(hard + shift * members)
        area = attack_summary(lira(values, inside, target, shared_variance=True), members)["auc"]
        if shift:
            assert area > 0.95
        else:
            error = math.sqrt((samples + 1) / (12 * (samples / 2) ** 2))
            assert abs(area - 0.5) < 3 * error


def test_models_that_all_agree_give_finite_ratios():
    inside = np.arange(4)[:, None] % 2 == np.zeros((1, 3))
    found = lira(np.full((4, 3), 100.0), inside, [100.0, -100.0, 0.0])
    assert np.isfinite(found).all() and found == pytest.approx(0)
    assert u_lira(np.full((4, 3), 100.0), inside, [100.0, -100.0, 0.0]) == pytest.approx(0.5)


def test_too_few_shadow_models_are_refused():
    values, inside, target = shadows(models=2)
    with pytest.raises(NotEnoughData, match="2 shadow models"):
        lira(values, inside, target)
    with pytest.raises(NotEnoughData, match="more than one"):
        lira(values, inside, target, shared_variance=True)
    values, inside, target = shadows(models=4)
    with pytest.raises(ConfigError, match="masks"):
        lira(values, inside[:, 1:], target)
    with pytest.raises(ConfigError, match="finite"):
        lira(np.where(inside, np.inf, values), inside, target)
    lonely = inside.copy()
    lonely[:, 0] = [True, False, False, False]
    assert np.isfinite(lira(values, lonely, target, shared_variance=True)).all()
    with pytest.raises(NotEnoughData):
        lira(values, lonely, target)


score = st.integers(0, 9).map(float)


@given(
    st.lists(score, min_size=1, max_size=15),
    st.lists(score, min_size=1, max_size=15),
    st.sampled_from([0.0, 0.001, 0.1, 0.25, 0.5, 1.0]),
)
def test_true_positive_rate_agrees_with_sklearn(members, others, fpr):
    truth = [1] * len(members) + [0] * len(others)
    false, true, _ = roc_curve(truth, members + others, drop_intermediate=False)
    assert tpr_at_fpr(members, others, fpr) == pytest.approx(true[false <= fpr + 1e-9].max())


def slow_klom(unlearned, oracle, bins=20):
    found = []
    for ours, theirs in zip(unlearned.T, oracle.T, strict=True):
        edges = (min(ours.min(), theirs.min()), max(ours.max(), theirs.max()))
        u = np.histogram(ours, bins, edges)[0] / len(ours)
        r = np.histogram(theirs, bins, edges)[0] / len(theirs)
        terms = (a * math.log(a / max(b, 1e-5)) for a, b in zip(u, r, strict=True) if a)
        found.append(math.fsum(terms))
    return found


def test_klom_agrees_with_histograms_of_numpy():
    rng = np.random.default_rng(0)
    unlearned, oracle = rng.normal(size=(30, 25)), rng.normal(0.5, 2, size=(50, 25))
    assert klom(unlearned, oracle) == pytest.approx(slow_klom(unlearned, oracle))
    assert klom(7 * unlearned - 3, 7 * oracle - 3) == pytest.approx(klom(unlearned, oracle))


def test_klom_of_equal_and_of_disjoint_margins():
    oracle = np.random.default_rng(0).normal(size=(100, 20))
    assert klom(oracle, oracle) == pytest.approx(0)
    assert klom(oracle[::-1], oracle) == pytest.approx(0)
    assert klom(np.full((5, 3), 100.0), np.full((9, 3), 100.0)) == pytest.approx(0)
    far = klom(np.full((5, 3), 100.0), np.full((9, 3), -100.0))
    assert far == pytest.approx(math.log(1e5))


def test_klom_counts_the_largest_value():
    found = klom([[0.0], [1.0]], [[0.0], [0.0]])
    assert found == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-5))


@pytest.mark.parametrize(("models", "expected"), [(100, 0.33), (1000, 0.024)])
def test_klom_of_one_distribution_is_not_zero(models, expected):
    rng = np.random.default_rng(0)
    samples = 3000 if models == 100 else 300
    found = klom(rng.normal(size=(models, samples)), rng.normal(size=(models, samples)))
    assert found.mean() == pytest.approx(expected, rel=0.1)


def test_the_floor_of_klom_compares_halves_of_the_oracles():
    oracle = np.random.default_rng(0).normal(size=(20, 8))
    assert klom_floor(oracle) == pytest.approx(slow_klom(oracle[::2], oracle[1::2]))
    with pytest.raises(NotEnoughData, match="two retrained"):
        klom_floor(oracle[:1])
    with pytest.raises(ConfigError, match="same samples"):
        klom(oracle, oracle[:, 1:])
    found = summarised([0.0, 1.0, 2.0, 9.0])
    assert (found["mean"], found["median"]) == (3.0, 1.5)
    assert found["p95"] == pytest.approx(np.percentile([0.0, 1.0, 2.0, 9.0], 95))


def slow_epsilon(ours, theirs, delta=1e-5):
    """Every interval between two values, and what lies outside of it."""
    if np.ptp(ours) < 0.01 * np.ptp(theirs):
        return 50.0
    values, best = sorted([*ours, *theirs]), 0.0
    bounds = [(a, b) for a in [-math.inf, *values] for b in values if a < b]
    for low, high in bounds:
        for inside in (True, False):
            called = [
                ((ours > low) & (ours <= high)) == inside,
                ((theirs > low) & (theirs <= high)) == inside,
            ]
            fnr, fpr = 1 - called[0].mean(), called[1].mean()
            if fnr < 1e-12 and fpr < 1e-12:
                best = 50.0
            elif fnr > 1e-12 and fpr > 1e-12:
                for a, b in ((fpr, fnr), (fnr, fpr)):
                    if 1 - delta - a > 0:
                        best = max(best, math.log(1 - delta - a) - math.log(b))
    return best


def test_epsilons_agree_with_all_rules_in_a_loop():
    rng = np.random.default_rng(0)
    oracle = rng.normal(size=(8, 6))
    unlearned = rng.normal([0, 0.5, 2, 9, 0, 0], [1, 1, 1, 1, 0.2, 1e-4], size=(8, 6))
    expected = [slow_epsilon(a, b) for a, b in zip(unlearned.T, oracle.T, strict=True)]
    assert epsilons(unlearned, oracle) == pytest.approx(expected)
    assert expected[3] == expected[5] == 50.0
    assert min(expected) > 0


def test_rates_of_a_single_threshold_by_hand():
    """Of four models of each kind three lie on the right side of 0: FPR = FNR = 1/4."""
    unlearned, oracle = [[1.0], [1.0], [1.0], [-1.0]], [[-1.0], [-1.0], [-1.0], [1.0]]
    assert epsilons(unlearned, oracle) == pytest.approx(math.log((0.75 - 1e-5) / 0.25))


def test_models_that_all_agree_where_retrained_ones_differ_give_themselves_away():
    """No rule separates them without error, and every rule with one rate of 0 is left out."""
    oracle = [[0.0], [0.0], [1.0], [1.0]]
    assert epsilons([[0.0]] * 4, oracle).tolist() == [50.0]
    assert epsilons([[0.0], [0.0], [0.0], [0.02]], oracle)[0] < 50


def test_fewer_cuts_find_no_better_rule():
    rng = np.random.default_rng(0)
    unlearned, oracle = rng.normal(size=(64, 30)), rng.normal(0.3, 1.5, size=(64, 30))
    few, all_of_them = (epsilons(unlearned, oracle, cuts=cuts) for cuts in (8, 1000))
    assert (few <= all_of_them + 1e-12).all() and (few < all_of_them).any()


def test_points_halve_with_every_bucket_and_end():
    assert challenge_points([0.0, 0.49, 0.5, 1.0], 512).tolist() == [1, 1, 0.5, 0.25]
    assert challenge_points([6.99, 7.0, 50.0], 512).tolist() == [2.0**-13, 0, 0]
    assert challenge_points([3.99, 4.0], 32).tolist() == [2.0**-7, 0]
    with pytest.raises(NotEnoughData):
        challenge_points([0.0], 2)


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20))
def test_all_points_are_given_only_for_small_epsilons(found):
    assert (challenge_points(found, 512).mean() == 1) == all(e < 0.5 for e in found)


def test_challenge_score_of_a_copy_and_of_something_else():
    rng = np.random.default_rng(0)
    oracle = rng.normal(size=(16, 10))
    assert challenge_score(oracle, oracle, retain=(0.9, 0.9), test=(0.8, 0.8)) == 1
    assert challenge_score(oracle, oracle, retain=(0.45, 0.9), test=(0.6, 0.8)) == pytest.approx(
        0.375
    )
    assert challenge_score(oracle + 50, oracle, retain=(0.9, 0.9), test=(0.8, 0.8)) == 0
    with pytest.raises(ConfigError, match="right at times"):
        challenge_score(oracle, oracle, retain=(0.9, 0.0), test=(0.8, 0.8))


def test_every_image_is_in_half_of_the_shadow_models():
    halves = balanced_halves(6, 500, 0)
    assert (halves.sum(0) == 3).all()
    assert halves.sum(1).double().std() > 0 and not torch.equal(halves, balanced_halves(6, 500, 1))
    assert (balanced_halves(5, 50, 0).sum(0) == 2).all()
    with pytest.raises(ConfigError, match="two shadow models"):
        balanced_halves(1, 5, 0)


def train(images, seed, *, start=None):
    """A network that learns random labels by heart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = MLP(8, 0, (64, 32))
    options = {"dim": 32, "epochs": 25, "batch_size": 16, "lr": 0.01, "moments": "none"}
    learner = Naive(backbone, Transform((), ()), name="naive", seed=seed, **options)
    trainer = TrainerOptions(precision="32", threads=1, loop="fast")
    learn(learner, Experience(0, images, phase=0, upcoming=0), trainer)
    return learner.eval()


def test_shadow_models_tell_what_was_learned_by_heart():
    rng = torch.Generator().manual_seed(0)
    images = ImageSet(
        torch.randn(60, 8, generator=rng), torch.randint(3, (60,), generator=rng), ("a", "b", "c")
    )
    found = shadow_margins(train, images, 9, 0)
    assert found.margins.shape == found.inside.shape == (9, 60)
    target, others = found.margins[0], slice(1, None)
    ratio = lira(found.margins[others], found.inside[others], target, shared_variance=True)
    assert attack_summary(ratio, found.inside[0])["auc"] > 0.9

    seen = []

    def retrain(learner, gone, kept):
        seen.append((gone, kept))
        return train(images.subset(kept), 1000 + len(seen))

    candidates = torch.arange(20)
    after = shadow_margins(train, images, 9, 0, candidates=candidates, unlearn=retrain)
    assert torch.equal(after.inside, found.inside)
    for (gone, kept), inside in zip(seen, found.inside, strict=True):
        assert sorted([*gone.tolist(), *kept.tolist()]) == inside.nonzero().flatten().tolist()
        assert int(gone.max()) < 20 <= int(kept.min())
    # What is retrained has nothing of the candidates, and everything of the others.
    shift = after.margins - found.margins
    inner = torch.where(found.inside, shift, torch.nan).nanmean(0)
    assert float(inner[:20].mean()) < -3 < float(inner[20:].mean())
