"""Learners of exact statistics, on the reference stream and against the published recursions."""

import pytest
import torch
from sklearn.linear_model import Ridge

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.config import build, compose
from clfed.data.benchmark import ImageSet
from clfed.data.digits import load
from clfed.errors import ConfigError, InvalidEmbedding, UnsupportedStatistics
from clfed.learners import state
from clfed.learners.fecam import FeCAM
from clfed.learners.fitting import learn
from clfed.learners.ncm import NearestClassMean
from clfed.learners.options import TrainerOptions
from clfed.learners.protocl import ProtoCL
from clfed.learners.ranpac import PENALTIES, RanPAC, ridge_errors
from clfed.learners.simplecil import SimpleCIL
from clfed.learners.slda import StreamingLDA, recursive_scatter
from clfed.learners.teen import TEEN
from clfed.prototypes import RandomProjection, tukey
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
PROJECTION = {
    "_target_": "clfed.prototypes.features.RandomProjection",
    "dim_out": 2000,
    "seed": 0,
}
TABLE = {
    "ncm": (NearestClassMean, {}, 89.87),
    "ncm_cosine": (NearestClassMean, {"classifier": {"name": "ncm", "metric": "cosine"}}, 89.98),
    "simplecil": (SimpleCIL, {}, 89.98),
    "slda": (StreamingLDA, {}, 94.21),
    "slda_0.01": (StreamingLDA, {"classifier": {"name": "lda", "shrinkage": 1e-2}}, 94.65),
    "fecam": (FeCAM, {}, 96.99),
    "fecam_common": (FeCAM, {"classifier": {"name": "fecam", "common": True}}, 92.09),
    "gaussian": (
        NearestClassMean,
        {"classifier": {"name": "gaussian", "jitter": 0.01}, "moments": "class"},
        98.89,
    ),
    "ridge": (NearestClassMean, {"classifier": {"name": "ridge"}, "moments": "shared"}, 92.32),
    "ranpac": (RanPAC, {"penalty": 100.0, "feature_map": PROJECTION}, 98.46),
    "protocl0": (ProtoCL, {"memory_size": 0}, 89.98),
}
FROZEN = [NearestClassMean, SimpleCIL, StreamingLDA, FeCAM, RanPAC, TEEN]
SMALL = {RanPAC: {"feature_map": {**PROJECTION, "dim_out": 40}}}


@pytest.fixture(scope="module")
def digits():
    return load(as_features=True)


def stream(digits, order="0123456789", size=2, shuffle=None):
    """Experiences of ``size`` classes each, their images in a seeded order."""
    parts = []
    for number in range(0, len(order), size):
        part = digits.train.of_classes([*order[number : number + size]])
        if shuffle is not None:
            rng = torch.Generator().manual_seed(shuffle)
            part = part.subset(torch.randperm(len(part), generator=rng))
        parts.append(Experience(number // size, part, number // size))
    return parts


def plain(method, **options):
    return method(Identity(), Transform((), ()), dim=64, **options)


def trained(learner, experiences):
    for experience in experiences:
        learn(learner, experience, FAST)
    return learner


def scores_by_name(learner, images):
    order = sorted(range(len(learner.classes)), key=learner.classes.__getitem__)
    return learner.scores_of(images)[:, order]


def percent(learner, test):
    answers = scores_by_name(learner, test.images).argmax(1)
    return 100 * float((answers == test.labels).double().mean())


@pytest.mark.parametrize("row", TABLE)
def test_reference_table_in_any_order_and_partition(digits, row):
    method, options, expected = TABLE[row]
    straight = trained(plain(method, **options), stream(digits))
    tolerance = 0.4 if row == "ranpac" else 0.2  # the published one is a mean over projections
    assert percent(straight, digits.test) == pytest.approx(expected, abs=tolerance)
    others = [stream(digits, "7305918264", 2, 1)]
    if row != "ranpac":  # two seconds each
        others += [stream(digits, "9876543210", 5, 2), stream(digits, size=1)]
    for experiences in others:
        other = trained(plain(method, **options), experiences)
        assert other.memory == straight.memory
        ours, theirs = (
            scores_by_name(learner, digits.test.images) for learner in (other, straight)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-10)
        assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("row", [row for row in TABLE if row != "ranpac"])
def test_nodes_add_up_and_subtract(digits, row):
    method, options, _ = TABLE[row]
    whole = trained(plain(method, **options), stream(digits))
    nodes = []
    for node in range(3):
        share = [
            Experience(e.number, e.train.subset(torch.arange(node, len(e.train), 3)), e.phase)
            for e in stream(digits)
        ]
        nodes.append(trained(plain(method, **options), share))
    merged = nodes[2].memory + nodes[0].memory + nodes[1].memory
    assert merged == whole.memory
    assert merged - nodes[1].memory == nodes[0].memory + nodes[2].memory
    nodes[0].memory = merged
    images = digits.test.images[:100]
    assert torch.equal(nodes[0].scores_of(images), whole.scores_of(images))


# The recursion of the paper -------------------------------------------------------------------


def recursion(x, y, epsilon=1e-4):
    """Deep SLDA's update, one sample after another, retyped in torch; classes 0..9."""
    means, counts = torch.zeros(10, x.shape[1]).double(), torch.zeros(10).double()
    sigma = torch.zeros(x.shape[1], x.shape[1]).double()
    for n, (row, label) in enumerate(zip(x.double(), y.tolist(), strict=True)):
        away = row - means[label]
        delta = n / (n + 1) * torch.outer(away, away)
        sigma = (n * sigma + delta) / (n + 1)
        means[label] = (counts[label] * means[label] + row) / (counts[label] + 1)
        counts[label] += 1
    precision = torch.linalg.pinv((1 - epsilon) * sigma + epsilon * torch.eye(x.shape[1]).double())
    return sigma, means @ precision, -0.5 * (means @ precision * means).sum(1)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_paper_mode_is_the_recursion_sample_by_sample(digits, shuffle):
    experiences = stream(digits, shuffle=shuffle)
    learner = trained(plain(StreamingLDA, mode="paper"), experiences)
    x = torch.cat([e.train.images for e in experiences])
    y = torch.cat([e.train.labels + 2 * e.number for e in experiences])
    sigma, weight, bias = recursion(x, y)
    torch.testing.assert_close(learner.kept["scatter"] / 899, sigma, atol=1e-13, rtol=1e-10)
    expected = digits.test.images.double() @ weight.T + bias
    torch.testing.assert_close(learner.scores_of(digits.test.images), expected, atol=1e-7, rtol=0)
    assert learner.merges == "none" and plain(StreamingLDA).merges == "exact"


def test_paper_mode_on_the_sorted_stream(digits):
    experiences = []
    for e in stream(digits):
        order = e.train.labels.argsort(stable=True)
        experiences.append(Experience(e.number, e.train.subset(order), e.phase))
    learner = trained(plain(StreamingLDA, mode="paper"), experiences)
    assert percent(learner, digits.test) == pytest.approx(93.88, abs=0.2)


def test_recursion_in_blocks_is_the_recursion_at_once(digits):
    q = (digits.train.images[:200] * 2**16).long()
    labels = digits.train.labels[:200]
    counts, sums = torch.zeros(10, dtype=torch.int64), torch.zeros(10, 64, dtype=torch.int64)
    whole = recursive_scatter(q, labels, counts, sums, 0)
    parts = 0
    for start in range(0, 200, 37):
        rows, names = q[start : start + 37], labels[start : start + 37]
        parts = parts + recursive_scatter(rows, names, counts, sums, start)
        counts += torch.bincount(names, minlength=10)
        sums.index_add_(0, names, rows)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)


def test_paper_mode_takes_the_classes_up_again(digits):
    a, b = digits.train.of_classes(["3", "5"]), digits.train.of_classes(["5", "1"])
    parts = [Experience(0, a, 0), Experience(1, b, 1)]
    learner = trained(plain(StreamingLDA, mode="paper"), parts)
    x, y = torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels + 1])
    sigma, _, _ = recursion(x, y)
    torch.testing.assert_close(learner.kept["scatter"] / len(x), sigma, atol=1e-13, rtol=1e-10)


# RanPAC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [30, 90])
def test_ridge_errors_agree_with_sklearn(rows):
    rng = torch.Generator().manual_seed(rows)
    x, held = torch.randn(2, rows, 50, generator=rng, dtype=torch.float64)
    y, answers = torch.randn(2, rows, 3, generator=rng, dtype=torch.float64)
    penalties = (1e-2, 1.0, 1e3)
    ours = ridge_errors(x, y, held, answers, penalties)
    for found, penalty in zip(ours.tolist(), penalties, strict=True):
        model = Ridge(alpha=penalty, fit_intercept=False).fit(x.numpy(), y.numpy())
        expected = ((model.predict(held.numpy()) - answers.numpy()) ** 2).sum()
        assert found == pytest.approx(expected, rel=1e-8)


def test_ranpac_is_the_joint_ridge_regression(digits):
    learner = trained(plain(RanPAC, penalty=5.0, **SMALL[RanPAC]), stream(digits))
    z = RandomProjection(64, 40, 0)(digits.train.images)
    z = (z * 2**16).round() / 2**16
    targets = torch.nn.functional.one_hot(digits.train.labels).double()
    model = Ridge(alpha=5.0, fit_intercept=False).fit(z.numpy(), targets.numpy())
    queries = RandomProjection(64, 40, 0)(digits.test.images)
    expected = torch.from_numpy(model.predict(queries.numpy()))
    torch.testing.assert_close(learner.scores_of(digits.test.images), expected, atol=1e-7, rtol=0)


def test_penalty_is_chosen_in_each_experience_and_kept(digits):
    learner = plain(RanPAC, **SMALL[RanPAC])
    assert learner.penalty == 1.0
    chosen = []
    for experience in stream(digits):
        learn(learner, experience, FAST)
        chosen.append(learner.penalty)
    assert set(chosen) <= set(PENALTIES)
    again = plain(RanPAC, **SMALL[RanPAC])
    state.restore(again, state.state_of(learner))
    assert again.penalty == chosen[-1]
    few = digits.train.subset(torch.arange(4))
    learn(learner, Experience(5, few, 5), FAST)  # too few to hold any out
    assert learner.penalty == chosen[-1]
    other = trained(plain(RanPAC, seed=1, **SMALL[RanPAC]), stream(digits))
    assert not torch.equal(other.kept["held_out_errors"], again.kept["held_out_errors"])


def test_a_scale_is_a_change_of_the_penalty(digits):
    small = {**PROJECTION, "dim_out": 40, "scale": 0.25}
    scaled = trained(plain(RanPAC, penalty=2.0, feature_map=small), stream(digits))
    unscaled = trained(plain(RanPAC, penalty=32.0, **SMALL[RanPAC]), stream(digits))
    ours, theirs = (m.scores_of(digits.test.images) for m in (scaled, unscaled))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


# FeCAM ----------------------------------------------------------------------------------------


def test_fecam_refuses_negative_embeddings_and_can_do_without_the_power(digits):
    shifted = ImageSet(digits.train.images - 0.5, digits.train.labels, digits.train.classes)
    experience = Experience(0, shifted, 0)
    with pytest.raises(InvalidEmbedding, match="negative"):
        learn(plain(FeCAM), experience, FAST)
    learn(plain(FeCAM, feature_map=None), experience, FAST)


def test_fecam_by_loops(digits):
    few = digits.train.of_classes(["0", "1", "2"])
    learner = trained(plain(FeCAM), [Experience(0, few, 0)])
    z, queries = (tukey(x.double()) for x in (few.images, digits.test.images[:20]))
    z = (z * 2**16).round() / 2**16
    eye = torch.eye(64).double()
    for c in range(3):
        own = z[few.labels == c]
        cov = torch.cov(own.T)
        for _ in range(2):
            v1 = cov.trace() / 64
            v2 = (cov.sum() - cov.trace()) / (64 * 63)
            cov = cov + v1 * eye + v2 * (1 - eye)
        std = cov.diagonal().sqrt()
        inverse = torch.linalg.inv(cov / torch.outer(std, std))
        centre = own.mean(0) / own.mean(0).norm()
        for i, u in enumerate(queries):
            away = u / u.norm() - centre
            score = -(away @ inverse @ away)
            assert float(learner.scores_of(digits.test.images[i : i + 1])[0, c]) == pytest.approx(
                float(score), rel=1e-4
            )


# All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FROZEN)
def test_only_frozen_networks(method):
    with pytest.raises(ConfigError, match="all"):
        plain(method, train="all")


@pytest.mark.parametrize(
    ("method", "options", "error"),
    [
        (NearestClassMean, {"classifier": {"name": "knn"}}, ConfigError),
        (NearestClassMean, {"classifier": {"metric": "cosine"}}, ConfigError),
        (NearestClassMean, {"classifier": {"name": "ncm", "metric": "l1"}}, ConfigError),
        (NearestClassMean, {"classifier": {"name": "lda"}}, UnsupportedStatistics),
        (NearestClassMean, {"classifier": {"name": "fedcof"}}, UnsupportedStatistics),
        (StreamingLDA, {"mode": "fast"}, ConfigError),
        (StreamingLDA, {"classifier": {"name": "lda", "shrinkage": "x"}}, ConfigError),
        (StreamingLDA, {"mode": "paper", "classifier": {"name": "ncm"}}, ConfigError),
        (FeCAM, {"moments": "shared"}, UnsupportedStatistics),
        (RanPAC, {"penalty": 0.0}, ConfigError),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_learned(method, options, error):
    with pytest.raises(error):
        plain(method, **options)


@pytest.mark.parametrize("method", FROZEN)
def test_network_learns_once_and_the_same_in_every_run(digits, method):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = MLP(64, 0, (16,))
        small = {RanPAC: {"feature_map": {**PROJECTION, "dim_out": 40}}}.get(method, {})
        options = {"train": "first", "epochs": 2, "batch_size": 64, "seed": 4, **small}
        return method(network, Transform((), ()), dim=16, **options)

    one, other = make(), make()
    experiences = stream(digits)[:3]
    learn(one, experiences[0], FAST)
    version = one.version()
    assert version != make().version()
    resumed = make()
    state.restore(resumed, state.state_of(one))
    for learner in (one, resumed):
        trained(learner, experiences[1:])
    assert one.version() == version and one.length == 0
    trained(other, experiences)
    assert state.sha256(one) == state.sha256(resumed) == state.sha256(other)
    assert one.images_kept == 0
    images = digits.test.images[:50]
    assert torch.equal(one.scores_of(images), resumed.scores_of(images))


@pytest.mark.parametrize("method", [*FROZEN, ProtoCL])
def test_single_images_and_single_classes_are_enough(digits, method):
    learner = plain(method, batch_size=1, **SMALL.get(method, {}))
    if method is ProtoCL:
        learner = plain(method, memory_size=0)
    for number, name in enumerate("305"):
        one = digits.train.of_classes([name]).subset(torch.arange(1))
        learn(learner, Experience(number, one, number), FAST)
        scores = learner.scores_of(digits.test.images[:9])
        assert scores.shape == (9, number + 1) and bool(torch.isfinite(scores).all())
    again = digits.train.of_classes(["0", "3"])
    learn(learner, Experience(3, again, 3), FAST)
    assert learner.classes == ("3", "0", "5")
    assert learner.memory.total_count == 3 + len(again)


@pytest.mark.parametrize(
    "name", ["ncm", "simplecil", "slda", "fecam", "ranpac", "teen", "protocl", "protocl0"]
)
def test_configured_learners_run_on_images(name):
    cfg = compose([f"learner={name}", "seed=3"])
    images = load()
    shape = MLP(1, 8, (32,))
    options = {"epochs": 1} if name != "simplecil" else {}
    if name == "ranpac":
        cfg.learner.feature_map.dim_out = 50
        assert cfg.learner.feature_map.seed == 3
    learner = build(
        {**cfg.learner, **options},
        backbone=shape,
        transform=Transform(images.mean, images.std),
        dim=32,
        seed=3,
    )
    trained(learner, stream(images)[:2])
    scores = learner.scores_of(images.test.images[:30])
    assert scores.shape == (30, 4) and bool(torch.isfinite(scores).all())
