"""Private release: sensitivities are attained and never exceeded; noise is where it must be."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    InvalidEmbedding,
    InvalidMessage,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.privacy.class_names import least_support, release_class_names
from clfed.privacy.gaussian import gaussian_sigma
from clfed.privacy.noise import integer_gaussian, integer_laplace
from clfed.privacy.release import SlotTable, release
from clfed.privacy.sensitivity import Bounds, best_count_scale, clip, clipped_means
from clfed.prototypes import PrototypeMemory, read_off

DIM = 3
LABELS = ("ape", "bee", "cat", "dog")
SCALE = 2**16

rows = st.lists(st.floats(-50, 50), min_size=DIM, max_size=DIM)
examples = st.tuples(st.sampled_from(LABELS), rows)
norms = st.floats(0.001, 40)
scales = st.floats(0.01, 80)


def seeded(seed=0):
    return np.random.default_rng(seed).bytes


def table_of(data, norm, labels=LABELS):
    z = torch.tensor([row for _, row in data], dtype=torch.float64).reshape(-1, DIM)
    zero = PrototypeMemory.empty(DIM, "e")
    return SlotTable.of(zero.observe(clip(z, norm), [name for name, _ in data]), labels)


def squared_distance(a, b, count_scale):
    """Exact, in fractions: no rounding can hide an excess."""
    sums = sum(int(v) ** 2 for v in (a.sums - b.sums).ravel())
    counts = sum(int(v) ** 2 for v in a.counts - b.counts)
    return (sums + Fraction(count_scale) ** 2 * counts) / Fraction(SCALE) ** 2


def within(distance, bound):
    return distance <= Fraction(bound) ** 2 * (1 + Fraction(1, 10**14))  # the bound is a float


@settings(deadline=None)
@given(st.lists(examples, max_size=6), examples, norms, scales)
def test_one_example_more_stays_within_the_sensitivity(data, one, norm, scale):
    bounds = Bounds("example", norm, scale)
    distance = squared_distance(table_of([*data, one], norm), table_of(data, norm), scale)
    assert within(distance, bounds.sensitivity)


@settings(deadline=None)
@given(st.lists(examples, max_size=6), examples, examples, norms, scales)
@example([], ("ape", [50.0, 0, 0]), ("ape", [-50.0, 0, 0]), 4.0, 1.0)  # opposite vectors
@example([], ("ape", [50.0, 0, 0]), ("bee", [50.0, 0, 0]), 4.0, 9.0)  # the label alone changes
def test_one_example_exchanged_stays_within_the_sensitivity(data, old, new, norm, scale):
    bounds = Bounds("replaced example", norm, scale)
    distance = squared_distance(table_of([*data, new], norm), table_of([*data, old], norm), scale)
    assert within(distance, bounds.sensitivity)


@settings(deadline=None)
@given(
    st.lists(examples, max_size=5),
    st.dictionaries(st.sampled_from(LABELS), st.lists(rows, min_size=1, max_size=3), max_size=3),
    norms,
    scales,
)
def test_one_client_more_stays_within_the_sensitivity(others, client, norm, scale):
    bounds = Bounds("client", norm, scale, per_class=3, classes=3)
    own = [(name, row) for name, held in client.items() for row in held]
    distance = squared_distance(table_of([*others, *own], norm), table_of(others, norm), scale)
    assert within(distance, bounds.sensitivity)


@pytest.mark.parametrize(
    ("bounds", "before", "after"),
    [
        (Bounds("example", 3.0, 4.0), [], [("ape", [9.0, 0, 0])]),
        (Bounds("replaced example", 3.0, 2.0), [("ape", [9.0, 0, 0])], [("ape", [-9.0, 0, 0])]),
        (Bounds("replaced example", 3.0, 4.0), [("ape", [9.0, 0, 0])], [("bee", [0, 9.0, 0])]),
        (
            Bounds("client", 3.0, 4.0, per_class=5, classes=4),
            [],
            [(name, [0, -3.0, 0]) for name in LABELS for _ in range(5)],
        ),
    ],
    ids=lambda value: value.neighbours if isinstance(value, Bounds) else "",
)
def test_sensitivities_are_attained(bounds, before, after):
    a, b = (table_of(data, bounds.clip_norm) for data in (before, after))
    distance = squared_distance(a, b, bounds.count_scale)
    assert math.sqrt(distance) == pytest.approx(bounds.sensitivity, rel=1e-12)


def test_sensitivities_by_hand():
    assert Bounds("replaced example", 5.0, 5.0).sensitivity == pytest.approx(10.0)
    assert Bounds("replaced example", 5.0, 0.1).sensitivity == 10.0
    assert Bounds("replaced example", 3.0, 4.0).sensitivity == pytest.approx(math.sqrt(50))
    assert Bounds("client", 3.0, 4.0, per_class=1, classes=16).sensitivity == 20.0
    assert Bounds("client", 3.0, 4.0, 7, 16, message_norm=2.5).sensitivity == 2.5


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=5), norms)
def test_clipped_embeddings_lie_in_the_ball_exactly(data, norm):
    z = torch.tensor(data, dtype=torch.float64)
    clipped = clip(z, norm)
    units = clipped * SCALE
    assert torch.equal(units, units.round())
    for before, after in zip(z, units.long().tolist(), strict=True):
        assert sum(v * v for v in after) <= (Fraction(norm) * SCALE) ** 2
        # Truncation by less than one unit a coordinate, and the direction stays.
        wanted = before * min(1.0, norm / max(float(before.norm()), 1e-300))
        assert (torch.tensor(after) / SCALE - wanted).abs().max() <= 1.01 / SCALE


def test_clip_corrects_what_floating_point_puts_outside():
    """Vectors a hair outside a sphere on which lattice points lie exactly."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(1, 2**20, (2000, 4), generator=generator)
    norms = (q * q).sum(1).double().sqrt() / SCALE  # rounded: below the true norm for about half
    below = 0
    for row, norm in zip(q, norms.tolist(), strict=True):
        after = (clip(row[None].double() / SCALE, norm)[0] * SCALE).long()
        limit = (Fraction(norm) * SCALE) ** 2
        assert int((after * after).sum()) <= limit
        below += int((row * row).sum()) > limit
    assert below > 500  # so that the correction was needed


def test_clip_leaves_short_embeddings_alone_and_takes_any_float_type():
    short = torch.tensor([[0.5, -0.25], [0.0, 0.0]])
    assert torch.equal(clip(short, 1.0), short.double())
    assert torch.equal(clip(short.half() * 100, 1.0)[1], torch.zeros(2, dtype=torch.float64))
    assert clip(torch.zeros(0, 5), 1.0).shape == (0, 5)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(LABELS), st.lists(rows, min_size=1, max_size=4), max_size=4),
    norms,
    scales,
)
def test_clipped_means_are_a_client_of_one_example_a_class(client, norm, scale):
    data = [(name, row) for name, held in client.items() for row in held]
    z = torch.tensor([row for _, row in data], dtype=torch.float64).reshape(-1, DIM)
    memory = PrototypeMemory.empty(DIM, "e").observe(z, [name for name, _ in data])
    means = clipped_means(memory, norm)
    assert means.counts.tolist() == [1] * len(client)
    bounds = Bounds("client", norm, scale, classes=4)
    bounds.check_clipped(means)
    bounds.check_client(means)
    empty = SlotTable.of(PrototypeMemory.empty(DIM, "e"), LABELS)
    distance = squared_distance(SlotTable.of(means, LABELS), empty, scale)
    assert within(distance, bounds.sensitivity)
    assert torch.equal(means.means(), clip(memory.means(), norm))


@settings(deadline=None)
@given(st.lists(examples, min_size=1, max_size=8), norms, scales, st.floats(0.01, 500))
def test_whole_messages_are_clipped_and_keep_their_means(data, norm, scale, ball):
    table = table_of(data, norm)
    clipped = table.clipped(ball, scale)
    empty = table_of([], norm)
    length = squared_distance(table, empty, scale)
    if length < Fraction(ball) ** 2 * (1 - Fraction(1, 10**10)):
        assert clipped is table
    assert squared_distance(clipped, empty, scale) <= Fraction(ball) ** 2
    if (clipped.counts[table.counts > 0] > 1000).all():
        error = clipped.means(1e-6) - table.means(1e-6)
        assert error.abs().max() <= (1 + norm) / 500


def test_best_count_scale_is_the_numerical_optimum():
    grid = np.geomspace(0.01, 10, 20001)
    for norm, dim in ((1.0, 64), (3.0, 512)):
        cost = (norm**2 + grid**2) * (dim + norm**2 / grid**2)
        assert best_count_scale(norm, dim) == pytest.approx(grid[cost.argmin()], rel=1e-3)


def test_noise_is_gaussian_in_every_slot_also_in_empty_ones():
    labels = [f"class {k}" for k in range(40)]
    seen = PrototypeMemory.empty(200, "e").observe(torch.full((9, 200), 0.05), ["class 7"] * 9)
    bounds = Bounds("example", 1.0, 0.25)
    table = release(seen, labels, bounds=bounds, sigma=2.0, entropy=seeded())
    assert table.counts.dtype == table.sums.dtype == torch.int64
    assert (table.sum_variance, table.count_variance) == (4.0, 64.0)
    noise = table.sums.double() / SCALE
    noise[table.classes.index("class 7")] -= 9 * round(0.05 * SCALE) / SCALE
    for slot in noise:
        assert float(slot.std()) == pytest.approx(2.0, rel=0.25)
        assert abs(float(slot.mean())) < 5 * 2 / math.sqrt(200)
    assert stats.kstest(noise.numpy().ravel() / 2.0, "norm").pvalue > 1e-3
    # Counts: 8 examples; pooled over releases, since there are only 40 of them.
    many = [
        release(seen, labels, bounds=bounds, sigma=2.0, entropy=seeded(k)).counts for k in range(50)
    ]
    counts = torch.stack(many).double() / SCALE
    counts[:, table.classes.index("class 7")] -= 9
    assert stats.kstest(counts.numpy().ravel() / 8.0, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[0].numpy(), noise[1].numpy())[0, 1]) < 0.3


def test_noise_does_not_depend_on_the_data():
    """Two releases with the same random bytes differ by exactly what the data differ by."""
    bounds = Bounds("example", 60.0, 1.0)
    a, b = [("ape", [1.5, -2.0, 3.25])], [("bee", [0.1, 0.2, 0.3]), ("cat", [7.0, 8.0, 9.0])]
    tables, noised = [], []
    for data in (a, b):
        tables.append(table_of(data, 60.0))
        noised.append(tables[-1].noised(bounds.sensitivity, 1.0, seeded(5)))
    assert torch.equal(noised[0].sums - noised[1].sums, tables[0].sums - tables[1].sums)
    assert torch.equal(noised[0].counts - noised[1].counts, tables[0].counts - tables[1].counts)
    other = tables[0].noised(bounds.sensitivity, 1.0, os.urandom)
    assert not torch.equal(other.sums, noised[0].sums)


def test_neighbours_cannot_be_told_apart_better_than_promised():
    """The best test between two neighbours (likelihood ratio) keeps to epsilon and delta."""
    epsilon, delta, trials = 1.0, 0.05, 40_000
    sigma = gaussian_sigma(epsilon, delta, Bounds("example", 0.75, 1.0).sensitivity)
    projections = []
    for present in (0, 1):
        noise = integer_gaussian((trials, 2), sigma * SCALE, seeded(present)).double() / SCALE
        vector = torch.tensor([0.75, 1.0]) * present  # the sum, and the scaled count
        projections.append((noise + vector) @ torch.tensor([0.6, 0.8]).double())
    without, having = projections
    for cut in np.linspace(-4, 6, 41):
        p, q = float((having > cut).double().mean()), float((without > cut).double().mean())
        assert p <= math.exp(epsilon) * q + delta + 4 * math.sqrt(0.25 / trials)


@pytest.mark.parametrize(
    ("dim", "n", "expected"),
    [(1600, 30, 4.97), (1600, 150, 0.99), (512, 30, 2.81), (512, 150, 0.56), (64, 750, 0.04)],
)
def test_utility_law_of_prototypes(dim, n, expected):
    """Noise norm on a prototype is sigma √d / n, here for A = 1, epsilon = 1, delta = 1e-5."""
    sigma = gaussian_sigma(1.0, 1e-5, sensitivity=1.0)
    assert round(sigma * math.sqrt(dim) / n, 2) == expected
    z = torch.nn.functional.normalize(
        torch.randn(n, dim, generator=torch.Generator().manual_seed(0)), dim=1
    )
    memory = PrototypeMemory.empty(dim, "e").observe(clip(z, 1.0), ["owl"] * n)
    exact = SlotTable.of(memory, ["owl"])
    # The law is about the noise of the sum; a count scale this large leaves the count alone.
    noised = exact.noised(sigma, 1e3, seeded(3))
    norm = float((noised.means() - exact.means()).norm())
    assert norm == pytest.approx(expected, rel=0.05, abs=0.005)


def test_pooling_first_divides_the_noise():
    """Noise once on the sum of all clients, or a share of it at each, costs the same."""
    clients = [table_of([("ape", [1.0, 0, 0])] * 4, 1.0) for _ in range(9)]
    central = sum(clients[1:], start=clients[0]).noised(3.0, 0.5, seeded())
    shared = [table.noised(1.0, 0.5, seeded(k)) for k, table in enumerate(clients)]
    distributed = sum(shared[1:], start=shared[0])
    assert distributed.sum_variance == central.sum_variance == 9.0
    assert distributed.count_variance == central.count_variance == 36.0
    assert distributed.classes == central.classes == LABELS


def test_post_processing_gives_a_memory_for_classifiers():
    generator = torch.Generator().manual_seed(2)
    centres = torch.nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=1)
    names = [f"seen {k}" for k in range(5)]
    z = (centres + 0.05 * torch.randn(600, 5, 16, generator=generator)).reshape(-1, 16)
    bounds = Bounds("example", 1.0, 0.5)
    memory = PrototypeMemory.empty(16, "e").observe(clip(z, 1.0), names * 600)
    sigma = gaussian_sigma(1.0, 1e-5, bounds.sensitivity)
    labels = [*names, *(f"never {k}" for k in range(30))]
    table = release(memory, labels, bounds=bounds, sigma=sigma, entropy=seeded(1))
    noisy = table.memory(clip_norm=1.0)
    assert noisy.classes == tuple(names) and int(noisy.counts.min()) >= 1
    assert (noisy.counts - 600).abs().max() <= 6 * sigma / 0.5
    assert float(noisy.means().norm(dim=1).max()) <= 1 + 1e-4
    answers = read_off("ncm", noisy)
    assert [answers.classes[k] for k in answers.predict(centres).tolist()] == names


def test_means_do_not_explode_where_counts_are_small_or_negative():
    table = SlotTable(("a", "b"), torch.tensor([-5, 3]) * SCALE, torch.tensor([[4], [-9]]), "e")
    assert (table.means(2.0) * SCALE).tolist() == [[2.0], [-3.0]]
    memory = table.memory(clip_norm=1.0, threshold=-10.0)
    assert memory.counts.tolist() == [1, 3]
    assert table.memory(clip_norm=1.0, threshold=0.0).classes == ("b",)
    assert not table.memory(clip_norm=1.0, threshold=4.0)


def test_shortening_never_moves_a_mean_away_from_the_truth():
    generator = torch.Generator().manual_seed(4)
    truth = clip(torch.randn(50, 8, generator=generator), 1.0)
    labels = [f"{k:02}" for k in range(50)]
    table = SlotTable.of(PrototypeMemory.empty(8, "e").observe(truth, labels), labels)
    noised = table.noised(0.7, 100.0, seeded())
    shortened = noised.memory(clip_norm=1.0, threshold=0.0)
    before = (noised.means() - truth).norm(dim=1)
    after = (shortened.means() - truth).norm(dim=1)
    assert (after <= before + 1e-4).all() and float(after.mean()) < 0.8 * float(before.mean())


def test_threshold_keeps_so_many_empty_slots_on_average():
    labels = [f"{k:03}" for k in range(500)]
    empty = SlotTable.of(PrototypeMemory.empty(1, "e"), labels)
    kept = [
        len(table.memory(clip_norm=1.0, threshold=table.threshold(5.0)))
        for table in (empty.noised(2.0, 0.5, seeded(k)) for k in range(200))
    ]
    assert np.mean(kept) == pytest.approx(5.0, abs=4 * math.sqrt(5 / 200))


@pytest.mark.parametrize("rate", [0.2, 1.0, 3.0])
def test_integer_laplace_has_its_law(rate):
    draws = integer_laplace(200_000, rate, seeded()).numpy()
    q = math.exp(-rate)
    for z in range(-3, 4):
        wanted = (1 - q) / (1 + q) * q ** abs(z)
        assert np.mean(draws == z) == pytest.approx(wanted, abs=5 * math.sqrt(wanted / 200_000))


def test_class_names_need_the_support_of_several_clients():
    brought = {f"node {k}": ["owl", "fox"] for k in range(60)} | {"alone": ["owl", "yeti"]}
    for seed in range(20):
        names = release_class_names(brought, most=2, epsilon=1.0, delta=1e-6, entropy=seeded(seed))
        assert names == ("fox", "owl")
    assert release_class_names({}, most=1, epsilon=1.0, delta=1e-6, entropy=os.urandom) == ()


@pytest.mark.parametrize(("most", "epsilon", "delta"), [(1, 1.0, 0.01), (3, 2.0, 0.03)])
def test_a_name_of_one_client_alone_leaks_with_probability_delta_at_most(most, epsilon, delta):
    least = least_support(most, epsilon, delta)
    draws = 400_000
    leaked = float((1 + integer_laplace(draws, epsilon / most, seeded()) >= least).double().mean())
    assert leaked <= delta / most + 4 * math.sqrt(delta / most / draws)
    closer = (1 + integer_laplace(draws, epsilon / most, seeded()) >= least - 1).double().mean()
    assert float(closer) > delta / most  # one less would be too little


def test_a_client_counts_for_so_many_names_only():
    brought = {f"node {k}": [f"name {j}" for j in range(10)] for k in range(200)}
    published = release_class_names(brought, most=1, epsilon=50.0, delta=0.5, entropy=seeded())
    assert least_support(1, 50.0, 0.5) == 2
    assert len(published) == 10  # about twenty votes each, not two hundred
    few = {f"node {k}": [f"name {j}" for j in range(10)] for k in range(2)}
    assert len(release_class_names(few, most=1, epsilon=50.0, delta=0.5, entropy=seeded())) <= 1


def memory(values=((0.5, 0.5),), names=("ape",), moments="none"):
    return PrototypeMemory.empty(2, "e", moments).observe(torch.tensor(values), list(names))


BOUNDS = Bounds("example", 1.0, 1.0)


def call(seen=None, labels=LABELS, bounds=BOUNDS, sigma=1.0):
    return release(
        memory() if seen is None else seen,
        labels,
        bounds=bounds,
        sigma=sigma,
        entropy=seeded(),
    )


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (InvalidEmbedding, "clipped to norm 1, got 5", lambda: call(memory([[3.0, 4.0]]))),
        (InvalidMessage, "difference", lambda: call(memory() - memory() - memory())),
        (UnsupportedStatistics, "moments='none'", lambda: call(memory(moments="shared"))),
        (UnknownClass, "public list, got 'owl'", lambda: call(memory(names=["owl"]))),
        (ConfigError, "different public labels", lambda: call(labels=["ape", "ape"])),
        (ConfigError, "at least one", lambda: call(labels=[])),
        (InvalidMessage, "printable", lambda: call(labels=["ape", "\n"])),
        (ConfigError, "finite sigma above 0, got 0", lambda: call(sigma=0)),
        (ConfigError, "finite sigma above 0, got nan", lambda: call(sigma=math.nan)),
        (ConfigError, "noise from 1 to", lambda: call(sigma=1e-6)),
        (ConfigError, "noise from 1 to", lambda: call(sigma=1e14)),
        (
            InvalidMessage,
            "at most 1 classes of one client, got 2",
            lambda: call(
                memory([[0.0, 0.1]] * 2, ["ape", "bee"]), bounds=Bounds("client", 1.0, 1.0)
            ),
        ),
        (
            InvalidMessage,
            "at most 2 examples of a class from one client, got 3",
            lambda: call(
                memory([[0.0, 0.1]] * 3, ["ape"] * 3), bounds=Bounds("client", 1.0, 1.0, 2)
            ),
        ),
        (ConfigError, "expected neighbours among", lambda: Bounds("user", 1.0, 1.0)),
        (ConfigError, "clip norm", lambda: Bounds("example", 0.0, 1.0)),
        (ConfigError, "clip norm from", lambda: Bounds("example", 1e-6, 1.0)),
        (ConfigError, "clip norm from", lambda: clip(torch.ones(1, 2), 1e6)),
        (ConfigError, "count scale", lambda: Bounds("example", 1.0, -1.0)),
        (ConfigError, "examples per class", lambda: Bounds("client", 1.0, 1.0, 0)),
        (ConfigError, "1 or, for clients, more", lambda: Bounds("example", 1.0, 1.0, 2)),
        (ConfigError, "number of classes", lambda: Bounds("client", 1.0, 1.0, 1, 2.5)),
        (ConfigError, "for clients alone", lambda: Bounds("example", 1, 1, message_norm=1.0)),
        (ConfigError, "message norm above 0", lambda: Bounds("client", 1, 1, message_norm=0)),
        (InvalidEmbedding, "finite norm", lambda: clip(torch.tensor([[math.nan]]), 1.0)),
        (InvalidEmbedding, "finite norm", lambda: clip(torch.tensor([[math.inf]]), 1.0)),
        (InvalidEmbedding, "floating point", lambda: clip(torch.ones(1, 2).long(), 1.0)),
        (InvalidEmbedding, r"shape \(B, D\)", lambda: clip(torch.ones(2), 1.0)),
        (ConfigError, "embedding size", lambda: best_count_scale(1.0, 0)),
        (ConfigError, "got exact counts", lambda: SlotTable.of(memory(), LABELS).threshold()),
        (ConfigError, "fewer mistakes than 4", lambda: call().threshold(4.0)),
        (ConfigError, "least count of at least 1", lambda: call().memory(clip_norm=1, least=0.5)),
        (ConfigError, "finite threshold", lambda: call().memory(clip_norm=1, threshold=math.nan)),
        (EmbeddingMismatch, "one list of labels", lambda: call() + call(labels=[*LABELS, "elk"])),
        (ConfigError, "at least 1 name", lambda: least_support(0, 1.0, 0.1)),
        (ConfigError, "delta between", lambda: least_support(1, 1.0, 0.0)),
        (ConfigError, "epsilon above 0", lambda: least_support(1, 0.0, 0.1)),
    ],
)
def test_bad_values_are_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()
