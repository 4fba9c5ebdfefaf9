"""Images that marked learners keep: capacity, reservoir law, checkpoints."""

import pytest
import torch

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.buffer import ImageBuffer
from clfed.seeding import generator


def numbered(start, stop, names=("a", "b")):
    images = torch.arange(start, stop, dtype=torch.float32)[:, None]
    return ImageSet(images, torch.arange(start, stop) % len(names), names)


def slow_reservoir(capacity, size, rng):
    kept = []
    draws = torch.rand(size, generator=rng, dtype=torch.float64)
    for n in range(size):
        if n < capacity:
            kept.append(n)
        elif (place := int(draws[n] * (n + 1))) < capacity:
            kept[place] = n
    return kept


@pytest.mark.parametrize(("capacity", "size"), [(5, 3), (5, 5), (5, 50), (0, 4), (1, 9)])
def test_reservoir_equals_one_image_after_another(capacity, size):
    buffer = ImageBuffer(capacity)
    buffer.reservoir(numbered(0, size), generator(1, "r"))
    expected = slow_reservoir(capacity, size, generator(1, "r"))
    content = buffer.content()
    assert (content.images[:, 0].tolist() if content is not None else []) == expected
    assert buffer.labels.tolist() == [n % 2 for n in expected]


def test_every_image_is_kept_equally_often():
    kept = torch.zeros(40)
    for seed in range(600):
        buffer = ImageBuffer(10)
        for part in range(4):
            buffer.reservoir(numbered(10 * part, 10 * part + 10), generator(seed, "r", part))
        assert len(buffer) == 10
        kept[buffer.content().images[:, 0].long()] += 1
    share = kept / 600
    assert abs(float(share.mean()) - 0.25) < 1e-6
    assert float((share - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 600) ** 0.5


def test_names_outlive_their_numbers():
    buffer = ImageBuffer(None)
    buffer.append(numbered(0, 2, ("a", "b")))
    buffer.append(numbered(2, 4, ("c", "a")))
    content = buffer.content()
    names = [content.classes[label] for label in content.labels.tolist()]
    assert names == ["a", "b", "c", "a"] and buffer.nbytes == 16


def test_state_round_trip_and_clear():
    buffer, other = ImageBuffer(3), ImageBuffer(3)
    buffer.reservoir(numbered(0, 9), generator(0, "r"))
    other.restore(buffer.state())
    more = numbered(9, 20)
    buffer.reservoir(more, generator(0, "s"))
    other.reservoir(more, generator(0, "s"))
    assert torch.equal(buffer.content().images, other.content().images)
    buffer.keep(torch.tensor([0]))
    assert len(buffer) == 1
    buffer.clear()
    assert len(buffer) == 0 and buffer.content() is None and buffer.nbytes == 0


def test_too_much_is_refused_and_nothing_changes():
    buffer = ImageBuffer(3)
    buffer.append(numbered(0, 2))
    with pytest.raises(ConfigError, match="at most 3 images, got 4"):
        buffer.append(numbered(0, 2))
    assert len(buffer) == 2
    with pytest.raises(ConfigError, match="-1"):
        ImageBuffer(-1)
