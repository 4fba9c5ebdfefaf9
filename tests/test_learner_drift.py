"""SDC, LDC, ADC and AdaGauss: against loops, closed forms and scikit-learn, and their whole lives."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import nn

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.config import build, compose
from clfed.data.benchmark import ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError, UnsupportedStatistics
from clfed.learners import state
from clfed.learners.adagauss import AdaGauss, Perceptron, adapted, anti_collapse, fit_adapter
from clfed.learners.adc import AdversarialDriftCompensation, descended
from clfed.learners.fitting import learn
from clfed.learners.ldc import LearnableDriftCompensation, adam_map
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.learners.sdc import SemanticDriftCompensation, length
from clfed.learners.training import initialisation
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.drift import linear_map, moved, weighted_drift
from clfed.prototypes.moments import class_scatter
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
PLAIN = Transform((), ())
FOLLOWING = (SemanticDriftCompensation, LearnableDriftCompensation, AdversarialDriftCompensation)
DRIFTING = ("sdc", "ldc", "adc", "adagauss")
METHODS = (*DRIFTING, "pass", "fetril")
# Less of everything than the files say, for the sake of time.
SMALL = {
    "adagauss": {"bottleneck": 12, "adapt_epochs": 5, "samples": 400},
    "fetril": {"head_epochs": 5},
}


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(name: str, **changed: object) -> dict:
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(compose([f"learner={name}"]).learner)
    return {**given, "batch_size": 32, **SMALL.get(name, {}), **changed}


def digits(kind: str = "features") -> tuple[ImageSet, ImageSet, Transform]:
    data = load(as_features=kind == "features")
    return data.train, data.test, Transform(data.mean, data.std)


def made(name: str, transform: Transform, kind: str = "features", seed: int = 0, **changed: object):
    with initialisation(seed, "test"):
        network = MLP(64, 0, (48,)) if kind == "features" else MLP(1, 8, (48,))
        config = settings(name, **changed)
        return build(config, backbone=network, transform=transform, dim=48, seed=seed)


def experience(number: int, data: ImageSet, names: list[str], upcoming: int = 0) -> Experience:
    return Experience(number, data.of_classes(names), number, upcoming=upcoming)


def pairs(data: ImageSet, count: int = 5) -> list[Experience]:
    return [
        experience(t, data, [str(2 * t), str(2 * t + 1)], upcoming=2 * (count - 1 - t))
        for t in range(count)
    ]


def few(data: ImageSet, per_class: int) -> ImageSet:
    return data.subset(torch.cat([rows[:per_class] for rows in data.indices_by_class()]))


def accuracy(learner, test: ImageSet) -> float:
    known = test.of_classes([name for name in test.classes if name in learner.classes])
    rows = learner.rows(known.classes)[known.labels]
    return float((learner.scores_of(known.images).argmax(1) == rows).double().mean())


# Semantic drift compensation ----------------------------------------------------------------------


def test_weighted_drift_golden():
    before, after = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.5], [1.0, -0.5]])
    drift = weighted_drift(torch.zeros(1, 2), before, after, sigma=0.3)
    assert drift[0].tolist() == pytest.approx([0.0, 0.496139], abs=5e-7)


@given(st.integers(0, 10**6), st.floats(0.05, 5.0))
def test_weighted_drift_is_the_loop_over_classes_and_examples(seed, sigma):
    means, before, after = points(seed, 3, 4), points(seed + 1, 7, 4), points(seed + 2, 7, 4)
    wanted = np.zeros((3, 4))
    for k, mean in enumerate(means.double().numpy()):
        total = 0.0
        for old, new in zip(before.double().numpy(), after.double().numpy(), strict=True):
            weight = math.exp(-sum((old - mean) ** 2) / (2 * sigma**2)) + 1e-5
            wanted[k] += weight * (new - old)
            total += weight
        wanted[k] /= total
    assert np.allclose(weighted_drift(means, before, after, sigma).numpy(), wanted, atol=1e-9)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_a_translation_is_found_exactly(seed, sigma):
    means, before, shift = points(seed, 3, 4), points(seed + 1, 7, 4), points(seed + 2, 4)
    before, shift = before.double(), shift.double()
    drift = weighted_drift(means, before, before + shift, sigma)
    assert torch.allclose(drift, shift.expand(3, 4), atol=1e-12)


def test_far_classes_move_with_the_mean_and_near_ones_with_their_neighbours():
    before = torch.tensor([[0.0], [10.0]])
    after = torch.tensor([[1.0], [13.0]])
    drift = weighted_drift(torch.tensor([[0.0], [1e4]]), before, after, sigma=0.1)
    assert drift.flatten().tolist() == pytest.approx([1.0, 2.0], abs=1e-4)


def test_sigma_counts_in_lengths_of_the_embeddings():
    assert length(torch.tensor([[3.0, 4.0], [0.0, 5.0]])) == 5.0
    assert length(torch.zeros(2, 3)) > 0
    unit = nn.functional.normalize(points(3, 9, 4))
    assert length(unit) == pytest.approx(1.0)


# Learnable drift compensation -----------------------------------------------------------------------


@pytest.mark.parametrize("identity", [True, False])
@given(seed=st.integers(0, 10**6))
def test_a_linear_drift_is_found_exactly(identity, seed):
    matrix, before = points(seed, 4, 4).double(), points(seed + 1, 30, 4).double()
    after = before @ matrix.T
    found = linear_map(after.T @ before, before.T @ before, 0.0, identity=identity)
    assert torch.allclose(found, matrix, atol=1e-8)


@pytest.mark.parametrize("identity", [True, False])
def test_linear_map_is_ridge_regression(identity):
    before, after = points(1, 20, 5).double(), points(2, 20, 5).double()
    gram = before.T @ before
    penalty = 0.3
    alpha = penalty * float(gram.trace()) / 5
    target = after - before if identity else after
    ridge = Ridge(alpha=alpha, fit_intercept=False).fit(before.numpy(), target.numpy())
    wanted = ridge.coef_ + (np.eye(5) if identity else 0.0)
    found = linear_map(after.T @ before, gram, penalty, identity=identity)
    assert np.allclose(found.numpy(), wanted, atol=1e-10)


def test_directions_without_examples_are_left_alone_or_deleted():
    before = torch.zeros(6, 3)
    before[:, :2] = points(1, 6, 2)
    after = before * 2
    lonely = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    sums = after.T @ before, before.T @ before
    assert torch.allclose(linear_map(*sums, 1e-6) @ lonely, lonely)
    assert torch.allclose(linear_map(*sums, 1e-6, identity=False) @ lonely, 0 * lonely)
    assert torch.allclose(linear_map(*sums, 0.0) @ lonely, lonely)  # pseudo-inverse


def test_the_sums_of_several_nodes_add_up():
    before, after = points(1, 20, 5).double(), points(2, 20, 5).double()
    parts = [(before[:7], after[:7]), (before[7:], after[7:])]
    cross, gram = sum(a.T @ b for b, a in parts), sum(b.T @ b for b, _ in parts)
    whole = linear_map(after.T @ before, before.T @ before, 0.1)
    assert torch.allclose(linear_map(cross, gram, 0.1), whole, atol=1e-12)


def test_the_published_fit_comes_to_the_closed_form():
    before = points(1, 200, 4)
    matrix = torch.eye(4) + 0.2 * points(2, 4, 4)
    options = {"epochs": 200, "lr": 1e-2, "batch_size": 50}
    found = adam_map(before, before @ matrix.T, **options, rng=torch.Generator().manual_seed(0))
    assert torch.allclose(found, matrix, atol=1e-3)
    none = adam_map(before, before, **{**options, "epochs": 1}, rng=torch.Generator())
    assert torch.allclose(none, torch.eye(4), atol=1e-6)


# Memories that move ---------------------------------------------------------------------------------


def test_moved_second_moments_are_symmetric_and_what_was_asked_for():
    rows = 30 * points(5, 40, 6)
    memory = PrototypeMemory.empty(6, "old", "class")
    memory = memory + memory.observe(rows, ["a", "b"] * 20)
    matrix = points(6, 6, 6).double()
    spread = class_scatter(memory) / memory.counts.double()[:, None, None]
    wanted = matrix @ spread @ matrix.T
    after = moved(memory, memory.means() @ matrix.T, "new", wanted)
    assert after.outer is not None and torch.equal(after.outer, after.outer.mT)
    found = class_scatter(after) / after.counts.double()[:, None, None]
    assert torch.allclose(found, wanted, rtol=1e-4, atol=0.05)
    assert torch.equal(after.counts, memory.counts) and after.embedding_id == "new"
    with pytest.raises(UnsupportedStatistics):
        shared = PrototypeMemory.empty(2, "old", "shared")
        moved(shared, torch.zeros(0, 2), "new")


def compensated(cls, student: nn.Module, teacher: nn.Module, pixels: torch.Tensor, **options):
    """Two old classes of a given older network, moved by a method: memory before and after."""
    learner = cls(student, PLAIN, dim=3, **options)
    learner.teacher = nn.ModuleDict({"backbone": teacher}).eval().requires_grad_(False)
    kept = PrototypeMemory.empty(3, "old", options.get("moments", "none"))
    old = teacher(points(11, 40, 4)).detach() + torch.tensor([2.0, 0.0, 0.0])
    kept = kept + kept.observe(old, ["a", "b"] * 20)
    data = ImageSet(pixels, torch.arange(len(pixels)) % 2, ("c", "d"))
    learner.begin_experience(Experience(1, data, 1))
    after = learner.embed_all(pixels)
    return kept, learner.compensate(kept, "new", Experience(1, data, 1), after), learner


@pytest.mark.parametrize("cls", FOLLOWING[::2])
def test_translated_networks_are_followed_exactly(cls):
    teacher = nn.Linear(4, 3)
    student = copy.deepcopy(teacher)
    shift = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        student.bias.add_(shift)
    before, after, _ = compensated(cls, student, teacher, points(12, 30, 4))
    assert torch.allclose(after.means(), before.means() + shift, atol=1e-4)
    assert after.embedding_id == "new" and torch.equal(after.counts, before.counts)


def test_linear_networks_are_followed_exactly():
    teacher, matrix = nn.Linear(4, 3, bias=False), points(9, 3, 3)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.weight.copy_(matrix @ teacher.weight)
    before, after, _ = compensated(
        LearnableDriftCompensation,
        student,
        teacher,
        points(12, 60, 4),
        penalty=0.0,
        moments="class",
    )
    matrix = matrix.double()
    assert torch.allclose(after.means(), before.means() @ matrix.T, atol=1e-3)
    wanted = matrix @ class_scatter(before) @ matrix.T
    assert torch.allclose(class_scatter(after), wanted, rtol=1e-3, atol=1e-2)


# Adversarial drift compensation ---------------------------------------------------------------------


def test_steps_have_the_length_that_the_norm_says():
    inputs, gradient = points(1, 2, 3, 1, 4, 4), points(2, 2, 3, 1, 4, 4)
    each = descended(inputs, gradient, 5.0, "sample") - inputs
    together = descended(inputs, gradient, 5.0, "batch") - inputs
    for c in range(2):
        assert float(together[c].norm()) == pytest.approx(5.0, rel=1e-5)
        for i in range(3):
            wanted = -5.0 * gradient[c, i] / gradient[c, i].norm()
            assert torch.allclose(each[c, i], wanted, atol=1e-5)
    assert torch.equal(descended(inputs, torch.zeros_like(gradient), 5.0, "sample"), inputs)


@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_adversarial_drift_is_the_loop_over_classes(norm):
    with initialisation(3, "networks"):
        teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            student[2].weight.add_(0.3 * points(1, 3, 8))
    images = points(12, 30, 4)
    options = {"images": 6, "attack_steps": 3, "alpha": 2.0, "norm": norm}
    before, after, _ = compensated(
        AdversarialDriftCompensation, student, teacher, images, **options
    )
    means = before.means().float()
    old = teacher(images).detach()
    succeeded = 0
    for k in range(2):
        near = sorted(range(30), key=lambda i: float((old[i] - means[k]).norm()))[:6]
        x = images[near].clone()
        for _ in range(3):
            x = x.detach().requires_grad_()
            loss = nn.functional.mse_loss(teacher(x), means[k].expand(6, 3))
            (g,) = torch.autograd.grad(loss, x)
            size = g.norm() if norm == "batch" else g.norm(dim=1, keepdim=True)
            x = (x - 2.0 * g / size).detach()
        seen, now = teacher(x).detach(), student(x).detach()
        hits = [i for i in range(6) if int((seen[i] - means).norm(dim=1).argmin()) == k]
        succeeded += len(hits)
        if hits:
            wanted = means[k] + (now - seen)[hits].mean(0)
        else:
            rest = weighted_drift(means, old, student(images), 0.3 * length(old))
            wanted = means[k] + rest[k].float()
        assert torch.allclose(after.means()[k].float(), wanted, atol=1e-4)
    assert succeeded


def test_attacks_come_nearer_and_stay_images():
    train, _, transform = digits("images")
    learner = made("adc", transform, "images", epochs=2, norm="sample", alpha=1.0)
    learn(learner, experience(0, train, ["0", "1"]), FAST)
    inputs = transform(train.images[:40]).unflatten(0, (2, 20))
    targets = learner.memory.means().repeat_interleave(20, 0)
    network = learner.teacher["backbone"]

    def distance(x):
        return (learner.features(x, network) - targets).square().sum(1).mean()

    learner.attack_steps = 5
    attacked = learner.attacked(inputs, targets)
    assert distance(attacked) < 0.9 * distance(inputs.flatten(0, 1))
    black, white = learner.limits(inputs)
    assert bool((attacked >= black).all()) and bool((attacked <= white).all())
    assert torch.allclose(white, transform(torch.full((1, 1, 8, 8), 255)).amax())


def test_without_a_success_the_neighbours_are_followed():
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    # All images lie on the side of the second class, and nothing moves them.
    with torch.no_grad():
        teacher.weight.zero_()
        teacher.bias.zero_()
    images = points(12, 20, 4)
    before, after, _ = compensated(
        AdversarialDriftCompensation, student, teacher, images, attack_steps=0
    )
    judged = (0 * before.means() - before.means()).norm(dim=1)
    lost = int(judged.argmax())
    drift = weighted_drift(
        before.means(), torch.zeros(20, 3), student(images), 0.3 * length(torch.zeros(20, 3))
    )
    wanted = (before.means() + drift)[lost]
    assert torch.allclose(after.means()[lost], wanted, atol=1e-4)


# AdaGauss -------------------------------------------------------------------------------------------


def test_anti_collapse_is_the_mean_clipped_diagonal_of_the_cholesky_factor():
    h = points(4, 50, 6) * torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 0.2])
    covariance = np.cov(h.double().numpy().T, bias=True)
    wanted = -np.minimum(np.diag(np.linalg.cholesky(covariance)), 1.0).mean()
    assert float(anti_collapse(h)) == pytest.approx(wanted, abs=1e-3)
    wide = 10 * points(4, 500, 3)
    assert float(anti_collapse(wide)) == -1.0


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_anti_collapse_takes_small_batches_and_any_scale(rows, scale):
    h = (scale * points(4, rows, 8)).requires_grad_()
    anti_collapse(h).backward()
    assert torch.isfinite(h.grad).all()


def test_anti_collapse_widens_what_is_narrow():
    h = (points(4, 60, 3) * torch.tensor([1.0, 1.0, 0.2])).requires_grad_()
    anti_collapse(h).backward()
    with torch.no_grad():
        wider = h - 5.0 * h.grad
    assert float(wider.std(0)[2]) > float(h.detach().std(0)[2])


def test_gaussians_go_through_linear_maps_exactly():
    matrix, shift = points(1, 3, 3), points(2, 3)
    half = points(3, 20_000, 3)
    draws = torch.cat([half, -half])
    root = points(4, 3, 3).double()
    covariance, mean = root @ root.T, points(5, 3).double()
    new_mean, new_covariance = adapted(lambda x: x @ matrix.T + shift, mean, covariance, draws)
    linear = matrix.double()
    assert torch.allclose(new_mean, linear @ mean + shift, atol=1e-4)
    wanted = linear @ covariance @ linear.T
    assert torch.allclose(new_covariance, wanted, rtol=0.1, atol=0.1)
    assert torch.equal(new_covariance, new_covariance.mT)
    single, _ = adapted(lambda x: x, mean, torch.zeros(3, 3).double(), draws)
    assert torch.allclose(single, mean, atol=1e-6)


@pytest.mark.parametrize("residual", [True, False])
def test_small_networks_start_as_they_say_and_learn_a_drift(residual):
    network = Perceptron(4, 64, residual=residual, rng=torch.Generator().manual_seed(0))
    before = points(1, 256, 4)
    assert torch.equal(network(before), before) == residual
    after = before @ (torch.eye(4) + 0.2 * points(2, 4, 4)).T + 0.5
    start = float((network(before) - after).square().mean().detach())
    options = {"epochs": 60, "lr": 0.05, "batch_size": 32}
    fit_adapter(network, before, after, **options, rng=torch.Generator().manual_seed(1))
    assert float((network(before) - after).square().mean().detach()) < 0.05 * start


def test_ambient_randomness_decides_nothing_in_small_networks():
    ambient = torch.get_rng_state()
    network = Perceptron(4, 8, residual=False, rng=torch.Generator().manual_seed(0))
    assert torch.equal(ambient, torch.get_rng_state())
    again = Perceptron(4, 8, residual=False, rng=torch.Generator().manual_seed(0))
    assert torch.equal(network.first.weight, again.first.weight)
    assert float(network.first.weight.abs().max()) <= 0.5


# Whole lives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRIFTING)
def test_old_classes_stay_known(name):
    train, test, transform = digits()
    learner = made(name, transform, epochs=5)
    naive = Naive(MLP(64, 0, (48,)), transform, dim=48, epochs=5, batch_size=32)
    for part in pairs(train):
        learn(learner, part, FAST)
        learn(naive, part, FAST)
    assert accuracy(learner, test) > max(0.45, 2 * accuracy(naive, test))
    assert learner.images_kept == 0 and learner.memory.embedding_id == learner.version()


@pytest.mark.parametrize("kind", ["features", "images"])
@pytest.mark.parametrize("name", METHODS)
def test_little_data_is_enough(name, kind):
    train, _, transform = digits(kind)
    one, some = few(train, 1), few(train, 5)
    learner = made(name, transform, kind, epochs=1, batch_size=1)
    stream = [
        experience(0, one, ["0", "1"]),
        experience(1, one, ["2"]),
        experience(2, some, ["0", "3"]),  # the first class comes back
        experience(3, some, ["4", "5", "1"]),
    ]
    for part in stream:
        learn(learner, part, FAST)
        scores = learner.scores_of(train.images[:7])
        assert scores.shape == (7, len(learner.classes)) and bool(torch.isfinite(scores).all())
    digest = state.sha256(learner)
    learn(learner, Experience(4, train.subset(torch.arange(0)), 4), FAST)
    assert state.sha256(learner) == digest


@pytest.mark.parametrize("kind", ["features", "images"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "fetril"])  # trains once
def test_gradients_reach_what_is_declared(name, kind):
    train, _, transform = digits(kind)
    learner = made(name, transform, kind, epochs=2)
    first, second = pairs(few(train, 30), 2)
    learn(learner, first, FAST)
    learner.begin_experience(second)
    # A network that equals its teacher has nothing to distil: let it move a little first.
    for _ in range(3):
        optimiser = torch.optim.SGD(learner.parameters(), 0.05)
        batch = next(iter(learner.batches(learner.training_data(second), seed=0)))
        optimiser.zero_grad()
        learner.training_step(batch, 0).backward()
        optimiser.step()
    parts = {part for term in learner.terms for part in term.reaches}
    for term in learner.terms:
        learner.zero_grad()
        weights = learner.terms
        learner.terms = (term,)
        learner.training_step(batch, 0).backward()
        learner.terms = weights
        reached = {
            part
            for part in parts
            if any(
                p.grad is not None and bool(p.grad.any())
                for p in getattr(learner, part).parameters()
            )
        }
        assert reached == set(term.reaches), term.name


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("sdc", {"sigma": 0.0}),
        ("sdc", {"weight": -1.0}),
        ("sdc", {"moments": "shared"}),
        ("ldc", {"fit": "magic"}),
        ("ldc", {"penalty": -0.1}),
        ("ldc", {"fit_lr": 0.0}),
        ("adc", {"norm": "l1"}),
        ("adc", {"images": 0}),
        ("adc", {"alpha": 0.0}),
        ("adagauss", {"bottleneck": 0}),
        ("adagauss", {"samples": 1}),
        ("adagauss", {"distillation": -1.0}),
        ("adagauss", {"moments": "shared"}),
    ],
)
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ConfigError):
        made(name, PLAIN, **bad)


@pytest.mark.parametrize("name", DRIFTING)
def test_a_stream_without_boundaries_is_refused(name):
    train, _, transform = digits()
    part = Experience(0, train.of_classes(["0", "1"]), 0, announced=False)
    with pytest.raises(ConfigError, match=name):
        learn(made(name, transform), part, FAST)


def test_means_alone_can_be_adapted():
    train, test, transform = digits()
    learner = made("adagauss", transform, epochs=3, moments="none", classifier={"name": "ncm"})
    for part in pairs(train)[:3]:
        learn(learner, part, FAST)
    assert learner.memory.outer is None and accuracy(learner, test) > 0.5


def test_second_moments_follow_the_linear_map():
    train, test, transform = digits()
    learner = made(
        "ldc", transform, moments="class", classifier={"name": "gaussian", "jitter": 0.1}
    )
    for part in pairs(train)[:3]:
        learn(learner, part, FAST)
    assert learner.memory.outer is not None and accuracy(learner, test) > 0.5


def test_the_bottleneck_belongs_to_the_network():
    learner = made("adagauss", PLAIN)
    assert isinstance(learner, AdaGauss) and learner.dim == 12
    assert learner.embed(torch.zeros(3, 64)).shape == (3, 12)
