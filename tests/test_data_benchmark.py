"""Image sets and benchmarks: selection, fingerprints, and what they refuse."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clfed.data.benchmark import Benchmark, ImageSet, check_class_name
from clfed.errors import CorruptData, NotEnoughData, UnknownClass


def image_set(labels, classes=("a", "b", "c"), seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), 1, 3, 2), generator=rng).byte()
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), classes)


LABELS = st.lists(st.integers(0, 2), max_size=12)


@given(LABELS)
def test_indices_by_class_are_numpys(labels):
    pool = image_set(labels)
    found = pool.indices_by_class()
    expected = [np.flatnonzero(np.array(labels) == number) for number in range(3)]
    assert [positions.tolist() for positions in found] == [e.tolist() for e in expected]


@given(LABELS, st.permutations("abc"), st.integers(0, 3))
def test_of_classes_keeps_images_and_names(labels, order, count):
    pool, names = image_set(labels), order[:count]
    chosen = pool.of_classes(names)
    kept = [index for index, label in enumerate(labels) if "abc"[label] in names]
    assert chosen.classes == tuple(names)
    assert torch.equal(chosen.images, pool.images[kept])
    assert [chosen.classes[n] for n in chosen.labels] == ["abc"[labels[i]] for i in kept]


def test_of_classes_refuses_unknown_and_repeated_names():
    with pytest.raises(UnknownClass, match="'z' and 1 more"):
        image_set([0, 1]).of_classes(["a", "z", "y"])
    with pytest.raises(CorruptData, match="distinct"):
        image_set([0, 1]).of_classes(["a", "a"])


def test_subset_takes_positions_and_masks():
    pool = image_set([0, 1, 2, 1])
    some = pool.subset(torch.tensor([3, 0]))
    assert some.labels.tolist() == [1, 0] and some.classes == pool.classes
    assert torch.equal(some.images[0], pool.images[3])
    assert len(pool.subset(pool.labels == 1)) == 2
    assert len(pool.subset(torch.tensor([], dtype=torch.int64))) == 0


def test_fingerprint_changes_with_everything_it_covers():
    pool = image_set([0, 1, 2])
    pixel = pool.images.clone()
    pixel[1, 0, 0, 0] ^= 1
    others = [
        ImageSet(pixel, pool.labels, pool.classes),
        image_set([0, 2, 1]),
        image_set([0, 1, 2], ("a", "b", "d")),
        image_set([0, 1, 2], ("a", "b", "c", "d")),
        ImageSet(pool.images.transpose(2, 3).contiguous(), pool.labels, pool.classes),
        ImageSet(pool.images.flatten(1).float(), pool.labels, pool.classes),
        pool.subset(torch.tensor([0, 1])),
    ]
    fingerprints = {other.fingerprint for other in [pool, *others]}
    assert len(fingerprints) == 8
    assert len(pool.fingerprint) == len(hashlib.sha256().hexdigest())


def test_fingerprint_is_stable_across_layouts_and_processes():
    pool = image_set([0, 1, 2])
    strided = torch.empty(3, 1, 2, 3, dtype=torch.uint8).transpose(2, 3)
    strided.copy_(pool.images)
    assert not strided.is_contiguous()
    assert ImageSet(strided, pool.labels, pool.classes).fingerprint == pool.fingerprint
    names = image_set([0], ("ab", "c")).fingerprint, image_set([0], ("a", "bc")).fingerprint
    assert names[0] != names[1]
    program = (
        "import torch; from clfed.data.benchmark import ImageSet;"
        "print(ImageSet(torch.ones(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0]), ('é',))"
        ".fingerprint)"
    )
    here = ImageSet(torch.ones(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0]), ("é",))
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert there.stdout.decode().strip() == here.fingerprint


BAD_SETS = {
    "float pictures": (torch.zeros(2, 1, 3, 3), torch.tensor([0, 1]), "ab"),
    "no channel": (torch.zeros(2, 3, 3).byte(), torch.tensor([0, 1]), "ab"),
    "empty pictures": (torch.zeros(2, 1, 0, 3).byte(), torch.tensor([0, 1]), "ab"),
    "double features": (torch.zeros(2, 3).double(), torch.tensor([0, 1]), "ab"),
    "NaN": (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "ab"),
    "infinity": (torch.full((2, 3), torch.inf), torch.tensor([0, 1]), "ab"),
    "short labels": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0]), "ab"),
    "int32 labels": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 1]).int(), "ab"),
    "label too large": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 2]), "ab"),
    "label negative": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, -1]), "ab"),
    "name twice": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 1]), "aa"),
    "empty name": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 1]), ("a", "")),
    "line in name": (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 1]), ("a", "b\n")),
}


@pytest.mark.parametrize("what", BAD_SETS)
def test_image_set_refuses(what):
    images, labels, classes = BAD_SETS[what]
    with pytest.raises(CorruptData):
        ImageSet(images, labels, tuple(classes))


@pytest.mark.parametrize("name", ["a", "a" * 128, "Ω", "猫", "a b", "T-shirt/top"])
def test_class_names_allowed(name):
    check_class_name(name)


@pytest.mark.parametrize("name", ["", "a" * 129, "a\0", "a\tb", "\x1b[2J", "a\u202eb", "\udc80"])
def test_class_names_refused(name):
    with pytest.raises(CorruptData, match="1 to 128 printable"):
        check_class_name(name)


def benchmark(**changes):
    parts = {
        "name": "toy",
        "train": image_set([0, 1, 2]),
        "test": image_set([0, 1, 2], seed=1),
        "groups": {"base": ("a",), "validation": ("b",), "field": ("c",)},
        "mean": (0.5,),
        "std": (0.5,),
        "protocol": "A toy.",
    }
    return Benchmark(**(parts | changes))


def test_benchmark_accepts_absent_test_ungrouped_classes_and_features():
    benchmark(test=None)
    benchmark(groups={"base": (), "validation": (), "field": ("c",)})
    features = ImageSet(torch.zeros(1, 4), torch.tensor([0]), ("a",))
    groups = {"base": (), "validation": (), "field": ("a",)}
    benchmark(train=features, test=None, groups=groups, mean=(), std=())


BAD_BENCHMARKS = {
    "another order in test": (CorruptData, {"test": image_set([0, 1, 2], ("a", "c", "b"))}),
    "test of other size": (
        CorruptData,
        {"test": ImageSet(torch.zeros(3, 1, 2, 3).byte(), torch.arange(3), ("a", "b", "c"))},
    ),
    "test of other kind": (
        CorruptData,
        {"test": ImageSet(torch.zeros(3, 4), torch.arange(3), ("a", "b", "c"))},
    ),
    "group absent": (CorruptData, {"groups": {"base": ("a",), "field": ("c",)}}),
    "group unknown": (
        CorruptData,
        {"groups": {"base": ("a",), "validation": (), "field": ("c",), "more": ()}},
    ),
    "overlap": (CorruptData, {"groups": {"base": ("a",), "validation": (), "field": ("a",)}}),
    "unknown class": (
        UnknownClass,
        {"groups": {"base": ("a",), "validation": (), "field": ("z",)}},
    ),
    "no class": (NotEnoughData, {"groups": {"base": (), "validation": (), "field": ()}}),
    "no train image": (NotEnoughData, {"train": image_set([0, 1])}),
    "no test image": (NotEnoughData, {"test": image_set([0, 1])}),
    "mean short": (CorruptData, {"mean": ()}),
    "std long": (CorruptData, {"std": (0.5, 0.5)}),
    "std zero": (CorruptData, {"std": (0.0,)}),
}


@pytest.mark.parametrize("what", BAD_BENCHMARKS)
def test_benchmark_refuses(what):
    error, changes = BAD_BENCHMARKS[what]
    with pytest.raises(error, match="toy"):
        benchmark(**changes)
