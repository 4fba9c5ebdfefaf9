"""DMM: exact attribution for ridge regression, targets by sample id, and fixed points."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.seeding import generator
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.attribution import Attribution, scale
from clfed.unlearning.base import named_weights
from clfed.unlearning.dmm import DMM

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat")
RIDGE = 0.01
N, DIM = 90, 5
GONE = torch.arange(0, N, 6)
IDS = 500 - 2 * torch.arange(N)


def points() -> ImageSet:
    labels = torch.arange(N) % 3
    centres = 2 * torch.eye(DIM)[:3]
    noise = torch.randn(N, DIM, generator=generator(0, "points"))
    return ImageSet(centres[labels] + noise, labels, CLASSES)


def ridge_weights(rows):
    """Coefficients (K, D) and intercepts (K,) of scikit-learn's ridge on some samples."""
    images = points()
    x = np.concatenate([images.images.double().numpy(), np.ones((N, 1))], 1)[rows]
    y = np.eye(3)[images.labels.numpy()[rows]]
    # The penalty is the same for both, RIDGE for each of the samples that stay.
    penalty = RIDGE * (N - len(GONE))
    found = Ridge(alpha=penalty, fit_intercept=False, tol=1e-12).fit(x, y).coef_
    return torch.from_numpy(found[:, :-1]), torch.from_numpy(found[:, -1])


ALL = np.arange(N)
KEPT = np.setdiff1d(ALL, GONE.numpy())


def original(batch_norm=False):
    """Its backbone is the identity, its head the ridge regression on all samples."""
    linear = nn.Linear(DIM, DIM, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(DIM))
    backbone = nn.Sequential(linear, nn.BatchNorm1d(DIM)) if batch_norm else linear
    learner = Naive(backbone, Transform((), ()), name="naive", dim=DIM)
    learner.grow(CLASSES)
    weight, bias = ridge_weights(ALL)
    with torch.no_grad():
        learner.head.column("weight").copy_(weight)
        learner.head.column("bias").copy_(bias)
    return learner.eval()


def context(learner, seed=0):
    request = Request("r", "sample", samples=tuple(IDS[GONE].tolist()))
    return make_context(request, learner, points(), IDS, gone=IDS[GONE], seed=seed)


def prepared(learner=None, **options):
    learner = original() if learner is None else learner
    unlearner = DMM(learner, ridge=RIDGE, random_features=0, **options)
    around = context(learner).behind(unlearner.needs)
    unlearner.bind(around)
    unlearner.prepare(around)
    return unlearner, around


def run(learner, **options):
    settings = {"ridge": RIDGE, "random_features": 0, "optimizer": "adam", "lr": 0.01, **options}
    return forget(DMM(learner, **settings), context(learner), OPTIONS)


def test_attribution_is_the_difference_of_two_trainings():
    images = points()
    split = [(images.images[rows], images.labels[rows]) for rows in (GONE, torch.from_numpy(KEPT))]
    ours = Attribution.of(*split, classes=3, ridge=RIDGE)
    for weights, (theirs, bias) in (
        (ours.whole, ridge_weights(ALL)),
        (ours.kept, ridge_weights(KEPT)),
    ):
        torch.testing.assert_close(weights[:-1].T, theirs, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(weights[-1], bias, atol=1e-9, rtol=1e-9)
    z = images.images
    torch.testing.assert_close(
        ours.contribution(z), ours.answers(z) - (z.double() @ ours.kept[:-1] + ours.kept[-1])
    )


def test_scale_finds_the_factor_and_no_shift_of_a_row():
    rng = generator(0, "scale")
    answers, shifts = torch.randn(20, 4, generator=rng), torch.randn(20, 1, generator=rng)
    assert scale(3.5 * answers + shifts, answers) == pytest.approx(3.5, abs=1e-5)


def test_a_ridge_head_is_predicted_exactly_and_its_optimum_is_the_retrained_one():
    unlearner, around = prepared()
    assert unlearner.alpha == pytest.approx(1, abs=1e-5)
    images = points().images.double()
    weight, bias = ridge_weights(KEPT)
    predicted = unlearner.predicted(points().images)
    torch.testing.assert_close(predicted, images @ weight.T + bias, atol=1e-5, rtol=1e-4)
    # Least squares on what is trained on, forget set and sample of the rest.
    rows = torch.cat([around.forget.ids, unlearner.drawn(around.retain).ids])
    used = (500 - rows) // 2
    design = F.pad(images[used], (0, 1), value=1.0)
    best = torch.linalg.lstsq(design, predicted[used]).solution
    torch.testing.assert_close(best[:-1].T, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(best[-1], bias, atol=1e-4, rtol=1e-4)


def test_training_reaches_the_retrained_answers():
    learner = original()
    model, _ = run(learner, epochs=60)
    images = points().images
    weight, bias = ridge_weights(KEPT)
    wanted = images.double() @ weight.T + bias
    before = float((learner.scores_of(images) - wanted).square().mean())
    after = float((model.scores_of(images) - wanted).square().mean())
    assert after < 0.05 * before


@pytest.mark.parametrize("batch_norm", [False, True])
def test_without_attribution_nothing_moves(batch_norm):
    learner = original(batch_norm)
    model, report = run(learner, strength=0.0, epochs=3)
    assert report.steps
    for name, value in named_weights(model).items():
        torch.testing.assert_close(value, named_weights(learner)[name], atol=1e-5, rtol=0)
    buffers = dict(model.backbone.named_buffers())
    for name, value in learner.backbone.named_buffers():
        assert torch.equal(value, buffers[name])


def test_targets_are_found_by_sample_id():
    unlearner, around = prepared(strength=3.0)
    order = torch.randperm(len(around.forget), generator=generator(0, "order"))
    rows = order[:7]
    batch = {
        "forget": around.forget.batch(rows),
        "retain": unlearner.drawn(around.retain).batch(rows),
    }
    images = torch.cat([part.images for part in batch.values()])
    expected = (unlearner.logits(images) - unlearner.predicted(images)).square().mean()
    assert float(unlearner.loss(batch).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-4
    )
    assert float(expected.detach()) > 1e-6


def test_sample_of_the_rest_is_three_times_the_forget_set():
    unlearner, around = prepared()
    assert len(unlearner.drawn(around.retain)) == 3 * len(GONE)
    assert not set(unlearner.drawn(around.retain).ids.tolist()) & set(around.forget.ids.tolist())
    more, _ = prepared(retain_multiple=100)
    assert len(more.drawn(around.retain)) == N - len(GONE)


def test_oracles_are_matched_by_their_mean_logits():
    oracles = [original(), original()]
    with torch.no_grad():
        oracles[1].head.column("bias").add_(torch.tensor([0.0, 2.0, 4.0]))
    unlearner, _ = prepared(oracles=oracles)
    images = points().images
    expected = original().scores_of(images) + torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(unlearner.predicted(images).float(), expected)


def test_anchor_pulls_towards_the_original():
    unlearner, around = prepared(anchor=2.0)
    batch = {"forget": around.forget.batch(torch.arange(5))}
    free = float(unlearner.loss(batch).detach())
    with torch.no_grad():
        unlearner.teacher.head.column("bias").add_(torch.tensor([1.0, 0.0, 0.0]))
    # Targets are those of before, so only the distance of the weights is new.
    assert float(unlearner.loss(batch).detach()) == pytest.approx(free + 2.0, rel=1e-4)


def test_random_features_do_not_know_the_forget_set():
    learner = original()
    unlearner = DMM(learner, random_features=32, seed=4)
    images = points().images
    features = unlearner.features(images)
    assert features.shape == (N, 32)
    assert float(features.min()) == 0
    with torch.no_grad():
        unlearner.teacher.backbone.weight.mul_(7)
    assert torch.equal(unlearner.features(images), features)


@pytest.mark.parametrize(
    "bad",
    [
        {"ridge": 0.0},
        {"retain_multiple": 0.0},
        {"anchor": -1.0},
        {"strength": -1.0},
        {"random_features": -1},
    ],
)
def test_refuses_bad_options(bad):
    with pytest.raises(ConfigError):
        DMM(original(), **bad)
