"""Missions: who meets what, from a seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios import class_incremental, expected_coverage, multi_client


def benchmark(classes=10, images=12, test=None, base=0):
    names = tuple(f"class {i:02d}" for i in range(classes + base))

    def make(count):
        labels = torch.arange(len(names)).repeat_interleave(count)
        pixels = torch.arange(len(labels), dtype=torch.float32)[:, None]
        return ImageSet(pixels, labels, names)

    groups = {"base": names[:base], "validation": (), "field": names[base:]}
    return Benchmark(
        "toy", make(images), make(test) if test else None, groups, (), (), "a toy for tests"
    )


PAPER = {
    "nodes": 3,
    "rounds": 4,
    "classes_per_mission": 2,
    "shots": 2,
    "replacement": False,
    "test_images": 3,
}


def test_same_seed_same_missions_and_another_seed_others():
    first, again, other = (
        multi_client(benchmark(), seed=seed, **PAPER).missions for seed in (1, 1, 2)
    )
    key = [
        [(m.node, m.round, m.classes, m.indices.tolist()) for m in p] for p in (first, again, other)
    ]
    assert key[0] == key[1] != key[2]


@given(
    seed=st.integers(0, 99),
    nodes=st.integers(1, 4),
    rounds=st.integers(1, 4),
    k=st.integers(1, 4),
    shots=st.integers(1, 3),
    replacement=st.booleans(),
    overlap=st.sampled_from([None, 0.0, 0.25, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_mission_holds_what_the_settings_promise(
    seed, nodes, rounds, k, shots, replacement, overlap
):
    plan = multi_client(
        benchmark(),
        seed=seed,
        nodes=nodes,
        rounds=rounds,
        classes_per_mission=k,
        shots=shots,
        replacement=replacement,
        overlap=overlap,
        test_images=3,
    )
    support, test = plan.support, plan.test
    assert not set(support.images.flatten().tolist()) & set(test.images.flatten().tolist())
    for mission in plan.missions:
        labels = support.labels[mission.indices]
        assert {support.classes[i] for i in labels.tolist()} == set(mission.classes)
        assert len(set(mission.classes)) == len(mission.classes) <= k
        assert mission.indices.unique().numel() == len(mission.indices)
        assert labels.bincount().max() <= shots
    if not replacement:
        met = torch.cat([m.indices for m in plan.missions])
        assert met.unique().numel() == len(met)
    assert plan.known(0) == ()
    assert plan.known(plan.rounds) == tuple(sorted({c for m in plan.missions for c in m.classes}))
    assert plan.met(plan.rounds).unique().numel() == len(support)


def test_mode_a_goes_on_until_every_image_is_consumed():
    plan = multi_client(benchmark(classes=6, images=11), seed=0, **{**PAPER, "rounds": None})
    assert len(plan.met(plan.rounds)) == 6 * (11 - 3)


def test_without_overlap_nodes_meet_disjoint_classes_and_with_it_they_share():
    settings_ = {**PAPER, "rounds": 2, "classes_per_mission": 3}
    alone = multi_client(benchmark(12), seed=3, overlap=0.0, **settings_)
    seen = [{c for m in alone.missions if m.node == n for c in m.classes} for n in range(3)]
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])
    shared = multi_client(benchmark(12), seed=3, overlap=1.0, **settings_)
    assert any(set(m.classes) - seen[m.node] for m in shared.missions)


def test_coverage_follows_the_card():
    assert [round(expected_coverage(50, 5, 5 * m), 1) for m in (1, 2, 5, 10)] == [
        20.5,
        32.6,
        46.4,
        49.7,
    ]
    field = benchmark(50, 6)
    settings_ = {"nodes": 5, "classes_per_mission": 5, "shots": 1, "replacement": True}
    covered = [
        len(multi_client(field, seed=s, rounds=2, test_images=1, **settings_).known(2))
        for s in range(60)
    ]
    # The standard error of the mean of 60 draws is about 0.35 classes.
    assert abs(sum(covered) / 60 - expected_coverage(50, 5, 10)) < 1.5


def test_class_incremental_meets_each_class_once():
    plan = class_incremental(benchmark(10, 12), seed=0, classes=7, shots=5, test_images=4)
    assert plan.nodes == 1 and plan.rounds == 7
    assert [len(m.classes) for m in plan.missions] == [1] * 7
    assert len(plan.known(7)) == 7 and len(plan.test) == 7 * 4 and len(plan.support) == 7 * 5


def test_a_data_set_with_its_own_split_keeps_it():
    plan = multi_client(benchmark(test=4), seed=0, **{**PAPER, "test_images": None})
    assert len(plan.test) == 10 * 4
    fewer = multi_client(benchmark(test=4), seed=0, **PAPER)
    assert fewer.test.labels.bincount().tolist() == [3] * 10


def test_a_data_set_without_a_split_gives_a_quarter_of_each_class():
    plan = multi_client(benchmark(images=12), seed=0, **{**PAPER, "test_images": None})
    assert plan.test.labels.bincount().tolist() == [3] * 10


def test_base_classes_come_along_only_when_asked():
    data = benchmark(classes=6, base=3, test=2)
    plan = multi_client(data, seed=0, **{**PAPER, "test_images": None}, include_base=True)
    assert plan.base_support.classes == plan.base_test.classes == data.groups["base"]
    assert multi_client(data, seed=0, **{**PAPER, "test_images": None}).base_test is None


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"nodes": 0}, ConfigError, "nodes"),
        ({"shots": -1}, ConfigError, "shots"),
        ({"shots": 2.5}, ConfigError, "shots"),
        ({"rounds": 0}, ConfigError, "rounds"),
        ({"rounds": None, "replacement": True}, ConfigError, "rounds"),
        ({"overlap": 1.5}, ConfigError, "overlap"),
        ({"classes_per_mission": 11}, NotEnoughData, "10 field classes"),
        ({"shots": 10}, NotEnoughData, "only 9"),
        ({"test_images": 13}, NotEnoughData, "only 12"),
        ({"field_classes": 99}, NotEnoughData, "99"),
        ({"include_base": True}, ConfigError, "include_base"),
    ],
)
def test_impossible_settings_are_refused(changes, error, said):
    with pytest.raises(error, match=said):
        multi_client(benchmark(), seed=0, **{**PAPER, **changes})


def test_no_field_class_is_refused():
    with pytest.raises(NotEnoughData, match="no field classes"):
        multi_client(benchmark(classes=0, base=3, test=2), seed=0, **PAPER)
