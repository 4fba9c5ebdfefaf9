"""Bayesian prototypes: posterior and predictive in closed form, and the learner that uses them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError, NotEnoughData
from clfed.learners import state
from clfed.learners.base import Step
from clfed.learners.episodes import Epochs
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.learners.protocl import ProtoCL, Rehearsed
from clfed.prototypes import PrototypeMemory, read_off
from clfed.prototypes.bayesian import log_joint, predictive
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")


def test_golden():
    of = predictive(torch.ones(1).double(), torch.tensor([[2.0]]).double())
    assert float(of.means) == pytest.approx(1.904762, abs=1e-6)
    assert float(of.variances) == pytest.approx(0.0976190, abs=1e-7)
    assert float(log_joint(torch.ones(1, 1), of)) == pytest.approx(-3.948396, abs=1e-6)
    three = predictive(torch.tensor([2.0, 0.0, 0.0]), torch.zeros(3, 1))
    assert three.log_priors.exp().tolist() == pytest.approx([0.6, 0.2, 0.2])


@pytest.mark.parametrize("seed", range(3))
def test_posterior_is_the_recursion_sample_by_sample(seed):
    """Q += h / s2, L += 1 / s2, a += 1, from Q = 0, L = 2, a = 3; then the density by torch."""
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(20, 3, generator=rng, dtype=torch.float64)
    y = torch.randint(4, (20,), generator=rng)
    q, precision, a = torch.zeros(4, 3).double(), [2.0] * 4, [3.0] * 4
    for row, label in zip(h, y.tolist(), strict=True):
        q[label] += row / 0.5
        precision[label] += 1 / 0.5
        a[label] += 1
    counts = torch.bincount(y, minlength=4).double()
    sums = torch.zeros(4, 3).double().index_add_(0, y, h)
    of = predictive(counts, sums, noise=0.5, precision=2.0, concentration=3.0)
    ours = log_joint(h, of)
    for k in range(4):
        normal = torch.distributions.Normal(q[k] / precision[k], math.sqrt(1 / precision[k] + 0.5))
        expected = normal.log_prob(h).sum(1) + math.log(a[k] / sum(a))
        torch.testing.assert_close(ours[:, k], expected)


def test_classifier_is_the_predictive_and_tends_to_the_nearest_mean():
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(30, 3, generator=rng).mul(2**10).round() / 2**10
    names = [*"abc"] * 10
    memory = PrototypeMemory.empty(3, "e").observe(rows, names)
    classifier = read_off("bayes", memory, noise=0.3, classes=["c", "a"])
    sums = torch.stack([rows[2::3].sum(0), rows[0::3].sum(0)]).double()
    of = predictive(torch.tensor([10.0, 10.0]).double(), sums, noise=0.3)
    torch.testing.assert_close(classifier.scores(rows), log_joint(rows, of))
    sure = read_off("bayes", memory, precision=1e-9, noise=1e-9).predict(rows)
    assert torch.equal(sure, read_off("ncm", memory).predict(rows))


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_batches_and_their_order_do_not_matter(seed, batch):
    rng = torch.Generator().manual_seed(seed)
    rows, names = torch.randn(12, 2, generator=rng), [*"abcabcabcabc"]
    zero = PrototypeMemory.empty(2, "e")
    whole = zero.observe(rows, names)
    order = torch.randperm(12, generator=rng)
    parts = [
        zero.observe(rows[p], [names[i] for i in p.tolist()]) for p in torch.split(order, batch)
    ]
    merged = sum(parts, zero)
    assert merged == whole and merged - parts[0] == sum(parts[1:], zero)
    assert torch.equal(
        read_off("bayes", merged).scores(rows), read_off("bayes", whole).scores(rows)
    )


@pytest.mark.parametrize("option", ["noise", "precision", "concentration"])
def test_bad_prior(option):
    with pytest.raises(ConfigError):
        make(classifier={"name": "bayes", option: 0.0})
    with pytest.raises(NotEnoughData):
        read_off("bayes", PrototypeMemory.empty(2, "e"))


@pytest.mark.parametrize(
    "options",
    [
        {"memory_size": -1},
        {"memory_size": True},
        {"memory_size": 0, "train": "all"},
        {"classifier": {"name": "ncm"}},
        {"classifier": {"name": "bayes", "sigma": 1}},
        {"train": "second"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        make(**options)


def make(backbone=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Identity() if backbone is None else MLP(64, 0, backbone)
    given_ = {"dim": backbone[-1] if backbone else 64, "epochs": 3, "batch_size": 16, **options}
    return ProtoCL(network, Transform((), ()), **given_)


@pytest.fixture(scope="module")
def digits():
    return load(as_features=True)


@pytest.fixture(scope="module")
def stream(digits):
    return [
        Experience(t, digits.train.of_classes([str(2 * t), str(2 * t + 1)]), t) for t in range(5)
    ]


def percent(learner, test):
    columns = torch.tensor([int(name) for name in learner.classes])
    answers = columns[learner.scores_of(test.images).argmax(1)]
    return 100 * float((answers == test.labels).double().mean())


def test_loss_uses_the_posterior_before_the_batch(stream):
    learner = make((8,))
    learner.begin_experience(stream[0])
    h = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 0, 0, 1, 1])
    step = Step(torch.zeros(6, 64), labels, h, 1)
    # Nothing is known yet: both classes expect the same.
    assert float(learner.losses(step)["predictive"].detach()) == pytest.approx(math.log(2))
    with torch.no_grad():
        learner.absorb(step)
    torch.testing.assert_close(learner._counts, torch.tensor([3.0, 3.0]).double())
    of = predictive(learner._counts, learner._sums)
    expected = -torch.log_softmax(log_joint(h, of), 1)[torch.arange(6), labels].mean()
    loss = learner.losses(step)["predictive"]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, h)
    assert bool(gradient.any())


def test_begins_with_what_earlier_experiences_left(stream):
    learner = make()
    for experience in stream[:2]:
        learn(learner, experience, FAST)
    learner.begin_experience(stream[2])
    counts = learner.memory.counts
    assert learner._counts.tolist() == [*counts.double().tolist(), 0.0, 0.0]
    torch.testing.assert_close(learner._sums[:4], learner.memory.means() * counts.double()[:, None])


def test_reference_stream_without_a_network(digits, stream):
    learner = make(memory_size=0)
    for experience in stream:
        learn(learner, experience, FAST)
    assert percent(learner, digits.test) == pytest.approx(89.98, abs=0.2)
    assert learner.images_kept == 0 and learner.merges == "exact"


def test_rehearsal_is_declared_bounded_and_helps(digits, stream):
    accuracy = {}
    for size in (20, 400):
        learner = make((64,), memory_size=size, epochs=4)
        kept = []
        for experience in stream:
            learn(learner, experience, FAST)
            kept.append(learner.images_kept)
        assert kept == [min(size, met) for met in (180, 359, 541, 721, 899)] or max(kept) == size
        assert learner.merges == "none" and learner.memory.total_count == 899
        accuracy[size] = percent(learner, digits.test)
    assert accuracy[400] > 80 > accuracy[20]


def test_evaluation_changes_nothing(digits, stream):
    learner = make((8,))
    learn(learner, stream[0], FAST)
    before = state.sha256(learner)
    learner.scores_of(digits.test.images)
    assert state.sha256(learner) == before


@pytest.mark.parametrize("size", [0, 50])
def test_resumed_streams_and_both_loops_give_the_same_bytes(stream, size):
    straight, lightning = make((8,), memory_size=size), make((8,), memory_size=size)
    slow = TrainerOptions(precision="32", threads=1, loop="lightning")
    for experience in stream[:3]:
        learn(straight, experience, FAST)
        learn(lightning, experience, slow)
        resumed = make((8,), memory_size=size)
        state.restore(resumed, state.state_of(straight))
    assert state.sha256(lightning) == state.sha256(straight)
    for learner in (straight, resumed):
        learn(learner, stream[3], FAST)
    assert state.sha256(resumed) == state.sha256(straight)


def test_old_means_are_taken_anew_from_kept_images(stream):
    learner = make((8,), memory_size=60)
    for experience in stream[:2]:
        learn(learner, experience, FAST)
    kept = learner.buffer.content()
    for name in ("0", "1"):
        mine = kept.images[kept.labels == kept.classes.index(name)]
        mean = learner.embed_all(mine).double().mean(0)
        row = learner.memory.rows([name])
        torch.testing.assert_close(learner.memory.means()[row][0], mean, atol=1e-4, rtol=0)
        assert int(learner.memory.counts[row]) == int((stream[0].train.labels == int(name)).sum())


def test_one_rehearsed_image_for_each_new_one():
    new = ImageSet(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64), ("a", "b"))
    old = ImageSet(torch.ones(3, 2), torch.ones(3, dtype=torch.int64), ("a", "b"))

    def batches(start):
        return [
            *Rehearsed(
                Epochs(new, batch_size=4, steps=range(start, 6), seed=1), old, seed=2, start=start
            )
        ]

    for images, labels in batches(0):
        half = len(labels) // 2
        assert torch.equal(labels, torch.tensor([0, 1]).repeat_interleave(half))
        assert torch.equal(images[:, 0], labels.float())
    for a, b in zip(batches(0)[2:], batches(2), strict=True):
        assert all(map(torch.equal, a, b))


def test_gradient_reaches_the_backbone_alone(stream):
    learner = make((8,), memory_size=50)
    learn(learner, stream[0], FAST)
    learner.begin_experience(stream[1])
    images, labels = next(iter(learner.batches(learner.training_data(stream[1]), seed=0)))
    step = Step(images, labels, learner.embed(images).float(), 1)
    (term,) = learner.terms
    learner.losses(step)[term.name].backward()
    reached = {
        name.split(".")[0]
        for name, p in learner.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert reached == set(term.reaches) == {"backbone"}
