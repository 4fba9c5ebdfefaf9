"""Classifiers read off a memory, against scikit-learn, closed forms and slow loops."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid

from clfed.errors import (
    ConfigError,
    InvalidEmbedding,
    InvalidMessage,
    NotEnoughData,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.prototypes import (
    CLASSIFIERS,
    Groups,
    PrototypeMemory,
    RandomProjection,
    groups_of,
    read_off,
    tukey,
)
from clfed.prototypes.covariance import correlation, whitening

DIM, CLASSES = 6, 5
NAMES = tuple("abcde")


def draw(seed, count, spread=1.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, DIM)) * spread
    mix = np.random.default_rng(98).normal(size=(CLASSES, DIM, DIM)) * 0.6
    y = rng.choice(CLASSES, size=count, p=[0.1, 0.15, 0.2, 0.25, 0.3])
    x = centres[y] + np.einsum("bij,bj->bi", mix[y], rng.normal(size=(count, DIM))) + 3
    return np.round(x * 2**16) / 2**16, y  # on the grid: the memory is then exact


def memory_of(x, y, moments="class", names=NAMES):
    zero = PrototypeMemory.empty(x.shape[1], "e", moments)
    return zero.observe(torch.as_tensor(x), [names[label] for label in y])


@pytest.fixture(scope="module")
def blobs():
    x, y = draw(0, 300)
    queries, answers = draw(1, 400)
    return x, y, queries, answers


def predictions(classifier, queries):
    return classifier.predict(torch.as_tensor(queries)).numpy()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_beats_chance_and_has_the_right_shapes(blobs, name):
    x, y, queries, answers = blobs
    parts = [memory_of(x[k::4], y[k::4]) for k in range(4)]
    memory = sum(parts, PrototypeMemory.empty(DIM, "e", "class"))
    classifier = read_off(name, memory, groups=groups_of(memory, parts))
    assert classifier.classes == NAMES
    scores = classifier.scores(torch.as_tensor(queries))
    assert scores.shape == (400, CLASSES) and scores.dtype == torch.float64
    assert (predictions(classifier, queries) == scores.argmax(1).numpy()).all()
    assert (predictions(classifier, queries) == answers).mean() > 0.6
    assert classifier.scores(torch.zeros(0, DIM)).shape == (0, CLASSES)
    for bad in (torch.zeros(2, DIM + 1), torch.zeros(DIM), torch.full((1, DIM), torch.nan)):
        with pytest.raises(InvalidEmbedding):
            classifier.scores(bad)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_label_space_is_restricted_but_covariance_is_not(blobs, name):
    x, y, queries, _ = blobs
    parts = [memory_of(x[k::4], y[k::4]) for k in range(4)]
    memory = sum(parts, PrototypeMemory.empty(DIM, "e", "class"))
    groups = groups_of(memory, parts)
    z = torch.as_tensor(queries)
    whole = read_off(name, memory, groups=groups).scores(z)
    few = read_off(name, memory, groups=groups, classes=["d", "b"])
    assert few.classes == ("d", "b")
    difference = few.scores(z) - whole[:, [3, 1]]
    constant = difference[0, 0]  # empirical priors are those of the label space
    torch.testing.assert_close(difference, constant.expand_as(difference), atol=1e-8, rtol=0)
    with pytest.raises(UnknownClass, match="'z'"):
        read_off(name, memory, groups=groups, classes=["a", "z"])
    with pytest.raises(NotEnoughData):
        read_off(name, memory, groups=groups, classes=[])
    with pytest.raises(ConfigError, match="nonsense"):
        read_off(name, memory, groups=groups, nonsense=1)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_nothing_known_is_an_error(name):
    zero = PrototypeMemory.empty(DIM, "e", "class")
    with pytest.raises(NotEnoughData):
        read_off(name, zero, groups=groups_of(zero, []))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_renaming_classes_permutes_scores(blobs, name):
    x, y, queries, _ = blobs
    renamed = ("zz", "q", "m", "c", "a")
    results = []
    for names in (NAMES, renamed):
        parts = [memory_of(x[k::4], y[k::4], names=names) for k in range(4)]
        memory = sum(parts, PrototypeMemory.empty(DIM, "e", "class"))
        classifier = read_off(name, memory, groups=groups_of(memory, parts), classes=names)
        results.append(classifier.scores(torch.as_tensor(queries)))
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-10)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_example_of_each_class_is_enough(name):
    x = np.eye(3, DIM) + 0.5
    memory = memory_of(x, [0, 1, 2])
    classifier = read_off(name, memory, groups=groups_of(memory, [memory]))
    assert predictions(classifier, x).tolist() == [0, 1, 2]
    single = memory_of(x[:1], [0])
    alone = read_off(name, single, groups=groups_of(single, [single]))
    assert predictions(alone, x).tolist() == [0, 0, 0]


def test_unknown_names_and_values_are_refused(blobs):
    memory = memory_of(*blobs[:2])
    for call in (
        lambda: read_off("knn", memory),
        lambda: read_off("ncm", memory, metric="cityblock"),
        lambda: read_off("lda", memory, shrinkage=1.5),
        lambda: read_off("lda", memory, priors="flat"),
        lambda: read_off("ridge", memory, penalty=0.0),
        lambda: read_off("gaussian", memory, jitter=-1.0),
        lambda: read_off("fedcof", memory, groups=groups_of(memory, [memory]), shrinkage=0.0),
    ):
        with pytest.raises(ConfigError):
            call()


@pytest.mark.parametrize(
    ("name", "options", "moments"),
    [
        ("lda", {}, "none"),
        ("lda", {"pooling": "uniform"}, "shared"),
        ("fecam", {}, "shared"),
        ("fecam", {"common": True}, "none"),
        ("gaussian", {}, "shared"),
        ("ridge", {}, "none"),
        ("fedcof", {}, "none"),
    ],
)
def test_missing_statistics_are_named(blobs, name, options, moments):
    with pytest.raises(UnsupportedStatistics):
        read_off(name, memory_of(*blobs[:2], moments), **options)


def test_debts_are_refused(blobs):
    memory = memory_of(*blobs[:2])
    with pytest.raises(InvalidMessage):
        read_off("ncm", memory - memory - memory)


def test_nearest_mean_agrees_with_sklearn(blobs):
    x, y, queries, _ = blobs
    memory = memory_of(x, y, "none")
    theirs = NearestCentroid().fit(x, y).predict(queries)
    assert (predictions(read_off("ncm", memory), queries) == theirs).all()
    means = np.stack([x[y == c].mean(0) for c in range(CLASSES)])
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        means / np.linalg.norm(means, axis=1, keepdims=True)
    ).T
    ours = read_off("ncm_cosine", memory).scores(torch.as_tensor(queries))
    np.testing.assert_allclose(ours, cosines, atol=1e-12)


def test_nearest_mean_ignores_a_shift_and_a_rotation(blobs):
    x, y, queries, _ = blobs
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, DIM)))[0]
    here = predictions(read_off("ncm", memory_of(x, y, "none")), queries)
    there = predictions(read_off("ncm", memory_of(x @ turn + 40, y, "none")), queries @ turn + 40)
    assert (here == there).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("moments", ["shared", "class"])
def test_lda_agrees_with_sklearn(blobs, shrinkage, moments):
    x, y, queries, _ = blobs
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
    ours = read_off(
        "lda", memory_of(x, y, moments), shrinkage=shrinkage, target="trace", priors="empirical"
    )
    z = torch.as_tensor(queries)
    np.testing.assert_allclose(
        ours.scores(z), theirs.decision_function(queries), rtol=1e-6, atol=1e-6
    )
    assert (predictions(ours, queries) == theirs.predict(queries)).all()


def test_lda_with_equal_priors_agrees_with_sklearn(blobs):
    x, y, queries, _ = blobs
    equal = np.full(CLASSES, 1 / CLASSES)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2, priors=equal).fit(x, y)
    ours = read_off("lda", memory_of(x, y), shrinkage=0.2, target="trace", pooling="uniform")
    difference = ours.scores(torch.as_tensor(queries)).numpy() - theirs.decision_function(queries)
    np.testing.assert_allclose(difference, np.log(CLASSES), atol=1e-6)
    assert (predictions(ours, queries) == theirs.predict(queries)).all()


def test_lda_without_shrinkage_ignores_any_linear_map(blobs):
    x, y, queries, _ = blobs
    skew = np.random.default_rng(5).normal(size=(DIM, DIM))
    here = read_off("lda", memory_of(x, y), shrinkage=0.0)
    there = read_off("lda", memory_of(x @ skew, y), shrinkage=0.0)
    assert (predictions(here, queries) == predictions(there, queries @ skew)).mean() > 0.99


def test_singular_covariance_falls_back_to_the_pseudo_inverse(blobs):
    x, y, queries, _ = blobs
    wide, wider = np.hstack([x, x[:, :2]]), np.hstack([queries, queries[:, :2]])
    ours = read_off("lda", memory_of(wide, y), shrinkage=0.0)
    plain = read_off("lda", memory_of(x, y), shrinkage=0.0)
    assert (predictions(ours, wider) == predictions(plain, queries)).mean() > 0.99
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    white, log_determinant = whitening(matrix[None])
    torch.testing.assert_close((white.mT @ white)[0], torch.linalg.pinv(matrix))
    assert log_determinant.item() == pytest.approx(np.log(2))


def test_gaussian_agrees_with_sklearn(blobs):
    x, y, queries, _ = blobs
    # scikit-learn's covariances are unbiased and mixed with the identity: undo both.
    theirs = np.empty((len(queries), CLASSES))
    for c in range(CLASSES):
        part = x[y == c]
        covariance = np.cov(part.T, bias=True) + 0.05 * np.eye(DIM)
        centred = queries - part.mean(0)
        theirs[:, c] = (
            -0.5 * np.sum(centred @ np.linalg.inv(covariance) * centred, axis=1)
            - 0.5 * np.linalg.slogdet(covariance)[1]
            + np.log(len(part) / len(x))
        )
    ours = read_off("gaussian", memory_of(x, y), jitter=0.05)
    np.testing.assert_allclose(ours.scores(torch.as_tensor(queries)), theirs, rtol=1e-8)
    near = QuadraticDiscriminantAnalysis().fit(x, y).predict(queries)
    assert (
        predictions(read_off("gaussian", memory_of(x, y), jitter=1e-9), queries) == near
    ).mean() > 0.97


def test_ridge_agrees_with_least_squares(blobs):
    x, y, *_ = blobs
    penalty = 2.5
    design = np.vstack([x, np.sqrt(penalty) * np.eye(DIM)])
    target = np.vstack([np.eye(CLASSES)[y], np.zeros((DIM, CLASSES))])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    for moments in ("shared", "class"):
        ours = read_off("ridge", memory_of(x, y, moments), penalty=penalty)
        np.testing.assert_allclose(ours.weight.T, solution, rtol=1e-9, atol=1e-12)
        scaled = read_off("ridge", memory_of(x, y, moments), penalty=penalty, normalise=True)
        np.testing.assert_allclose(
            scaled.weight.T, solution / np.linalg.norm(solution, axis=0), rtol=1e-9
        )


def test_fecam_golden():
    covariance = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    # One shrink gives [[5, 2], [2, 7]], two give [[11, 4], [4, 13]].
    assert correlation(covariance, (1.0, 1.0), 1)[0, 1].item() == pytest.approx(2 / np.sqrt(35))
    twice = correlation(covariance, (1.0, 1.0), 2)
    assert twice[0, 1].item() == pytest.approx(0.3344968, abs=1e-7)
    assert twice.diagonal().tolist() == pytest.approx([1.0, 1.0])
    batch = correlation(torch.stack([covariance, torch.zeros(2, 2).double()]), (1.0, 1.0), 2)
    assert torch.equal(batch[0], twice) and torch.equal(batch[1], torch.eye(2).double())


@pytest.mark.parametrize("common", [False, True])
def test_fecam_agrees_with_slow_loops(blobs, common):
    x, y, queries, _ = blobs
    covariances = [np.cov(x[y == c].T) for c in range(CLASSES)]
    if common:
        pooled = sum(s * ((y == c).sum() - 1) for c, s in enumerate(covariances))
        covariances = [pooled / (len(x) - CLASSES)] * CLASSES
    expected = np.empty((len(queries), CLASSES))
    for c, covariance in enumerate(covariances):
        s = covariance.copy()
        for _ in range(2):
            v1 = np.mean(np.diag(s))
            v2 = s[~np.eye(DIM, dtype=bool)].mean()
            s = s + v1 * np.eye(DIM) + v2 * (1 - np.eye(DIM))
        s /= np.sqrt(np.outer(np.diag(s), np.diag(s)))
        centre = x[y == c].mean(0)
        for row, query in enumerate(queries):
            d = query / np.linalg.norm(query) - centre / np.linalg.norm(centre)
            expected[row, c] = -d @ np.linalg.solve(s, d)
    moments = "shared" if common else "class"
    ours = read_off("fecam", memory_of(x, y, moments), common=common).scores(
        torch.as_tensor(queries)
    )
    difference = ours.numpy() - expected
    np.testing.assert_allclose(difference, difference[:, :1].repeat(CLASSES, 1), atol=1e-9)
    if not common:
        np.testing.assert_allclose(difference, 0, atol=1e-9)


def test_quadratic_scores_do_not_depend_on_blocks(blobs, monkeypatch):
    x, y, queries, _ = blobs
    classifier = read_off("fecam", memory_of(x, y))
    whole = classifier.scores(torch.as_tensor(queries))
    monkeypatch.setattr("clfed.prototypes.heads._BLOCK_ENTRIES", 100)
    torch.testing.assert_close(
        classifier.scores(torch.as_tensor(queries)), whole, rtol=1e-12, atol=1e-12
    )


def test_fedcof_agrees_with_slow_loops(blobs):
    x, y, queries, _ = blobs
    node = np.random.default_rng(7).integers(0, 6, size=len(x))
    node[y == 0] = 2  # this class comes from one node alone
    gamma = 0.3
    parts = [memory_of(x[node == k], y[node == k], "none") for k in range(6)]
    memory = sum(parts, PrototypeMemory.empty(DIM, "e"))
    matrix = len(x) * np.outer(x.mean(0), x.mean(0))
    for c in range(1, CLASSES):
        centre, spread = x[y == c].mean(0), np.zeros((DIM, DIM))
        members = [k for k in range(6) if ((node == k) & (y == c)).any()]
        for k in members:
            group = x[(node == k) & (y == c)]
            spread += len(group) * np.outer(group.mean(0) - centre, group.mean(0) - centre)
        covariance = spread / (len(members) - 1) + gamma * np.eye(DIM)
        matrix += ((y == c).sum() - 1) * covariance
    sums = np.stack([x[y == c].sum(0) for c in range(CLASSES)], axis=1)
    solution = np.linalg.solve(matrix, sums)
    solution /= np.linalg.norm(solution, axis=0)
    ours = read_off("fedcof", memory, groups=groups_of(memory, parts), shrinkage=gamma)
    np.testing.assert_allclose(ours.weight.T, solution, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(ours.scores(torch.as_tensor(queries)), queries @ solution, atol=1e-7)


def test_fedcof_covariance_is_unbiased():
    """Mean of the estimate over many draws is the covariance of the examples, one class."""
    rng = np.random.default_rng(11)
    root = np.array([[1.0, 0.0], [0.8, 0.5]])
    sizes = [2, 3, 5, 10]
    estimates = []
    for _ in range(3000):
        x = rng.normal(size=(sum(sizes), 2)) @ root.T
        groups = np.split(x, np.cumsum(sizes)[:-1])
        centre = x.mean(0)
        spread = sum(len(g) * np.outer(g.mean(0) - centre, g.mean(0) - centre) for g in groups)
        estimates.append(spread / (len(sizes) - 1))
    np.testing.assert_allclose(np.mean(estimates, axis=0), root @ root.T, atol=0.05)
    # and the library's matrix is that estimate: with one class and tiny gamma,
    # W is proportional to [(N - 1) S + N mu mu^T]^-1 mu.
    x = np.round((rng.normal(size=(sum(sizes), 2)) @ root.T + 1) * 2**16) / 2**16
    pieces = np.split(x, np.cumsum(sizes)[:-1])
    parts = [memory_of(piece, [0] * len(piece), "none") for piece in pieces]
    memory = sum(parts, PrototypeMemory.empty(2, "e"))
    centre = x.mean(0)
    spread = sum(len(g) * np.outer(g.mean(0) - centre, g.mean(0) - centre) for g in pieces) / 3
    expected = np.linalg.solve((len(x) - 1) * spread + len(x) * np.outer(centre, centre), centre)
    ours = read_off("fedcof", memory, groups=groups_of(memory, parts), shrinkage=1e-12)
    np.testing.assert_allclose(ours.weight[0], expected / np.linalg.norm(expected), rtol=1e-6)


def test_fedcof_without_repeated_classes_is_nearest_mean(blobs):
    x, y, *_ = blobs
    parts = [memory_of(x[y == c], y[y == c], "none") for c in range(CLASSES)]
    memory = sum(parts, PrototypeMemory.empty(DIM, "e"))
    ours = read_off("fedcof", memory, groups=groups_of(memory, parts))
    assert torch.equal(ours.weight, read_off("ncm", memory).weight)


def test_fedcof_refuses_groups_that_are_not_the_memory(blobs):
    x, y, *_ = blobs
    memory = memory_of(x, y, "none")
    good = groups_of(memory, [memory])
    for bad in (
        Groups(good.class_index[1:], good.counts[1:], good.sums[1:]),
        Groups(good.class_index, good.counts, good.sums + 1),
        Groups(good.class_index, good.counts + 1, good.sums),
    ):
        with pytest.raises(InvalidMessage):
            read_off("fedcof", memory, groups=bad)


def test_tukey_refuses_what_has_no_root():
    assert tukey(torch.tensor([0.0, 0.25, 9.0])).tolist() == [0.0, 0.5, 3.0]
    assert tukey(torch.tensor([8.0]), 1 / 3).item() == pytest.approx(2.0)
    assert tukey(torch.zeros(0, 3)).shape == (0, 3)
    for bad in (torch.tensor([-1e-9]), torch.tensor([torch.nan])):
        with pytest.raises(InvalidEmbedding):
            tukey(bad)
    with pytest.raises(InvalidEmbedding):
        tukey(torch.ones(1), 0.0)


def test_random_projection_is_the_seed_and_nothing_else():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, second, other = (RandomProjection(3, 7, seed)(x) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (4, 7) and float(first.min()) == 0.0
    with pytest.raises(InvalidEmbedding):
        RandomProjection(3, 7, 1)(torch.zeros(2, 4))


def test_forgetting_in_the_memory_is_forgetting_in_the_classifier(blobs):
    x, y, queries, _ = blobs
    z = torch.as_tensor(queries)
    memory, rest = memory_of(x, y), memory_of(x[y != 2], y[y != 2])
    for name in ("ncm", "lda", "fecam", "gaussian", "ridge"):
        forgotten = read_off(name, memory.without(["c"]))
        assert torch.equal(forgotten.scores(z), read_off(name, rest).scores(z))
