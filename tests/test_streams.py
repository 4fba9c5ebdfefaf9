"""Streams: who meets which images of which classes when, and Avalanche's view of the same."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.data import digits
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios import (
    few_shot,
    online,
    permuted,
    power_law,
    rehearsal_probabilities,
    rotated,
    split,
)
from clfed.scenarios.domains import shuffled, turned
from clfed.scenarios.pools import draw, ordered, sizes

BUILDERS = [split, permuted, few_shot, online, power_law]


def benchmark(classes=6, images=12, test=4, *, groups=None, pictures=False):
    """Every image is its own number, so that it can be followed: test images count from 10,000."""
    names = tuple(f"class {i:02d}" for i in range(classes))

    def make(count, start):
        labels = torch.arange(classes).repeat(count)
        ids = torch.arange(len(labels)) + start
        if not pictures:
            return ImageSet(ids.float()[:, None], labels, names)
        digits_ = torch.stack([ids // 100, ids % 100], 1).to(torch.uint8)
        return ImageSet(digits_[:, None, None, :], labels, names)

    groups = groups or {
        "base": names[: classes // 2],
        "validation": (),
        "field": names[classes // 2 :],
    }
    mean = (0.0,) if pictures else ()
    std = (1.0,) if pictures else ()
    tests = make(test, 10_000 if not pictures else 9_000) if test else None
    return Benchmark("toy", make(images, 0), tests, groups, mean, std, "a toy for tests")


def ids(images):
    return [int(row[0]) for row in images.images]


def named(images):
    """Each image's number with the name of its class."""
    return dict(zip(ids(images), (images.classes[y] for y in images.labels.tolist()), strict=True))


def fingerprints(stream):
    parts = [e.train.fingerprint for e in stream.experiences], [t.fingerprint for t in stream.tests]
    rest = [(e.number, e.phase, e.announced, e.revisited, e.upcoming) for e in stream.experiences]
    return parts, rest, stream.setting, stream.protocol, stream.replay_free


def small(build, data=None, seed=0, **options):
    if build is few_shot:
        options = {"base_classes": 2, "way": 2, "shots": 3} | options
    elif build is not permuted:
        options = {"experiences": 3} | options
    return build(data or benchmark(), seed, **options)


# Division of the classes ------------------------------------------------------------------------


def test_split_shows_every_image_once_with_its_class_and_in_order():
    data = benchmark()
    stream = split(data, 0, experiences=3)
    assert [e.classes for e in stream.experiences] == [
        data.train.classes[i : i + 2] for i in (0, 2, 4)
    ]
    assert stream.classes == data.train.classes and stream.setting == "class"
    assert [e.upcoming for e in stream.experiences] == [4, 2, 0]
    assert all(e.announced and not e.revisited for e in stream.experiences)
    met = [named(e.train) for e in stream.experiences]
    assert sum(map(len, met)) == len(data.train)
    assert {k: v for part in met for k, v in part.items()} == named(data.train)
    judged = [named(images) for images in stream.tests]
    assert {k: v for part in judged for k, v in part.items()} == named(data.test)
    assert [t.classes for t in stream.tests] == [e.classes for e in stream.experiences]


def test_groups_are_ignored_and_classes_without_a_group_stay_out():
    names = benchmark().train.classes
    data = benchmark(groups={"base": names[5:6], "validation": names[2:4], "field": names[:1]})
    assert split(data, 0, experiences=2).classes == (names[0], names[2], names[3], names[5])


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.none() | st.integers(1, 20),
    st.booleans(),
    st.booleans(),
)
def test_no_class_is_lost_in_the_division(classes, number, first, uneven, by_size):
    asked = {"experiences": None, "classes_per_experience": None, "first_classes": first}
    asked["classes_per_experience" if by_size else "experiences"] = number
    try:
        parts = sizes(classes, uneven=uneven, **asked)
    except (ConfigError, NotEnoughData):
        return
    assert sum(parts) == classes and min(parts) >= 1
    rest = parts if first is None else parts[1:]
    assert first is None or parts[0] == first
    assert by_size or len(parts) == number
    assert max(rest) - min(rest) <= (number if by_size else 1)
    assert uneven or len(set(rest)) == 1


def test_what_does_not_divide_is_refused_unless_allowed():
    with pytest.raises(ConfigError, match="2 would be left"):
        split(benchmark(), 0, experiences=4)
    stream = split(benchmark(), 0, experiences=4, uneven=True)
    assert [len(e.classes) for e in stream.experiences] == [2, 2, 1, 1]
    stream = split(benchmark(), 0, classes_per_experience=4, uneven=True)
    assert [len(e.classes) for e in stream.experiences] == [4, 2]


def test_a_warm_start_is_counted_among_the_experiences():
    data = benchmark(classes=10)
    stream = split(data, 0, first_classes=4, experiences=4)
    assert [len(e.classes) for e in stream.experiences] == [4, 2, 2, 2]
    assert "4 + 3 x 2 classes" in stream.protocol
    other = split(data, 0, first_classes=4, classes_per_experience=2)
    assert fingerprints(other) == fingerprints(stream)


def test_1993_is_the_class_order_of_the_published_tables():
    names = [str(i) for i in range(100)]
    order = ordered(names, "seeded", 1993, seed=7)
    # The beginning that the CIFAR-100 tables of the iCaRL family share.
    assert [*map(int, order[:10])] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert sorted(order) == sorted(names)
    assert ordered(names, "seeded", None, 1) != ordered(names, "seeded", None, 2)


def test_the_order_of_classes_does_not_change_their_images():
    options = {"experiences": 3, "train_images": 5, "test_images": 2}
    natural, seeded = (
        split(benchmark(), 3, class_order=order, class_seed=seed, **options)
        for order, seed in (("natural", None), ("seeded", 5))
    )
    assert natural.classes != seeded.classes
    for part in (lambda s: [e.train for e in s.experiences], lambda s: s.tests):
        merged = [
            {k: v for images in part(s) for k, v in named(images).items()}
            for s in (natural, seeded)
        ]
        assert merged[0] == merged[1]


def test_domain_split_is_the_label_modulo_the_head():
    stream = split(benchmark(), 0, setting="domain", experiences=3)
    assert stream.classes == ("0", "1") and stream.setting == "domain"
    assert [e.revisited for e in stream.experiences] == [(), ("0", "1"), ("0", "1")]
    assert {e.upcoming for e in stream.experiences} == {0}
    labels = dict(zip(ids(benchmark().train), benchmark().train.labels.tolist(), strict=True))
    for experience in stream.experiences:
        for image, name in named(experience.train).items():
            assert name == str(labels[image] % 2)
    with pytest.raises(ConfigError, match="same number"):
        split(benchmark(), 0, setting="domain", first_classes=4, classes_per_experience=2)


# What is learned and what is judged -----------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
def test_validation_never_looks_at_test_images(build):
    honest = small(build, validation_share=0.25)
    data = benchmark()
    changed = ImageSet(data.test.images + 5e6, data.test.labels, data.test.classes)
    blind = Benchmark("toy", data.train, changed, data.groups, (), (), "")
    assert fingerprints(small(build, blind, validation_share=0.25)) == fingerprints(honest)
    assert "were not looked at" in honest.protocol
    learned = {i for e in honest.experiences[:1] for i in ids(e.train)}
    judged = set(ids(honest.tests[0]))
    assert judged and not learned & judged and max(judged) < 10_000


def test_validation_and_test_share_of_one_seed_are_disjoint():
    data = benchmark(images=16, test=0)
    final, chosen = (split(data, 0, experiences=3, validation_share=v) for v in (0.0, 0.25))
    tested, validated, learned = (
        {i for images in sets for i in ids(images)}
        for sets in (final.tests, chosen.tests, [e.train for e in chosen.experiences])
    )
    assert len(tested) == 6 * 4 and len(validated) == 6 * 3
    assert not tested & validated and not tested & learned and not validated & learned
    assert "25% of each class, drawn by the seed" in final.protocol


def test_caps_hold_for_each_class_and_draw_by_the_seed():
    one, again, other = (
        split(benchmark(), seed, experiences=2, train_images=5, test_images=3) for seed in (1, 1, 2)
    )
    for sets, cap in (([e.train for e in one.experiences], 5), (one.tests, 3)):
        counts = Counter(name for images in sets for name in named(images).values())
        assert set(counts.values()) == {cap} and len(counts) == 6
    assert fingerprints(one) == fingerprints(again) != fingerprints(other)
    assert "at most 5 train images a class, at most 3 test images a class" in one.protocol
    plenty = split(benchmark(), 1, experiences=2, train_images=500)
    assert sum(len(e.train) for e in plenty.experiences) == 6 * 12


@given(st.integers(0, 99), st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_a_draw_takes_what_is_asked_and_leaves_the_rest(seed, counts):
    images = ImageSet(torch.zeros(12, 1), torch.arange(12) % 3, ("a", "b", "c"))
    taken, rest = draw(images, torch.tensor(counts), torch.Generator().manual_seed(seed))
    assert sorted([*taken.tolist(), *rest.tolist()]) == list(range(12))
    assert taken.tolist() == sorted(taken.tolist()) and rest.tolist() == sorted(rest.tolist())
    assert torch.bincount(taken % 3, minlength=3).tolist() == [min(c, 4) for c in counts]


@pytest.mark.parametrize("build", BUILDERS)
def test_same_seed_same_stream_and_ambient_generators_untouched(build):
    def ambient():
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), legacy

    before = ambient()
    first = small(build, seed=4)
    first.benchmark()
    assert ambient() == before
    assert fingerprints(first) == fingerprints(small(build, seed=4))
    if build not in (split, permuted):  # nothing is drawn, and one number has one order
        assert fingerprints(first) != fingerprints(small(build, seed=5))


# Domains ------------------------------------------------------------------------------------------


def test_permuted_shuffles_train_and_test_alike_and_the_first_not_at_all():
    data = digits.load()
    stream = permuted(data, 0, experiences=3, test_share=0.2)
    assert stream.setting == "domain" and stream.classes == data.train.classes
    assert [e.phase for e in stream.experiences] == [0, 1, 2]
    plain = stream.experiences[0].train, stream.tests[0]
    for experience, test in zip(stream.experiences[1:], stream.tests[1:], strict=True):
        back = []
        for before, after in zip(plain, (experience.train, test), strict=True):
            flat, moved = before.images.flatten(1), after.images.flatten(1)
            assert not torch.equal(flat, moved) and torch.equal(flat.sort(1)[0], moved.sort(1)[0])
            assert torch.equal(before.labels, after.labels)
            back.append((flat, moved))
        # One order explains every pixel of every image of both sets.
        every = torch.cat([f for f, _ in back]), torch.cat([m for _, m in back])
        columns = {tuple(c.tolist()) for c in every[0].T}
        assert {tuple(c.tolist()) for c in every[1].T} == columns
        assert experience.revisited == stream.classes
    second, third = (e.train.images for e in stream.experiences[1:])
    assert not torch.equal(second, third)
    again, other = (permuted(data, seed, experiences=2).experiences[1].train for seed in (0, 1))
    assert not torch.equal(again.images.flatten(2).sum((0, 1)), other.images.flatten(2).sum((0, 1)))


def test_a_permutation_is_undone_by_its_inverse():
    pictures = torch.randint(256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shuffled(shuffled(pictures, order), torch.argsort(order)), pictures)
    # Colours of a pixel stay together.
    assert torch.equal(shuffled(pictures, order)[:, 1:2], shuffled(pictures[:, 1:2], order))


def test_rotated_turns_in_equal_steps_and_a_right_angle_loses_nothing():
    data = digits.load()
    stream = rotated(data, 0, experiences=3)
    plain, quarter, half = (e.train.images for e in stream.experiences)
    assert torch.equal(quarter, torch.rot90(plain, 1, (2, 3)))
    assert torch.equal(half, torch.rot90(plain, 2, (2, 3)))
    assert torch.equal(stream.tests[1].images, torch.rot90(stream.tests[0].images, 1, (2, 3)))
    assert turned(plain, 0.0) is plain
    with pytest.raises(ConfigError, match="ready features"):
        rotated(benchmark(), 0)


# Few shots ----------------------------------------------------------------------------------------


def test_few_shot_has_the_published_shape_by_default():
    data = benchmark(classes=100, images=8, test=2)
    stream = few_shot(data, 0)
    assert [len(e.classes) for e in stream.experiences] == [60] + [5] * 8
    assert [len(e.train) for e in stream.experiences] == [60 * 8] + [25] * 8
    assert [len(t) for t in stream.tests] == [120] + [10] * 8
    assert stream.classes == data.train.classes and stream.experiences[0].upcoming == 40
    for experience in stream.experiences[1:]:
        assert set(Counter(named(experience.train).values()).values()) == {5}
    short = few_shot(data, 0, sessions=2, train_images=3)
    assert len(short.classes) == 70 and len(short.experiences[0].train) == 180
    assert fingerprints(few_shot(data, 1)) != fingerprints(stream)


# One pass -------------------------------------------------------------------------------------------


def test_online_shows_each_image_once_in_small_unannounced_portions():
    data = benchmark(images=25)
    stream = online(data, 0, size=20, experiences=3)
    assert [len(e.train) for e in stream.experiences] == [20, 20, 10] * 3
    assert [e.phase for e in stream.experiences] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [e.number for e in stream.experiences] == list(range(9)) and len(stream.tests) == 3
    assert not any(e.announced for e in stream.experiences)
    assert all(e.upcoming is None for e in stream.experiences)
    met = {}
    for experience in stream.experiences:
        here = named(experience.train)
        assert set(here.values()) == set(experience.classes)
        assert set(experience.revisited) == {n for n in here.values() if n in met.values()}
        assert not set(here) & set(met)
        met |= here
    assert met == named(data.train)
    first = ids(stream.experiences[0].train)
    assert first != sorted(first)
    other = online(data, 1, size=20, experiences=3)
    assert ids(other.experiences[0].train) != first


def test_online_names_only_classes_that_a_portion_shows():
    stream = online(benchmark(images=3), 0, size=1, experiences=1)
    assert all(len(e.classes) == 1 and e.train.labels.tolist() == [0] for e in stream.experiences)
    assert set(stream.classes) == set(benchmark().train.classes)


# Power law ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (1.0, (0.48, 0.24, 0.16, 0.12)),
        (0.5, (0.3591, 0.2539, 0.2073, 0.1796)),
        (2.0, (0.7024, 0.1756, 0.0780, 0.0439)),
        (0.0, (0.25, 0.25, 0.25, 0.25)),
        (float("inf"), (1.0, 0.0, 0.0, 0.0)),
    ],
)
def test_the_power_law_has_its_known_values(a, expected):
    found = rehearsal_probabilities(torch.arange(1, 5), "power", a)
    assert found.tolist() == pytest.approx(expected, abs=5e-5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.floats(0, 6))
@settings(max_examples=60)
def test_the_exponential_control_has_the_mean_age_of_the_power_law(ages, a):
    ages = torch.tensor(ages)
    power, exponential, uniform = (
        rehearsal_probabilities(ages, control, a) for control in ("power", "exponential", "uniform")
    )
    for found in (power, exponential, uniform):
        assert float(found.sum()) == pytest.approx(1) and float(found.min()) >= 0
    assert float((exponential * ages).sum()) == pytest.approx(float((power * ages).sum()), rel=1e-9)
    assert uniform.tolist() == pytest.approx([1 / len(ages)] * len(ages))


def test_without_old_images_the_stream_is_the_split_bit_for_bit():
    plain = split(benchmark(), 3, experiences=3)
    for options in ({"rho": 0.0}, {"control": "none"}):
        assert fingerprints(power_law(benchmark(), 3, experiences=3, **options)) == fingerprints(
            plain
        )


@pytest.mark.parametrize("control", ["power", "exponential", "uniform"])
@pytest.mark.parametrize("age", ["onset", "last_seen"])
def test_every_control_brings_as_many_old_images_beside_the_same_new_ones(control, age):
    data = benchmark(classes=10, images=20)
    plain = split(data, 0)
    stream = power_law(data, 0, rho=0.5, control=control, age=age)
    assert not stream.replay_free and "not free of replay" in stream.protocol
    assert fingerprints(stream)[0][1] == fingerprints(plain)[0][1]
    assert fingerprints(stream)[0][0][0] == fingerprints(plain)[0][0][0]
    seen = named(plain.experiences[0].train)
    for mine, theirs in zip(stream.experiences[1:], plain.experiences[1:], strict=True):
        fresh, count = named(theirs.train), len(theirs.train)
        assert ids(mine.train)[:count] == ids(theirs.train) and len(mine.train) == count + 20
        old = mine.train.subset(torch.arange(count, len(mine.train)))
        assert len(set(ids(old))) == 20 and set(ids(old)) <= set(seen)
        assert all(seen[image] == name for image, name in named(old).items())
        assert mine.classes == (*theirs.classes, *mine.revisited)
        assert set(mine.revisited) == set(named(old).values())
        assert mine.upcoming == theirs.upcoming
        seen |= fresh


def test_old_images_come_as_often_as_the_law_says():
    data = benchmark(classes=5, images=4000, test=1)
    last = power_law(data, 1, rho=1.0, a=1.0).experiences[-1]
    counts = Counter(named(last.train).values())
    found = [counts[f"class {c:02d}"] / 4000 for c in (3, 2, 1, 0)]
    assert found == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.03)  # four standard deviations


def test_last_seen_counts_from_the_last_occurrence():
    # With one old image an experience, whoever came back last is young again.
    data = benchmark(classes=40, images=2, test=1)
    options = {"classes_per_experience": 1, "rho": 0.5, "a": float("inf")}
    onset, last_seen = (power_law(data, 0, age=age, **options) for age in ("onset", "last_seen"))
    assert all(e.revisited == (f"class {e.number - 1:02d}",) for e in onset.experiences[1:])
    young = [{0, 1}]
    for experience in last_seen.experiences[2:]:
        back = int(experience.revisited[0][-2:])
        assert back in young[-1]
        young.append({back, experience.number})
    assert any(e.revisited[0] != f"class {e.number - 1:02d}" for e in last_seen.experiences[1:])


def test_more_old_images_than_there_are_come_again_only_after_all_came_once():
    last = power_law(benchmark(classes=2, images=4, test=1), 0, experiences=2, rho=2.5).experiences[
        1
    ]
    assert sorted(Counter(ids(last.train)).values()) == [1] * 4 + [2] * 2 + [3] * 2


# Avalanche ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["class", "task", "domain"])
def test_avalanche_holds_the_same_images_in_the_same_order(setting):
    check(split(benchmark(), 0, setting=setting, experiences=3, class_order="seeded"))


@pytest.mark.parametrize("build", BUILDERS[1:])
def test_avalanche_holds_the_same_stream(build):
    check(small(build))


def check(stream):
    made = stream.benchmark()
    assert made is stream.benchmark()
    assert len(made.train_stream) == len(stream.experiences)
    assert len(made.test_stream) == len(stream.tests)
    number = {name: i for i, name in enumerate(stream.classes)}
    pairs = [*zip(made.train_stream, stream.experiences, strict=True)]
    sets = [(theirs, mine.train, mine.phase) for theirs, mine in pairs]
    sets += [
        (t, mine, phase)
        for phase, (t, mine) in enumerate(zip(made.test_stream, stream.tests, strict=True))
    ]
    for theirs, mine, phase in sets:
        task = phase if stream.setting == "task" else 0
        samples = [theirs.dataset[i] for i in range(len(theirs.dataset))]
        assert torch.equal(torch.stack([x for x, _, _ in samples]), mine.images)
        assert [y for _, y, _ in samples] == [number[mine.classes[y]] for y in mine.labels.tolist()]
        assert {t for _, _, t in samples} == {task} == set(theirs.task_labels)
        assert theirs.classes_in_this_experience == {number[n] for n in named(mine).values()}
    assert [theirs.current_experience for theirs, _ in pairs] == [e.number for _, e in pairs]


def test_importing_streams_does_not_import_avalanche():
    code = "import sys, clfed.scenarios; sys.exit('avalanche' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (split, {"setting": "instance"}),
        (split, {"experiences": 0}),
        (split, {"experiences": True}),
        (split, {"experiences": 2.0}),
        (split, {"experiences": 3, "classes_per_experience": 2}),
        (split, {"classes_per_experience": -1}),
        (split, {"first_classes": 0, "experiences": 2}),
        (split, {"first_classes": 2, "experiences": 1}),
        (split, {"experiences": 2, "class_order": "random"}),
        (split, {"experiences": 2, "class_seed": 3}),
        (split, {"experiences": 2, "class_order": "seeded", "class_seed": -1}),
        (split, {"experiences": 2, "validation_share": 1.0}),
        (split, {"experiences": 2, "validation_share": -0.1}),
        (split, {"experiences": 2, "validation_share": True}),
        (split, {"experiences": 2, "test_share": float("nan")}),
        (split, {"experiences": 2, "train_images": 0}),
        (split, {"experiences": 2, "test_images": "all"}),
        (permuted, {"experiences": 0}),
        (rotated, {"largest": 0}),
        (rotated, {"largest": 400}),
        (rotated, {"largest": True}),
        (few_shot, {"base_classes": 0}),
        (few_shot, {"base_classes": 3, "way": 2}),
        (few_shot, {"base_classes": 2, "way": 2, "shots": 0}),
        (few_shot, {"base_classes": 2, "way": 2, "sessions": 0}),
        (few_shot, {"base_classes": 2, "way": 2, "train_images": 0}),
        (online, {"size": 0}),
        (online, {"size": 1.5}),
        (power_law, {"experiences": 2, "rho": -1}),
        (power_law, {"experiences": 2, "rho": float("inf")}),
        (power_law, {"experiences": 2, "a": -1}),
        (power_law, {"experiences": 2, "a": float("nan")}),
        (power_law, {"experiences": 2, "control": "linear"}),
        (power_law, {"experiences": 2, "age": "first"}),
    ],
)
def test_bad_settings_are_refused(build, options):
    with pytest.raises(ConfigError) as caught:
        build(benchmark(pictures=build is rotated), 0, **options)
    assert "scenario" in str(caught.value) + caught.value.remedy


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (split, {"experiences": 7, "uneven": True}),
        (split, {"first_classes": 6, "experiences": 2}),
        (split, {"experiences": 2, "validation_share": 0.01}),
        (split, {"experiences": 2, "validation_share": 0.99}),
        (few_shot, {}),
        (few_shot, {"base_classes": 2, "way": 2, "sessions": 3}),
        (few_shot, {"base_classes": 2, "way": 2, "shots": 13}),
        (few_shot, {"base_classes": 6, "way": 2}),
    ],
)
def test_too_few_classes_or_images_are_refused(build, options):
    with pytest.raises(NotEnoughData):
        build(benchmark(), 0, **options)
