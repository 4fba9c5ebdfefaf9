"""Projection: the geometry of what stays, and statistics that follow without an image."""

import pytest
import torch
from torch import nn

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.prototypes import PrototypeMemory
from clfed.seeding import generator
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.projection import Projection, directions, edited, projector
from clfed.unlearning.statistics import Statistics

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat", "dog")
UNIT = 2.0**-16


def points() -> ImageSet:
    labels = torch.arange(4).repeat_interleave(25)
    centres = 3 * torch.eye(6)[:4] + 5
    noise = 0.7 * torch.randn(100, 6, generator=generator(0, "points"))
    return ImageSet(centres[labels] + noise, labels, CLASSES)


def named(images):
    return [images.classes[row] for row in images.labels.tolist()]


def seen(embeddings, names, moments="none"):
    empty = PrototypeMemory.empty(embeddings.shape[1], "demo", moments)
    return empty.observe(embeddings, names)


def original(moments="none", **options):
    backbone = nn.Linear(6, 6)
    with torch.no_grad():
        backbone.weight.copy_(torch.eye(6))
        backbone.bias.zero_()
    learner = Naive(backbone, Transform((), ()), name="naive", dim=6, moments=moments, **options)
    learner.grow(CLASSES)
    images = points()
    empty = PrototypeMemory.empty(6, learner.version(), moments)
    learner.memory = empty.observe(learner.mapped(learner.embed_all(images.images)), named(images))
    return learner.eval()


def context(learner, request, *, statistics=True):
    images, ids = points(), torch.arange(100)
    rows = torch.tensor([CLASSES.index(name) for name in request.classes], dtype=torch.int64)
    gone = ids[torch.isin(images.labels, rows)] if len(rows) else ids[:5]
    known = Statistics.of(learner, images, ids, ["me"] * 100) if statistics else None
    return make_context(request, learner, images, ids, gone=gone, statistics=known)


def run(*names, learner=None, **options):
    learner = original() if learner is None else learner
    around = context(learner, Request("r", "class", classes=names))
    return forget(Projection(learner, **options), around, OPTIONS)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_simplex_without_a_vertex_is_a_simplex(count):
    # Vertices of a simplex: unit vectors about their mean, turned at random.
    turn = torch.linalg.qr(torch.randn(count, count, generator=generator(0, "turn")).double())[0]
    vertices = (torch.eye(count, dtype=torch.float64) - 1 / count) @ turn
    vertices = vertices / vertices.norm(dim=1, keepdim=True)
    kept = (vertices @ projector(vertices[:1]))[1:]
    kept = kept / kept.norm(dim=1, keepdim=True)
    cosines = (kept @ kept.T)[~torch.eye(count - 1, dtype=torch.bool)]
    torch.testing.assert_close(cosines, torch.full_like(cosines, -1 / (count - 2)))


def test_projector_is_one_and_removes_the_span():
    rows = torch.randn(3, 7, generator=generator(0, "rows")).double()
    rows = torch.cat([rows, rows[:1] + rows[1:2], torch.zeros(1, 7).double()])
    matrix = projector(rows)
    torch.testing.assert_close(matrix @ matrix, matrix)
    torch.testing.assert_close(matrix, matrix.T)
    assert float((rows @ matrix).abs().max()) < 1e-12
    assert float(matrix.trace()) == pytest.approx(7 - 3)


@pytest.mark.parametrize("moments", ["none", "class", "shared"])
def test_edited_statistics_are_those_of_edited_embeddings(moments):
    images = points()
    matrix = projector(torch.randn(1, 6, generator=generator(1, "v")).double())
    ours = edited(seen(images.images, named(images), moments), matrix, "demo")
    theirs = seen((images.images.double() @ matrix).float(), named(images), moments)
    assert ours.classes == theirs.classes
    assert torch.equal(ours.counts, theirs.counts)
    # Each of 25 embeddings of 6 numbers is off by a rounding of at most one unit.
    assert int((ours.sums - theirs.sums).abs().max()) <= 25 * 6
    if moments != "none":
        size = float(images.images.abs().max())
        gap = float((ours.outer - theirs.outer).abs().max()) * UNIT**2
        assert gap <= 100 * 6 * 2 * size * UNIT


def test_directions_start_from_the_mean_of_all_means_or_from_zero():
    memory = seen(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), ["ant", "bee"])
    assert directions(memory, ["bee"], centred=False).tolist() == [[0.0, 4.0]]
    assert directions(memory, ["bee"], centred=True).tolist() == [[-1.0, 2.0]]


@pytest.mark.parametrize("centred", [True, False])
def test_model_answers_by_the_nearest_mean_of_projected_images(centred):
    model, report = run("bee", centred=centred)
    images = points()
    z = images.images.double()
    means = torch.stack([z[images.labels == row].mean(0) for row in range(4)])
    v = means[1] - (means.mean(0) if centred else 0)
    v = v / v.norm()
    z, means = z - (z @ v)[:, None] * v, means - (means @ v)[:, None] * v
    torch.testing.assert_close(model.embed_all(images.images).double(), z, atol=1e-4, rtol=1e-4)
    distances = torch.cdist(z, means)
    distances[:, 1] = torch.inf
    assert torch.equal(model.scores_of(images.images).argmax(1), distances.argmin(1))
    assert bool((model.scores_of(images.images, closed=False)[:, 1] == -torch.inf).all())
    assert report.touched == {"class statistics": 0}
    assert not report.exact
    assert model.memory.embedding_id == model.version()


def test_several_classes_go_in_any_order():
    one, report = run("bee", "dog")
    other, _ = run("dog", "bee")
    assert report.lineage == {"removed_directions": 2}
    assert one.memory.classes == ("ant", "cat")
    images = points().images
    torch.testing.assert_close(one.scores_of(images)[:, [0, 2]], other.scores_of(images)[:, [0, 2]])


def test_second_moments_by_class_follow_and_pooled_ones_are_dropped():
    model, _ = run("bee", learner=original("class"))
    assert model.memory.moments == "class"
    z = model.embed_all(points().images[:25]).double()
    torch.testing.assert_close(
        model.memory.outer[0].double() * UNIT**2, z.T @ z, atol=0.1, rtol=1e-4
    )
    model, _ = run("bee", learner=original("shared"))
    assert model.memory.moments == "none"


def test_refuses_what_it_cannot_do():
    learner = original()
    for request in (Request("r", "sample", samples=(0, 1, 2, 3, 4)),
                    Request("r", "contributor", contributor="me")):  # fmt: skip
        with pytest.raises(ConfigError, match="direction"):
            forget(Projection(learner), context(learner, request), OPTIONS)
    bee = Request("r", "class", classes=("bee",))
    with pytest.raises(ConfigError, match="none"):
        forget(Projection(learner), context(learner, bee, statistics=False), OPTIONS)
    with pytest.raises(ConfigError, match="stays"):
        run(*CLASSES)
    mapped = {"_target_": "clfed.prototypes.features.tukey", "beta": 0.5}
    with pytest.raises(ConfigError, match="something else"):
        run("bee", learner=original(feature_map=mapped))
