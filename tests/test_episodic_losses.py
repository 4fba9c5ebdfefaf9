"""Triplets of prototypes and clean neighbours against slow loops, and protonet in a stream."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clfed.backbones import MLP, Conv4, Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.learners import CrossEntropy, PrototypicalNetwork, state
from clfed.learners.episodic_losses import distances, icnn, proto_triplet
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
TRANSFORM = Transform((), ())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Proto-Triplet


def slow_triplet(queries, prototypes, targets, margin):
    losses = []
    for query, target in zip(queries.tolist(), targets.tolist(), strict=True):
        gaps = [math.sqrt(math.dist(query, p) ** 2 + 1e-6) for p in prototypes.tolist()]
        wrong = min(gap for k, gap in enumerate(gaps) if k != target)
        losses.append(max(0.0, gaps[target] - wrong + margin))
    return sum(losses) / len(losses)


@given(st.integers(0, 999), st.integers(2, 6), st.floats(0, 2))
def test_triplet_agrees_with_a_loop(seed, ways, margin):
    queries, prototypes = normal(7, 3, seed=seed), normal(ways, 3, seed=seed + 1)
    targets = torch.arange(7) % ways
    expected = slow_triplet(queries, prototypes, targets, margin)
    assert proto_triplet(queries, prototypes, targets, margin).item() == pytest.approx(expected)


def test_triplet_of_known_distances():
    # Own prototype at distance 1, the wrong one at 1.2: 1 - 1.2 + 0.5.
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.2]])
    loss = proto_triplet(torch.zeros(1, 2), prototypes, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(("wrong", "pulls"), [(1.2, True), (1.49, True), (1.51, False)])
def test_triplet_and_its_gradient_vanish_beyond_the_margin(wrong, pulls):
    query = torch.zeros(1, 2, requires_grad=True)
    prototypes = torch.tensor([[1.0, 0.0], [0.0, wrong]])
    loss = proto_triplet(query, prototypes, torch.tensor([0]))
    loss.backward()
    assert bool(loss > 0) == bool(query.grad.abs().sum() > 0) == pulls


def test_triplet_of_a_single_class_is_zero():
    query = torch.ones(2, 3, requires_grad=True)
    loss = proto_triplet(query, torch.zeros(1, 3), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(query.grad, torch.zeros(2, 3))


def test_distances_are_smooth_where_points_meet():
    points = torch.zeros(1, 3, requires_grad=True)
    met = distances(points, torch.zeros(1, 3))
    met.sum().backward()
    assert met.item() == pytest.approx(1e-3) and bool(points.grad.isfinite().all())


# ICNN


def slow_icnn(points, labels, k):
    """The published score, one number at a time."""
    n = len(points)
    d = [[math.sqrt(math.dist(p, q) ** 2 + 1e-6) for q in points] for p in points]
    intra, inter, purity = [], [], []
    for i in range(n):
        order = sorted((j for j in range(n) if j != i), key=lambda j, i=i: d[i][j])
        closest = min((d[i][j] for j in order if labels[j] != labels[i]), default=math.inf)
        near = order[:k]
        alike = [d[i][j] / (closest + 1e-8) for j in near if labels[j] == labels[i]]
        other = [d[i][j] / max(map(max, d)) for j in near if labels[j] != labels[i]]
        if alike:
            intra.append(sum(r / max(1, *alike) for r in alike) / len(alike))
        if other:
            inter.append(sum(other) / len(other))
        purity.append(len(alike) / len(near))
    s = 1 - sum(intra) / len(intra) if intra else 0.0
    t = sum(inter) / len(inter) if inter else 1.0
    return -math.log(((s + t) / 2 + sum(purity) / n) / 2)


@given(st.integers(0, 999), st.integers(2, 14), st.integers(1, 4), st.floats(0, 3))
def test_icnn_agrees_with_a_loop(seed, n, classes, gap):
    labels = torch.arange(n) % classes
    points = normal(n, 3, seed=seed) + gap * labels[:, None]
    expected = slow_icnn(points.tolist(), labels.tolist(), 4)
    assert icnn(points, labels).item() == pytest.approx(expected, abs=1e-9)


def clusters(per_class: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(2).repeat_interleave(per_class)
    return 100.0 * labels[:, None].repeat(1, 3).double(), labels


def test_points_of_separate_classes_have_no_icnn_loss():
    # s = 1 - 0.001 / 173 and t = purity = 1.
    assert icnn(*clusters()).item() == pytest.approx(0, abs=3e-6)


def test_shuffled_labels_cost():
    points, labels = clusters()
    points = points + 0.1 * normal(10, 3)
    assert icnn(points, labels.roll(1)) > icnn(points, labels)
    assert icnn(points, labels[torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])]) > 0.5


def test_icnn_ignores_rotation_shift_and_scale():
    labels = torch.arange(12) % 3
    points = normal(12, 4) + 2 * labels[:, None]
    turn = torch.linalg.qr(normal(4, 4, seed=1)).Q
    for moved in (points @ turn, points + 7, points * 1000):
        assert icnn(moved, labels).item() == pytest.approx(icnn(points, labels).item(), abs=1e-5)


@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1]])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_icnn_is_finite_for_the_smallest_sets(labels, spread):
    points = (spread * normal(len(labels), 2)).requires_grad_()
    loss = icnn(points, torch.tensor(labels))
    loss.backward()
    assert loss.isfinite() and points.grad.isfinite().all()


def test_icnn_descends():
    labels = torch.arange(20) % 2
    points = (normal(20, 2) + labels[:, None]).requires_grad_()
    before = icnn(points, labels)
    optimiser = torch.optim.SGD([points], 0.1)
    for _ in range(50):
        optimiser.zero_grad()
        icnn(points, labels).backward()
        optimiser.step()
    assert icnn(points, labels) < before - 0.1


# In an episode


def network(**options) -> PrototypicalNetwork:
    options = {"steps": 3, "way": 3, "shot": 2, "query": 2, "dim": 4, "lr": 0.01} | options
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(normal(4, 4, seed=9))
        linear.bias.zero_()
    return PrototypicalNetwork(linear, TRANSFORM, **options)


def features(counts: dict[str, int], number: int = 0) -> Experience:
    names = tuple(counts)
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([*counts.values()]))
    centres = 3 * normal(len(names), 4, seed=5)
    points = (centres[labels] + normal(len(labels), 4, seed=number)).float()
    return Experience(number, ImageSet(points, labels, names), phase=number)


@pytest.mark.parametrize("chosen", ["both", "support", "query"])
def test_icnn_takes_the_chosen_images_of_the_episode(chosen):
    learner = network(icnn=1.0, icnn_set=chosen, shot=3, query=2)
    h = normal(15, 4)
    places = {"both": [0, 1, 2, 3, 4], "support": [0, 1, 2], "query": [3, 4]}[chosen]
    points = h.reshape(3, 5, 4)[:, places].flatten(0, 1)
    labels = torch.arange(3).repeat_interleave(len(places))
    expected = slow_icnn(points.tolist(), labels.tolist(), 4)
    assert learner._icnn(h).item() == pytest.approx(expected)


def test_triplets_of_an_episode_take_its_means():
    h = normal(12, 4)
    grouped = h.reshape(3, 4, 4)
    queries, targets = grouped[:, 2:].flatten(0, 1), torch.tensor([0, 0, 1, 1, 2, 2])
    expected = slow_triplet(queries, grouped[:, :2].mean(1), targets, 0.7)
    learner = network(proto_triplet=1.0, margin=0.7)
    assert learner._proto_triplet(h).item() == pytest.approx(expected)


def test_weights_choose_the_terms():
    assert [term.name for term in network().terms] == ["prototypical"]
    learner = network(prototypical=0.0, proto_triplet=2.0, icnn=0.5)
    assert [(t.name, t.weight) for t in learner.terms] == [("proto_triplet", 2.0), ("icnn", 0.5)]
    learner.begin_experience(features(dict.fromkeys("abc", 4)))
    batch = next(iter(learner.batches(features(dict.fromkeys("abc", 4)).train, seed=0)))
    total = learner.training_step(batch, 0)
    parts = learner.mean_losses()
    assert total.item() == pytest.approx(2 * parts["proto_triplet"] + 0.5 * parts["icnn"])


def test_a_term_without_weight_changes_no_bit():
    runs = [network(), network(proto_triplet=0.0, icnn=0.0, margin=3.0)]
    for learner in runs:
        learn(learner, features(dict.fromkeys("abcd", 6)), FAST)
    assert state.sha256(runs[0]) == state.sha256(runs[1])


# In a stream


@pytest.mark.parametrize(
    ("counts", "episode"),
    [
        ({"a": 9, "b": 9, "c": 9, "d": 9}, (3, 2, 2)),
        ({"a": 9, "b": 9}, (2, 2, 2)),
        ({"a": 9, "b": 3}, (2, 2, 1)),
        ({"a": 2, "b": 9}, (2, 1, 1)),
        ({"a": 5, "b": 9, "c": 1}, (2, 2, 2)),
    ],
    ids=str,
)
def test_episodes_shrink_to_what_there_is(counts, episode):
    learner = network()
    learner.begin_experience(features(counts))
    assert learner.episode == episode and learner.length == 3
    way, shot, query = episode
    for images, labels in learner.batches(learner.training_data(features(counts)), seed=0):
        assert len(images) == len(labels) == way * (shot + query)


@pytest.mark.parametrize(
    "counts", [{"a": 1, "b": 1}, {"a": 9}, {"a": 1}, {"a": 9, "b": 1}], ids=str
)
def test_without_an_episode_the_network_stays_and_the_means_are_kept(counts):
    learner = network()
    before = learner.backbone.weight.clone()
    assert learn(learner, features(counts), FAST) == 0
    assert torch.equal(learner.backbone.weight, before)
    assert learner.memory.counts.tolist() == [*counts.values()]
    assert learner(torch.zeros(2, 4)).isfinite().all()


def test_base_training_refuses_what_a_stream_shrinks():
    with pytest.raises(NotEnoughData, match="3 classes"):
        network().check_base(features({"a": 9, "b": 9}).train)
    with pytest.raises(NotEnoughData, match="'b' has 3"):
        network().check_base(features({"a": 9, "b": 3, "c": 9}).train)
    network().check_base(features({"a": 9, "b": 4, "c": 9}).train)


def test_the_network_freezes_after_the_first_experience():
    learner, going_on = network(), network(train="all")
    stream = [features(dict.fromkeys("abc", 6)), features(dict.fromkeys("ade", 6), 1)]
    for kind in (learner, going_on):
        learn(kind, stream[0], FAST)
    assert torch.equal(learner.backbone.weight, going_on.backbone.weight)
    assert learn(learner, stream[1], FAST) == 0 and learn(going_on, stream[1], FAST) == 3
    assert not torch.equal(learner.backbone.weight, going_on.backbone.weight)
    assert learner.memory.counts.tolist() == [12, 6, 6, 6, 6]
    assert learner.classes == going_on.classes == tuple("abcde")
    moments = learner.memory.prototypes()
    own = learner.embed_all(torch.cat([e.train.images[e.train.labels == 0] for e in stream]))
    torch.testing.assert_close(moments[0], own.mean(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("train", ["first", "all"])
def test_a_restored_learner_goes_on_to_the_same_bytes(train):
    stream = [features(dict.fromkeys("abc", 6)), features(dict.fromkeys("de", 3), 1)]
    options = {"train": train, "icnn": 1.0, "proto_triplet": 1.0}
    whole, first = network(**options), network(**options)
    for experience in stream:
        learn(whole, experience, FAST)
    learn(first, stream[0], FAST)
    rest = network(**options)
    state.restore(rest, state.state_of(first))
    learn(rest, stream[1], TrainerOptions(precision="32", threads=1, loop="lightning"))
    assert state.sha256(rest) == state.sha256(whole)


def test_images_are_turned_and_changed_in_a_stream():
    pictures = torch.randint(0, 256, (12, 1, 16, 16), generator=torch.Generator()).to(torch.uint8)
    experience = Experience(0, ImageSet(pictures, torch.arange(12) % 2, ("a", "b")), phase=0)
    options = {"rotations": True, "augmentation": {}, "steps": 2, "dim": 8}
    conv = Conv4(1, 16, (4, 4, 4, 8))
    learner = PrototypicalNetwork(conv, Transform((0.5,), (0.5,)), way=6, **options)
    learner.begin_experience(experience)
    assert learner.episode == (6, 3, 3)
    learn(learner, experience, FAST)
    assert learner.scores_of(pictures).shape == (12, 2)


@pytest.mark.parametrize("kind", [PrototypicalNetwork, CrossEntropy])
def test_every_term_reaches_what_it_says(kind):
    learner = kind(nn.Linear(4, 4), TRANSFORM, steps=2, dim=4, batch_size=8)
    experience = features(dict.fromkeys("abc", 12))
    learner.begin_experience(experience)
    loader = learner.batches(learner.training_data(experience), seed=0)
    learner.training_step(next(iter(loader)), 0).backward()
    reached = {
        name.partition(".")[0] for name, p in learner.named_parameters() if p.grad is not None
    }
    assert reached == set(learner.terms[0].reaches)


def test_cross_entropy_answers_by_the_nearest_mean():
    learner = CrossEntropy(nn.Linear(4, 4), TRANSFORM, steps=30, dim=4, batch_size=16, lr=0.01)
    stream = [features(dict.fromkeys("abc", 9)), features({"d": 1}, 1)]
    assert [learn(learner, experience, FAST) for experience in stream] == [30, 0]
    assert learner.weight.shape == (0, 4)
    queries = stream[0].train.images
    nearest = torch.cdist(learner.embed_all(queries), learner.memory.prototypes()).argmin(1)
    assert torch.equal(learner.scores_of(queries).argmax(1), nearest)


def test_digits_from_the_command_line_settings():
    from clfed.config import compose
    from clfed.data.digits import load
    from clfed.learners.training import make_learner

    data = load(as_features=True)
    settings = ["learner.proto_triplet=1", "learner.icnn=1", "learner.augmentation=null"]
    cfg = compose(["learner=protonet", *settings, "learner.steps=60"]).learner
    assert [cfg.proto_triplet, cfg.icnn] == [1, 1]
    settings = {**cfg, "classifier": dict(cfg.classifier)}
    torch.manual_seed(0)
    learner = make_learner(settings, MLP(64, 0, (100,)), data, dim=100, seed=0)
    for number in range(5):
        names = [str(2 * number), str(2 * number + 1)]
        learn(learner, Experience(number, data.train.of_classes(names), phase=number), FAST)
    right = torch.tensor([*map(int, learner.classes)])[
        learner.scores_of(data.test.images).argmax(1)
    ]
    assert (right == data.test.labels).double().mean() > 0.55  # 2 of 10 classes trained it


def test_without_a_network_only_means_are_learned():
    learner = PrototypicalNetwork(Identity(), TRANSFORM, dim=4)
    assert learn(learner, features({"a": 3, "b": 2}), FAST) == 0
    with pytest.raises(ConfigError):
        PrototypicalNetwork(Identity(), TRANSFORM, dim=4, train="sometimes")
