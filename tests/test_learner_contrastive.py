"""Contrast, relations, mixtures and mixing: against closed forms, slow loops and published numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sklearn.covariance import EmpiricalCovariance
from torch.nn import functional as F

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.config import compose
from clfed.data.benchmark import ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError, NotEnoughData
from clfed.learners import novelty, state
from clfed.learners.base import Step
from clfed.learners.csd import CSD, batch_hard_triplet
from clfed.learners.fitting import learn
from clfed.learners.losses import contrast, soft_divergence, supervised_contrast
from clfed.learners.mixing import blend, mixing_plan, pair_law
from clfed.learners.mixtures import mixture_likelihood, moved_prototypes, own_shares, sinkhorn
from clfed.learners.onpro import OnPro, equilibrium, online_prototypes
from clfed.learners.options import TrainerOptions
from clfed.learners.palm import PALM
from clfed.learners.prd import PRD, relation_over_classes, relation_over_samples, tightness
from clfed.scenarios.streams import Experience
from clfed.seeding import generator

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
ONPRO0 = {"memory_size": 0, "logits": "current", "classifier": {"name": "ncm"}}
KINDS = {
    "prd": (PRD, {}),
    "csd": (CSD, {}),
    "palm": (PALM, {}),
    "onpro": (OnPro, {}),
    "onpro0": (OnPro, ONPRO0),
}


def features(names: str, per_class: int = 6, *, seed: int = 0, dim: int = 5) -> ImageSet:
    labels = torch.arange(len(names)).repeat_interleave(per_class)
    centres = torch.stack([torch.randn(dim, generator=generator(1, name)) for name in names])
    noise = 0.5 * torch.randn(len(labels), dim, generator=generator(seed, "noise", names))
    return ImageSet(centres[labels] + noise, labels, tuple(names))


def pictures(names: str, per_class: int = 4, shape: tuple[int, int] = (8, 8)) -> ImageSet:
    labels = torch.arange(len(names)).repeat_interleave(per_class)
    rng = generator(0, "pictures", names)
    images = torch.randint(0, 256, (len(labels), 1, *shape), generator=rng)
    return ImageSet(images.to(torch.uint8), labels, tuple(names))


def stream(*parts: ImageSet, announced: bool = True) -> list[Experience]:
    return [Experience(t, part, t, announced=announced) for t, part in enumerate(parts)]


def make(kind: str, images: ImageSet, **options):
    cls, given_options = KINDS[kind]
    pixels = images.images.dim() == 4
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if pixels:
            backbone = MLP(1, images.images.shape[2], (12, 8))
        else:
            backbone = MLP(images.images.shape[1], 0, (12, 8))
        transform = Transform((0.5,), (0.25,)) if pixels else Transform((), ())
        options = {"epochs": 2, "batch_size": 6, **given_options, **options}
        return cls(backbone, transform, dim=8, **options)


def first_step(learner, experience: Experience) -> Step:
    learner.begin_experience(experience)
    learner.train()
    batch = next(iter(learner.batches(learner.training_data(experience), seed=0)))
    return learner.make_step(*batch)


# Losses -----------------------------------------------------------------------------------------


def slow_contrast(anchors, labels, rows, names, temperature):
    values = []
    for i in range(len(anchors)):
        others = [j for j in range(len(rows)) if j != i]
        total = sum(math.exp(float(anchors[i] @ rows[j]) / temperature) for j in others)
        mine = [j for j in others if int(names[j]) == int(labels[i])]
        if mine:
            logs = [float(anchors[i] @ rows[j]) / temperature - math.log(total) for j in mine]
            values.append(-sum(logs) / len(logs))
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("others", [0, 4])
def test_supervised_contrast_is_the_slow_loop(rows, others):
    rng = generator(0, "contrast", rows, others)
    z = F.normalize(torch.randn(rows + others, 3, generator=rng, dtype=torch.float64))
    y = torch.randint(3, (rows + others,), generator=rng)
    extra = {"others": z[rows:], "other_labels": y[rows:]} if others else {}
    ours = supervised_contrast(z[:rows], y[:rows], temperature=0.3, **extra)
    assert float(ours) == pytest.approx(slow_contrast(z[:rows], y[:rows], z, y, 0.3), abs=1e-9)


def test_supervised_contrast_golden_values():
    z, y = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    assert float(supervised_contrast(z, y, temperature=0.1)) == pytest.approx(9.0796e-5, rel=1e-4)
    assert float(supervised_contrast(z, y, temperature=0.5)) == pytest.approx(0.239545, abs=1e-6)
    inherited = float(supervised_contrast(z, y, temperature=0.1)) * 0.1 / 0.07
    assert inherited == pytest.approx(1.29708e-4, rel=1e-4)
    for n in (2, 5, 9):
        collapsed = supervised_contrast(torch.ones(n, 1), torch.zeros(n).long(), temperature=0.1)
        assert float(collapsed) == pytest.approx(math.log(n - 1), abs=1e-5)


def test_contrast_without_positives_is_zero_with_a_finite_gradient():
    scores = torch.randn(3, 3, generator=generator(0), requires_grad=True)
    for candidates in (torch.ones(3, 3) > 0, torch.zeros(3, 3) > 0):
        value = contrast(scores, torch.zeros(3, 3, dtype=torch.bool), candidates)
        (gradient,) = torch.autograd.grad(value, scores)
        assert float(value.detach()) == 0 and bool((gradient == 0).all())


def test_soft_divergence_is_the_sum_of_its_definition():
    rng = generator(0, "divergence")
    old, new = (torch.randn(4, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    p, q = (np.exp(x.numpy() / 2) for x in (old, new))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert float(soft_divergence(old, new, 2.0)) == pytest.approx((p * np.log(p / q)).sum() / 4)
    assert float(soft_divergence(old, old + 5)) == pytest.approx(0, abs=1e-12)


# PRD --------------------------------------------------------------------------------------------

EYE = torch.eye(2, dtype=torch.float64)
BEFORE = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
NOW = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)


def test_relation_golden_values():
    one = [
        relation_over_samples((BEFORE, EYE[k : k + 1]), (NOW, EYE[k : k + 1]), 1.0) for k in (0, 1)
    ]
    assert [float(x) for x in one] == pytest.approx([0.004984, 0.028604], abs=1e-6)
    both = (BEFORE, EYE), (NOW, EYE)
    assert float(relation_over_samples(*both, 1.0)) == pytest.approx(0.016794, abs=1e-6)
    assert float(relation_over_samples(*both, 0.2)) == pytest.approx(0.072022, abs=1e-6)
    heads = torch.tensor([0, 0])
    assert float(relation_over_classes(*both, heads, 1.0)) == pytest.approx(0.023241, abs=1e-6)


def test_relations_over_classes_are_a_loop_over_experiences():
    rng = generator(0, "classes")
    heads = torch.tensor([0, 0, 1, 1, 1, 2])
    old, new = (
        (torch.randn(5, 4, generator=rng), torch.randn(6, 4, generator=rng)) for _ in range(2)
    )
    slow = 0.0
    for head in range(3):
        mine = heads == head
        p, q = (torch.log_softmax(h @ F.normalize(w)[mine].T / 0.7, 1) for h, w in (old, new))
        slow += float((p.exp() * (p - q)).sum(1).mean())
    assert float(relation_over_classes(old, new, heads, 0.7)) == pytest.approx(slow, abs=1e-6)


def test_relations_that_cannot_be_told_are_zero():
    one = (NOW[:1], EYE), (BEFORE[:1], EYE)
    assert float(relation_over_samples(*one, 0.2)) == pytest.approx(0, abs=1e-12)
    apart = relation_over_classes((BEFORE, EYE), (NOW, EYE), torch.tensor([0, 1]), 1.0)
    assert float(apart) == 0


@given(st.floats(0.01, 100), st.integers(0, 1))
def test_samples_relation_does_not_see_lengths(scale, row):
    stretched = EYE.clone()
    stretched[row] *= scale
    plain = relation_over_samples((BEFORE, EYE), (NOW, EYE), 0.2)
    assert float(
        relation_over_samples((BEFORE, EYE), (scale * NOW, stretched), 0.2)
    ) == pytest.approx(float(plain))


def begun_prd(**options):
    first, second = stream(features("ab"), features("cd"))
    learner = make("prd", first.train, feature_noise=0.0, **options)
    learn(learner, first, FAST)
    return learner, second


@pytest.mark.parametrize("relation", ["samples", "classes"])
def test_prd_relation_begins_at_zero_and_moves_old_prototypes_alone(relation):
    learner, second = begun_prd(relation=relation)
    step = first_step(learner, second)
    value = learner.losses(step)["relation"]
    weights = [*learner.backbone.parameters(), learner.head.column("weight")]
    start = torch.autograd.grad(value, weights, allow_unused=True)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert all(float(g.abs().max()) < 1e-5 for g in start)
    with torch.no_grad():
        rng = generator(5)
        for parameter in learner.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    step = learner.make_step(step.images, step.labels)
    value = learner.losses(step)["relation"]
    *network, prototypes = torch.autograd.grad(value, weights)
    assert float(value.detach()) > 0 and all(bool(g.any()) for g in network)
    assert bool(prototypes[:2].any(1).all()) and not bool(prototypes[2:].any())
    assert not any(p.requires_grad for p in learner.teacher.parameters())


def test_prd_tightness_pulls_present_prototypes_alone():
    learner, second = begun_prd()
    step = first_step(learner, second)
    value = learner.losses(step)["prototype"]
    present = torch.unique(step.labels)
    gradient = torch.autograd.grad(
        value, [learner.head.column("weight"), *learner.backbone.parameters()], allow_unused=True
    )
    assert all(g is None for g in gradient[1:])
    assert bool(gradient[0][present].any(1).all()) and not bool(gradient[0][:2].any())
    h, p = step.h.detach(), learner.head.column("weight").detach()
    cosines = [float(F.cosine_similarity(h[i], p[y], dim=0)) for i, y in enumerate(step.labels)]
    assert float(value) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)
    assert float(tightness(h, h)) == pytest.approx(0, abs=1e-6)


def test_prd_answers_do_not_depend_on_lengths_of_prototypes():
    learner, second = begun_prd()
    before = learner.scores_of(second.train.images)
    with torch.no_grad():
        learner.head.column("weight").mul_(torch.tensor([[0.01], [70.0]]))
    torch.testing.assert_close(learner.scores_of(second.train.images), before)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_prd_prototypes_have_a_rate_of_their_own(optimizer):
    learner, second = begun_prd(optimizer=optimizer, weight_decay=0.1, prototype_lr=0.5)
    learner.begin_experience(second)
    network, prototypes = learner.configure_optimizers()["optimizer"].param_groups
    assert (network["lr"], prototypes["lr"]) == (0.001, 0.5)
    assert (network["weight_decay"], prototypes["weight_decay"]) == (0.1, 0.0)
    assert prototypes["params"] == [*learner.head.parameters()]
    assert prototypes.get("momentum", 0) == 0
    named = {id(p) for group in (network, prototypes) for p in group["params"]}
    assert named == {id(p) for p in learner.parameters() if p.requires_grad}


def test_prd_knows_which_experience_brought_a_class():
    learner, second = begun_prd()
    learn(learner, second, FAST)
    learn(learner, Experience(2, features("be"), 2), FAST)
    assert learner.classes == tuple("abcde")
    assert learner.kept["heads"].tolist() == [0, 0, 1, 1, 2]


# CSD --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_triplets_are_the_slow_loop(seed):
    rng = generator(seed, "triplets")
    h, y = torch.randn(8, 3, generator=rng), torch.randint(4, (8,), generator=rng)
    d = [[1 - float(F.cosine_similarity(a, b, dim=0)) for b in h] for a in h]
    values = []
    for i in range(8):
        same = [d[i][j] for j in range(8) if j != i and y[j] == y[i]]
        other = [d[i][j] for j in range(8) if y[j] != y[i]]
        if same and other:
            values.append(max(0.0, 0.4 + max(same) - min(other)))
    assert float(batch_hard_triplet(h, y, 0.4)) == pytest.approx(
        sum(values) / len(values), abs=1e-5
    )


def test_no_valid_triplet_is_zero_with_a_gradient():
    for labels in ([0, 0, 0], [0, 1, 2], [0]):
        h = torch.randn(len(labels), 4, generator=generator(0), requires_grad=True)
        value = batch_hard_triplet(h, torch.tensor(labels))
        (gradient,) = torch.autograd.grad(value, h)
        assert float(value) == 0 and not bool(gradient.any())


def test_csd_terms_are_their_formulas_and_spare_what_they_should():
    first, second = stream(features("ab"), features("cd"))
    learner = make("csd", first.train)
    start = learner.losses(first_step(learner, first))
    assert float(start["distillation"]) == float(start["contrast"]) == 0
    learn(learner, first, FAST)
    step = first_step(learner, second)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1.3).add_(0.05)
    step = learner.make_step(step.images, step.labels)
    values = learner.losses(step)
    with torch.no_grad():
        before = learner.embed(step.images, learner.teacher["backbone"])
        old, new = learner.teacher["head"](before), learner.head(step.h)[:, :2]
        p, q = (old / 2).softmax(1), (new / 2).softmax(1)
        kl = float((p * (p / q).log()).sum() / len(p))
        rows = F.normalize(torch.cat([step.h, before]))
        names = step.labels.repeat(2)
    assert float(values["distillation"]) == pytest.approx(kl, abs=1e-5)
    slow = slow_contrast(rows[: len(p)], step.labels, rows, names, 0.07)
    assert float(values["contrast"]) == pytest.approx(slow, abs=1e-4)
    head = learner.head.column("weight")
    (gradient,) = torch.autograd.grad(values["classification"], head, retain_graph=True)
    assert not bool(gradient[:2].any()) and bool(gradient[2:].any())
    sum(values.values()).backward()
    assert all(p.grad is None for p in learner.teacher.parameters())


# OnPro ------------------------------------------------------------------------------------------


def test_equilibrium_golden_values():
    assert float(equilibrium(torch.eye(3)[:1], torch.eye(3)[:1])) == 0
    two = torch.eye(4, dtype=torch.float64)[:2]
    assert float(equilibrium(two, two)) == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_online_prototypes_are_means_of_unit_length():
    z = torch.randn(7, 3, generator=generator(0))
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 0])
    for k, row in enumerate(online_prototypes(z, labels)):
        mean = z[labels == k].mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


@given(st.integers(2, 6), st.integers(0, 99))
def test_pair_law_sums_to_one_and_ranks_by_closeness(size, seed):
    prototypes = torch.randn(size, 3, generator=generator(seed), dtype=torch.float64)
    law = pair_law(prototypes)
    assert float(law.sum()) == pytest.approx(1) and torch.equal(law, law.T)
    assert not bool(law.diagonal().any())
    upper = torch.triu_indices(size, size, 1)
    distance = (prototypes[upper[0]] - prototypes[upper[1]]).norm(dim=1)
    order = law[upper[0], upper[1]][distance.argsort()]
    assert bool((order.diff() <= 1e-12).all())


def test_pair_law_of_coinciding_or_single_prototypes_is_finite():
    law = pair_law(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert law[0, 1] == 0.5 and bool(law.isfinite().all())
    assert pair_law(torch.ones(1, 2)).tolist() == [[0.0]]


def test_mixing_plan_draws_by_the_law():
    labels = torch.tensor([4, 4, 4, 7, 9, 9])
    law = torch.tensor([[0.0, 0.4, 0.1], [0.4, 0.0, 0.0], [0.1, 0.0, 0.0]])
    settings = {"mixup": 0.0, "base_rate": 0.0, "mixing": 0.4}
    seen = torch.zeros(10, 10)
    shares = []
    for seed in range(400):
        first, second, share = mixing_plan(labels, law, **settings, rng=generator(seed))
        seen.index_put_((labels[first], labels[second]), torch.ones(6), accumulate=True)
        shares.append(share)
    drawn = seen[[4, 7, 9]][:, [4, 7, 9]] / seen.sum()
    torch.testing.assert_close(drawn, law, atol=0.03, rtol=0)
    share = torch.cat(shares).double()
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / 7.2, abs=0.01)


def test_mixing_plan_keeps_what_is_not_to_be_mixed():
    labels, settings = torch.tensor([3, 3, 3, 3]), {"mixup": 0.0, "base_rate": 0.5, "mixing": 0.4}
    first, _, share = mixing_plan(labels, torch.zeros(1, 1), **settings, rng=generator(0))
    assert first.tolist() == [0, 1, 2, 3] and share.tolist() == [1.0] * 4
    rows = torch.arange(8.0).view(4, 2)
    assert torch.equal(blend(rows, first, first.flip(0), share), rows)


@given(st.permutations(range(5)))
def test_the_plan_does_not_depend_on_the_order_of_classes(order):
    order = torch.tensor(order)
    labels = torch.randint(5, (12,), generator=generator(1))
    prototypes = torch.randn(5, 3, generator=generator(2), dtype=torch.float64)
    settings = {"mixup": 0.6, "base_rate": 0.5, "mixing": 0.4}

    def plan(names, rows):
        present = torch.unique(names)
        return mixing_plan(names, pair_law(rows[present]), **settings, rng=generator(3))

    renamed = torch.empty_like(prototypes)
    renamed[order] = prototypes
    for ours, theirs in zip(plan(labels, prototypes), plan(order[labels], renamed), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("images", [features("ab"), pictures("ab")], ids=["features", "pictures"])
def test_onpro_instance_contrast_is_the_slow_loop(images):
    (first,) = stream(images)
    learner = make("onpro", images, projection=3, feature_noise=0.0)
    step = first_step(learner, first)
    turns = 4 if images.images.dim() == 4 else 1
    copies = learner.copies(step.images, "present")
    assert len(copies) == 2 * turns * len(step.labels)
    h = learner.embed(copies)
    z, g = F.normalize(learner.projector(h)), F.normalize(h)
    start = int(torch.randint(8 - 3 + 1, (1,), generator=learner.rng("slice")))
    scores = (z @ (z + g[:, start : start + 3]).T / 0.07).double()
    names = [(int(y), turn) for _ in range(2) for turn in range(turns) for y in step.labels]
    values = []
    for i in range(len(names)):
        others = [j for j in range(len(names)) if j != i]
        total = torch.logsumexp(scores[i, others], 0)
        mine = [float(scores[i, j] - total) for j in others if names[j] == names[i]]
        values.append(-sum(mine) / len(mine))
    ours = learner.losses(step)["instance"]
    assert float(ours) == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_onpro_turns_pictures():
    images = pictures("ab")
    learner = make("onpro", images)
    learner.begin_experience(stream(images)[0])
    copies = learner.copies(images.images, "present").view(2, 4, *images.images.shape)
    for turn in range(4):
        expected = np.rot90(images.images.numpy(), turn, axes=(2, 3))
        assert (copies[0, turn].numpy() == expected).all()
    assert torch.equal(copies[0], copies[1])
    changed = make("onpro", images, augmentation={"rotation": 20.0})
    changed.begin_experience(stream(images)[0])
    views = changed.copies(images.images, "present").view(2, 4, *images.images.shape)
    assert torch.equal(views[0], copies[0].float()) and not torch.equal(views[0], views[1])


def test_onpro_learns_old_classes_from_the_buffer_alone():
    first, second = stream(features("ab", 20), features("cd", 20))
    learner = make("onpro", first.train, memory_size=30, epochs=1)
    learn(learner, first, FAST)
    assert len(learner.buffer) == 30 and set(learner.buffer.content().classes) == {"a", "b"}
    step = first_step(learner, second)
    images, labels = learner.draw()
    assert len(images) == 28  # seven for each of four classes
    (gradient,) = torch.autograd.grad(
        learner.losses(step)["classification"], learner.head.column("weight")
    )
    # Only old images were there to learn from, and the new rows are still told that they are wrong.
    assert bool(gradient.any(1).all()) and bool((labels < 2).all())
    learn(learner, second, FAST)
    assert len(learner.buffer) == 30 == learner.images_kept
    assert set(learner.buffer.labels.tolist()) == {0, 1, 2, 3}


def test_onpro_offers_each_image_once():
    (first,) = stream(features("ab", 10))
    learner = make("onpro", first.train, memory_size=100, epochs=3, batch_size=7)
    learn(learner, first, FAST)
    assert len(learner.buffer) == 20
    ordered = learner.buffer.images.sort(0).values
    torch.testing.assert_close(ordered, first.train.images.sort(0).values)


def test_onpro_without_memory_never_touches_a_buffer(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a buffer was used")

    monkeypatch.setattr("clfed.learners.onpro.ImageBuffer", refuse)
    first, second = stream(features("ab"), features("cd"))
    learner = make("onpro0", first.train)
    learn(learner, first, FAST)
    step = first_step(learner, second)
    assert learner.buffer is None and learner.draw() is None
    (gradient,) = torch.autograd.grad(
        learner.losses(step)["classification"], learner.head.column("weight")
    )
    assert not bool(gradient[:2].any()) and bool(gradient[2:].any())
    learn(learner, second, FAST)
    asked = torch.cat([first.train.images, second.train.images])
    h = learner.embed_all(second.train.images).double()
    means = torch.stack([h[second.train.labels == k].mean(0) for k in (0, 1)])
    torch.testing.assert_close(learner.memory.means()[2:], means, atol=1e-5, rtol=0)
    assert learner.scores_of(asked).shape == (24, 4) and learner.images_kept == 0


@pytest.mark.parametrize("kind", ["onpro", "onpro0", "palm"])
def test_streams_without_boundaries_are_learned(kind):
    data = features("abcd", 8)
    parts = [data.subset(torch.tensor([i, i + 3])) for i in range(0, 28, 4)]
    learner = make(kind, data, epochs=1)
    for experience in stream(*parts, announced=False):
        learn(learner, experience, FAST)
    assert bool(learner.scores_of(data.images).isfinite().all())
    assert not learner.teacher


@pytest.mark.parametrize("kind", ["prd", "csd"])
def test_methods_with_a_teacher_need_boundaries(kind):
    (experience,) = stream(features("ab"), announced=False)
    with pytest.raises(ConfigError, match="where an experience ends"):
        learn(make(kind, experience.train), experience, FAST)


# PALM -------------------------------------------------------------------------------------------


def slow_sinkhorn(scores, rounds=3):
    """The published loop: prototypes in rows, exponentials, masses one over their number."""
    q = np.exp(scores.numpy().astype(np.float64)).T
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdims=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn_golden_values_and_the_published_loop():
    z = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    found = sinkhorn(z @ EYE.T / 0.05)
    assert found.flatten().tolist() == pytest.approx(
        [0.999993, 0.000007, 0.016503, 0.983497], abs=1e-6
    )
    scores = torch.randn(9, 4, generator=generator(0), dtype=torch.float64) / 0.3
    for rounds in (1, 3, 50):
        np.testing.assert_allclose(sinkhorn(scores, rounds=rounds), slow_sinkhorn(scores, rounds))
    torch.testing.assert_close(sinkhorn(scores).sum(1), torch.ones(9).double())
    torch.testing.assert_close(
        sinkhorn(scores, rounds=500).sum(0), torch.full((4,), 9 / 4).double()
    )


def test_sinkhorn_in_blocks_balances_each_class_alone():
    scores = torch.randn(7, 6, generator=generator(1), dtype=torch.float64) / 0.2
    labels, classes = torch.tensor([0, 1, 0, 1, 1, 0, 1]), torch.arange(6) // 2
    found = sinkhorn(scores, labels[:, None] == classes)
    expected = torch.zeros(7, 6, dtype=torch.float64)
    for c in (0, 1):  # the third class is not in the batch
        block = np.ix_(labels.numpy() == c, classes.numpy() == c)
        expected[block] = torch.from_numpy(slow_sinkhorn(scores[block]))
    torch.testing.assert_close(found, expected)


def test_own_shares_keep_the_largest_of_the_own_class():
    q = torch.rand(6, 8, generator=generator(2))
    labels, classes = torch.tensor([0, 1, 1, 0, 1, 0]), torch.arange(8) // 4
    found = own_shares(q, labels[:, None] == classes, top=3)
    for i in range(6):
        mine = [j for j in range(8) if classes[j] == labels[i]]
        best = sorted(mine, key=lambda j: -float(q[i, j]))[:3]
        expected = torch.zeros(8)
        expected[best] = q[i, best] / q[i, best].sum()
        torch.testing.assert_close(found[i], expected)
    tied = own_shares(torch.full((1, 3), 0.2), torch.tensor([[True, True, True]]), top=2)
    torch.testing.assert_close(tied, torch.full((1, 3), 1 / 3))


@given(st.integers(0, 50), st.floats(0, 0.999))
def test_moved_prototypes_stay_on_the_sphere_and_rest_where_their_samples_are(seed, momentum):
    rng = generator(seed, "moved")
    p = F.normalize(torch.randn(4, 3, generator=rng, dtype=torch.float64))
    z = F.normalize(torch.randn(5, 3, generator=rng, dtype=torch.float64))
    shares = torch.rand(5, 4, generator=rng, dtype=torch.float64)
    shares[:, 2] = 0
    moved = moved_prototypes(p, z, shares, momentum)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(4).double())
    assert torch.equal(moved[2], p[2])
    step = momentum * p[0] + (1 - momentum) * (shares[:, 0] / shares[:, 0].sum()) @ z
    torch.testing.assert_close(moved[0], step / step.norm())
    torch.testing.assert_close(moved_prototypes(p, p, torch.eye(4).double(), momentum), p)


def test_likelihood_golden_value_and_stopped_gradient():
    p = EYE.clone().requires_grad_()
    z = EYE.clone().requires_grad_()
    value = mixture_likelihood(z, p, EYE, 0.1)
    assert float(value) == pytest.approx(math.log(1 + math.exp(-10)))
    assert float(value) == pytest.approx(4.54e-5, rel=1e-3)
    value.backward()
    assert p.grad is None and z.grad is not None


def test_palm_freezes_prototypes_of_old_classes():
    first, second = stream(features("ab"), features("cd"))
    learner = make("palm", first.train, components=2, epochs=5)
    start = None
    learner.begin_experience(first)
    start = learner.prototypes()
    learn(learner, first, FAST)
    old = learner.mixture.column("prototypes").clone()
    assert not torch.allclose(learner.prototypes(), start)
    learn(learner, second, FAST)
    torch.testing.assert_close(learner.mixture.column("prototypes")[:2], old, atol=1e-6, rtol=0)


def test_palm_predictors_are_the_slow_ones():
    (first,) = stream(features("abc"))
    for predictor in ("nearest", "mixture"):
        learner = make("palm", first.train, components=2, predictor=predictor)
        learn(learner, first, FAST)
        with torch.no_grad():
            h = learner.embed_all(first.train.images)
            cosines = F.normalize(learner.projector(h)) @ learner.prototypes().T
        slow = torch.stack([cosines[:, 2 * c : 2 * c + 2].amax(1) for c in range(3)], 1)
        if predictor == "mixture":
            blocks = [cosines[:, 2 * c : 2 * c + 2] / 0.1 for c in range(3)]
            slow = torch.stack([block.exp().sum(1).log() for block in blocks], 1)
        torch.testing.assert_close(learner.scores_of(first.train.images), slow)


def test_ood_scores_are_scikit_learns_distances():
    first, second = stream(features("ab", 40), features("cd", 40))
    learner = make("palm", first.train, shrinkage=0.0)
    with pytest.raises(NotEnoughData):
        learner.ood_scores(first.train.images)
    learn(learner, first, FAST)
    known = F.normalize(learner.embed_all(first.train.images)).double()
    asked = F.normalize(learner.embed_all(second.train.images)).double()
    basis = torch.linalg.svd(known - known.mean(0), full_matrices=False)
    keep = basis.Vh[1e-3 * basis.S[0] < basis.S].T
    theirs = EmpiricalCovariance().fit((known @ keep).numpy()).mahalanobis((asked @ keep).numpy())
    ours = learner.ood_scores(second.train.images)
    if keep.shape[1] == known.shape[1]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-2)
    assert ours.shape == (80,) and ours.dtype == torch.float64
    spread = novelty.distances(learner.memory, known, 0.5)
    covariance = np.cov(known.T.numpy(), bias=True)
    covariance += 0.5 * covariance.trace() / 8 * np.eye(8)
    away = (known - known.mean(0)).numpy()
    slow = [row @ np.linalg.solve(covariance, row) for row in away]
    np.testing.assert_allclose(spread, slow, rtol=1e-3)


def test_quantiles_are_numpys():
    rng = generator(0, "quantiles")
    values, labels = torch.rand(57, generator=rng).double(), torch.randint(4, (57,), generator=rng)
    labels[labels == 2] = 1
    found = novelty.class_quantiles(values, labels, 5)
    for c in (0, 1, 3):
        expected = np.quantile(values[labels == c].numpy(), np.linspace(0, 1, 101))
        np.testing.assert_allclose(found[c], expected)
        at = float(np.quantile(values[labels == c].numpy(), 0.95))
        assert float(novelty.thresholds(found, 0.95)[c]) == pytest.approx(at)
    assert bool(found[[2, 4]].isinf().all())
    assert bool(novelty.thresholds(found, 0.95)[[2, 4]].isinf().all())


def test_quantiles_of_classes_that_come_back_are_weighted():
    old, new = torch.ones(1, 101), torch.full((3, 101), 4.0)
    found = novelty.blended(old, new, torch.tensor([1, 0, 0]), torch.tensor([2, 5, 0]))
    assert found[:, 0].tolist() == pytest.approx([3.0, 4.0, math.inf])


def test_palm_tells_unknown_digits():
    data = load(as_features=True)
    known, others = [str(d) for d in range(5)], [str(d) for d in range(5, 10)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = PALM(MLP(64, 0, (64,)), Transform((), ()), dim=64, epochs=15, batch_size=64)
    learn(learner, stream(data.train.of_classes(known))[0], FAST)
    same = data.train.of_classes(known)
    # 95 % of what was learned passes by construction, if it is taken for its own class.
    assert float(learner.unknown(same.images).double().mean()) == pytest.approx(0.05, abs=0.02)
    inside, outside = (data.test.of_classes(names).images for names in (known, others))
    scores = torch.cat([learner.ood_scores(outside), learner.ood_scores(inside)])
    ranks = scores.argsort().argsort().double()[: len(outside)] + 1
    area = (ranks.sum() - len(outside) * (len(outside) + 1) / 2) / len(outside) / len(inside)
    assert area > 0.85
    assert learner.unknown(outside).double().mean() > learner.unknown(inside).double().mean() + 0.3


# All ---------------------------------------------------------------------------------------------

REACHES = {
    "prd": {"contrast": "backbone projector", "prototype": "head", "relation": "backbone head"},
    "csd": {
        "classification": "backbone head",
        "triplet": "backbone",
        "distillation": "backbone head",
        "contrast": "backbone",
    },
    "onpro": {
        "classification": "backbone head",
        "instance": "backbone projector",
        "prototype": "backbone projector",
    },
    "palm": {"likelihood": "backbone projector", "contrast": "backbone projector"},
}
REACHES["onpro0"] = REACHES["onpro"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_exactly_what_is_declared(kind):
    first, second = stream(features("ab"), features("cd"))
    learner = make(kind, first.train, epochs=1)
    learn(learner, first, FAST)
    step = first_step(learner, second)
    with torch.no_grad():
        rng = generator(9)
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    declared = {term.name: " ".join(term.reaches) for term in learner.terms}
    assert declared == REACHES[kind]
    for name, parts in declared.items():
        learner.zero_grad(set_to_none=True)
        learner.losses(learner.make_step(step.images, step.labels))[name].backward()
        touched = {
            n.split(".")[0]
            for n, p in learner.named_parameters()
            if p.grad is not None and bool(p.grad.any())
        }
        assert touched == set(parts.split()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "parts",
    [
        (features("ab", 1), features("c", 1)),
        (features("a", 3), features("ab", 4)),
        (pictures("ab", 2), pictures("bc", 2), pictures("a", 1)),
    ],
    ids=["one example", "one class", "classes come back"],
)
@pytest.mark.parametrize("size", [1, 4])
def test_small_and_odd_experiences(kind, parts, size):
    learner = make(kind, parts[0], batch_size=size)
    for experience in stream(*parts):
        learn(learner, experience, FAST)
    scores = learner.scores_of(parts[0].images)
    assert scores.shape == (len(parts[0]), len(learner.classes)) and bool(scores.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_learner_goes_on_to_the_same_bytes(kind):
    experiences = stream(features("ab"), features("cd"), features("ae"))
    whole, again = (make(kind, experiences[0].train) for _ in range(2))
    for experience in experiences[:2]:
        learn(whole, experience, FAST)
    state.restore(again, state.state_of(whole))
    for learner in (whole, again):
        learn(learner, experiences[2], FAST)
    assert state.sha256(whole) == state.sha256(again)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prd", {"relation": "both"}),
        ("prd", {"kappa": 0.0}),
        ("prd", {"prototype_lr": -1.0}),
        ("prd", {"beta": -1.0}),
        ("csd", {"margin": 0.0}),
        ("csd", {"contrast_temperature": -0.1}),
        ("onpro", {"memory_size": -1}),
        ("onpro", {"mixup": 1.5}),
        ("onpro", {"base_rate": -0.1}),
        ("onpro", {"mixing": 0.0}),
        ("onpro", {"loss": "bce"}),
        ("onpro", {"projection": 0}),
        ("palm", {"balance": "some"}),
        ("palm", {"predictor": "best"}),
        ("palm", {"moments": "none"}),
        ("palm", {"momentum": 1.0}),
        ("palm", {"known_rate": 1.0}),
        ("palm", {"components": 0}),
        ("palm", {"epsilon": 0.0}),
    ],
    ids=str,
)
def test_bad_settings_are_refused(kind, options):
    with pytest.raises(ConfigError):
        make(kind, features("ab"), **options)


def test_images_that_cannot_be_turned_are_refused_before_anything_changes():
    (first,) = stream(pictures("ab", shape=(8, 6)))
    learner = OnPro(Identity(), Transform((), ()), dim=48)
    with pytest.raises(ConfigError, match="8x6"):
        learn(learner, first, FAST)
    assert learner.classes == () and learner.number == -1


# Enough to notice that something broke; chance is 10 %, fine-tuning without protection reaches 19 %.
FLOORS = {"prd": 0.4, "csd": 0.22, "palm": 0.6, "onpro": 0.4, "onpro0": 0.6}


@pytest.mark.parametrize("kind", KINDS)
def test_digits_in_five_experiences_with_the_settings_of_the_file(kind):
    data = load()
    settings = OmegaConf.to_container(compose([f"learner={kind}"]).learner)
    del settings["_target_"]
    if not kind.startswith("onpro"):
        settings |= {"epochs": 10, "batch_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone, transform = MLP(1, 8, (100,)), Transform(data.mean, data.std)
        learner = KINDS[kind][0](backbone, transform, dim=100, **settings)
    parts = [data.train.of_classes([str(2 * t), str(2 * t + 1)]) for t in range(5)]
    for experience in stream(*parts):
        learn(learner, experience, FAST)
    found = learner.scores_of(data.test.images).argmax(1)
    assert float((found == data.test.labels).double().mean()) > FLOORS[kind]


def test_palm_places_prototypes_of_new_classes_in_a_frozen_network():
    first, second = stream(features("ab", 20), features("cd", 20))
    learner = make("palm", first.train, train="first", components=2)
    for experience in (first, second):
        learn(learner, experience, FAST)
    h = learner.embed_all(second.train.images)
    with torch.no_grad():
        z = F.normalize(learner.projector(h))
    for c, row in ((0, 2), (1, 3)):
        mine = z[second.train.labels == c]
        nearest = (mine @ F.normalize(learner.mixture.column("prototypes")[row]).T).amax(1)
        assert (
            float(nearest.mean()) > float((mine @ F.normalize(mine.mean(0), dim=0)).mean()) - 1e-3
        )
