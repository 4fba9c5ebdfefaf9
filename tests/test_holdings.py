"""Who holds which images, what is held out, and what stands in for other data."""

import pytest
import torch

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.surrogate import surrogates
from clfed.errors import ConfigError, NotEnoughData
from clfed.scenarios.holdings import load

CLASSES = ("ant", "bee", "cat")


def benchmark(shape=(1, 4, 4), per_class=20, test=True, classes=CLASSES):
    labels = torch.arange(len(classes)).repeat(per_class)
    images = torch.arange(len(labels) * torch.Size(shape).numel()).reshape(-1, *shape) % 251
    train = ImageSet(images.to(torch.uint8), labels, classes)
    groups = {"base": classes, "validation": (), "field": ()}
    mean = (0.5,) * shape[0]
    return Benchmark("tiny", train, train if test else None, groups, mean, mean, "For tests.")


def test_training_and_held_out_images_divide_each_class():
    made = load(benchmark=benchmark(), seed=0, validation=0.25)
    assert torch.bincount(made.train.labels).tolist() == [15, 15, 15]
    assert torch.bincount(made.validation.labels).tolist() == [5, 5, 5]
    train = {tuple(image.flatten().tolist()) for image in made.train.images}
    held = {tuple(image.flatten().tolist()) for image in made.validation.images}
    assert len(train | held) == 60 and not train & held


def test_ids_are_positions_in_the_whole_set():
    data = benchmark()
    made = load(benchmark=data, seed=3, train_images=8, validation=0.25)
    assert len(made.train) == 18
    assert torch.equal(made.train.images, data.train.images[made.ids])
    assert torch.equal(made.train.labels, data.train.labels[made.ids])
    assert bool((made.ids.diff() > 0).all())


def test_the_split_follows_the_seed():
    first, again, other = (load(benchmark=benchmark(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.owners, again.owners)
    assert not torch.equal(first.ids, other.ids)


def test_a_class_of_its_own_for_each_contributor():
    made = load(benchmark=benchmark(), seed=0, contributors=3, concentration=None)
    assert torch.equal(made.owners, made.train.labels)


@pytest.mark.parametrize("concentration, low, high", [(0.05, 0.6, 1.0), (1000.0, 0.3, 0.5)])
def test_concentration_says_how_unequal_owners_are(concentration, low, high):
    data = benchmark(per_class=300)
    made = load(benchmark=data, seed=0, contributors=3, concentration=concentration)
    largest = [
        float(torch.bincount(made.owners[made.train.labels == c], minlength=3).max()) / 270
        for c in range(3)
    ]
    assert low <= sum(largest) / 3 <= high
    assert len(made.owners) == len(made.train)


@pytest.mark.parametrize(
    "options",
    [{"validation": 1.0}, {"validation": -0.1}, {"contributors": 0}, {"concentration": -1.0}],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="scenario=holdings needs"):
        load(benchmark=benchmark(), seed=0, **options)


def test_data_without_test_images_are_refused():
    with pytest.raises(NotEnoughData, match="no test images"):
        load(benchmark=benchmark(test=False), seed=0)


@pytest.mark.parametrize("key", ["train_images", "test_images"])
def test_more_images_than_there_are_is_refused(key):
    with pytest.raises(NotEnoughData, match=f"scenario.{key}=21 asks for more than the 20 images"):
        load(benchmark=benchmark(), seed=0, **{key: 21})


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (3, 6, 6)])
def test_surrogates_get_the_shape_asked_for(shape):
    found = surrogates(benchmark(), shape, 7, seed=0)
    assert found.shape == (7, *shape) and found.dtype == torch.uint8
    assert torch.equal(found, surrogates(benchmark(), shape, 7, seed=0))
    assert not torch.equal(found, surrogates(benchmark(), shape, 7, seed=1))


def test_surrogates_of_the_same_shape_are_images_of_the_other_set():
    data = benchmark()
    found = surrogates(data, (1, 4, 4), 1000, seed=0)
    assert len(found) == len(data.train)
    whole = {tuple(image.flatten().tolist()) for image in data.train.images}
    assert {tuple(image.flatten().tolist()) for image in found} == whole


def test_grey_becomes_equal_channels_and_colour_their_mean():
    grey = surrogates(benchmark(), (3, 4, 4), 5, seed=0)
    assert torch.equal(grey[:, 0], grey[:, 2])
    colour = benchmark((3, 4, 4))
    single = surrogates(colour, (1, 4, 4), 60, seed=0)
    assert single.shape == (60, 1, 4, 4)
    expected = colour.train.images.double().mean(1, keepdim=True).round()
    found = sorted(image.flatten().tolist() for image in single.double())
    assert found == sorted(image.flatten().tolist() for image in expected)


def test_ready_features_have_no_surrogates():
    with pytest.raises(ConfigError, match="ready features"):
        surrogates(benchmark(), (64,), 5, seed=0)
