"""Prototype calibration: the golden values, the limits, and the learner that uses it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clfed.backbones import Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData, UnknownClass
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.learners.teen import TEEN
from clfed.prototypes import PrototypeMemory, read_off
from clfed.prototypes.calibration import calibrate
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
BASE = torch.tensor([True, True, False])


def memory_of(rows, names):
    return PrototypeMemory.empty(rows.shape[1], "e").observe(rows, names)


def by_hand(rows, base, alpha, tau):
    """Loops over classes, one similarity at a time."""
    unit = [row / row.norm() for row in rows]
    out = []
    for n, row in enumerate(rows):
        if base[n]:
            out.append(row)
            continue
        logits = [tau * float(unit[n] @ unit[b]) for b in range(len(rows)) if base[b]]
        weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
        anchors = [unit[b] for b in range(len(rows)) if base[b]]
        delta = sum(w * a for w, a in zip(weights, anchors, strict=True))
        out.append((1 - alpha) * unit[n] + alpha * delta / delta.norm())
    return torch.stack(out)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.1, (0.5440728, 0.8199170)), (0.5, (0.3203642, 0.8995851))]
)
def test_golden(alpha, expected):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    moved = calibrate(rows, BASE, delta_weight=alpha, temperature=16.0)
    assert moved[2].tolist() == pytest.approx(expected, abs=1e-7)
    pulled = calibrate(rows, BASE, delta_weight=1.0, temperature=16.0)[2]
    assert pulled.tolist() == pytest.approx((0.0407284, 0.9991703), abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_loops(seed):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 5, generator=rng, dtype=torch.float64)
    base = torch.rand(9, generator=rng) < 0.5
    base[0] = True
    torch.testing.assert_close(
        calibrate(rows, base, delta_weight=0.3, temperature=7.0), by_hand(rows, base, 0.3, 7.0)
    )


def test_limits():
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    base = torch.tensor([True, True, True, False, False, False])
    unit = rows / rows.norm(dim=1, keepdim=True)
    nearest = unit[:3][(unit[3:] @ unit[:3].T).argmax(1)]
    cold = calibrate(rows, base, delta_weight=1.0, temperature=1e6)
    torch.testing.assert_close(cold[3:], nearest)
    warm = calibrate(rows, base, delta_weight=1.0, temperature=0.0)
    mean = unit[:3].mean(0)
    torch.testing.assert_close(warm[3:], (mean / mean.norm()).expand(3, -1))
    untouched = calibrate(rows, base, delta_weight=0.0)
    torch.testing.assert_close(untouched[3:], unit[3:])
    nobody = torch.zeros(6, dtype=torch.bool)
    assert torch.equal(calibrate(rows, nobody), rows)


@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 50))
def test_base_rows_stay_and_order_does_not_matter(seed, alpha, tau):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    base = torch.rand(7, generator=rng) < 0.5
    moved = calibrate(rows, base, delta_weight=alpha, temperature=tau)
    assert torch.equal(moved[base], rows[base])
    order = torch.randperm(7, generator=rng)
    shuffled = calibrate(rows[order], base[order], delta_weight=alpha, temperature=tau)
    torch.testing.assert_close(shuffled, moved[order])


def test_a_session_is_calibrated_whatever_else_is_new():
    rng = torch.Generator().manual_seed(5)
    rows, names = torch.randn(6, 4, generator=rng), [*"abcdef"]
    whole = read_off("teen", memory_of(rows, names), base=["a", "b", "c"], classes=["d"])
    alone = read_off("teen", memory_of(rows[:4], names[:4]), base=["a", "b", "c"], classes=["d"])
    assert torch.equal(whole.weight, alone.weight)
    plain = read_off("ncm_cosine", memory_of(rows, names))
    zero = read_off("teen", memory_of(rows, names), base=["a", "b"], delta_weight=0)
    torch.testing.assert_close(plain.weight, zero.weight)
    assert torch.equal(read_off("teen", memory_of(rows, names)).weight, plain.weight)


@pytest.mark.parametrize(
    "options",
    [{"delta_weight": -0.1}, {"delta_weight": 1.1}, {"temperature": -1}, {"base": "abc"}],
)
def test_bad_options(options):
    memory = memory_of(torch.eye(3), [*"abc"])
    with pytest.raises(ConfigError):
        read_off("teen", memory, **options)


def test_unknown_classes():
    memory = memory_of(torch.eye(3), [*"abc"])
    with pytest.raises(UnknownClass):
        read_off("teen", memory, base=["z"])
    with pytest.raises(NotEnoughData):
        read_off("teen", PrototypeMemory.empty(3, "e"))


def experience(number, names, seed, shots=5):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(names)).repeat(shots)
    images = torch.randn(len(labels), 4, generator=rng) + 3 * torch.eye(4)[labels % 4]
    return Experience(number, ImageSet(images, labels, tuple(names)), number)


def teen(**options):
    return TEEN(Identity(), Transform((), ()), dim=4, **options)


def test_base_classes_are_those_of_the_first_experience_with_images():
    learner = teen()
    empty = ImageSet(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ("z",))
    parts = [experience(1, "ab", 1), experience(2, "cd", 2), experience(3, "ac", 3)]
    learn(learner, Experience(0, empty, 0), FAST)
    for part in parts:
        learn(learner, part, FAST)
    expected = read_off("teen", learner.memory, base=["a", "b"], classes=["a", "b", "c", "d"])
    assert torch.equal(learner.reader().weight, expected.weight)
    again = teen()
    state.restore(again, state.state_of(learner))
    assert torch.equal(again.reader().weight, expected.weight)
    named = teen(classifier={"name": "teen", "base": ["c"]})
    for part in parts:
        learn(named, part, FAST)
    assert named.reading(named.memory)["base"] == ["c"]


def test_what_nodes_merge_are_raw_sums():
    """Averaging calibrated prototypes of unequal nodes would not be the same."""
    base, many, few = experience(0, "ab", 1), experience(1, "c", 2, 9), experience(1, "c", 3, 2)
    one, other, both = teen(), teen(), teen()
    for learner, later in ((one, (many,)), (other, (few,)), (both, (many, few))):
        for part in (base, *later):
            learn(learner, part, FAST)
    own = other.memory.select(["c"])
    assert one.memory + own == both.memory
    one.memory = one.memory + own
    assert torch.equal(one.reader().weight, both.reader().weight)
    mean = 9 / 11 * calibrated(teen(), base, many) + 2 / 11 * calibrated(teen(), base, few)
    assert not torch.allclose(mean / mean.norm(), both.reader().weight[2])


def calibrated(learner, *parts):
    for part in parts:
        learn(learner, part, FAST)
    return learner.reader().weight[2]
