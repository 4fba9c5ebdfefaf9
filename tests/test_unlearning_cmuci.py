"""CMUCI: wrong labels, what is trained, and concepts that say where to poison."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.seeding import generator
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.base import named_weights
from clfed.unlearning.cmuci import CMUCI, drawn_of_class, swapped
from clfed.unlearning.concepts import (
    ConceptBank,
    clusters,
    integrated_gradients,
    sparse_classifier,
)

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat", "dog")
IDS = 300 - 2 * torch.arange(60)


def pictures() -> ImageSet:
    """Noise, with a bright quarter that tells the class."""
    labels = torch.arange(60) % 4
    images = torch.randint(0, 60, (60, 1, 8, 8), generator=generator(0, "noise"))
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[row, :, top : top + 4, left : left + 4] += 150
    return ImageSet(images.to(torch.uint8), labels, CLASSES)


def original():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    learner = Naive(backbone, Transform((0.3,), (0.3,)), name="naive", dim=8)
    learner.grow(CLASSES)
    images = pictures()
    optimiser = torch.optim.Adam([*learner.backbone.parameters(), *learner.head.parameters()], 0.02)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(learner.head(learner.embed(images.images)), images.labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return learner.eval()


def context(learner, kind="class", images=None):
    images = pictures() if images is None else images
    request = Request("r", "class", classes=("bee", "dog"))
    gone = IDS[images.labels % 2 == 1]
    if kind == "sample":
        gone = IDS[::5]
        request = Request("r", "sample", samples=tuple(gone.tolist()))
    return make_context(request, learner, images, IDS, gone=gone)


def prepared(kind="class", **options):
    learner = original()
    unlearner = CMUCI(learner, **options)
    around = context(learner, kind).behind(unlearner.needs)
    unlearner.bind(around)
    unlearner.prepare(around)
    return unlearner, around


@pytest.mark.parametrize("kind", ["class", "sample"])
@pytest.mark.parametrize("labels", ["random", "targeted"])
def test_wrong_labels_are_wrong_and_never_of_a_class_that_goes(kind, labels):
    unlearner, around = prepared(kind, labels=labels)
    targets = unlearner.targets[around.forget.ids]
    assert bool((targets != around.forget.labels).all())
    if kind == "class":
        assert set(targets.tolist()) <= {0, 2}


def test_targeted_labels_are_the_runner_up_that_stays():
    unlearner, around = prepared(labels="targeted")
    scores = unlearner.teacher.scores_of(around.forget.images)
    rows = {sample: row for row, sample in enumerate(around.forget.ids.tolist())}
    ids = around.forget.ids
    for sample, target in zip(ids.tolist(), unlearner.targets[ids].tolist(), strict=True):
        assert target == max((0, 2), key=lambda row: float(scores[rows[sample], row]))


def test_a_frozen_backbone_leaves_all_but_the_head():
    learner = original()
    around = context(learner)
    model, report = forget(CMUCI(learner, epochs=40, batch_size=16, lr=0.1), around, OPTIONS)
    assert report.steps == 40 * 4
    for name, weight in named_weights(learner).items():
        same = torch.equal(weight, named_weights(model)[name])
        assert same == name.startswith("backbone"), name
    answers = model.scores_of(pictures().images, closed=False).argmax(1)
    labels = pictures().labels
    assert float((answers == labels)[labels % 2 == 1].double().mean()) <= 0.1
    assert float((answers == labels)[labels % 2 == 0].double().mean()) >= 0.9


def test_a_trained_backbone_changes_too():
    learner = original()
    trained = {"backbone": "trained", "epochs": 1, "lr": 0.1}
    model, _ = forget(CMUCI(learner, **trained), context(learner), OPTIONS)
    assert all(
        not torch.equal(weight, named_weights(model)[name])
        for name, weight in named_weights(learner).items()
    )


@pytest.mark.parametrize("concepts", [0, 2])
def test_both_ways_to_train_have_the_same_loss_at_the_start(concepts):
    losses = []
    for backbone in ("frozen", "trained"):
        unlearner, around = prepared(backbone=backbone, concepts=concepts, bank=5)
        rows = torch.tensor([4, 1, 7])
        batch = {"forget": around.forget.batch(rows), "retain": around.retain.batch(rows)}
        losses.append(float(unlearner.loss(batch).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if not concepts:
        images = torch.cat([part.images for part in batch.values()])
        wrong = unlearner.targets[batch["forget"].ids].tolist()
        labels = torch.cat([torch.tensor(wrong), batch["retain"].labels])
        expected = F.cross_entropy(unlearner.teacher_logits(images), labels)
        assert losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_poison_is_one_square_where_the_class_shows():
    unlearner, around = prepared(concepts=2, bank=5, patch=0.5)
    before = around.forget.images[around.forget.ids.argsort()]
    labels = around.forget.labels[around.forget.ids.argsort()]
    differ = (before != unlearner.images[around.forget.ids.sort().values])[:, 0]
    for row in range(len(differ)):
        y, x = differ[row].nonzero(as_tuple=True)
        assert int(y.max() - y.min()) < 4
        assert int(x.max() - x.min()) < 4
    # The bright quarter of the class is what is replaced, at least in most images.
    bright = torch.zeros(len(differ), 8, 8, dtype=torch.bool)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        bright[row, top : top + 4, left : left + 4] = True
    assert float((differ & bright).sum() / differ.sum()) > 0.4
    assert set(unlearner.targets[around.forget.ids].tolist()) <= {0, 2}


def test_poison_takes_pictures():
    features = ImageSet(torch.randn(60, 64), pictures().labels, CLASSES)
    learner = original()
    with pytest.raises(ConfigError, match="features"):
        forget(CMUCI(learner, concepts=2), context(learner, images=features), OPTIONS)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16))
def test_integrated_gradients_are_complete(seed):
    rng = generator(seed, "ig")
    weight, a, base = (torch.randn(n, 5, generator=rng).double() for n in (3, 4, 1))

    def belief(x):
        return torch.softmax(x @ weight.T, 1)[:, 0] + x[:, 1] ** 3

    found = integrated_gradients(belief, a, base[0])
    torch.testing.assert_close(found.sum(1), belief(a) - belief(base), atol=1e-3, rtol=1e-3)


def test_integrated_gradients_of_a_linear_function():
    rng = generator(0, "linear")
    w, a, base = (torch.randn(*shape, generator=rng) for shape in ((5,), (4, 5), (5,)))
    torch.testing.assert_close(integrated_gradients(lambda x: x @ w, a, base), w * (a - base))


def test_clusters_of_blobs_are_the_blobs():
    blobs = torch.arange(60) % 3
    z = 20 * torch.eye(4)[blobs] + torch.randn(60, 4, generator=generator(0, "blobs"))
    found = clusters(z, 8, generator(1, "centres"))
    assert sorted(set(found.tolist())) == list(range(int(found.max()) + 1))
    # More centres than blobs: each cluster lies within one blob.
    assert all(len(set(blobs[found == number].tolist())) == 1 for number in set(found.tolist()))


def test_activations_are_projections():
    bank = ConceptBank(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0]))
    # (z - centre) = (3, 4): 25 / 25, and 8 / 4.
    assert bank.activations(torch.tensor([[4.0, 5.0]])).tolist() == [[1.0, 2.0]]


def test_sparse_classifier_agrees_with_sklearn():
    rng = generator(0, "sparse")
    labels = torch.arange(120) % 3
    a = torch.randn(120, 6, generator=rng).double()
    a[:, :3] += 1.5 * torch.eye(3)[labels]
    a = (a - a.mean(0)) / a.std(0)
    weight, bias = sparse_classifier(a, labels, 3, penalty=0.02, steps=3000)
    model = LogisticRegression(
        l1_ratio=1, C=1 / (0.02 * 120), solver="saga", tol=1e-8, max_iter=20000
    ).fit(a.numpy(), labels.numpy())
    theirs = torch.from_numpy(model.coef_)

    def objective(w, b):
        return float(F.cross_entropy(a @ w.T + b, labels) + 0.02 * w.abs().sum())

    best = objective(theirs, torch.from_numpy(model.intercept_))
    assert objective(weight, bias) == pytest.approx(best, rel=1e-4)
    assert 0 < np.count_nonzero(weight.numpy()) < weight.numel()


def test_hottest_square_is_replaced():
    images, donors = torch.zeros(2, 1, 4, 5), torch.ones(2, 1, 4, 5)
    heat = torch.zeros(2, 4, 5)
    heat[0, 1:3, 3:5] = 1
    heat[1, 0:2, 0:2] = 1
    found = swapped(images, donors, heat, 2)
    assert torch.equal(found[:, 0], heat)


def test_donors_are_of_the_wanted_class():
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    wanted = torch.tensor([2, 0, 1] * 40)
    places = drawn_of_class(labels, wanted, generator(0, "donors"))
    assert torch.equal(labels[places], wanted)
    assert set(places.tolist()) == set(range(6))
    assert len(drawn_of_class(labels, torch.tensor([4, 5]), generator(0, "donors"))) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"labels": "true"},
        {"backbone": "half"},
        {"concepts": -1},
        {"concepts": 30},
        {"bank": 1},
        {"patch": 0.0},
    ],
)
def test_refuses_bad_options(bad):
    with pytest.raises(ConfigError):
        CMUCI(original(), **bad)
