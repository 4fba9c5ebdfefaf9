"""Low-rank adapters on any layer, and forgetting with them, against hand computations."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clfed.backbones import MLP
from clfed.backbones.conv4 import Conv4
from clfed.backbones.encoder import Transform
from clfed.backbones.zoo import ResNet18
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.evaluation.forgetting import h_mean
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience
from clfed.seeding import generator
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.gs_lora import GroupSparseLora
from clfed.unlearning.gs_lora_pp import GroupSparseLoraPlus
from clfed.unlearning.lora import LowRank, attach, blocks, fold
from clfed.unlearning.pools import Batch

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat", "dog")
FAST = {"epochs": 12, "batch_size": 20, "lr": 0.05, "optimizer": "adam", "name": "gs_lora"}


def points(seed=0, per_class=40):
    labels = torch.arange(4).repeat_interleave(per_class)
    centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    noise = 0.5 * torch.randn(len(labels), 2, generator=generator(seed, "points"))
    return ImageSet(centres[labels] + noise, labels, CLASSES)


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = MLP(2, 0, (16, 8))
    learner = Naive(backbone, Transform((), ()), dim=8, epochs=12, batch_size=16, lr=0.01)
    learn(learner, Experience(0, points(), phase=0, upcoming=0), OPTIONS)
    return learner.eval()


def context(learner, request=None, gone=None, there=None):
    images, ids = points(), torch.arange(160)
    request = request or Request("r", "class", classes=("bee",))
    gone = ids[points().labels == 1] if gone is None else gone
    if there is not None:
        images, ids = images.subset(there), ids[there]
    return make_context(request, learner, images, ids, gone=gone, validation=points(9), seed=1)


def answers(learner):
    return learner.scores_of(points().images, closed=False)


def accuracy(learner, row):
    return float((answers(learner).argmax(1) == row)[points().labels == row].double().mean())


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 5, 3, padding=1, stride=2), (2, 4, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapter_starts_at_nothing_and_folds_to_the_bit(kind):
    make, shape = LAYERS[kind]
    layer, inputs = make(), torch.randn(shape)
    names, before = set(layer.state_dict()), layer(inputs)
    network = nn.Sequential(layer)
    (adapter,) = attach(network, 2, generator(0)).values()
    assert torch.equal(network(inputs), before)
    with torch.no_grad():
        adapter.b.normal_()
    changed = network(inputs)
    assert not torch.allclose(changed, before)
    fold(network)
    assert torch.equal(network(inputs), changed)
    assert set(layer.state_dict()) == names
    assert torch.equal(copy.deepcopy(network)(inputs), changed)


def test_an_adapter_of_a_convolution_is_two_convolutions_beside_it():
    layer, inputs = nn.Conv2d(4, 5, 3, padding=1), torch.randn(2, 4, 8, 8)
    before = layer(inputs)
    (adapter,) = attach(nn.Sequential(layer), 2, generator(0), scale=0.5).values()
    with torch.no_grad():
        adapter.b.normal_()
        narrow = F.conv2d(inputs, adapter.a.view(2, 4, 3, 3), padding=1)
        beside = F.conv2d(narrow, adapter.b.view(5, 2, 1, 1))
    torch.testing.assert_close(layer(inputs), before + 0.5 * beside, rtol=1e-4, atol=1e-5)


def test_a_rank_never_exceeds_that_of_the_weight():
    adapter = LowRank(torch.zeros(3, 5), 8, rng=generator(0))
    assert (adapter.a.shape, adapter.b.shape) == ((3, 5), (3, 3))


def test_blocks_of_known_networks():
    from torchvision.models import VisionTransformer

    assert blocks(MLP(2, 0, (4, 3))) == [["layers.1"], ["layers.3"]]
    assert [len(group) for group in blocks(Conv4(1, 16, (2, 2, 2, 2)))] == [1, 1, 1, 1]
    groups = blocks(ResNet18(3))
    assert [len(group) for group in groups] == [1, 2, 2, 3, 2, 3, 2, 3, 2]
    assert groups[3][0].startswith("network.layer2.0.")
    vision = VisionTransformer(32, 16, 3, 2, 8, 8, num_classes=2)
    assert [len(group) for group in blocks(vision)] == [1, 3, 3, 3, 1]


def prepared(learner, kind=GroupSparseLora, **options):
    around = context(learner)
    made = kind(learner, seed=1, **{**FAST, **options})
    made.bind(around)
    made.prepare(around)
    return made, around


def batch(around):
    parts = {}
    for name, pool in (("forget", around.forget), ("retain", around.retain)):
        parts[name] = Batch(pool.images, pool.labels, pool.ids)
    return parts


def cross_entropy(scores, labels):
    scores = scores.detach().double().numpy()
    mine = scores[np.arange(len(labels)), labels.numpy()]
    return float((np.log(np.exp(scores).sum(1)) - mine).mean())


def test_the_loss_is_the_papers(trained):
    made, around = prepared(trained, beta=0.3)
    assert made.bound == pytest.approx(2 * math.log(4))
    wrong = cross_entropy(answers(trained)[points().labels == 1], around.forget.labels)
    right = cross_entropy(answers(trained)[points().labels != 1], around.retain.labels)
    expected = 0.3 * max(made.bound - wrong, 0) + right
    assert made.loss(batch(around)).item() == pytest.approx(expected, rel=1e-4)


def test_nothing_pulls_once_the_bound_is_reached(trained):
    made, around = prepared(trained, bound=0.0, beta=5.0)
    parts = batch(around)
    found = torch.autograd.grad(made.loss(parts), made.groups[0][0].b)[0]
    retain = F.cross_entropy(made.logits(parts["retain"].images), parts["retain"].labels)
    assert torch.equal(found, torch.autograd.grad(retain, made.groups[0][0].b)[0])


def test_only_adapters_learn(trained):
    made, _ = prepared(trained)
    learn_these = [name for name, p in made.named_parameters() if p.requires_grad]
    assert len(learn_these) == 4
    assert all(name.endswith((".a", ".b")) for name in learn_these)


def test_the_proximal_map_shortens_groups_by_hand(trained):
    made, _ = prepared(trained)
    group = [LowRank(torch.zeros(1, 1), 1, rng=generator(0)) for _ in range(2)]
    for adapter, value in zip(group, (3.0, 4.0), strict=True):
        adapter.load_state_dict({"a": torch.tensor([[value]]), "b": torch.tensor([[0.0]])})
    made.groups = [group]
    made.shrink(1.0)  # of length 5 stays 4
    assert [adapter.a.item() for adapter in group] == pytest.approx([2.4, 3.2])
    made.shrink(0.0)
    assert [adapter.a.item() for adapter in group] == pytest.approx([2.4, 3.2])
    made.shrink(4.5)
    made.shrink(0.0)
    assert [adapter.a.item() for adapter in group] == [0.0, 0.0]


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("kind", [GroupSparseLora, GroupSparseLoraPlus])
def test_a_large_lasso_leaves_the_model_as_it_was(trained, kind, ema):
    made = kind(trained, seed=1, alpha=1e6, ema=ema, **FAST)
    model, report = forget(made, context(trained), OPTIONS)
    assert report.lineage["groups changed"] == 0 and report.steps > 0
    assert torch.equal(answers(model), answers(trained))


def test_without_the_lasso_all_groups_change_and_the_head_does_not(trained):
    model, report = forget(
        GroupSparseLora(trained, seed=1, alpha=0.0, **FAST), context(trained), OPTIONS
    )
    assert report.lineage["groups changed"] == report.lineage["groups"] == 2
    assert torch.equal(model.head.column("weight"), trained.head.column("weight"))
    assert set(model.state_dict()) == set(trained.state_dict())
    assert all(weight.requires_grad for weight in model.backbone.parameters())


@pytest.mark.parametrize("kind", [GroupSparseLora, GroupSparseLoraPlus])
def test_classes_go_one_after_another(trained, kind):
    model, there = trained, torch.ones(160, dtype=torch.bool)
    for row, name in ((1, "bee"), (3, "dog")):
        gone = torch.arange(160)[points().labels == row]
        request = Request(name, "class", classes=(name,))
        around = context(model, request, gone, there)
        model, _ = forget(kind(model, seed=1, **FAST), around, OPTIONS)
        there = there & (points().labels != row)
    assert model.retired == ("bee", "dog")
    assert max(accuracy(model, 1), accuracy(model, 3)) <= 0.1
    assert min(accuracy(model, 0), accuracy(model, 2)) >= 0.9


def test_the_average_is_taken_at_the_end(trained):
    made, around = prepared(trained, ema=0.75)
    adapter = made.groups[0][0]
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            adapter.b.fill_(value)
        made.average()
    weight = trained.backbone.get_submodule(blocks(trained.backbone)[0][0]).weight
    product = adapter.a.detach().sum(0)  # b is constant
    made.finalize(around)
    changed = made.learner.backbone.get_submodule(blocks(trained.backbone)[0][0]).weight
    mean = 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    torch.testing.assert_close(changed, weight + mean * product, rtol=1e-4, atol=1e-5)


def test_samples_are_forgotten_as_far_as_held_out_images(trained):
    gone = torch.arange(0, 160, 10)
    around = context(trained, Request("r", "sample", samples=tuple(gone.tolist())), gone)
    made = GroupSparseLora(trained, seed=1, **FAST)
    made.bind(around)
    made.prepare(around)
    scores = trained.scores_of(points(9).images)
    assert made.bound == pytest.approx(cross_entropy(scores, points(9).labels), rel=1e-4)
    assert made.held_out == float((scores.argmax(1) == points(9).labels).double().mean())
    made.held_out = 1.0
    assert made.should_stop(around)
    made.held_out = 0.0
    assert not made.should_stop(around)
    assert not prepared(trained)[0].should_stop(context(trained))  # classes go on to the end


def test_samples_need_held_out_images(trained):
    around = context(trained, Request("r", "sample", samples=(0,)), torch.tensor([0]))
    around.validation = around.validation.part(torch.empty(0, dtype=torch.int64))
    with pytest.raises(ConfigError, match="held-out"):
        forget(GroupSparseLora(trained, **FAST), around, OPTIONS)


def test_prototypes_and_divergences_agree_with_slow_loops(trained):
    made, _ = prepared(trained, GroupSparseLoraPlus)
    embeddings = trained.embed_all(points().images)
    for row in range(4):
        mine = [e for e, y in zip(embeddings, points().labels.tolist(), strict=True) if y == row]
        torch.testing.assert_close(made.prototypes[row], torch.stack(mine).mean(0))
    found = made.divergence(embeddings, points().labels)
    total = 0.0
    for embedding, label in zip(embeddings.numpy(), points().labels.tolist(), strict=True):
        p, q = (np.exp(v) / np.exp(v).sum() for v in (made.prototypes[label].numpy(), embedding))
        total += float((p * np.log(p / q)).sum())
    assert float(found) == pytest.approx(total / 160, rel=1e-3)


def test_the_prototype_terms_have_their_weights_and_their_cap(trained):
    plain, around = prepared(trained)
    base = plain.loss(batch(around)).item()
    pulls = {"forget_pull": 0.5, "retain_pull": 2.0}
    made, _ = prepared(trained, GroupSparseLoraPlus, prototype_bound=3.0, **pulls)
    embeddings, labels = trained.embed_all(points().images), points().labels
    here = float(made.divergence(embeddings[labels == 1], labels[labels == 1]))
    there = float(made.divergence(embeddings[labels != 1], labels[labels != 1]))
    expected = base + 0.5 * (3.0 - here) + 2.0 * there
    assert made.loss(batch(around)).item() == pytest.approx(expected, rel=1e-4)
    made.prototype_bound = here / 2
    assert made.loss(batch(around)).item() == pytest.approx(base + 2.0 * there, rel=1e-4)


def test_without_pulls_it_is_the_method_without_prototypes(trained):
    plain, _ = forget(GroupSparseLora(trained, seed=1, **FAST), context(trained), OPTIONS)
    made = GroupSparseLoraPlus(trained, seed=1, forget_pull=0.0, **FAST)
    assert state.sha256(forget(made, context(trained), OPTIONS)[0]) == state.sha256(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"beta": -1.0},
        {"alpha": -1.0},
        {"bound": -1.0},
        {"warmup": 1.5},
        {"ema": 1.0},
        {"ema_start": -0.1},
        {"schedule": "sequential"},
        {"mask": {"density": 0.5}},
        {"proximal": 0.5},
        {"forget_pull": -1.0},
        {"prototype_bound": -1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(trained, options):
    with pytest.raises(ConfigError):
        GroupSparseLoraPlus(trained, **options)


def test_the_harmonic_mean_of_keeping_and_forgetting():
    assert h_mean(0.9, before=0.8, after=0.8) == 0
    assert h_mean(0.7, before=0.8, after=0.1) == pytest.approx(0.7)
    assert h_mean(0.0, before=1.0, after=0.0) == 0
    assert h_mean(0.9, before=0.5, after=0.6) == 0
    assert h_mean(0.6, before=1.0, after=0.7) == pytest.approx(2 / (1 / 0.6 + 1 / 0.3))
    with pytest.raises(ConfigError):
        h_mean(90.0, before=0.5, after=0.0)
