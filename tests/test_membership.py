"""Attacks on membership: blind where nothing differs, and never judged on what they learned."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from clfed.errors import NotEnoughData
from clfed.evaluation.membership import (
    attack_scores,
    best_threshold,
    called_non_members,
    confidences,
    entropies,
    loss_attack,
    matched,
    modified_entropies,
    scores,
    threshold_attack,
)
from clfed.evaluation.unlearning import Answers, Sheet


def said(count=30, classes=5, *, seed=0, scale=2.0, lost=()):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=rng)
    logits[:, list(lost)] = -torch.inf
    labels = torch.randint(classes, (count,), generator=rng)
    return Answers(logits, torch.randn(count, 3, generator=rng), labels)


def test_scores_agree_with_slow_loops():
    found = said()
    for i, (row, y) in enumerate(zip(found.logits.double(), found.labels.tolist(), strict=True)):
        p = (row.exp() / row.exp().sum()).numpy()
        others = [p[k] for k in range(5) if k != y]
        modified = -(1 - p[y]) * math.log(p[y]) - sum(q * math.log(1 - q) for q in others)
        assert confidences(found)[i] == pytest.approx(p[y])
        assert entropies(found)[i] == pytest.approx(entropy(p))
        assert modified_entropies(found)[i] == pytest.approx(modified)
        expected = [math.log(p[y] / (1 - p[y])), p[y] - max(others), -entropy(p), -modified]
        assert scores(found)[i] == pytest.approx(expected)


def test_certain_answers_and_lost_classes_have_finite_scores():
    certain = Answers(
        torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.zeros(2, 1), torch.tensor([0, 1])
    )
    assert np.isfinite(scores(certain)).all()
    assert (scores(certain)[0] > scores(certain)[1])[[0, 1, 3]].all()
    assert np.isfinite(scores(said(lost=(0, 3)))).all()


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 60), st.integers(10, 40))
def test_matched_populations_have_equally_many_of_each_class(seed, n, m, most):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(3, size=n), rng.integers(4, size=m)
    common = np.minimum(np.bincount(first, minlength=4), np.bincount(second, minlength=4))
    # Features name their row, and so their class.
    sides = np.arange(n, dtype=float)[:, None], np.arange(m, dtype=float)[:, None]
    if common.sum() < 10:
        with pytest.raises(NotEnoughData, match="at least 10"):
            matched(sides[0], first, sides[1], second, seed=seed, most=most)
        return
    ours, theirs = matched(sides[0], first, sides[1], second, seed=seed, most=most)
    rows = ours[:, 0].astype(int), theirs[:, 0].astype(int)
    assert all(len(set(part)) == len(part) for part in rows)
    counts = [
        np.bincount(labels[part], minlength=4).tolist()
        for labels, part in zip((first, second), rows, strict=True)
    ]
    assert counts[0] == counts[1] and sum(counts[0]) <= most
    if common.sum() <= most:
        assert counts[0] == common.tolist()


def test_the_order_of_images_does_not_matter_to_a_draw():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(300, 2)), rng.integers(3, size=300)
    others, theirs = rng.normal(size=(200, 2)), rng.integers(3, size=200)
    found = matched(features, labels, others, theirs, seed=4, most=60)
    a, b = rng.permutation(300), rng.permutation(200)
    again = matched(features[a], labels[a], others[b], theirs[b], seed=4, most=60)
    assert all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))
    other = matched(features, labels, others, theirs, seed=5, most=60)
    assert not np.array_equal(found[0], other[0])


value = st.integers(0, 6).map(float)


@given(st.lists(value, min_size=1, max_size=12), st.lists(value, min_size=1, max_size=12))
def test_the_best_threshold_is_the_best_of_all(members, others):
    truth = [1] * len(members) + [0] * len(others)
    pooled = np.array(members + others)
    reached = [balanced_accuracy_score(truth, pooled > t) for t in [-1.0, *sorted(set(pooled))]]
    threshold, accuracy = best_threshold(np.array(members), np.array(others))
    assert accuracy == pytest.approx(max(reached))
    assert balanced_accuracy_score(truth, pooled > threshold) == pytest.approx(max(reached))


def within(values, ideal=0.5):
    """Whether a mean lies within three standard errors of its ideal."""
    return abs(np.mean(values) - ideal) < 3 * np.std(values, ddof=1) / math.sqrt(len(values))


def test_attacks_are_blind_to_exchangeable_images():
    rng = np.random.default_rng(0)
    by_loss, by_threshold, areas, overfitted, called = [], [], [], [], []
    for seed in range(40):
        members, others = rng.exponential(size=(2, 120, 4))
        by_loss.append(loss_attack(members[:, :1], others[:, :1], seed=seed))
        accuracy, area = threshold_attack(members, others)
        by_threshold.append(accuracy)
        areas.append(area)
        overfitted.append(best_threshold(members[:, 0], others[:, 0])[1])
        same = np.zeros(120, dtype=np.int64)
        called.append(
            called_non_members(
                (members[:, 1], same), (others[:, 1], same), rng.exponential(size=500), seed=seed
            )
        )
    assert within(by_loss) and within(by_threshold) and within(areas) and within(called)
    # The test has teeth: an attack that is judged on what it was chosen on does not pass it.
    assert not within(overfitted)


def test_attacks_find_what_differs():
    rng = np.random.default_rng(0)
    members, others = rng.normal(4, size=(100, 1)), rng.normal(0, size=(100, 1))
    noise = rng.normal(size=(2, 100, 2))
    assert loss_attack(members, others, seed=0) > 0.9
    accuracy, area = threshold_attack(np.hstack([noise[0], members]), np.hstack([noise[1], others]))
    assert accuracy > 0.9
    assert area == pytest.approx(
        roc_auc_score([1] * 100 + [0] * 100, [*members, *others]), abs=0.02
    )
    same = np.zeros(100, dtype=np.int64)
    judged = np.array([4.0] * 30 + [0.0] * 10)
    sides = (members[:, 0], same), (others[:, 0], same)
    assert called_non_members(*sides, judged, seed=0) == 0.25


def test_forgetting_more_than_there_was_is_seen_too():
    """Losses that are too large are as telling as losses that are too small."""
    rng = np.random.default_rng(0)
    forgotten, others = rng.normal(4, size=(100, 1)), rng.normal(0, size=(100, 1))
    assert loss_attack(forgotten, others, seed=0) > 0.9
    assert threshold_attack(-forgotten, -others)[1] < 0.1


def test_a_mix_of_classes_is_no_membership():
    """Class 1 has large scores whether it was trained on or not; the forget set is of class 1."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300)
    others = rng.normal(10 * labels)[:, None]
    forgotten, ones = rng.normal(10, size=(300, 1)), np.ones(300, dtype=np.int64)
    assert roc_auc_score([1] * 300 + [0] * 600, [*forgotten, *others]) > 0.7
    ours, theirs = matched(forgotten, ones, others, labels, seed=0)
    assert abs(threshold_attack(ours, theirs)[1] - 0.5) < 0.15
    assert abs(loss_attack(ours, theirs, seed=0) - 0.5) < 0.15


def test_scores_for_a_histogram():
    parts = {name: said(seed=i) for i, name in enumerate(Sheet.__dataclass_fields__)}
    sheet = Sheet(**parts)
    assert [*attack_scores(sheet, "sample")] == ["retain", "test", "forget"]
    found = attack_scores(sheet, "class")
    assert [*found] == ["retain", "test", "forget", "test_forget"]
    assert np.array_equal(found["forget"], confidences(parts["forget"]))
