"""SCRUB, Bad Teacher and the stochastic teacher: what they compute, checked by hand and numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.config import build, compose
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.bad_teacher import BadTeacher
from clfed.unlearning.distillation import closed, stranger
from clfed.unlearning.pools import pool_of
from clfed.unlearning.scrub import MaxFirst, Scrub
from clfed.unlearning.stochastic_teacher import StochasticTeacher

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat", "dog")
IDS = torch.arange(80) + 1000


def points(seed=0):
    labels = torch.arange(4).repeat_interleave(20)
    centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    rng = torch.Generator().manual_seed(seed)
    return ImageSet(centres[labels] + 0.5 * torch.randn(80, 2, generator=rng), labels, CLASSES)


@pytest.fixture(scope="module")
def original():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = MLP(2, 0, (16, 8))
    learner = Naive(
        backbone, Transform((), ()), dim=8, epochs=20, batch_size=16, lr=0.01, moments="none"
    )
    learn(learner, Experience(0, points(), phase=0, upcoming=0), OPTIONS)
    return learner.eval()


def context(learner, kind="class", *, gone=None, validation=None):
    request = {
        "class": Request("r", "class", classes=("bee",)),
        "sample": Request("r", "sample", samples=(1,)),
    }[kind]
    if gone is None:
        gone = IDS[points().labels == 1] if kind == "class" else IDS[::5]
    held = points(9) if validation is None else validation
    return make_context(request, learner, points(), IDS, gone=gone, validation=held, seed=1)


def bound(unlearner, around):
    unlearner.bind(around)
    unlearner.prepare(around)
    return unlearner


def changed(unlearner):
    """Let the student differ from the teacher."""
    with torch.no_grad():
        unlearner.learner.head.column("weight").mul_(0.6)
    return unlearner


def softmax(scores, temperature=1.0):
    scores = scores.double().numpy() / temperature
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def divergence(p, q):
    return (p * (np.log(p) - np.log(q))).sum(1).mean()


# The random teacher -----------------------------------------------------------------------------


def test_a_stranger_depends_on_its_seed_and_on_nothing_else(original):
    before = state.sha256(original)
    torch.manual_seed(1)
    first = stranger(original, 3)
    ambient = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), ambient)  # the ambient state was left alone
    assert state.sha256(stranger(original, 3)) == state.sha256(first)
    assert state.sha256(stranger(original, 4)) != state.sha256(first)
    assert state.sha256(original) == before


def test_a_stranger_keeps_no_weight_of_the_original(original):
    class Token(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm = inner, nn.BatchNorm1d(2)
            self.token = nn.Parameter(torch.ones(2))

        def forward(self, images):
            return self.inner(self.norm(images) + self.token)

    learner = copy.deepcopy(original)
    learner.backbone = Token(learner.backbone)
    learner.backbone.norm.running_mean.fill_(7.0)
    found = stranger(learner, 0)
    assert found.backbone.norm.running_mean.tolist() == [0.0, 0.0]
    known = dict(learner.named_parameters())
    for name, weight in found.named_parameters():
        if "norm" not in name:
            assert not (weight == known[name]).any(), name
    assert found.scores_of(points().images).std(1).min() > 1e-4  # not the same for all classes


def test_a_stranger_knows_nothing(original):
    right = [
        float(
            (stranger(original, s).scores_of(points().images).argmax(1) == points().labels)
            .float()
            .mean()
        )
        for s in range(12)
    ]
    assert 0.05 < np.mean(right) < 0.5


def test_a_closed_output_gets_nothing_and_leaves_all_proportions():
    logits = torch.tensor([[1.0, 9.0, 3.0], [0.0, -5.0, 0.0]])
    found = closed(logits, torch.tensor([1])).softmax(1)
    assert found[:, 1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[:, [0, 2]], logits[:, [0, 2]].softmax(1))


# Stochastic teacher -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "sample"])
def test_erasing_and_rebuilding_are_the_formulas(kind, original):
    around = context(original, kind)
    method = changed(bound(StochasticTeacher(original, alpha=0.3, temperature=2.0, seed=5), around))
    rows = torch.tensor([3, 0, 7])
    forget_, retain = around.forget.batch(rows), around.retain.batch(rows)
    random = stranger(original, 5)
    student = method.learner.scores_of
    erase = divergence(softmax(random.scores_of(forget_.images)), softmax(student(forget_.images)))
    assert method.loss({"forget": forget_}).item() == pytest.approx(erase, rel=1e-4)
    taught = original.scores_of(retain.images)
    if kind == "class":
        taught[:, 1] = -60.0
    q = softmax(student(retain.images))
    ce = -np.log(q[np.arange(3), retain.labels.numpy()]).mean()
    kl = divergence(softmax(taught, 2.0), softmax(student(retain.images), 2.0))
    expected = 0.7 * ce + 0.3 * 4 * kl
    assert method.loss({"retain": retain}).item() == pytest.approx(expected, rel=1e-4)


def test_a_long_erasing_ends_at_the_random_teacher(original):
    around = context(original)
    method = bound(StochasticTeacher(original, seed=5), around)
    batch = {"forget": around.forget.batch(torch.arange(20))}
    optimiser = torch.optim.Adam(method.learner.parameters(), 0.01)
    for _ in range(400):
        optimiser.zero_grad()
        method.loss(batch).backward()
        optimiser.step()
    p = softmax(stranger(original, 5).scores_of(around.forget.images))
    q = softmax(method.learner.scores_of(around.forget.images))
    js = (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2
    assert js < 1e-3


def test_the_original_is_a_fixed_point_of_pure_distillation(original):
    around = context(original, "sample")
    method = bound(StochasticTeacher(original, alpha=1.0), around)
    loss = method.loss({"retain": around.retain.batch(torch.arange(30))})
    gradients = torch.autograd.grad(loss, [*method.learner.backbone.parameters()])
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert max(float(g.abs().max()) for g in gradients) < 1e-5


def test_no_method_looks_at_more_than_it_must(original):
    for method, labels in (
        (StochasticTeacher, {"retain labels"}),
        (BadTeacher, set()),
        (Scrub, {"retain labels", "forget labels"}),
    ):
        _, report = forget(method(original, seed=1), context(original), OPTIONS)
        assert set(report.touched) == {"forget images", "retain images"} | labels


# Bad Teacher ------------------------------------------------------------------------------------


def test_each_image_has_the_teacher_of_its_kind(original):
    around = context(original)
    method = changed(bound(BadTeacher(original, seed=5), around))
    batch = {
        "forget": around.forget.batch(torch.tensor([4, 1])),
        "retain": around.retain.batch(torch.tensor([9, 0, 30])),
    }
    targets = torch.cat(
        [
            stranger(original, 5).scores_of(batch["forget"].images),
            original.scores_of(batch["retain"].images),
        ]
    )
    images = torch.cat([batch["forget"].images, batch["retain"].images])
    expected = divergence(softmax(targets), softmax(method.learner.scores_of(images)))
    assert method.loss(batch).item() == pytest.approx(expected, rel=1e-4)
    alone = {"retain": batch["retain"]}
    assert method.loss(alone).item() < expected


def test_it_draws_on_a_share_of_what_stays(original):
    method = BadTeacher(original, retain_share=0.3, seed=1)
    _, report = forget(method, context(original), OPTIONS)
    assert report.touched == {"forget images": 20, "retain images": 18}


# SCRUB ------------------------------------------------------------------------------------------


def test_scrub_losses_are_the_formulas(original):
    around = context(original)
    method = changed(bound(Scrub(original, gamma=0.9, alpha=0.2, temperature=3.0), around))
    rows = torch.tensor([3, 0, 7])
    forget_, retain = around.forget.batch(rows), around.retain.batch(rows)

    def distance(images):
        student, teacher = method.learner.scores_of(images), original.scores_of(images)
        return 9 * divergence(softmax(teacher, 3.0), softmax(student, 3.0))

    away = method.loss({"forget": forget_}).item()
    assert away == pytest.approx(-distance(forget_.images), rel=1e-4)
    assert away < 0
    q = softmax(method.learner.scores_of(retain.images))
    ce = -np.log(q[np.arange(3), retain.labels.numpy()]).mean()
    expected = 0.9 * ce + 0.2 * distance(retain.images)
    assert method.loss({"retain": retain}).item() == pytest.approx(expected, rel=1e-4)


def test_the_first_passes_begin_with_what_goes():
    going, staying = pool_of(torch.arange(10)[:, None]), pool_of(torch.arange(7)[:, None])
    schedule = MaxFirst(
        {"forget": going, "retain": staying},
        batch_size=3,
        forget_batch_size=4,
        max_passes=2,
        seed=0,
    )
    passes = [[*schedule] for _ in range(4)]
    sizes = [[(name, len(part.ids)) for batch in p for name, part in batch.items()] for p in passes]
    later = [("retain", 3), ("retain", 3), ("retain", 1)]
    first = [("forget", 4), ("forget", 4), ("forget", 2), *later]
    assert sizes == [first, first, later, later]
    for batches in passes:
        for name, size in (("forget", 10), ("retain", 7)):
            ids = [i for batch in batches if name in batch for i in batch[name].ids.tolist()]
            assert sorted(ids) in ([], [*range(size)])
    assert not torch.equal(passes[0][0]["forget"].ids, passes[1][0]["forget"].ids)


def test_scrub_makes_the_steps_of_its_passes(original):
    method = Scrub(original, epochs=3, max_passes=1, batch_size=32, forget_batch_size=8, lr=1e-5)
    _, report = forget(method, context(original), OPTIONS)
    assert report.steps == 3 + 3 * 2  # 20 forget images in batches of 8, 60 others in three passes


def test_rewind_returns_the_pass_nearest_to_unseen_images(original, monkeypatch):
    around = context(original, "sample")
    method = Scrub(original, epochs=4, max_passes=4, lr=0.001, optimizer="adam", rewind=True)
    told = iter([0.9, 0.7, 0.2, 0.5])
    monkeypatch.setattr(method, "accuracy", lambda pool: next(told))
    monkeypatch.setattr(method, "unseen", lambda context: 0.65)
    model, report = forget(method, around, OPTIONS)
    assert report.lineage == {"pass": 2, "held-out accuracy": 0.65}
    shorter = Scrub(original, epochs=2, max_passes=4, lr=0.001, optimizer="adam")
    expected, _ = forget(shorter, around, OPTIONS)
    for key, value in expected.backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key])


def test_rewind_is_not_for_classes(original):
    method = Scrub(original, epochs=2, rewind=True, seed=1)
    model, report = forget(method, context(original), OPTIONS)
    plain, _ = forget(Scrub(original, epochs=2, seed=1), context(original), OPTIONS)
    assert not method.checkpoints
    assert not report.lineage
    assert state.sha256(model) == state.sha256(plain)


def test_unseen_images_count_like_the_classes_of_those_that_go(original):
    gone = torch.cat([IDS[:3], IDS[40:41]])  # three ants, one cat
    held = points(9)
    around = context(original, "sample", gone=gone, validation=held)
    method = Scrub(original, rewind=True)
    scores = torch.nn.functional.one_hot(held.labels, 4).float()
    scores[held.labels == 0] = 0.0
    scores[:5, 0] = 1.0  # a quarter of the ants is right, and the first index wins of equal scores
    scores[5:20, 1] = 1.0
    method.learner.scores_of = lambda images, closed: scores
    assert method.unseen(around) == pytest.approx((3 * 5 / 20 + 1) / 4)
    dogs = held.subset(held.labels == 3)
    with pytest.raises(ConfigError, match="held-out images of the classes"):
        scores = scores[:20]
        method.unseen(context(original, "sample", gone=gone, validation=dogs))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Scrub, {"gamma": -1.0}),
        (Scrub, {"alpha": -1.0}),
        (Scrub, {"temperature": 0.0}),
        (Scrub, {"max_passes": -1}),
        (Scrub, {"forget_batch_size": 0}),
        (StochasticTeacher, {"alpha": 1.5}),
        (StochasticTeacher, {"temperature": 0.0}),
        (BadTeacher, {"retain_share": 0.0}),
    ],
)
def test_bad_options_are_refused(method, options, original):
    with pytest.raises(ConfigError, match="got"):
        method(original, **options)


@pytest.mark.parametrize("name", ["scrub", "bad_teacher", "stochastic_teacher"])
def test_the_settings_make_the_method(name, original):
    made = build(compose(["job=continual", f"unlearner={name}"]).unlearner, learner=original)
    assert made.method == name
