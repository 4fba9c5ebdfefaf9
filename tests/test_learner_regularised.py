"""Naive, joint, distillation and quadratic anchors: against slow loops, closed forms and each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional as F

from clfed.backbones import MLP, Conv4, Identity
from clfed.backbones.encoder import Transform
from clfed.config import compose
from clfed.data.benchmark import ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError
from clfed.learners import ewc, gradients, state
from clfed.learners.anchors import ANCHOR, IMPORTANCE, penalty, quadratic, weights_of
from clfed.learners.base import Step
from clfed.learners.ewc import ElasticWeightConsolidation, fisher_diagonal
from clfed.learners.featkd import FeatureDistillation, feature_distance
from clfed.learners.fitting import learn
from clfed.learners.joint import JointTraining
from clfed.learners.l2 import L2
from clfed.learners.lwf import LearningWithoutForgetting, soft_cross_entropy
from clfed.learners.mas import MemoryAwareSynapses
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.learners.predkd import PredictionDistillation, binary_distillation
from clfed.learners.si import SynapticIntelligence
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
PLAIN = Transform((), ())
GREY = Transform((0.5,), (0.25,))
DISTILLING = (LearningWithoutForgetting, PredictionDistillation, FeatureDistillation)
ANCHORED = (L2, ElasticWeightConsolidation, SynapticIntelligence, MemoryAwareSynapses)
ALL = (Naive, JointTraining, *DISTILLING, *ANCHORED)
EVERY_TERM = {"featkd": 0.5, "l2": 2.0, "ewc": 30.0}


def features(names: str, per_class: int = 6, *, seed: int = 0, dim: int = 5) -> ImageSet:
    """Each class, a letter, is one random point plus noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(names)).repeat_interleave(per_class)
    noise = 0.5 * torch.randn(len(labels), dim, generator=rng)
    centres = [torch.randn(dim, generator=torch.Generator().manual_seed(ord(n))) for n in names]
    return ImageSet((torch.stack(centres)[labels] + noise), labels, tuple(names))


def pictures(names: str, per_class: int = 3, size: int = 16) -> ImageSet:
    labels = torch.arange(len(names)).repeat_interleave(per_class)
    rng = torch.Generator().manual_seed(ord(names[0]))
    pixels = torch.randint(0, 256, (len(labels), 1, size, size), generator=rng)
    return ImageSet(pixels.to(torch.uint8), labels, tuple(names))


def stream(*parts: ImageSet) -> list[Experience]:
    seen: set[str] = set()
    every = {name for part in parts for name in part.classes}
    experiences = []
    for number, part in enumerate(parts):
        back = tuple(name for name in part.classes if name in seen)
        seen |= set(part.classes)
        experiences.append(
            Experience(number, part, number, revisited=back, upcoming=len(every - seen))
        )
    return experiences


THREE = stream(features("ab"), features("cd", seed=1), features("ef", seed=2))


def make(kind, backbone=None, transform=PLAIN, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        backbone = backbone() if backbone else MLP(5, 0, (7, 4))
    options = {"dim": 4, "lr": 0.02, "epochs": 3, "batch_size": 4, "seed": 5, **options}
    return kind(backbone, transform, **options)


def taught(kind, experiences=THREE, options=FAST, **settings):
    learner = make(kind, **settings)
    for experience in experiences:
        learn(learner, experience, options)
    return learner


def step_of(learner, data: ImageSet) -> Step:
    rows = learner.rows(data.classes)[data.labels]
    return Step(data.images, rows, learner.embed(data.images), 1)


def shaken(learner) -> None:
    """Move every weight a little."""
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))


# The head's loss: which outputs, which loss -----------------------------------------------------


def softmax_loss(outputs: np.ndarray, label: int) -> float:
    return -math.log(math.exp(outputs[label]) / sum(math.exp(o) for o in outputs))


def logistic_loss(outputs: np.ndarray, label: int) -> float:
    total = 0.0
    for k, o in enumerate(outputs):
        p = 1 / (1 + math.exp(-o))
        total -= math.log(p if k == label else 1 - p)
    return total


@pytest.mark.parametrize("loss", ["softmax", "bce", "cosine"])
@pytest.mark.parametrize("logits", ["current", "seen", "all"])
def test_head_policies_agree_with_slow_loops(logits, loss):
    experiences = stream(features("ab"), features("cbd", seed=1), features("ef"))
    learner = make(Naive, logits=logits, loss=loss)
    learn(learner, experiences[0], FAST)
    learner.begin_experience(experiences[1])
    shaken(learner)
    # Rows: a b c d, and two more where all outputs are trained; "b" came back.
    columns = {"current": [2, 1, 3], "seen": [0, 1, 2, 3], "all": [0, 1, 2, 3, 4, 5]}[logits]
    step = step_of(learner, experiences[1].train)
    h = step.h.detach().double().numpy()
    weight = learner.head.weight.detach().double().numpy()
    total = 0.0
    for row, label in zip(h, step.labels.tolist(), strict=True):
        outputs = []
        for k in columns:
            if loss == "cosine":
                cosine = row @ weight[k] / np.linalg.norm(row) / np.linalg.norm(weight[k])
                outputs.append(16.0 * cosine)
            else:
                outputs.append(row @ weight[k] + learner.head.bias[k].item())
        one = logistic_loss if loss == "bce" else softmax_loss
        total += one(np.array(outputs), columns.index(label))
    ours = learner.losses(step)["classification"].item()
    assert ours == pytest.approx(total / len(h), rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "bce", "cosine"])
@pytest.mark.parametrize("logits", ["current", "seen", "all"])
def test_head_policies_train_only_their_rows(logits, loss):
    learner = make(Naive, logits=logits, loss=loss)
    learn(learner, THREE[0], FAST)
    learner.begin_experience(THREE[1])
    shaken(learner)
    learner.losses(step_of(learner, THREE[1].train))["classification"].backward()
    moved = (learner.head.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist()
    assert moved == {"current": [2, 3], "seen": [0, 1, 2, 3], "all": list(range(6))}[logits]


def test_unannounced_current_outputs_are_those_of_the_batch():
    learner = make(Naive, logits="current")
    data = features("abcd")
    learner.begin_experience(Experience(0, data, 0, announced=False))
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours = float(learner.classification(logits, torch.tensor([3, 1, 3])))
    slow = log_loss([1, 0, 1], logits[:, [1, 3]].softmax(1).numpy(), labels=[0, 1])
    assert ours == pytest.approx(slow, rel=1e-6)


# Distillation -----------------------------------------------------------------------------------


def test_soft_cross_entropy_has_the_known_values():
    new, old = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    value = soft_cross_entropy(new, old, 2.0)
    entropy = soft_cross_entropy(old, old, 2.0)
    assert round(float(value), 6) == 0.693147
    assert round(float(value - entropy), 6) == 0.110944


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distillations_agree_with_slow_loops(temperature):
    rng = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 3, 4, generator=rng).unbind()
    soft = binary = 0.0
    for n, o in zip(new.tolist(), old.tolist(), strict=True):
        for k in range(4):
            p_old = math.exp(o[k] / temperature) / sum(math.exp(x / temperature) for x in o)
            p_new = math.exp(n[k] / temperature) / sum(math.exp(x / temperature) for x in n)
            soft -= p_old * math.log(p_new)
            q_old, q_new = 1 / (1 + math.exp(-o[k])), 1 / (1 + math.exp(-n[k]))
            binary -= q_old * math.log(q_new) + (1 - q_old) * math.log(1 - q_new)
    assert float(soft_cross_entropy(new, old, temperature)) == pytest.approx(soft / 3, rel=1e-5)
    assert float(binary_distillation(new, old)) == pytest.approx(binary / 3, rel=1e-5)


outputs = st.lists(st.floats(-20, 20), min_size=3, max_size=3)


@given(outputs, outputs, st.floats(0.25, 8))
def test_no_student_beats_the_teacher_itself(new, old, temperature):
    old = torch.tensor([old], dtype=torch.float64)
    for loss in (lambda a, b: soft_cross_entropy(a, b, temperature), binary_distillation):
        same = old.clone().requires_grad_()
        least = loss(same, old)
        least.backward()
        assert same.grad.abs().max() < 1e-12
        other = loss(torch.tensor([new], dtype=torch.float64), old)
        assert other >= least.detach() - 1e-12


def test_feature_distance_agrees_with_a_slow_loop():
    h, before = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    slow = sum(
        (a - b) ** 2 for x, y in zip(h, before, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert float(feature_distance(h, before)) == pytest.approx(float(slow) / 5, rel=1e-6)


@pytest.mark.parametrize("logits", ["current", "seen", "all"])
def test_learners_compare_themselves_with_the_network_of_the_last_experience(logits):
    """Every class that the teacher knows is compared, also one that came back."""
    experiences = stream(features("abc"), features("bd", seed=1), features("ef"))
    for kind in (LearningWithoutForgetting, PredictionDistillation, FeatureDistillation):
        learner = make(kind, logits=logits)
        learn(learner, experiences[0], FAST)
        learner.begin_experience(experiences[1])
        copy = MLP(5, 0, (7, 4))
        copy.load_state_dict(learner.backbone.state_dict())
        weight, bias = (
            learner.head.weight.detach()[:3].clone(),
            learner.head.bias.detach()[:3].clone(),
        )
        shaken(learner)
        step = step_of(learner, experiences[1].train)
        before = copy(step.images).detach()
        new, old = learner.head(step.h)[:, :3], F.linear(before, weight, bias)
        if kind is LearningWithoutForgetting:
            kl = F.kl_div((new / 2).log_softmax(1), (old / 2).softmax(1), reduction="batchmean")
            entropy = torch.distributions.Categorical(logits=old / 2).entropy().mean()
            expected, name = kl + entropy, "distillation"
        elif kind is PredictionDistillation:
            parts = F.binary_cross_entropy(new.sigmoid(), old.sigmoid(), reduction="none")
            expected, name = parts.sum(1).mean(), "distillation"
        else:
            expected, name = (step.h - before).norm(dim=1).square().mean(), "features"
        ours = learner.losses(step)[name].item()
        assert ours == pytest.approx(expected.item(), rel=1e-5)


def test_the_squared_temperature_is_a_factor_of_the_weight():
    plain = make(LearningWithoutForgetting, weight=3.0, distillation_temperature=2.0)
    squared = make(
        LearningWithoutForgetting,
        weight=3.0,
        distillation_temperature=2.0,
        squared_temperature=True,
    )
    assert [learner.terms[1].weight for learner in (plain, squared)] == [3.0, 12.0]


# The penalty ------------------------------------------------------------------------------------


def test_the_half_is_where_it_should_be():
    pairs = [(torch.tensor([0.1, 0.2]), torch.zeros(2), torch.tensor([2.0, 0.5]))]
    value = float(quadratic(pairs))
    halved, whole = (make(ElasticWeightConsolidation, weight=10, half=h) for h in (True, False))
    assert halved.terms[1].weight * value == pytest.approx(0.2)
    assert whole.terms[1].weight * value == pytest.approx(0.4)


@pytest.mark.parametrize("logits", ["current", "seen", "all"])
@pytest.mark.parametrize("kind", ANCHORED)
def test_the_penalty_is_zero_at_the_anchor_and_leaves_new_rows_free(kind, logits):
    learner = make(kind, logits=logits)
    learn(learner, THREE[0], FAST)
    learner.begin_experience(THREE[1])
    learner.zero_grad()
    value = penalty(learner)
    value.backward()
    assert value.item() == 0
    assert all(not p.grad.any() for p in learner.parameters() if p.grad is not None)
    shaken(learner)
    value = penalty(learner)
    value.backward()
    assert value.item() > 0
    gradient = learner.head.weight.grad
    assert gradient[:2].abs().sum() > 0 and not gradient[2:].any()


@pytest.mark.parametrize("kind", ANCHORED)
def test_the_penalty_agrees_with_a_loop_over_weights(kind):
    learner = taught(kind)
    shaken(learner)
    total = 0.0
    for name, weights in weights_of(learner).items():
        anchor = learner.kept[ANCHOR + name].flatten().tolist()
        importance = learner.kept.get(IMPORTANCE + name)
        factors = [1.0] * len(anchor) if importance is None else importance.flatten().tolist()
        for w, a, f in zip(weights.flatten().tolist(), anchor, factors, strict=True):
            total += f * (w - a) ** 2
    assert penalty(learner).item() == pytest.approx(total, rel=1e-5)


def test_l2_is_ewc_with_importance_one(monkeypatch):
    def ones(learner, experience, samples, group):
        return {name: torch.ones_like(value) for name, value in weights_of(learner).items()}

    monkeypatch.setattr(ewc, "fisher_diagonal", ones)
    plain = taught(L2, weight=3.0)
    elastic = taught(ElasticWeightConsolidation, weight=3.0, mode="online", decay=0.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), elastic.state_dict().values(), strict=True)
        if isinstance(a, torch.Tensor)
    )


def test_l2_may_hold_ready_weights_from_the_start():
    free, held = taught(L2, THREE[:1]), make(L2, weight=1e3, anchor_first=True, lr=1e-3)
    initial = {name: p.detach().clone() for name, p in held.backbone.named_parameters()}
    learn(held, THREE[0], FAST)
    distance = {
        learner: sum(
            float((p - initial[name]).detach().square().sum())
            for name, p in learner.backbone.named_parameters()
        )
        for learner in (free, held)
    }
    assert distance[held] < 0.01 * distance[free]
    assert held.head.weight.abs().max() > 1e-3  # rows of new classes are free
    assert set(held.kept) == {ANCHOR + name for name in weights_of(held)}


# Importances ------------------------------------------------------------------------------------


def gradients_one_by_one(learner, data: ImageSet, value, group: int = 1) -> dict[str, list]:
    """Gradients of the mean over each group of images, by plain backward passes."""
    learner.eval()
    rows = {name: len(weights) for name, weights in weights_of(learner).items()}
    parameters, found = [learner.get_parameter(name) for name in rows], {}
    for start in range(0, len(data) // group * group, group):
        part = slice(start, start + group)
        logits = learner.head(learner.backbone(learner.transform(data.images[part])))
        parts = torch.autograd.grad(value(logits, data.labels[part]), parameters)
        for name, gradient in zip(rows, parts, strict=True):
            found.setdefault(name, []).append(gradient[: rows[name]])
    return found


def agree(ours, slow, power) -> None:
    assert ours.keys() == slow.keys()
    for name, singles in slow.items():
        expected = power(torch.stack(singles)).mean(0)
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("loss", ["softmax", "bce", "cosine"])
@pytest.mark.parametrize("logits", ["current", "seen", "all"])
@pytest.mark.parametrize(("group", "chunk"), [(1, 1), (1, 500), (1, 10**6), (5, 1), (5, 500)])
def test_fisher_information_agrees_with_one_backward_pass_an_example(
    logits, loss, group, chunk, monkeypatch
):
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    learner = make(Naive, logits=logits, loss=loss)
    learn(learner, THREE[0], FAST)
    learn(learner, THREE[1], FAST)
    data = learner.training_data(THREE[1])
    slow = gradients_one_by_one(learner, data, learner.classification, group)
    agree(fisher_diagonal(learner, THREE[1], None, group), slow, torch.square)


def test_fisher_information_of_a_convolutional_network_with_batch_normalisation():
    data = pictures("ab")
    learner = make(
        ElasticWeightConsolidation,
        lambda: Conv4(1, 16, (3, 3, 3, 4)),
        GREY,
        epochs=2,
    )
    learn(learner, stream(data)[0], FAST)
    slow = gradients_one_by_one(
        learner, learner.training_data(stream(data)[0]), learner.classification
    )
    ours = {name: learner.kept[IMPORTANCE + name] for name in weights_of(learner)}
    agree(ours, slow, torch.square)


def test_fisher_information_of_a_linear_classifier_in_closed_form():
    r"""F(w_k) = mean (p_k - [y = k])^2 x^2."""
    learner = make(Naive, Identity, dim=5)
    learn(learner, THREE[0], FAST)
    x, y = THREE[0].train.images, F.one_hot(THREE[0].train.labels)
    errors = (learner.head(x).softmax(1) - y).square().detach()
    ours = fisher_diagonal(learner, THREE[0], None)
    torch.testing.assert_close(ours["head.weight"], errors.T @ x.square() / len(x))
    torch.testing.assert_close(ours["head.bias"], errors.mean(0))


def test_importance_of_outputs_agrees_with_one_backward_pass_an_example():
    learner = taught(MemoryAwareSynapses, THREE[:1], logits="all", samples=None)
    data = learner.training_data(THREE[0])
    slow = gradients_one_by_one(learner, data, lambda o, y: o[:, :2].square().sum())
    ours = {name: learner.kept[IMPORTANCE + name] for name in weights_of(learner)}
    agree(ours, slow, torch.abs)


@pytest.mark.parametrize(("alpha", "old", "new"), [(None, 1, 1), (0.5, 0.5, 0.5), (0.0, 0, 1)])
def test_importances_of_outputs_are_summed_or_mixed(alpha, old, new):
    learner = taught(MemoryAwareSynapses, THREE[:1], alpha=alpha)
    before = dict(learner.kept)
    learn(learner, THREE[1], FAST)
    fresh = make(MemoryAwareSynapses)
    state.restore(fresh, state.state_of(learner))
    fresh.begin_experience(THREE[1])
    fresh.kept = {}
    fresh.consolidate(THREE[1])
    for name, value in fresh.kept.items():
        if name.startswith(IMPORTANCE):
            expected = new * value
            expected[: len(before[name])] += old * before[name]
            torch.testing.assert_close(learner.kept[name], expected)


def test_samples_are_drawn_for_the_importance():
    some = taught(ElasticWeightConsolidation, THREE[:1], samples=5)
    again = taught(ElasticWeightConsolidation, THREE[:1], samples=5)
    every = taught(ElasticWeightConsolidation, THREE[:1], samples=None)
    name = IMPORTANCE + "head.weight"
    assert torch.equal(some.kept[name], again.kept[name])
    assert not torch.equal(some.kept[name], every.kept[name])


# EWC: one parabola for all experiences ----------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_one_parabola_has_the_gradient_of_all_of_them(mode, decay, monkeypatch):
    past = []

    def recorded(learner, *rest):
        fisher = fisher_diagonal(learner, *rest)
        past.append((fisher, {n: w.detach().clone() for n, w in weights_of(learner).items()}))
        return fisher

    monkeypatch.setattr(ewc, "fisher_diagonal", recorded)
    learner = taught(ElasticWeightConsolidation, weight=10.0, mode=mode, decay=decay, half=False)
    shaken(learner)
    weights = weights_of(learner)
    ours = torch.autograd.grad(penalty(learner), [learner.get_parameter(n) for n in weights])
    for gradient, (name, w) in zip(ours, weights.items(), strict=True):
        expected = torch.zeros_like(w)
        for age, (fisher, anchor) in enumerate(reversed(past)):
            rows = len(fisher[name])
            where = past[-1][1] if mode == "online" else anchor
            expected[:rows] += 2 * decay**age * fisher[name] * (w[:rows] - where[name][:rows])
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-3, atol=1e-6)


# SI: the path integral --------------------------------------------------------------------------


def test_synaptic_intelligence_agrees_with_a_plain_loop():
    """Two experiences of SGD written out, with the gradient of the cross-entropy alone."""
    damping, weight, rate = 0.05, 4.0, 0.1
    settings = {"optimizer": "sgd", "lr": rate, "batch_size": 100, "epochs": 4, "clip": 1e9}
    learner = make(SynapticIntelligence, weight=weight, damping=damping, **settings)
    network = nn.Sequential(MLP(5, 0, (7, 4)), nn.Linear(4, 4))
    network[0].load_state_dict(learner.backbone.state_dict())
    nn.init.zeros_(network[1].weight), nn.init.zeros_(network[1].bias)
    parameters = [*network.parameters()]
    omega = [torch.zeros_like(p) for p in parameters]
    anchor = [torch.zeros_like(p) for p in parameters]
    for number, experience in enumerate(THREE[:2]):
        learn(learner, experience, FAST)
        images, labels = experience.train.images, experience.train.labels + 2 * number
        momentum = [torch.zeros_like(p) for p in parameters]
        path = [torch.zeros_like(p) for p in parameters]
        first = [p.detach().clone() for p in parameters]
        for _ in range(4):
            logits = network(images)[:, : 2 * number + 2]
            task = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
            for p, g, o, a, m, w in zip(
                parameters, task, omega, anchor, momentum, path, strict=True
            ):
                with torch.no_grad():
                    before = p.clone()
                    whole = g + weight * o * (p - a)
                    m.mul_(0.9).add_(whole)
                    p.sub_(rate * (whole + 0.9 * m))
                    w.sub_(g * (p - before))
        for p, o, w, s in zip(parameters, omega, path, first, strict=True):
            o.add_(w.clamp(min=0) / ((p.detach() - s) ** 2 + damping))
        anchor = [p.detach().clone() for p in parameters]
        names = [*weights_of(learner)]
        for name, p, o in zip(names, parameters, omega, strict=True):
            rows = learner.kept[ANCHOR + name].shape[0]
            torch.testing.assert_close(
                learner.kept[ANCHOR + name], p.detach()[:rows], rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(
                learner.kept[IMPORTANCE + name], o[:rows], rtol=1e-3, atol=1e-6
            )


def test_paths_add_up_to_what_the_loss_lost():
    """Over small steps on the whole set the sum of the path integrals is the fall of the loss."""
    learner = make(SynapticIntelligence, optimizer="sgd", lr=1e-3, batch_size=100, epochs=300)
    learner.begin_experience(THREE[0])
    data = THREE[0].train
    before = learner.losses(step_of(learner, data))["classification"].item()
    learn(learner, THREE[0], FAST)
    after = learner.losses(step_of(learner, data))["classification"].item()
    fallen = sum(float(path.sum()) for path in learner._path.values())
    assert fallen == pytest.approx(before - after, rel=0.02)


# Joint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", ["seen", "all"])
def test_joint_training_is_a_training_on_all_images(logits):
    joint = taught(JointTraining, THREE[:2], logits=logits)
    parts = [experience.train for experience in THREE[:2]]
    union = ImageSet(
        torch.cat([part.images for part in parts]),
        torch.cat([parts[0].labels, parts[1].labels + 2]),
        (*parts[0].classes, *parts[1].classes),
    )
    once = make(Naive, logits=logits)
    learn(once, Experience(1, union, 1, upcoming=2), FAST)
    for name, value in once.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(joint.state_dict()[name], value), name
    assert joint.images_kept == len(union)
    assert state.stored(joint)["images"] == union.images.numel() * 4


def test_joint_training_may_go_on_from_where_it_was():
    warm = taught(JointTraining, restart=False)
    assert not warm.kept and warm.images_kept == sum(len(e.train) for e in THREE)
    assert state.sha256(warm) != state.sha256(taught(JointTraining))


def test_joint_training_keeps_statistics_of_all_images_in_the_present_space():
    joint = taught(JointTraining, classifier={"name": "ncm"}, moments="shared")
    fresh = joint.memory.empty(joint.memory.sums.shape[1], joint.version(), "shared")
    for experience in THREE:
        train = experience.train
        names = [train.classes[k] for k in train.labels.tolist()]
        fresh = fresh + fresh.observe(joint.embed_all(train.images), names)
    assert joint.memory == fresh


def test_joint_training_has_no_current_outputs():
    with pytest.raises(ConfigError, match="current"):
        make(JointTraining, logits="current")


# What holds for each of them --------------------------------------------------------------------


def settings_of(kind) -> dict:
    return EVERY_TERM if kind is PredictionDistillation else {}


@pytest.mark.parametrize("kind", ALL)
def test_gradients_reach_the_declared_parts_and_no_other(kind):
    learner = make(kind, **settings_of(kind))
    learn(learner, THREE[0], FAST)
    learner.begin_experience(THREE[1])
    shaken(learner)
    for term in learner.terms:
        learner.zero_grad()
        learner.losses(step_of(learner, THREE[1].train))[term.name].backward()
        reached = {
            name.split(".")[0]
            for name, parameter in learner.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
        assert reached == set(term.reaches), term
    assert len(learner.terms) == {PredictionDistillation: 5, Naive: 1, JointTraining: 1}.get(
        kind, 2
    )


@pytest.mark.parametrize("kind", [*DISTILLING, *ANCHORED])
def test_the_first_experience_is_plain_training(kind):
    options = {"logits": "seen", "loss": "softmax"}
    first = taught(kind, THREE[:1], **settings_of(kind), **options)
    naive = taught(Naive, THREE[:1], **options)
    for name, value in naive.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(first.state_dict()[name], value), name
    losses = first.losses(step_of(first, THREE[0].train))
    assert set(losses) == {term.name for term in first.terms}


@pytest.mark.parametrize("kind", [*DISTILLING, *ANCHORED])
def test_a_weight_of_zero_is_plain_training(kind):
    options = {"logits": "seen", "loss": "softmax"}
    ours, naive = taught(kind, weight=0.0, **options), taught(Naive, **options)
    for (name, mine), (_, theirs) in zip(
        ours.named_parameters(), naive.named_parameters(), strict=False
    ):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", [*DISTILLING, *ANCHORED])
def test_a_larger_weight_keeps_the_network_nearer(kind):
    images, moved = THREE[1].train.images, []
    predictions = kind in (LearningWithoutForgetting, PredictionDistillation)
    # A network that is sure of its training images has next to no Fisher information.
    large = 1e6 if kind is ElasticWeightConsolidation else 100.0
    for weight in (0.0, large):
        learner = make(kind, logits="current", weight=weight, epochs=30)
        learn(learner, THREE[0], FAST)
        look = learner.scores_of if predictions else learner.embed_all
        before = look(images)
        learn(learner, THREE[1], FAST)
        after = look(images)[:, : before.shape[1]]
        if predictions:
            before, after = before.softmax(1), after.softmax(1)
        moved.append(float((after - before).norm()))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("loss", ["softmax", "bce", "cosine"])
@pytest.mark.parametrize("kind", ALL)
def test_a_resumed_stream_ends_in_the_same_bytes(kind, loss):
    whole = taught(kind, loss=loss, **settings_of(kind))
    half = taught(kind, THREE[:2], loss=loss, **settings_of(kind))
    resumed = make(kind, loss=loss, **settings_of(kind))
    state.restore(resumed, state.state_of(half))
    learn(resumed, THREE[2], FAST)
    assert state.sha256(resumed) == state.sha256(whole)


@pytest.mark.parametrize("kind", ALL)
def test_both_loops_end_in_the_same_bytes(kind):
    lightning = TrainerOptions(precision="32", threads=1, loop="lightning")
    experiences = THREE[:2]
    slow = taught(kind, experiences, lightning, epochs=1, **settings_of(kind))
    fast = taught(kind, experiences, FAST, epochs=1, **settings_of(kind))
    assert state.sha256(slow) == state.sha256(fast)


@pytest.mark.parametrize("logits", ["current", "seen", "all"])
@pytest.mark.parametrize("kind", ALL)
def test_small_and_odd_experiences_are_learned(kind, logits):
    """One example a class, one class, a class that comes back, batches of one."""
    if kind is JointTraining and logits == "current":
        return
    experiences = stream(features("abc", 1), features("d", 1), features("ad", 1), features("e", 2))
    options = {"batch_size": 1, "logits": logits, **settings_of(kind)}
    learner = taught(kind, experiences, **options)
    scores = learner.scores_of(features("abcde").images)
    assert scores.shape == (30, 5) and bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("kind", ALL)
def test_images_are_learned(kind):
    experiences = stream(pictures("ab", 2), pictures("cd", 2))
    learner = taught(
        kind,
        experiences,
        backbone=lambda: Conv4(1, 16, (3, 3, 3, 4)),
        transform=GREY,
        epochs=1,
        **settings_of(kind),
    )
    assert bool(torch.isfinite(learner.scores_of(pictures("abcd").images)).all())


@pytest.mark.parametrize("kind", ALL)
def test_an_experience_without_images_changes_nothing(kind):
    learner = taught(kind, THREE[:2])
    before = state.sha256(learner)
    learn(learner, Experience(2, features("z", 0), 2, upcoming=0), FAST)
    assert state.sha256(learner) == before


@pytest.mark.parametrize("kind", ALL)
def test_a_network_that_is_frozen_after_the_first_experience_stays(kind):
    learner = taught(kind, THREE[:1], train="first", classifier={"name": "ncm"})
    version = learner.version()
    learn(learner, THREE[1], FAST)
    assert learner.version() == version and set(learner.classes) == set("abcd")


@pytest.mark.parametrize("kind", [*DISTILLING, *ANCHORED])
def test_boundaries_are_needed(kind):
    with pytest.raises(ConfigError, match="ends"):
        make(kind).begin_experience(Experience(0, features("ab"), 0, announced=False))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {"weight": bad}) for kind in (*DISTILLING, *ANCHORED) for bad in (-1, math.nan)],
        (LearningWithoutForgetting, {"distillation_temperature": 0}),
        *[(PredictionDistillation, {key: -1}) for key in EVERY_TERM],
        (PredictionDistillation, {"samples": 0}),
        (ElasticWeightConsolidation, {"mode": "both"}),
        (ElasticWeightConsolidation, {"fisher": "exact"}),
        (ElasticWeightConsolidation, {"decay": 1.5}),
        (ElasticWeightConsolidation, {"samples": 0}),
        (SynapticIntelligence, {"damping": 0}),
        (MemoryAwareSynapses, {"alpha": 2}),
        (MemoryAwareSynapses, {"samples": 0}),
        (L2, {"logits": "past"}),
    ],
)
def test_bad_settings_are_refused(kind, options):
    with pytest.raises(ConfigError, match="Expected"):
        make(kind, **options)


# On digits, two classes at a time ---------------------------------------------------------------


def digits_accuracy(name: str, **options) -> float:
    from clfed.config import build

    benchmark = load(as_features=True)
    settings = {**compose([f"learner={name}"]).learner, "batch_size": 32, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = MLP(64, 0, (100,))
        learner = build(settings, backbone=backbone, transform=PLAIN, dim=100, seed=0)
    parts = [benchmark.train.of_classes((str(k), str(k + 1))) for k in range(0, 10, 2)]
    for experience in stream(*parts):
        learn(learner, experience, FAST)
    test = benchmark.test
    rows = learner.rows(test.classes)[test.labels]
    return float((learner.scores_of(test.images).argmax(1) == rows).double().mean())


def test_the_order_of_methods_on_digits():
    accuracy = {
        name: digits_accuracy(name)
        for name in ("naive", "joint", "lwf", "predkd", "featkd", "l2", "ewc", "si", "mas")
    }
    assert accuracy["joint"] > 0.85
    assert max(accuracy[name] for name in accuracy if name != "joint") < accuracy["joint"] - 0.2
    assert accuracy["naive"] < 0.25
    assert accuracy["lwf"] > accuracy["naive"] + 0.1
