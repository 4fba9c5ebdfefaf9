"""Masks, relabelling, ascent, influence and boundaries against hand computation and slow oracles."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clfed.backbones import MLP, Conv4
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, InvalidEmbedding
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience
from clfed.seeding import generator
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.base import named_weights
from clfed.unlearning.boundary_expand import BoundaryExpand
from clfed.unlearning.boundary_shrink import BoundaryShrink
from clfed.unlearning.finetune import Finetune
from clfed.unlearning.gradient_ascent import GradientAscent
from clfed.unlearning.influence import Influence, recursion, single_gradients, woodbury
from clfed.unlearning.l1_sparse import L1Sparse
from clfed.unlearning.masks import Saliency, SoftThreshold
from clfed.unlearning.neggrad_plus import NegGradPlus
from clfed.unlearning.random_label import RandomLabel

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat")
EACH = 24
CLASS = Request("r", "class", classes=("bee",))
SAMPLES = Request("r", "sample", samples=tuple(range(0, 3 * EACH, 6)))
# What moves weights that have no gradient: momentum comes with sgd, decay is switched on.
MOVING = {"lr": 0.05, "weight_decay": 0.1, "batch_size": 16, "epochs": 2}


def pictures(seed=0):
    """Three classes of 16x16 pictures, each bright in a corner of its own."""
    labels = torch.arange(3).repeat_interleave(EACH)
    images = 60 * torch.rand(3 * EACH, 1, 16, 16, generator=generator(seed, "pictures"))
    for label, (row, column) in enumerate([(0, 0), (0, 8), (8, 0)]):
        images[labels == label, :, row : row + 8, column : column + 8] += 120
    return ImageSet(images.to(torch.uint8), labels, CLASSES)


def points(seed=0):
    labels = torch.arange(3).repeat_interleave(EACH)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    noise = 0.6 * torch.randn(len(labels), 2, generator=generator(seed, "points"))
    return ImageSet(centres[labels] + noise, labels, CLASSES)


def trained(backbone, transform, dim, images, epochs):
    learner = Naive(
        backbone,
        transform,
        name="naive",
        seed=0,
        dim=dim,
        epochs=epochs,
        batch_size=12,
        lr=0.01,
        moments="none",
    )
    learn(learner, Experience(0, images, phase=0, upcoming=0), OPTIONS)
    return learner.eval()


@functools.cache
def original(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "pictures":
            network = Conv4(1, 16, (4, 4, 4, 8))
            return trained(network, Transform((0.4,), (0.25,)), 8, pictures(), 4)
        return trained(MLP(2, 0, (6, 4)), Transform((), ()), 4, points(), 20)


def around(kind="points", request=SAMPLES):
    images = pictures() if kind == "pictures" else points()
    ids = torch.arange(len(images))
    gone = ids[images.labels == 1] if request.kind == "class" else torch.tensor(request.samples)
    return make_context(request, original(kind), images, ids, gone=gone, seed=3)


def weights_of(learner):
    return {name: weight.detach() for name, weight in named_weights(learner).items()}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def run(method, context, **options):
    return forget(method(context.learner, seed=context.seed, **options), context, OPTIONS)[0]


def cross_entropy(logits, labels):
    """By hand, in numpy: mean of log sum exp less the right output."""
    logits = logits.detach().double().numpy()
    top = logits.max(1)
    norm = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return norm - logits[np.arange(len(labels)), labels.numpy()]


def open_logits(learner, images):
    with torch.no_grad():
        return learner.scores(learner.embed(images))


# Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RandomLabel, GradientAscent, NegGradPlus, BoundaryExpand])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_outside_the_mask_keep_their_bits_with_any_method(method, optimizer):
    context = around("pictures")
    mask = Saliency(0.3)
    mask.measure(RandomLabel(context.learner), context)
    model = run(method, context, mask={"density": 0.3}, optimizer=optimizer, **MOVING)
    before, after = weights_of(context.learner), weights_of(model)
    moved = 0
    for name, chosen in mask.masks.items():
        assert torch.equal(before[name][~chosen], after[name][~chosen])
        moved += int((before[name] != after[name]).sum())
    assert moved


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.73, 1.0])
def test_a_mask_has_its_density_and_the_largest_gradients(density):
    context = around("pictures", CLASS)
    unlearner = RandomLabel(context.learner)
    mask = Saliency(density)
    mask.measure(unlearner, context)
    chosen = torch.cat([part.flatten() for part in mask.masks.values()])
    assert abs(float(chosen.double().mean()) - density) <= 1 / len(chosen)
    learner = copy.deepcopy(context.learner)
    logits = learner.scores(learner.embed(context.forget.images))
    F.cross_entropy(logits, context.forget.labels, reduction="sum").backward()
    sizes = torch.cat([w.grad.abs().flatten() for w in named_weights(learner).values()])
    if 0 < density < 1:
        assert float(sizes[chosen].min()) >= float(sizes[~chosen].max()) - 1e-5
    if density == 0.5:  # the median of the paper
        assert (chosen == (sizes >= sizes.median())).double().mean() > 0.99


@pytest.mark.parametrize("kind", ["points", "pictures"])
@pytest.mark.parametrize("schedule", ["sequential", "concat"])
def test_a_mask_of_all_weights_is_the_method_itself(kind, schedule):
    context = around(kind)
    plain = run(RandomLabel, context, schedule=schedule, **MOVING)
    mask = {"density": 1.0, "freeze_norm": False}
    masked = run(RandomLabel, context, schedule=schedule, mask=mask, **MOVING)
    for name, value in plain.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, masked.state_dict()[name]), name


@pytest.mark.parametrize("method", [RandomLabel, GradientAscent, NegGradPlus, Influence])
def test_an_empty_mask_is_the_identity_with_batch_norm_frozen(method):
    context = around("pictures")
    options = {} if method is Influence else MOVING
    model = run(method, context, mask={"density": 0.0}, **options)
    for name, value in context.learner.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, model.state_dict()[name]), name


def test_running_statistics_may_follow_under_a_mask():
    context = around("pictures")
    mask = {"density": 0.0, "freeze_norm": False}
    model = run(RandomLabel, context, mask=mask, schedule="concat", **MOVING)
    assert same(weights_of(context.learner), weights_of(model))
    changed = [
        name
        for name, value in context.learner.state_dict().items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, model.state_dict()[name])
    ]
    assert changed
    assert all("running" in name or "num_batches" in name for name in changed)


def test_a_mask_needs_the_forget_set():
    with pytest.raises(ConfigError, match="forget set"):
        run(Finetune, around(), mask={"density": 0.5}, name="finetune")
    with pytest.raises(ConfigError, match="density"):
        Saliency(1.5)


def test_soft_threshold_by_hand():
    unlearner = RandomLabel(original("points"))
    soft = SoftThreshold(0.5)
    soft.measure(unlearner)
    weights = named_weights(unlearner.learner)
    sizes = torch.randperm(sum(w.numel() for w in weights.values())) + 1.0
    sizes[::2] *= -1
    parts = sizes.split([w.numel() for w in weights.values()])
    before = weights_of(copy.deepcopy(unlearner.learner))
    with torch.no_grad():
        for weight, part in zip(weights.values(), parts, strict=True):
            weight.add_(part.view_as(weight))
    changes = torch.cat([(w.detach() - before[n]).flatten() for n, w in weights.items()])
    soft.shrink(unlearner, 0.25)
    count = round(0.25 * len(sizes))
    threshold = float(len(sizes) - count)  # the sizes are 1 .. n
    expected = [math.copysign(max(abs(c) - threshold, 0), c) for c in changes.tolist()]
    left = torch.cat([(w.detach() - before[n]).flatten() for n, w in weights.items()])
    assert left.tolist() == pytest.approx(expected, abs=2e-5)
    assert int((left != 0).sum()) == count


def test_the_soft_form_ends_with_its_share_of_the_weights():
    context = around("pictures")
    model = run(RandomLabel, context, proximal=0.2, **MOVING)
    before, after = weights_of(context.learner), weights_of(model)
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    total = sum(weight.numel() for weight in before.values())
    assert 0.15 * total < moved <= 0.2 * total + 1
    everything = run(RandomLabel, context, proximal=1.0, **MOVING)
    assert same(weights_of(everything), weights_of(run(RandomLabel, context, **MOVING)))


# Random labels and fine-tuning ----------------------------------------------------------------


def test_drawn_labels_never_name_the_class_that_goes():
    context = around(request=CLASS)
    unlearner = RandomLabel(context.learner)
    unlearner.prepare(context)
    drawn = unlearner.drawn_labels(torch.ones(600, dtype=torch.int64))
    assert drawn.bincount(minlength=3)[1] == 0
    assert abs(int(drawn.bincount(minlength=3)[0]) - 300) < 60


def test_single_samples_get_any_label_anew_in_each_step():
    context = around()
    unlearner = RandomLabel(context.learner)
    unlearner.prepare(context)
    first = unlearner.drawn_labels(torch.ones(600, dtype=torch.int64))
    assert int(first.bincount(minlength=3).min()) > 140
    unlearner.step_number += 1
    assert not torch.equal(first, unlearner.drawn_labels(torch.ones(600, dtype=torch.int64)))


@torch.no_grad()
def test_finetune_is_the_cross_entropy_of_what_stays():
    context = around()
    unlearner = Finetune(context.learner)
    batch = context.retain.batch(torch.arange(5))
    expected = cross_entropy(open_logits(context.learner, batch.images), batch.labels).mean()
    assert float(unlearner.loss({"retain": batch})) == pytest.approx(expected, abs=1e-5)


# Gradient ascent and its relatives ------------------------------------------------------------


@torch.no_grad()
def test_ascent_has_the_sign_and_the_ceiling_it_claims():
    context = around()
    batch = context.forget.batch(torch.arange(len(context.forget)))
    losses = cross_entropy(open_logits(context.learner, batch.images), batch.labels)
    plain = GradientAscent(context.learner, ceiling=None)
    assert float(plain.loss({"forget": batch})) == pytest.approx(-losses.mean(), abs=1e-5)
    half = float(np.median(losses)) / math.log(3)  # half of the images are above
    bounded = GradientAscent(context.learner, ceiling=half)
    expected = -np.minimum(losses, half * math.log(3)).mean()
    assert float(bounded.loss({"forget": batch})) == pytest.approx(expected, abs=1e-5)


def test_ascent_raises_the_loss_of_the_forget_set():
    context = around()
    model = run(GradientAscent, context, lr=0.01, epochs=5)
    before, after = (
        cross_entropy(open_logits(m, context.forget.images), context.forget.labels).mean()
        for m in (context.learner, model)
    )
    assert after > before


def test_without_its_ceiling_ascent_runs_away():
    context = around()
    wild = {"lr": 0.2, "epochs": 60}
    bounded = weights_of(run(GradientAscent, context, **wild))
    assert max(float(weight.abs().max()) for weight in bounded.values()) < 100
    with pytest.raises(InvalidEmbedding, match="diverged"):
        run(GradientAscent, context, ceiling=None, **wild)


def test_ascent_stops_at_the_first_pass_that_forgot_enough():
    context = around(request=CLASS)
    options = {"lr": 0.05, "epochs": 200, "seed": 0}
    _, report = forget(GradientAscent(context.learner, until=0.0, **options), context, OPTIONS)
    assert report.stopped
    assert 0 < report.steps < 200
    options["epochs"] = report.steps - 1
    early = GradientAscent(context.learner, until=0.0, **options)
    model, report = forget(early, context, OPTIONS)
    assert not report.stopped
    assert (open_logits(model, context.forget.images).argmax(1) == 1).any()


@pytest.mark.parametrize("options", [{"ceiling": 0.0}, {"until": 1.5}])
def test_ascent_refuses_bad_options(options):
    with pytest.raises(ConfigError):
        GradientAscent(original("points"), **options)


@torch.no_grad()
@pytest.mark.parametrize("balance", [0.0, 0.3, 0.95, 1.0])
def test_neggrad_plus_weighs_both_sides(balance):
    context = around("pictures")
    unlearner = NegGradPlus(context.learner, balance=balance, ceiling=None)
    gone, kept = (pool.batch(torch.arange(8)) for pool in (context.forget, context.retain))
    losses = [
        cross_entropy(open_logits(context.learner, part.images), part.labels).mean()
        for part in (gone, kept)
    ]
    unlearner.learner.eval()
    found = float(unlearner.loss({"forget": gone, "retain": kept}))
    assert found == pytest.approx(balance * losses[1] - (1 - balance) * losses[0], abs=1e-5)
    with pytest.raises(ConfigError, match="balance"):
        NegGradPlus(context.learner, balance=1.1)


def test_neggrad_plus_takes_statistics_of_images_that_stay_alone():
    context = around("pictures", CLASS)
    gone, kept = (pool.batch(torch.arange(8)) for pool in (context.forget, context.retain))
    both, alone = NegGradPlus(context.learner), Finetune(context.learner)
    both.training_step({"forget": gone, "retain": kept}, 0)
    alone.training_step({"retain": kept}, 0)
    for name, value in alone.learner.backbone.named_buffers():
        assert torch.equal(value, both.learner.backbone.get_buffer(name)), name


@torch.no_grad()
def test_the_l1_penalty_falls_linearly_from_pass_to_pass():
    context = around()
    unlearner = L1Sparse(context.learner, alpha=0.5, epochs=4)
    assert [unlearner.strength(t) for t in range(5)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    batch = context.retain.batch(torch.arange(5))
    norm = sum(float(np.abs(w.numpy()).sum()) for w in weights_of(context.learner).values())
    plain = float(Finetune(context.learner).loss({"retain": batch}))
    assert float(unlearner.loss({"retain": batch})) == pytest.approx(plain + 0.5 * norm, rel=1e-5)
    with pytest.raises(ConfigError, match="alpha"):
        L1Sparse(context.learner, alpha=-1.0)


def test_the_l1_penalty_sees_the_number_of_the_pass_and_shrinks_weights():
    context = around()
    seen = []

    class Watched(L1Sparse):
        def strength(self, number):
            seen.append(number)
            return super().strength(number)

    options = {"epochs": 3, "batch_size": 32, "lr": 0.01}
    sparse = run(Watched, context, alpha=0.05, **options)
    assert seen == [0, 0, 1, 1, 2, 2]
    dense = run(Finetune, context, **options)
    norms = [sum(float(w.abs().sum()) for w in weights_of(m).values()) for m in (sparse, dense)]
    assert norms[0] < norms[1]


# Influence ------------------------------------------------------------------------------------


def vectors(count=7, size=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=size), rng.normal(size=(count, size))


def test_woodbury_solves_the_dense_system():
    v, g = vectors()
    dense = 0.7 * np.eye(5) + g.T @ g / len(g)
    found = woodbury(torch.tensor(v), torch.tensor(g), 0.7)
    assert found.tolist() == pytest.approx(np.linalg.solve(dense, v).tolist())


def test_woodbury_is_woodfisher_one_image_after_another():
    v, g = vectors()
    inverse = np.eye(5)
    for row in g:
        step = inverse @ row
        inverse -= np.outer(step, step) / (len(g) + row @ step)
    found = woodbury(torch.tensor(v), torch.tensor(g), 1.0)
    assert found.tolist() == pytest.approx((inverse @ v).tolist())


def test_the_recursion_is_the_published_one_and_stays_on_one_line():
    v, g = vectors()
    k, o = v.copy(), g[0].copy()
    for row in g[1:]:
        k, o = (
            k - (k @ row) / (len(g) + o @ row) * o,
            o - (o @ row) / (len(g) + o @ row) * o,
        )
    chunks = iter(torch.tensor(g).split(3))
    found = recursion(torch.tensor(v), chunks, len(g)).numpy()
    assert found.tolist() == pytest.approx(k.tolist())
    ratio = (found - v) / g[0]
    assert ratio == pytest.approx(np.full(5, ratio[0]))


@pytest.mark.parametrize("kind", ["points", "pictures"])
def test_single_gradients_agree_with_a_slow_loop(kind):
    context = around(kind)
    part = context.retain.part(torch.arange(0, 60, 5))
    found = torch.cat([*single_gradients(context.learner, part)])
    learner = copy.deepcopy(context.learner).eval().requires_grad_(True)
    for row, image, label in zip(found, part.images, part.labels, strict=True):
        learner.zero_grad()
        F.cross_entropy(learner.scores(learner.embed(image[None])), label[None]).backward()
        slow = torch.cat([w.grad.flatten() for w in named_weights(learner).values()])
        torch.testing.assert_close(row, slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("inverse", ["recursion", "woodbury"])
def test_influence_takes_the_step_of_the_formula(inverse):
    context = around(request=CLASS)
    options = {"alpha": 3.0, "samples": 10**6, "inverse": inverse, "seed": 5}
    model = forget(Influence(context.learner, **options), context, OPTIONS)[0]
    order = torch.randperm(len(context.retain), generator=generator(5, "unlearner", "influence"))
    gone, kept = (
        torch.cat([*single_gradients(context.learner, pool)]).double().numpy()
        for pool in (context.forget, context.retain.part(order))
    )
    n = len(gone) + len(kept)
    v = gone.sum(0) / n - len(gone) / (n * len(kept)) * kept.sum(0)
    if inverse == "woodbury":
        step = np.linalg.solve(np.eye(len(v)) + kept.T @ kept / len(kept), v)
    else:
        step, o = v.copy(), kept[0].copy()
        for g in kept[1:]:
            along = o @ g
            step -= (step @ g) / (len(kept) + along) * o
            o -= along / (len(kept) + along) * o
    before, after = weights_of(context.learner), weights_of(model)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert moved.tolist() == pytest.approx((3 * step).tolist(), abs=2e-5)


@pytest.mark.parametrize("inverse", ["recursion", "woodbury"])
def test_influence_of_length_zero_is_the_identity_and_a_long_one_forgets(inverse):
    context = around(request=CLASS)
    still = run(Influence, context, alpha=0.0, inverse=inverse)
    assert same(weights_of(context.learner), weights_of(still))
    right = [
        float((open_logits(m, context.forget.images).argmax(1) == 1).double().mean())
        for m in (context.learner, run(Influence, context, alpha=200.0, inverse=inverse))
    ]
    assert right[1] < right[0]


def test_influence_keeps_to_its_mask():
    context = around("pictures", CLASS)
    mask = Saliency(0.25)
    mask.measure(Influence(context.learner), context)
    free = weights_of(run(Influence, context, alpha=5.0))
    masked = weights_of(run(Influence, context, alpha=5.0, mask={"density": 0.25}))
    for name, weight in weights_of(context.learner).items():
        assert torch.equal(masked[name], torch.where(mask.masks[name], free[name], weight))


@pytest.mark.parametrize(
    "options", [{"alpha": -1.0}, {"samples": 0}, {"inverse": "exact"}, {"damping": 0.0}]
)
def test_influence_refuses_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Influence(original("points"), **options)


# Boundaries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["points", "pictures"])
@pytest.mark.parametrize("request_", [CLASS, SAMPLES], ids=["class", "samples"])
@pytest.mark.parametrize("wrong_only", [True, False])
def test_labels_across_the_boundary_agree_with_a_slow_loop(kind, request_, wrong_only):
    context = around(kind, request_)
    unlearner = BoundaryShrink(context.learner, epsilon=0.2, wrong_only=wrong_only)
    found = unlearner.pools(context)["forget"]
    assert torch.equal(found.ids, context.forget.ids)
    learner = copy.deepcopy(context.learner).eval()
    expected = []
    for image, label in zip(context.forget.images, context.forget.labels, strict=True):
        scale = 255.0 if kind == "pictures" else 1.0
        x = (image[None].float() / scale).requires_grad_(True)
        loss = F.cross_entropy(learner.scores(learner.embed(scale * x)), label[None])
        loss.backward()
        off = x.detach() + 0.2 * x.grad.sign()
        off = off.clamp(0, 1) if kind == "pictures" else off
        scores = open_logits(learner, scale * off)[0].tolist()
        banned = {int(label)} if wrong_only else set()
        banned |= {1} if request_ is CLASS else set()
        expected.append(max(set(range(3)) - banned, key=scores.__getitem__))
    assert found.labels.tolist() == expected


def test_the_code_of_the_paper_may_keep_a_label_and_the_paper_does_not():
    context = around()
    wrong = BoundaryShrink(context.learner, epsilon=0.0).pools(context)["forget"].labels
    assert bool((wrong != context.forget.labels).all())
    kept = BoundaryShrink(context.learner, epsilon=0.0, wrong_only=False).pools(context)["forget"]
    answers = open_logits(context.learner, context.forget.images).argmax(1)
    assert torch.equal(kept.labels, answers)
    with pytest.raises(ConfigError, match="epsilon"):
        BoundaryShrink(context.learner, epsilon=-0.1)


def test_boundary_shrink_moves_images_to_their_new_labels():
    context = around(request=CLASS)
    model = run(BoundaryShrink, context, lr=0.05, epochs=40)
    labels = BoundaryShrink(context.learner).pools(context)["forget"].labels
    answers = open_logits(model, context.forget.images).argmax(1)
    assert (answers == labels).double().mean() > 0.8


def test_boundary_expand_trains_one_more_output_and_drops_it():
    context = around("pictures", CLASS)
    unlearner = BoundaryExpand(context.learner, lr=0.02, epochs=10)
    model, _ = forget(unlearner, context, OPTIONS)
    assert weights_of(model).keys() == weights_of(context.learner).keys()
    for name, weight in weights_of(context.learner).items():
        assert weights_of(model)[name].shape == weight.shape
    assert open_logits(model, context.forget.images).shape[1] == 3
    assert model.classes == context.learner.classes
    assert float(unlearner.shadow.column("weight").detach().abs().max()) > 0


@torch.no_grad()
def test_boundary_expand_is_cross_entropy_with_a_class_beyond_the_last():
    context = around()
    unlearner = BoundaryExpand(context.learner)
    unlearner.prepare(context)
    with torch.no_grad():
        unlearner.shadow.column("bias").fill_(0.5)
    batch = context.forget.batch(torch.arange(6))
    logits = open_logits(context.learner, batch.images)
    wide = torch.cat([logits, torch.full((6, 1), 0.5)], 1)
    expected = cross_entropy(wide, torch.full((6,), 3)).mean()
    assert float(unlearner.loss({"forget": batch})) == pytest.approx(expected, abs=1e-5)


def test_forget_only_methods_leave_running_statistics_alone():
    context = around("pictures", CLASS)
    for method in (GradientAscent, BoundaryShrink, BoundaryExpand):
        model = run(method, context, lr=0.01, epochs=2)
        for name, value in context.learner.backbone.named_buffers():
            assert torch.equal(value, model.backbone.get_buffer(name)), name
        assert not same(weights_of(context.learner), weights_of(model))
