"""Fine-tuning of a whole network: the head, the loop, and what it must not touch."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clfed.backbones import Conv4, Encoder, Identity
from clfed.errors import InvalidEmbedding, UnknownClass
from clfed.federated.networks import load_network, network_record
from clfed.learners.fine_tuning import FineTuning
from clfed.seeding import generator

WIDTHS = [4, 4, 4, 4]


def features(dim=6):
    return Encoder(Identity(dim, dim), {"_target_": "clfed.backbones.Identity"}, input_shape=(dim,))


@pytest.fixture(scope="module")
def pixels():
    """An encoder with batch normalisation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = Conv4(1, 16, WIDTHS)
    config = {"_target_": "clfed.backbones.Conv4", "widths": WIDTHS}
    return Encoder(backbone, config, input_shape=(1, 16, 16), mean=(0.5,), std=(0.3,))


def blobs(count=60, dim=6, classes=3):
    """Separable features: each class around a corner of its own."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    noise = 0.1 * torch.randn(count, dim, generator=rng)
    return noise + F.one_hot(labels, dim).float(), labels


def pictures(count=12):
    rng = torch.Generator().manual_seed(2)
    return (
        torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=rng),
        torch.arange(count) % 3,
    )


def bits(learner):
    return {name: value.numpy().tobytes() for name, value in learner.state_dict().items()}


def fit(learner, data, epochs=3, batch_size=8, seed=0):
    learner.fit(*data, epochs=epochs, batch_size=batch_size, rng=generator(seed, "test"))
    return learner


# The head


def test_a_new_head_knows_nothing():
    learner = FineTuning(features(), ["owl", "elk"])
    assert learner.classes == ("owl", "elk")
    assert learner(torch.randn(5, 6)).tolist() == [[0.0, 0.0]] * 5


def test_growing_keeps_old_rows_and_appends_zeros():
    learner = fit(FineTuning(features(), ["a", "b", "c"]), blobs())
    weight, bias = learner.head.weight.clone(), learner.head.bias.clone()
    learner.grow(["z", "b", "z", "d"])
    assert learner.classes == ("a", "b", "c", "z", "d")
    assert torch.equal(learner.head.weight[:3], weight) and torch.equal(learner.head.bias[:3], bias)
    assert not learner.head.weight[3:].any() and not learner.head.bias[3:].any()
    assert weight.any() and learner.head.out_features == 5
    learner.grow(["a", "d"])
    assert learner.classes == ("a", "b", "c", "z", "d")


def test_grown_rows_are_trained():
    learner = fit(FineTuning(features(), ["a", "b"]), blobs(classes=2))
    learner.grow(["c"])
    fit(learner, blobs(), epochs=20)
    assert learner.head.weight[2].any() and learner.head.weight.requires_grad


def test_labels_are_rows_by_name():
    learner = FineTuning(features(), ["b", "a"])
    assert learner.label(["a", "b", "a"]).tolist() == [1, 0, 1]
    assert learner.label([]).dtype == torch.int64
    with pytest.raises(UnknownClass, match="'c'"):
        learner.label(["a", "c"])


def test_the_order_in_which_classes_came_permutes_the_logits_and_nothing_else():
    images, labels = blobs()
    names = "abc"
    first = FineTuning(features(), "abc")
    second = FineTuning(features(), "cab")
    named = [names[i] for i in labels.tolist()]
    fit(first, (images, first.label(named)))
    fit(second, (images, second.label(named)))
    torch.testing.assert_close(first(images)[:, [2, 0, 1]], second(images))


# Training


def test_training_separates_what_can_be_separated():
    images, labels = blobs()
    learner = FineTuning(features(), "abc", lr=0.1)
    losses = [float(learner.training_step((images, labels), 0))]
    for _ in range(3):
        fit(learner, (images, labels), epochs=5)
        losses.append(float(learner.training_step((images, labels), 0)))
    assert losses[0] == pytest.approx(np.log(3))
    assert losses == sorted(losses, reverse=True)
    assert (learner.predict(images) == labels).all()


def test_one_step_is_the_gradient_of_softmax_regression():
    """W -= lr (softmax(W z + b) - onehot)^T z / B, with W = b = 0: all probabilities are 1/C."""
    images, labels = blobs(count=8)
    learner = FineTuning(features(), "abc", lr=0.5, momentum=0.9, weight_decay=0.0)
    fit(learner, (images, labels), epochs=1)
    z, y = images.double().numpy(), np.eye(3)[labels.numpy()]
    error = (np.full((8, 3), 1 / 3) - y) / 8
    np.testing.assert_allclose(learner.head.weight.detach(), -0.5 * error.T @ z, atol=1e-6)
    np.testing.assert_allclose(learner.head.bias.detach(), -0.5 * error.sum(0), atol=1e-6)


def test_the_same_generator_gives_the_same_bits_and_another_one_others(pixels):
    data = pictures()
    first, again, other = (
        bits(fit(FineTuning(pixels, "abc"), data, batch_size=4, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_ambient_randomness_is_neither_used_nor_touched(pixels):
    before = torch.random.get_rng_state()
    fit(FineTuning(pixels, "abc"), pictures())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, 5])
def test_a_last_batch_of_one_image_is_left_out(pixels, count):
    images, labels = pictures(count)
    learner = FineTuning(pixels, "abc")
    before = bits(learner)
    fit(learner, (images, labels), epochs=1, batch_size=4)
    tracked = learner.state_dict()["backbone.layers.1.num_batches_tracked"]
    start = pixels.backbone.state_dict()["layers.1.num_batches_tracked"]
    assert int(tracked - start) == count // 4
    assert (bits(learner) == before) is (count == 1)


def test_no_images_no_change(pixels):
    images, labels = pictures()
    learner = FineTuning(pixels, "abc")
    before = bits(learner)
    fit(learner, (images[:0], labels[:0]))
    assert bits(learner) == before


def test_the_backbone_learns_and_the_encoder_does_not(pixels):
    images, _ = pictures()
    embedding, identity, stored = pixels.embed(images), pixels.embedding_id, pixels.to_bytes()
    learner = fit(FineTuning(pixels, "abc", lr=0.1), pictures())
    assert bits(learner)["backbone.layers.0.weight"] != (
        pixels.backbone.state_dict()["layers.0.weight"].numpy().tobytes()
    )
    assert torch.equal(pixels.embed(images), embedding)
    assert (pixels.embedding_id, pixels.to_bytes()) == (identity, stored)
    assert not any(p.requires_grad for p in pixels.backbone.parameters())
    assert not pixels.backbone.training


# Answers


def test_predictions_are_the_largest_logits_in_any_batches(pixels):
    images, _ = pictures()
    learner = fit(FineTuning(pixels, "abc", lr=0.1), pictures())
    predicted = learner.predict(images)
    with torch.no_grad():
        logits = learner.eval()(images)
    assert logits.shape == (12, 3) and predicted.dtype == torch.int64
    assert predicted.tolist() == logits.argmax(1).tolist()
    assert learner.predict(images, batch_size=5).tolist() == predicted.tolist()
    assert learner.predict(images[:0]).shape == (0,)
    before = bits(learner)
    learner.predict(images)
    assert bits(learner) == before


def test_training_goes_on_after_a_prediction(pixels):
    learner = FineTuning(pixels, "abc")
    learner.predict(pictures()[0])
    before = bits(learner)["backbone.layers.1.running_mean"]
    fit(learner, pictures())
    assert bits(learner)["backbone.layers.1.running_mean"] != before


def test_a_network_survives_the_wire(pixels):
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0}
    learner = fit(FineTuning(pixels, "abc", **options), pictures())
    copy = load_network(pixels, network_record(learner), learner.classes, **options)
    assert bits(copy) == bits(learner) and copy.classes == learner.classes
    assert bits(fit(copy, pictures())) == bits(fit(learner, pictures()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_do_not_train_in_silence(value):
    images, labels = blobs()
    images[3, 2] = value
    with pytest.raises(InvalidEmbedding, match="finite"):
        fit(FineTuning(features(), "abc"), (images, labels))


def test_a_training_that_diverges_is_refused():
    with pytest.raises(InvalidEmbedding, match="finite"):
        fit(FineTuning(features(), "abc", lr=1e30), blobs(), epochs=10)
