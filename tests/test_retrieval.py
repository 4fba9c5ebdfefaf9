"""Retrieval and the detection of unknown classes, against loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from clfed.errors import ConfigError, InvalidEmbedding, NotEnoughData
from clfed.evaluation.retrieval import recall_at
from clfed.evaluation.unknown import auroc, fpr_at_tpr


def at_angles(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def cloud(seed, count, classes):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng)
    centres = torch.randn(classes, 5, generator=rng)
    return centres[labels] + 0.8 * torch.randn(count, 5, generator=rng), labels


def slow_recall(embeddings, labels, k):
    """Sort the others of every image by cosine and look at the first k."""
    hits = 0
    for i, one in enumerate(embeddings):
        others = [
            (-float(torch.cosine_similarity(one.double(), other.double(), dim=0)), int(labels[j]))
            for j, other in enumerate(embeddings)
            if j != i
        ]
        hits += int(labels[i]) in [label for _, label in sorted(others)[:k]]
    return hits / len(embeddings)


# --- retrieval --------------------------------------------------------------------------------


def test_golden_of_four_angles():
    points = at_angles(0, 6, 60, 66)
    assert recall_at(points, torch.tensor([0, 0, 1, 1]), [1]) == {1: 1.0}
    found = recall_at(points, torch.tensor([0, 1, 0, 1]), [1, 2, 3])
    assert found == {1: 0.0, 2: 0.5, 3: 1.0}


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_equals_the_slow_search_whatever_the_block(block):
    embeddings, labels = cloud(0, 40, 6)
    ks = [1, 2, 5, 39]
    found = recall_at(embeddings, labels, ks, block=block)
    assert found == {k: slow_recall(embeddings, labels, k) for k in ks}


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 5))
def test_relations(seed, count, classes):
    embeddings, labels = cloud(seed, count, classes)
    found = [*recall_at(embeddings, labels, list(range(1, count)))]
    values = [recall_at(embeddings, labels, [k])[k] for k in found]
    assert values == sorted(values)
    alone = (torch.bincount(labels)[labels] < 2).double().mean()
    assert values[-1] == pytest.approx(1 - float(alone))
    scaled = embeddings * torch.rand(count, 1, generator=torch.Generator().manual_seed(1)).add(0.5)
    assert recall_at(scaled.double(), labels, [1]) == recall_at(embeddings.double(), labels, [1])


def test_collapsed_embeddings_retrieve_nothing():
    labels = torch.tensor([0, 0, 1, 1])
    for same in (torch.ones(4, 3), torch.zeros(4, 3)):
        assert recall_at(same, labels, [1, 2, 3]) == {1: 0.0, 2: 0.0, 3: 1.0}


@pytest.mark.parametrize(
    "embeddings, labels, named",
    [
        (torch.ones(4), torch.zeros(4, dtype=torch.int64), "embeddings"),
        (torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), "two images"),
        (torch.ones(4, 2), torch.zeros(3, dtype=torch.int64), "int64 labels"),
        (torch.ones(4, 2), torch.zeros(4), "int64 labels"),
        (torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), "embeddings"),
        (torch.full((4, 2), math.nan), torch.zeros(4, dtype=torch.int64), "finite"),
        (torch.full((4, 2), math.inf), torch.zeros(4, dtype=torch.int64), "finite"),
    ],
)
def test_bad_embeddings_are_refused(embeddings, labels, named):
    with pytest.raises(InvalidEmbedding, match=named):
        recall_at(embeddings, labels, [1])


@pytest.mark.parametrize("k", [0, -1, 4, 1.0, True, "1", None])
def test_bad_neighbours_are_refused(k):
    with pytest.raises(ConfigError, match="K of at least 1 and at most 3"):
        recall_at(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), [1, k])


@pytest.mark.parametrize("block", [0, -1, 2.0, True])
def test_bad_blocks_are_refused(block):
    with pytest.raises(ConfigError, match="block"):
        recall_at(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), [1], block=block)


# --- unknown classes --------------------------------------------------------------------------

# Small whole numbers tie often.
scores = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30)


@given(scores, scores)
def test_auroc_equals_scikit_learn_and_the_definition(known, unknown):
    truth = [1] * len(known) + [0] * len(unknown)
    found = auroc(known, unknown)
    assert found == pytest.approx(roc_auc_score(truth, known + unknown), abs=1e-12)
    pairs = [(k > u) + 0.5 * (k == u) for k in known for u in unknown]
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auroc(unknown, known) == pytest.approx(1 - found, abs=1e-12)


@given(scores, scores, st.integers(1, 20))
def test_fpr_equals_a_search_over_all_thresholds(known, unknown, twentieths):
    # Shares are compared as whole numbers, so that the oracle has no rounding of its own.
    passing = [t for t in known if 20 * sum(k >= t for k in known) >= twentieths * len(known)]
    expected = sum(u >= max(passing) for u in unknown) / len(unknown)
    assert fpr_at_tpr(known, unknown, twentieths / 20) == expected


def test_fpr95_of_a_hundred_known_images():
    known, unknown = np.arange(100.0), np.array([4.5, 5.0, 5.5, -1.0])
    assert fpr_at_tpr(known, unknown) == 0.5  # the threshold is 5: 95 images are not below it
    assert fpr_at_tpr(torch.tensor(known), torch.tensor(unknown)) == 0.5


def test_extremes():
    assert auroc([2, 3], [0, 1]) == 1.0 and fpr_at_tpr([2, 3], [0, 1]) == 0.0
    assert auroc([0, 1], [2, 3]) == 0.0 and fpr_at_tpr([0, 1], [2, 3]) == 1.0
    assert auroc([1, 1], [1, 1, 1]) == 0.5 and fpr_at_tpr([1, 1], [1, 1, 1]) == 1.0
    assert auroc([math.inf, 1], [-math.inf, 0]) == 1.0
    assert fpr_at_tpr([5, 4, 3, 2, 1], [2.5, 1.5], tpr=1) == 1.0
    assert fpr_at_tpr([5, 4, 3, 2, 1], [4.5], tpr=1e-12) == 0.0


@pytest.mark.parametrize("metric", [auroc, fpr_at_tpr])
def test_bad_scores_are_refused(metric):
    for bad in ([[1.0]], [1.0, math.nan], 1.0):
        for pair in ((bad, [1.0]), ([1.0], bad)):
            with pytest.raises(ConfigError, match="one score"):
                metric(*pair)
    for pair in (([], [1.0]), ([1.0], [])):
        with pytest.raises(NotEnoughData, match="got none"):
            metric(*pair)


@pytest.mark.parametrize("tpr", [0, -0.1, 1.01, 95, True, math.nan])
def test_bad_rates_are_refused(tpr):
    with pytest.raises(ConfigError, match="true positive rate"):
        fpr_at_tpr([1.0], [0.0], tpr)
