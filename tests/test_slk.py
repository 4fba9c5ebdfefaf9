"""Laplacian clustering of questions: limits, energies, symmetries, and the learner's option."""

from itertools import pairwise

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from clfed.backbones import Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, InvalidEmbedding
from clfed.learners.fitting import learn
from clfed.learners.ncm import NearestClassMean
from clfed.learners.options import TrainerOptions
from clfed.learners.simplecil import SimpleCIL
from clfed.learners.teen import TEEN
from clfed.prototypes.neighbours import affinity, bandwidth, squared_distances
from clfed.prototypes.transductive import Laplacian, cluster
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
ABC = torch.arange(3)


def blobs(seed, queries=40, dim=5, classes=3, spread=0.6):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=rng, dtype=torch.float64)
    labels = torch.randint(classes, (queries,), generator=rng)
    noise = spread * torch.randn(queries, dim, generator=rng, dtype=torch.float64)
    support = centres + 0.3 * torch.randn(classes, dim, generator=rng, dtype=torch.float64)
    return support, centres[labels] + noise, labels


@pytest.mark.parametrize("size", [3, 60, 700])
def test_graph_agrees_with_sklearn_and_is_positive(size):
    rng = torch.Generator().manual_seed(size)
    points = torch.randn(size, 3, generator=rng, dtype=torch.float64)
    graph = affinity(points, 2).to_dense()
    there = torch.tensor(
        NearestNeighbors(n_neighbors=2).fit(points.numpy()).kneighbors_graph().toarray()
    )
    off = ~torch.eye(size, dtype=torch.bool)
    assert torch.equal(graph[off], (0.5 * (there + there.T))[off])
    values = torch.linalg.eigvalsh(graph)
    assert -1e-9 < float(values[0]) < 1e-6
    assert float(graph.diagonal().std()) < 1e-12


def test_bandwidth_by_loops():
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    squares = [
        sorted(float((a - b).square().sum()) for j, b in enumerate(points) if j != i)[:5]
        for i, a in enumerate(points)
    ]
    assert bandwidth(points) == pytest.approx(sum(map(sum, squares)) / 60)


@pytest.mark.parametrize("seed", range(3))
def test_without_smoothness_it_is_soft_k_means(seed):
    support, queries, _ = blobs(seed)
    found = cluster(support, ABC, queries, options=Laplacian(strength=0.0))
    points, centres = torch.cat([support, queries]), support.clone()
    for _ in range(300):
        away = torch.stack([-(queries - centre).square().sum(1) for centre in centres], dim=1)
        soft = away.exp() / away.exp().sum(1, keepdim=True)
        mass = torch.cat([torch.eye(3, dtype=torch.float64), soft])
        centres = torch.stack([(mass[:, k, None] * points).sum(0) / mass[:, k].sum() for k in ABC])
    torch.testing.assert_close(found.assignments, soft, atol=3e-2, rtol=0)
    torch.testing.assert_close(found.prototypes, centres, atol=3e-2, rtol=0)


@pytest.mark.parametrize("mode", ["kmeans", "meanshift"])
@pytest.mark.parametrize("strength", [0.0, 0.7, 3.0])
def test_energy_never_rises(mode, strength):
    for seed in range(15):
        support, queries, _ = blobs(seed)
        options = Laplacian(strength=strength, mode=mode)
        weights = torch.tensor([1.0, 5.0, 30.0])
        energies = cluster(support, ABC, queries, weights=weights, options=options).energies
        assert len(energies) > 2
        for before, after in pairwise(energies):
            assert after <= before + 1e-9 * max(1.0, abs(before))


@pytest.mark.parametrize("mode", ["kmeans", "meanshift"])
def test_last_energy_by_loops(mode):
    support, queries, _ = blobs(4, queries=9)
    options = Laplacian(strength=0.5, mode=mode)
    found = cluster(support, ABC, queries, weights=torch.tensor([2.0, 1.0, 4.0]), options=options)
    points = torch.cat([support, queries])
    graph, sigma = affinity(points, 2).to_dense(), bandwidth(points)
    y = torch.cat([torch.eye(3, dtype=torch.float64), found.assignments])
    weights = [2.0, 1.0, 4.0, *[1.0] * 9]
    energy = 0.0
    for p, x in enumerate(points):
        for k, c in enumerate(found.prototypes):
            cost = (x - c).square().sum()
            cost = cost if mode == "kmeans" else -torch.exp(-cost / (2 * sigma))
            energy += weights[p] * y[p, k] * cost
            energy += y[p, k] * y[p, k].log() if y[p, k] > 0 else 0.0
            energy -= 0.25 * sum(y[p, k] * graph[p, j] * y[j, k] for j in range(12))
    assert found.energies[-1] == pytest.approx(float(energy))


@pytest.mark.parametrize("mode", ["kmeans", "meanshift"])
def test_order_of_questions_and_names_of_classes_do_not_matter(mode):
    support, queries, _ = blobs(7)
    options = Laplacian(mode=mode)
    found = cluster(support, ABC, queries, options=options).assignments
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(1))
    shuffled = cluster(support, ABC, queries[order], options=options).assignments
    torch.testing.assert_close(shuffled, found[order])
    renamed = cluster(support, torch.tensor([2, 0, 1]), queries, options=options).assignments
    torch.testing.assert_close(renamed[:, [2, 0, 1]], found)


def test_one_class_one_question_and_equal_points():
    point = torch.ones(1, 4)
    for mode in ("kmeans", "meanshift"):
        options = Laplacian(mode=mode)
        many = cluster(point, torch.tensor([0]), torch.rand(6, 4), options=options)
        assert torch.equal(many.assignments, torch.ones(6, 1, dtype=torch.float64))
        same = cluster(torch.ones(3, 4), ABC, point, options=options)
        assert same.assignments.shape == (1, 3) and float(same.assignments.sum()) == pytest.approx(
            1
        )
        assert bool(torch.isfinite(same.prototypes).all())


def test_a_mean_stands_for_its_images():
    """Counts as weights move the prototypes as the images themselves would, clamped."""
    support, queries, _ = blobs(2)
    offsets = 0.1 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3)).double()
    images = support[:, None] + offsets - offsets.mean(1, keepdim=True)
    plain = Laplacian(strength=0.0)
    by_mean = cluster(support, ABC, queries, weights=torch.full((3,), 4.0), options=plain)
    labels = ABC.repeat_interleave(4)
    by_image = cluster(images.flatten(0, 1), labels, queries, options=plain)
    torch.testing.assert_close(by_mean.prototypes, by_image.prototypes, atol=1e-3, rtol=0)


def test_squared_distances():
    a, b = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(squared_distances(a, b), torch.cdist(a, b) ** 2)


@pytest.mark.parametrize(
    "options",
    [{"strength": -1}, {"mode": "median"}, {"neighbours": 0}, {"neighbours": True}, {"lambda": 1}],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        NearestClassMean(Identity(), Transform((), ()), dim=4, transductive=options)


def test_only_nearest_means_can_be_transductive():
    with pytest.raises(ConfigError, match="ridge"):
        NearestClassMean(
            Identity(),
            Transform((), ()),
            dim=4,
            classifier={"name": "ridge"},
            moments="shared",
            transductive={},
        )


@pytest.mark.parametrize("method", [NearestClassMean, SimpleCIL, TEEN])
def test_learners_answer_together_and_say_so(method):
    rng = torch.Generator().manual_seed(11)
    centres = 4 + 3 * torch.randn(4, 6, generator=rng)
    labels = torch.arange(4).repeat(30)
    images = centres[labels] + 1.5 * torch.randn(120, 6, generator=rng)
    together = method(Identity(), Transform((), ()), dim=6, transductive={"shift": True})
    single = method(Identity(), Transform((), ()), dim=6)
    assert together.transductive and not single.transductive
    for learner in (together, single):
        for number, names in enumerate((("a", "b"), ("c", "d"))):
            chosen = (labels // 2 == number).nonzero().flatten()[:6]
            part = ImageSet(images[chosen], labels[chosen] % 2, names)
            learn(learner, Experience(number, part, number), FAST)
    scores = together.scores_of(images)
    assert scores.shape == (120, 4) and bool(torch.isfinite(scores).all())
    right = (scores.argmax(1) == labels).double().mean()
    assert right >= (single.scores_of(images).argmax(1) == labels).double().mean() - 0.03
    assert together.scores_of(images[:0]).shape == (0, 4)
    assert together.scores_of(images[:1]).shape == (1, 4)
    part = together.scores_of(images[:10])
    assert not torch.allclose(part, scores[:10])  # the other questions matter
    assert together.memory == single.memory
    with pytest.raises(InvalidEmbedding):
        together.reader().scores(torch.full((2, 6), torch.nan))
