"""Evolved mixture: two-sample distances against slow loops, when experts come, who answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners import state
from clfed.learners.emm import EvolvedMixture
from clfed.learners.experts import Expert
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.learners.two_sample import CRITERIA, bandwidth, gauss_w2, hsic, mmd2, permuted
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
LIGHTNING = TrainerOptions(precision="32", threads=1, loop="lightning")
SMALL = {"memory": 40, "drop": 10, "hidden": 16, "code": 2, "epochs": 10, "batch_size": 16}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


# Distances of two samples


def kernel(a, b, width):
    return math.exp(-sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (2 * width**2))


def slow_mmd2(left, right):
    pooled = [*left.tolist(), *right.tolist()]
    squares = [
        sum((x - y) ** 2 for x, y in zip(pooled[i], pooled[j], strict=True))
        for i in range(len(pooled))
        for j in range(i)
    ]
    width = math.sqrt(sorted(squares)[(len(squares) - 1) // 2] / 2)
    x, y = left.tolist(), right.tolist()
    m, n = len(x), len(y)
    own = sum(kernel(x[i], x[j], width) for i in range(m) for j in range(m) if i != j)
    others = sum(kernel(y[i], y[j], width) for i in range(n) for j in range(n) if i != j)
    cross = sum(kernel(a, b, width) for a in x for b in y)
    return own / (m * (m - 1)) + others / (n * (n - 1)) - 2 * cross / (m * n)


@given(st.integers(0, 999), st.integers(2, 7), st.integers(2, 7), st.floats(0, 3))
def test_mmd2_agrees_with_a_loop(seed, m, n, shift):
    left, right = normal(m, 3, seed=seed), normal(n, 3, seed=seed + 1) + shift
    assert mmd2(left, right).item() == pytest.approx(slow_mmd2(left, right), abs=1e-9)


def test_mmd2_is_about_zero_for_one_law_and_grows_with_a_shift():
    values = [float(mmd2(normal(300, 5), normal(300, 5, seed=1) + s)) for s in (0, 0.3, 0.6, 1, 3)]
    null = permuted("mmd2", normal(300, 5), normal(300, 5, seed=1), 200, torch.Generator())
    assert values[0] < null.max()
    assert values == sorted(values) and values[-1] > 1


@pytest.mark.parametrize("shape", [(30, 1), (30, 4), (3, 6)])
def test_gauss_w2_agrees_with_scipy(shape):
    left, right = normal(*shape), 2 * normal(*shape, seed=1) + 1
    one, two = (np.atleast_2d(np.cov(x.numpy().T)) for x in (left, right))
    root = sqrtm(one)
    mixed = np.trace(sqrtm(root @ two @ root).real)
    means = float((left.mean(0) - right.mean(0)).square().sum())
    expected = means + np.trace(one) + np.trace(two) - 2 * mixed
    assert gauss_w2(left, right).item() == pytest.approx(expected, rel=1e-5)


def test_gauss_w2_of_a_moved_sample_is_the_squared_shift():
    points = normal(50, 3)
    shift = torch.tensor([1.0, 2.0, 2.0])
    assert gauss_w2(points, points + shift).item() == pytest.approx(9)
    assert gauss_w2(points, points).item() == pytest.approx(0, abs=1e-9)


def test_hsic_agrees_with_the_matrix_formula():
    left, right = normal(9, 2), normal(9, 3, seed=1)
    gram = [
        np.exp(-torch.cdist(p, p).square().numpy() / (2 * float(bandwidth(p)) ** 2))
        for p in (left, right)
    ]
    centring = np.eye(9) - 1 / 9
    expected = np.trace(gram[0] @ centring @ gram[1] @ centring) / 9
    assert hsic(left, right).item() == pytest.approx(expected)


def test_hsic_sees_dependent_pairs_and_no_shift():
    """What the published criterion measures: pairs, and not whether two laws differ."""
    left, other = normal(500, 50), normal(500, 50, seed=1)
    separate = [float(hsic(left, s * other + m)) for m, s in ((0, 1), (5, 1), (0, 3), (5, 3))]
    assert max(separate) - min(separate) < 1e-6  # the median bandwidth takes out shift and scale
    assert all(0.38 < value < 0.41 for value in separate)
    assert float(hsic(left, left)) > max(separate) + 0.02
    assert float(mmd2(left, other + 5)) > 1 > 0.01 > float(mmd2(left, other))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_permutations_are_the_criterion_of_random_splits(criterion):
    left, right = normal(6, 2), normal(6, 2, seed=1) + 1
    found = permuted(criterion, left, right, 5, torch.Generator().manual_seed(0))
    orders = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)).argsort(1)
    pooled = torch.cat([left, right])
    for value, order in zip(found, orders, strict=True):
        first = order < 6 if criterion == "mmd2" else torch.isin(torch.arange(12), order[:6])
        # A split is a set for mmd2 and gauss_w2; hsic pairs its two halves in order.
        halves = (pooled[first], pooled[~first])
        if criterion == "hsic":
            halves = (pooled[order[:6]], pooled[order[6:]])
        assert value.item() == pytest.approx(CRITERIA[criterion](*halves).item(), abs=1e-9)


def test_the_permutation_test_keeps_its_level_and_has_power():
    def rejected(shift):
        count = 0
        for seed in range(100):
            left, right = normal(30, 2, seed=2 * seed), normal(30, 2, seed=2 * seed + 1) + shift
            null = permuted("mmd2", left, right, 100, torch.Generator().manual_seed(seed))
            count += bool(mmd2(left, right) > null.quantile(0.95))
        return count

    assert rejected(0.0) <= 12 and rejected(1.0) >= 95


@pytest.mark.parametrize("points", [torch.zeros(1, 2), torch.zeros(3, 2)], ids=len)
def test_bandwidth_of_equal_points_is_one(points):
    assert bandwidth(points).item() == 1


# Experts


def test_the_autoencoders_loss_is_the_negative_bound():
    expert = Expert(3, 5, 2, seed=0)
    expert.variance.fill_(0.4)
    h, noise = normal(4, 3).float(), normal(4, 2, seed=1).float()
    for i in range(4):
        code = expert.encoder(h[i])
        mean, log_spread = code[:2], code[2:]
        rebuilt = expert.decoder(mean + log_spread.div(2).exp() * noise[i])
        log_likelihood = torch.distributions.Normal(rebuilt, 0.4**0.5).log_prob(h[i]).sum()
        posterior = torch.distributions.Normal(mean, log_spread.div(2).exp())
        divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1))
        # Per number of the embedding, without the constant ln(2 pi) / 2.
        expected = (divergence.sum() - log_likelihood) / 3 - math.log(2 * math.pi) / 2
        torch.testing.assert_close(expert.shortfall(h, noise)[i], expected)


def test_weights_of_an_expert_come_from_its_seed():
    first = Expert(3, 5, 2, seed=4)
    torch.rand(3)
    second, third = Expert(3, 5, 2, seed=4), Expert(3, 5, 2, seed=5)
    assert torch.equal(first.encoder[0].weight, second.encoder[0].weight)
    assert not torch.equal(first.encoder[0].weight, third.encoder[0].weight)


# When experts come


def emm(dim: int = 3, **options) -> EvolvedMixture:
    return EvolvedMixture(Identity(), Transform((), ()), dim=dim, lr=0.01, **(SMALL | options))


def phase(number: int, names: str, centre: float, count: int = 60) -> Experience:
    """Gaussian classes around a place, one unit apart."""
    labels = torch.arange(count) % len(names)
    points = normal(count, 3, seed=number) * 0.3 + labels[:, None] + centre
    return Experience(number, ImageSet(points.float(), labels, tuple(names)), phase=number)


def frozen(learner: EvolvedMixture) -> int:
    return len(learner.experts) - 1


@pytest.mark.parametrize(("criterion", "seed"), [("mmd2", 0), ("mmd2", 1), ("gauss_w2", 0)])
def test_more_of_the_same_never_expands(criterion, seed):
    learner = emm(criterion=criterion, seed=seed)
    counts = []
    for number in range(6):
        learn(learner, phase(number, "ab", 0.0), FAST)
        counts.append(frozen(learner))
    assert counts == [1] * 6  # the first full memory alone


@pytest.mark.parametrize(("criterion", "seed"), [("mmd2", 0), ("mmd2", 1), ("gauss_w2", 0)])
def test_two_phases_expand_exactly_once(criterion, seed):
    learner = emm(criterion=criterion, seed=seed)
    counts = []
    for number in range(6):
        learn(learner, phase(number, *(("ab", 0.0) if number < 3 else ("cd", 8.0))), FAST)
        counts.append(frozen(learner))
    assert counts == [1, 1, 1, 2, 2, 2]


def test_frozen_experts_keep_their_bits():
    learner = emm()
    learn(learner, phase(0, "ab", 0.0), FAST)
    before = {n: t.clone() for n, t in learner.experts[0].state_dict().items() if "extra" not in n}
    for number, (names, centre) in enumerate([("cd", 8.0), ("ab", 0.0), ("ef", -8.0)], start=1):
        learn(learner, phase(number, names, centre), FAST if number % 2 else LIGHTNING)
    after = learner.experts[0].state_dict()
    assert frozen(learner) > 1
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_small_stream_fills_the_memory_first():
    learner = emm()
    kept = []
    for number in range(6):
        learn(learner, phase(number, "ab", 0.0, count=10), FAST)
        kept.append((learner.images_kept, frozen(learner)))
    assert kept == [(10, 0), (20, 0), (30, 0), (0, 1), (10, 1), (20, 1)]
    assert state.stored(learner)["images"] == 20 * 3 * 4


def test_the_memory_keeps_the_latest_images():
    learner = emm(memory=40, drop=15)
    learn(learner, phase(0, "ab", 0.0), FAST)
    second = phase(1, "ab", 0.0)
    learn(learner, second, FAST)
    # Not new: of the 40 latest the 15 oldest went.
    assert torch.equal(learner.buffer.images, second.train.images[-25:])


def test_a_stream_without_boundaries_needs_no_announcement():
    learner = emm()
    for number in range(8):
        images = phase(number, "ab" if number < 4 else "cd", 0.0 if number < 4 else 8.0, 40).train
        learn(learner, Experience(number, images, phase=0, announced=False), FAST)
    assert not learner.needs_boundaries and frozen(learner) == 2


@pytest.mark.parametrize("values", [(0.40, 0.38), (0.40, 0.40)])
def test_the_published_rule_expands_below_its_threshold(values, monkeypatch):
    learner = emm(criterion="hsic", threshold=0.39)
    learner.experts.add()
    learner.experts.add()
    learner.experts.add()
    found = iter(values)
    monkeypatch.setitem(CRITERIA, "hsic", lambda left, right: torch.tensor(next(found)))
    assert learner.is_new(torch.zeros(10, 3)) == (min(values) < 0.39)


def test_a_fixed_threshold_must_be_passed_by_every_expert(monkeypatch):
    learner = emm(threshold=1.0)
    for _ in range(3):
        learner.experts.add()
    for values, new in (((1.1, 2.0), True), ((0.9, 2.0), False)):
        found = iter(values)
        monkeypatch.setitem(CRITERIA, "mmd2", lambda left, right, f=found: torch.tensor(next(f)))
        assert learner.is_new(torch.zeros(10, 3)) is new


def test_the_published_criterion_does_not_react_to_a_new_phase():
    """The same decision for the same law and for one five units away."""
    learner = emm(criterion="hsic", threshold=0.39)
    learn(learner, phase(0, "ab", 0.0), FAST)
    memory = phase(1, "ab", 0.0).train.images[:40]
    assert learner.is_new(memory) == learner.is_new(memory + 5)
    by_distance = emm()
    learn(by_distance, phase(0, "ab", 0.0), FAST)
    assert not by_distance.is_new(memory) and by_distance.is_new(memory + 5)


# Who answers


def test_every_image_is_answered_by_its_own_expert():
    learner = emm()
    stream = [phase(0, "ab", 0.0), phase(1, "cd", 8.0), phase(2, "ef", -8.0)]
    for experience in stream:
        learn(learner, experience, FAST)
    images = torch.cat([e.train.images for e in stream])
    expected = torch.cat([e.train.labels + 2 * t for t, e in enumerate(stream)])
    answers = learner.scores_of(images)
    assert answers.isfinite().all()
    assert torch.equal(answers.argmax(1) // 2, expected // 2)
    # Neither order nor neighbours matter, so that the order of a test set cannot help.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(learner.scores_of(images[order]), answers[order])


def test_scores_are_log_probabilities_of_the_expert_that_knows_best():
    learner = emm()
    for experience in (phase(0, "ab", 0.0), phase(1, "cd", 8.0)):
        learn(learner, experience, FAST)
    h = phase(2, "ab", 0.0).train.images
    first, second = learner.experts[0], learner.experts[1]
    mine = first.shortfall(h) < second.shortfall(h)
    expected = torch.full((60, 4), -1e4)
    expected[mine, :2] = first.logits(h).log_softmax(1)[mine]
    expected[~mine, 2:] = second.logits(h).log_softmax(1)[~mine]
    torch.testing.assert_close(learner.scores_of(h), expected.detach())


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("size", [1, 16])
def test_the_smallest_experiences_are_learned_from(names, size):
    learner = emm(batch_size=size)
    for number, those in enumerate([names, "c", names]):
        learn(learner, phase(number, those, 3.0 * number, count=len(those)), FAST)
    assert learner.scores_of(normal(5, 3).float()).isfinite().all()
    assert learner.classes == (*names, "c")
    assert learner.images_kept == 2 * len(names) + 1


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_restored_learner_goes_on_to_the_same_bytes(cut):
    stream = [phase(0, "ab", 0.0), phase(1, "ab", 0.0), phase(2, "cd", 8.0, 15), phase(3, "ab", 8)]
    whole, first, rest = emm(), emm(), emm()
    for experience in stream:
        learn(whole, experience, FAST)
    for experience in stream[:cut]:
        learn(first, experience, FAST)
    state.restore(rest, state.state_of(first))
    assert state.sha256(rest) == state.sha256(first)
    for experience in stream[cut:]:
        learn(rest, experience, LIGHTNING)
    assert state.sha256(rest) == state.sha256(whole)


def test_the_network_never_trains():
    network = MLP(3, 0, (4,))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    learner = EvolvedMixture(network, Transform((), ()), dim=4, **SMALL)
    learn(learner, phase(0, "ab", 0.0), FAST)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_digits():
    from clfed.data.digits import load

    data = load(as_features=True)
    learner = EvolvedMixture(
        Identity(), Transform(data.mean, data.std), dim=64, epochs=50, batch_size=64, lr=0.003
    )
    for number in range(5):
        names = [str(2 * number), str(2 * number + 1)]
        learn(learner, Experience(number, data.train.of_classes(names), phase=number), FAST)
    right = learner.scores_of(data.test.images).argmax(1) == data.test.labels
    assert right.double().mean() > 0.92
    assert frozen(learner) == 5 and learner.images_kept <= 100


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "euclid"},
        {"criterion": "hsic"},
        {"memory": 3},
        {"drop": 0},
        {"drop": 41},
        {"hidden": 0},
        {"code": 0},
        {"train": "first"},
        {"classifier": {"name": "ncm"}},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        emm(**options)
