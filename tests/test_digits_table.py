"""The offline reference stream: scikit-learn digits, pixels as embeddings, a known table."""

import random

import pytest
import torch
from sklearn.datasets import load_digits

from clfed.prototypes import PrototypeMemory, RandomProjection, read_off, tukey

TOLERANCE = 0.2  # one of the 898 test images is 0.11
PIXELS = "digits/16"


@pytest.fixture(scope="module")
def digits():
    data, target = load_digits(return_X_y=True)
    x, y = torch.tensor(data) / 16, torch.tensor(target)
    return x[::2], y[::2], x[1::2], y[1::2]


def memory_of(x, y, moments="class", identity=PIXELS):
    zero = PrototypeMemory.empty(x.shape[1], identity, moments)
    return zero.observe(x, [str(int(label)) for label in y])


def percent(classifier, x, y):
    names = [classifier.classes[i] for i in classifier.predict(x).tolist()]
    return (
        100
        * sum(int(name) == label for name, label in zip(names, y.tolist(), strict=True))
        / len(y)
    )


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ncm", {}, 89.87),
        ("ncm_cosine", {}, 89.98),
        ("lda", {"shrinkage": 1e-4}, 94.21),
        ("lda", {"shrinkage": 1e-2}, 94.65),
        ("gaussian", {"jitter": 0.01}, 98.89),
        ("ridge", {"penalty": 1.0}, 92.32),
    ],
)
def test_table_of_pixels(digits, name, options, expected):
    x, y, queries, answers = digits
    assert percent(read_off(name, memory_of(x, y), **options), queries, answers) == pytest.approx(
        expected, abs=TOLERANCE
    )


@pytest.mark.parametrize(("common", "expected"), [(False, 96.99), (True, 92.09)])
def test_table_of_fecam(digits, common, expected):
    x, y, queries, answers = digits
    memory = memory_of(tukey(x), y, identity="tukey")
    classifier = read_off("fecam", memory, common=common)
    assert percent(classifier, tukey(queries), answers) == pytest.approx(expected, abs=TOLERANCE)


def test_table_of_ranpac(digits):
    x, y, queries, answers = digits
    accuracies = []
    for seed in range(5):
        project = RandomProjection(64, 2000, seed)
        memory = memory_of(project(x), y, "shared", f"projection {seed}")
        accuracies.append(
            percent(read_off("ridge", memory, penalty=100.0), project(queries), answers)
        )
    assert sum(accuracies) / 5 == pytest.approx(98.46, abs=TOLERANCE)
    assert min(accuracies) > 98.22 - 0.4
    assert max(accuracies) < 98.66 + 0.4


@pytest.mark.parametrize("seed", range(3))
def test_order_batches_and_partition_do_not_matter(digits, seed):
    x, y, queries, _ = digits
    x = tukey(x)
    whole = memory_of(x, y)
    rng = random.Random(seed)
    tasks = rng.sample(range(10), 10)
    stream = torch.cat([torch.nonzero(y == task)[:, 0] for task in tasks])
    batch, nodes = rng.choice([1, 7, 32, 100]), rng.choice([1, 3, 5])
    held = [PrototypeMemory.empty(64, PIXELS, "class") for _ in range(nodes)]
    for start in range(0, len(stream), batch):
        part = stream[start : start + batch]
        node = rng.randrange(nodes)
        held[node] += memory_of(x[part], y[part])
    rng.shuffle(held)
    merged = sum(held, PrototypeMemory.empty(64, PIXELS, "class"))
    assert merged == whole
    for name in ("ncm", "ncm_cosine", "lda", "fecam", "gaussian", "ridge"):
        ours, theirs = read_off(name, merged), read_off(name, whole)
        assert torch.equal(ours.scores(tukey(queries)), theirs.scores(tukey(queries)))
