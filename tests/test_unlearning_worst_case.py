"""Worst-case forget sets: the projection, the search, and the start that goes nowhere."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import RequestError
from clfed.learners.naive import Naive
from clfed.scenarios.holdings import Holdings
from clfed.seeding import generator
from clfed.unlearning.worst_case import on_capped_simplex, select, sign_descent

CLASSES = ("ant", "bee", "cat", "dog")


def holdings() -> Holdings:
    labels = torch.arange(4).repeat_interleave(15)
    centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    noise = 0.5 * torch.randn(60, 2, generator=generator(0, "points"))
    images = ImageSet(centres[labels] + noise, labels, CLASSES)
    ids = 1000 - 3 * torch.arange(60)  # neither from zero nor in order
    return Holdings(images, ids, labels, CLASSES, images, images, "")


def original():
    """A linear model that fits the points well, so that all losses are small."""
    learner = Naive(nn.Linear(2, 2, bias=False), Transform((), ()), name="naive", dim=2)
    learner.grow(CLASSES)
    with torch.no_grad():
        learner.backbone.weight.copy_(torch.eye(2))
        learner.head.column("weight").copy_(
            2 * torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])
        )
    return learner.eval()


def losses():
    """Cross-entropy of each sample, in numpy."""
    data = holdings().train
    logits = data.images.double().numpy() @ np.array([[1, 1], [-1, 1], [1, -1], [-1, -1.0]]).T * 2
    top = np.log(np.exp(logits).sum(1))
    return top - logits[np.arange(60), data.labels.numpy()]


def chosen(**options):
    (request,) = select(holdings=holdings(), seed=0, original=original, **options)
    return request


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_projection_has_the_sum_and_keeps_to_the_box(values, share):
    a = torch.tensor(values, dtype=torch.float64)
    total = share * len(a)
    w = on_capped_simplex(a, total)
    assert float(w.sum()) == pytest.approx(total, abs=1e-9)
    assert bool(((w >= 0) & (w <= 1)).all())


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.integers(0, 2**16))
def test_projection_is_the_nearest_feasible_point(values, seed):
    a = torch.tensor(values, dtype=torch.float64)
    w = on_capped_simplex(a, 1.0)
    others = torch.rand(50, len(a), generator=generator(seed, "others"), dtype=torch.float64)
    others = others / others.sum(1, keepdim=True)  # all feasible for a sum of 1
    assert float((w - a).square().sum()) <= float((others - a).square().sum(1).min()) + 1e-9


@pytest.mark.parametrize("outer", [0, 1, 3])
def test_a_frozen_model_gives_the_smallest_losses(outer):
    expected = sorted(holdings().ids[np.argsort(losses(), kind="stable")[:6]].tolist())
    request = chosen(outer=outer, epochs=0, weight_lr=1e-3)
    assert request.kind == "sample"
    assert list(request.samples) == expected


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_a_random_binary_start_does_not_move(rate):
    first = torch.randperm(60, generator=generator(0, "worst case start"))[:6]
    expected = sorted(holdings().ids.sort().values[first].tolist())
    # The search counts samples by their ids.
    stuck = chosen(outer=20, epochs=0, start="random", weight_lr=rate)
    assert list(stuck.samples) == expected
    assert set(chosen(outer=20, epochs=0, weight_lr=rate).samples) != set(expected)


def test_decay_alone_spreads_the_weights_and_never_prefers():
    # With a huge gamma the weights stay equal, and ties go to the first.
    w = on_capped_simplex(torch.full((10,), 0.3, dtype=torch.float64) * (1 - 2 * 0.1), 3.0)
    torch.testing.assert_close(w, torch.full((10,), 0.3, dtype=torch.float64))


def test_classes_are_judged_by_their_mean_loss():
    means = losses().reshape(4, 15).mean(1)
    expected = [CLASSES[row] for row in sorted(np.argsort(means)[:2])]
    request = chosen(level="class", share=0.5, outer=1, epochs=0)
    assert request.kind == "class"
    assert list(request.classes) == expected


def test_descent_moves_every_weight_by_its_sign():
    learner, data = original(), holdings().train
    weights = torch.linspace(0, 1, 60)
    before = copy.deepcopy(learner)
    moved = sign_descent(learner, data.images, data.labels, weights, [torch.arange(60)], lr=0.25)
    expected = copy.deepcopy(learner)
    logits = expected.head(expected.backbone(data.images))
    (weights * F.cross_entropy(logits, data.labels, reduction="none")).sum().backward()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(
            dict(moved.named_parameters())[name], value - 0.25 * value.grad.sign()
        )
        torch.testing.assert_close(dict(learner.named_parameters())[name],
                                   dict(before.named_parameters())[name])  # fmt: skip


def test_the_search_depends_on_the_seed_alone():
    first = chosen(outer=2, epochs=1, lr=0.05)
    torch.rand(5)
    assert chosen(outer=2, epochs=1, lr=0.05) == first
    assert len(first.samples) == 6


@pytest.mark.parametrize(
    "bad",
    [
        {"share": 0.0},
        {"share": 1.0},
        {"outer": -1},
        {"epochs": -1},
        {"level": "owner"},
        {"start": "zero"},
        {"lr": 0.0},
        {"weight_lr": 0.0},
        {"gamma": -1.0},
        {"batch_size": 0},
    ],
)
def test_refuses_bad_options(bad):
    with pytest.raises(RequestError):
        chosen(**bad)
