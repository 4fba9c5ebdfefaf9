"""PASS and FeTrIL: rotations, noisy prototypes and translated features, against loops and closed forms."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn
from torch.nn import functional as F

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError
from clfed.learners import state
from clfed.learners.base import Step
from clfed.learners.fetril import (
    Features,
    FeatureTranslation,
    softmax_classifier,
    support_vectors,
    translated,
)
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.learners.pass_ import (
    PrototypeAugmentation,
    RotationHead,
    Turned,
    class_variances,
    radius,
)
from clfed.learners.tables import Head
from clfed.learners.training import initialisation
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
PLAIN = Transform((), ())
SEEDS = st.integers(0, 10**6)


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digits(kind: str = "features") -> tuple[ImageSet, ImageSet, Transform]:
    data = load(as_features=kind == "features")
    return data.train, data.test, Transform(data.mean, data.std)


def network(kind: str = "features", width: int = 64) -> MLP:
    with initialisation(0, "test"):
        return MLP(64, 0, (width,)) if kind == "features" else MLP(1, 8, (width,))


def pairs(data: ImageSet, count: int = 5) -> list[Experience]:
    names = [[str(2 * t), str(2 * t + 1)] for t in range(count)]
    return [
        Experience(t, data.of_classes(part), t, upcoming=2 * (count - 1 - t))
        for t, part in enumerate(names)
    ]


def accuracy(learner, test: ImageSet) -> float:
    known = test.of_classes([name for name in test.classes if name in learner.classes])
    rows = learner.rows(known.classes)[known.labels]
    return float((learner.scores_of(known.images).argmax(1) == rows).double().mean())


def prototypes(kind: str = "features", **options):
    transform = digits(kind)[2]
    options = {"epochs": 3, "batch_size": 32, **options}
    return PrototypeAugmentation(network(kind), transform, dim=64, **options)


# PASS -------------------------------------------------------------------------------------------------


def test_radius_golden():
    covariances = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert float(radius(covariances.diagonal(dim1=1, dim2=2))) == pytest.approx(1.118034, abs=5e-7)


@given(SEEDS)
def test_variances_are_those_of_numpy_class_by_class(seed):
    features, labels = points(seed, 20, 3), torch.arange(20) % 4 * 2
    wanted = [np.cov(features[labels == c].double().numpy().T).diagonal() for c in (0, 2, 4, 6)]
    assert np.allclose(class_variances(features, labels).numpy(), wanted, atol=1e-6)


def test_the_radius_is_that_of_the_first_experience():
    train, _, _ = digits()
    learner = prototypes()
    first, second, *_ = pairs(train)
    learn(learner, first, FAST)
    features = learner.embed_all(first.train.images).double().numpy()
    labels = first.train.labels.numpy()
    traces = [np.trace(np.cov(features[labels == c].T)) for c in range(2)]
    wanted = math.sqrt(sum(traces) / 2 / 64)
    assert float(learner.kept["radius"]) == pytest.approx(wanted, rel=1e-5)
    kept = learner.kept["radius"].clone()
    learn(learner, second, FAST)
    assert torch.equal(learner.kept["radius"], kept)


def test_batches_hold_every_rotation_of_every_image():
    train, _, _ = digits("images")
    learner = prototypes("images")
    learner.begin_experience(pairs(train)[0])
    data = learner.training_data(pairs(train)[0])
    images, labels = next(iter(learner.batches(data, seed=3)))
    upright = images.unflatten(0, (4, -1))
    for turns in range(4):
        turned = torch.tensor(np.rot90(upright[0].numpy(), turns, (-2, -1)).copy())
        assert torch.equal(upright[turns], turned)
    assert torch.equal(labels, labels[: len(labels) // 4].repeat(4))
    assert len(list(Turned([(images, labels)]))) == 1


@pytest.mark.parametrize("logits", ["seen", "all"])
@pytest.mark.parametrize("loss", ["softmax", "cosine"])
def test_classification_is_the_loop_over_pairs_of_class_and_turn(logits, loss):
    train, _, _ = digits("images")
    learner = prototypes("images", logits=logits, loss=loss, softmax_temperature=0.5)
    part = pairs(train)[0]
    learner.begin_experience(part)
    with torch.no_grad():
        for weights in learner.head.parameters():
            weights.copy_(0.1 * points(7, *weights.shape))
    h, labels = points(1, 12, 64), torch.arange(12) % 2
    images = torch.zeros(12, 1, 8, 8)
    value = learner.losses(Step(images, labels, h, 1))["classification"]
    rows = 2 if logits == "seen" else 10
    weight = learner.head.weight[:rows].detach()
    total = 0.0
    for i in range(12):
        scores = []
        for c in range(rows):
            for r in range(4):
                if loss == "cosine":
                    score = 16.0 * float(F.cosine_similarity(weight[c, r], h[i], dim=0))
                else:
                    score = float(weight[c, r] @ h[i] + learner.head.bias[c, r].detach())
                scores.append(score / 0.5)
        wanted = 4 * int(labels[i]) + i // 3  # three images a turn
        total -= scores[wanted] - math.log(sum(math.exp(s) for s in scores))
    assert float(value.detach()) == pytest.approx(total / 12, rel=1e-4)


def test_predictions_use_every_fourth_logit():
    head = RotationHead(Head(3, "linear"), 4)
    head.grow(["a", "b"])
    with torch.no_grad():
        head.weight.copy_(points(1, 2, 4, 3))
        head.bias.copy_(points(2, 2, 4))
    h = points(3, 5, 3)
    flat = F.linear(h, head.weight.reshape(8, 3), head.bias.reshape(8))
    assert torch.allclose(head.turned(h).flatten(1), flat)
    assert torch.allclose(head(h), flat[:, ::4])


def test_features_have_no_rotations():
    train, test, _ = digits()
    learner, single = prototypes(), prototypes(rotations=False)
    for part in pairs(train)[:3]:
        learn(learner, part, FAST)
        learn(single, part, FAST)
    assert torch.allclose(learner.scores_of(test.images), single.scores_of(test.images), atol=1e-4)


def test_distillation_is_the_norm_of_all_that_moved_and_zero_at_rest():
    train, _, _ = digits()
    learner = prototypes()
    first, second, *_ = pairs(train)
    learn(learner, first, FAST)
    learner.begin_experience(second)
    images = second.train.images[:6]
    h = learner.embed(images)
    at_rest = learner.losses(Step(images, torch.full((6,), 2), h, 1))["distillation"]
    (gradient,) = torch.autograd.grad(at_rest, h)
    assert float(at_rest.detach()) == 0.0 and not bool(gradient.any())
    moved = h.detach() + points(1, 6, 64)
    value = learner.losses(Step(images, torch.full((6,), 2), moved, 1))["distillation"]
    assert float(value) == pytest.approx(float(points(1, 6, 64).double().norm()), rel=1e-5)


def test_prototypes_stay_where_they_were_and_meet_noise_of_the_radius():
    train, _, _ = digits()
    learner = prototypes(batch_size=4000)
    first, second, *_ = pairs(train)
    learn(learner, first, FAST)
    before = learner.memory.means()
    learner.begin_experience(second)
    seen = []
    original = learner.turned_loss
    learner.turned_loss = lambda h, *rest: seen.append((h.detach(), *rest)) or original(h, *rest)
    learner.losses(Step(second.train.images[:2], torch.tensor([2, 3]), points(1, 2, 64), 1))
    features, labels, turn, turns = seen[1]
    assert features.shape == (4000, 64) and not bool(turn.any()) and turns == 1
    assert set(labels.tolist()) == {0, 1}
    for row in (0, 1):
        noise = features[labels == row].double() - before[learner.memory.rows([str(row)])[0]]
        assert float(noise.mean(0).abs().max()) < 0.2 * float(learner.kept["radius"]) + 1e-6
        assert float(noise.std()) == pytest.approx(float(learner.kept["radius"]), rel=0.02)
    del learner.turned_loss
    learn(learner, second, FAST)
    assert torch.equal(learner.memory.select(["0", "1"]).means(), before)


@pytest.mark.parametrize("kind", ["features", "images"])
def test_pass_remembers(kind):
    train, test, transform = digits(kind)
    learner = prototypes(kind, epochs=5)
    naive = Naive(network(kind), transform, dim=64, epochs=5, batch_size=32)
    for part in pairs(train):
        learn(learner, part, FAST)
        learn(naive, part, FAST)
    assert accuracy(learner, test) > max(0.4, 1.5 * accuracy(naive, test))


@pytest.mark.parametrize(
    "bad",
    [
        {"logits": "current"},
        {"loss": "bce"},
        {"softmax_temperature": 0.0},
        {"distillation": -1.0},
        {"augmentation_weight": float("nan")},
        {"feature_map": {"_target_": "clfed.prototypes.features.tukey"}},
    ],
)
def test_bad_settings_of_pass_are_refused(bad):
    with pytest.raises(ConfigError):
        prototypes(**bad)


def test_images_that_cannot_be_turned_are_refused_before_anything_changes():
    images = torch.zeros(4, 1, 6, 8, dtype=torch.uint8)
    part = Experience(0, ImageSet(images, torch.tensor([0, 0, 1, 1]), ("a", "b")), 0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    learner = PrototypeAugmentation(backbone, Transform((0.5,), (0.5,)), dim=5, epochs=1)
    before = state.sha256(learner)
    with pytest.raises(ConfigError, match="square"):
        learn(learner, part, FAST)
    assert state.sha256(learner) == before
    upright = PrototypeAugmentation(
        backbone, Transform((0.5,), (0.5,)), dim=5, epochs=1, rotations=False
    )
    learn(upright, part, FAST)


# FeTrIL -----------------------------------------------------------------------------------------------


@given(SEEDS)
def test_pseudo_features_have_the_old_mean_and_the_spread_of_their_source(seed):
    features, labels = points(seed, 24, 5), torch.arange(24) % 3 + 4
    old, names = points(seed + 1, 6, 5), torch.tensor([0, 1, 2, 3, 9, 8])
    both = translated(features, labels, old, names)
    assert torch.equal(both.rows(slice(0, 24)), features)
    assert torch.equal(both.labels[:24], labels)
    means = torch.stack([features[labels == n].double().mean(0) for n in (4, 5, 6)])
    for p in range(6):
        rows = both.rows(both.labels == names[p]).double()
        cosines = [float(F.cosine_similarity(old[p].double(), mean, dim=0)) for mean in means]
        n = int(np.argmax(cosines))
        source = features[labels == n + 4].double()
        assert torch.allclose(rows.mean(0), old[p].double(), atol=1e-5)
        assert torch.allclose(rows.T.cov(), source.T.cov(), atol=1e-4)
        assert torch.allclose(rows, source - means[n] + old[p], atol=1e-5)
    assert len(both) == 24 + 6 * 8


def test_nothing_old_makes_no_pseudo_features():
    none = translated(
        points(1, 4, 3), torch.tensor([1, 1, 1, 1]), torch.zeros(0, 3), torch.zeros(0).long()
    )
    assert len(none) == 4


def plain(features: torch.Tensor, labels: torch.Tensor) -> Features:
    return translated(features, labels, torch.zeros(0, features.shape[1]), torch.zeros(0).long())


def blobs(classes: int = 3, each: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(classes).repeat_interleave(each)
    return points(1, classes, 6)[labels] * 2 + points(2, len(labels), 6), labels


def test_the_softmax_classifier_is_logistic_regression():
    features, labels = blobs()
    options = {"epochs": 400, "lr": 5.0, "batch_size": 120}
    rng = torch.Generator().manual_seed(0)
    weight, bias = softmax_classifier(plain(features, labels), 4, **options, rng=rng)
    unit = F.normalize(features)
    logits = unit @ weight.T + bias
    loss = float(F.cross_entropy(logits, labels))
    theirs = LogisticRegression(C=1e6, max_iter=5000).fit(unit.numpy(), labels.numpy())
    best = -theirs.predict_log_proba(unit.numpy())[np.arange(120), labels.numpy()].mean()
    assert best - 1e-3 < loss < best + 0.02
    assert bool((logits.argmax(1) != 3).all())


@pytest.mark.parametrize("classes", [2, 3])
def test_support_vectors_are_those_of_scikit_learn(classes):
    features, labels = blobs(classes)
    rows = torch.tensor([5, 2, 4])[:classes][labels]
    weight, bias = support_vectors(plain(features, rows), 6, 0.5, seed=3)
    unit = F.normalize(features)
    theirs = LinearSVC(C=0.5, dual="auto", random_state=3).fit(unit.numpy(), rows.numpy())
    ours = (unit @ weight.T + bias).argmax(1)
    assert ours.tolist() == theirs.predict(unit.numpy()).tolist()


def test_one_class_needs_no_machine():
    weight, bias = support_vectors(plain(points(1, 5, 6), torch.full((5,), 1)), 3, 1.0, seed=0)
    assert int((points(2, 4, 6) @ weight.T + bias).argmax(1).unique()) == 1


@pytest.mark.parametrize("kind", ["linear", "svm"])
def test_fetril_remembers_with_a_frozen_network(kind):
    train, test, transform = digits()
    options = {"classifier_kind": kind, "head_epochs": 10, "head_lr": 5.0, "epochs": 5}
    learner = FeatureTranslation(network(), transform, dim=64, batch_size=32, **options)
    for part in pairs(train):
        learn(learner, part, FAST)
        if part.number == 0:
            frozen = copy.deepcopy(learner.backbone.state_dict())
    assert all(torch.equal(frozen[k], v) for k, v in learner.backbone.state_dict().items())
    assert accuracy(learner, test) > 0.7
    assert set(learner.kept) == set() and learner.memory.outer is None


def test_ready_features_are_as_good_as_their_translations():
    train, test, transform = digits()
    learner = FeatureTranslation(Identity(), transform, dim=64, head_epochs=10, head_lr=5.0)
    for part in pairs(train):
        assert learn(learner, part, FAST) == 0
    assert accuracy(learner, test) > 0.8


def test_classes_that_come_back_are_learned_from_their_images():
    train, _, transform = digits()
    learner = FeatureTranslation(Identity(), transform, dim=64, head_epochs=5)
    seen = []
    original = learner.fitted
    learner.fitted = lambda features: seen.append(features) or original(features)
    learn(learner, pairs(train)[0], FAST)
    learn(learner, Experience(1, train.of_classes(["2", "0"]), 1), FAST)
    data = train.of_classes(["2", "0"])
    assert torch.equal(seen[1].rows(slice(0, len(data))), data.images)
    pseudo = seen[1].labels[len(data) :]
    assert set(pseudo.tolist()) == {1}


@pytest.mark.parametrize(
    "bad",
    [
        {"classifier_kind": "forest"},
        {"train": "all"},
        {"head": "cosine"},
        {"loss": "cosine"},
        {"head_epochs": 0},
        {"head_lr": 0.0},
        {"svm_penalty": -1.0},
        {"feature_map": {"_target_": "clfed.prototypes.features.tukey"}},
    ],
)
def test_bad_settings_of_fetril_are_refused(bad):
    with pytest.raises(ConfigError):
        FeatureTranslation(Identity(), PLAIN, dim=4, **bad)
