"""Base training: losses against slow loops, draws, cache, and the same bits again."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clfed.backbones import Conv4, Encoder, Identity
from clfed.backbones.encoder import Transform
from clfed.config import choices, compose
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.errors import ConfigError, EncoderError, InvalidEmbedding, NotEnoughData
from clfed.learners import CrossEntropy, FineTuning, PrototypicalNetwork
from clfed.learners.episodes import Augmentation, Episodes, Shuffled, rotate, with_rotations
from clfed.learners.loop import average_weights, nearest_mean_accuracy, validation_split
from clfed.learners.options import TrainerOptions, fast_bfloat16
from clfed.learners.protonet import squared_distance_logits
from clfed.learners.training import BaseTraining, base_encoder, cache_key, train_base
from clfed.scenarios.streams import Experience

TRANSFORM = Transform((0.5,), (0.25,))
BACKBONE = {"_target_": "clfed.backbones.Conv4", "widths": [4, 4, 4, 8]}
PROTONET = {
    "_target_": "clfed.learners.PrototypicalNetwork",
    "steps": 6,
    "way": 4,
    "shot": 2,
    "query": 2,
    "rotations": True,
    "augmentation": {"rotation": 5.0},
    "ema": 0.9,
    "lr": 0.01,
}
TRAINER = TrainerOptions(precision="32", threads=1, validate_every=2, resume_every=0)
CFG = BaseTraining(PROTONET, BACKBONE, TRAINER)


def drawings(classes: int, images: int, seed: int = 0, size: int = 16) -> ImageSet:
    """Each class is one random picture plus noise."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randint(0, 256, (classes, 1, 1, size, size), generator=rng).float()
    noise = 40 * torch.randn(classes, images, 1, size, size, generator=rng)
    pixels = (centres + noise).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    labels = torch.arange(classes).repeat_interleave(images)
    order = torch.randperm(len(labels), generator=rng)
    return ImageSet(pixels[order], labels[order], tuple(f"class{c:02}" for c in range(classes)))


def benchmark(base: int = 6, validation: int = 3, field: int = 3, images: int = 8) -> Benchmark:
    data = drawings(base + validation + field, images)
    names = data.classes
    groups = {
        "base": names[:base],
        "validation": names[base : base + validation],
        "field": names[base + validation :],
    }
    return Benchmark("drawings", data, None, groups, (0.5,), (0.25,), "Random pictures.")


def protonet(**options) -> PrototypicalNetwork:
    options = {"steps": 1, "way": 3, "shot": 2, "query": 2} | options
    return PrototypicalNetwork(Conv4(1, 16, (4, 4, 4, 8)), TRANSFORM, **options)


def five_classes() -> Experience:
    data = ImageSet(torch.randn(10, 4), torch.arange(10) % 5, tuple("abcde"))
    return Experience(0, data, phase=0)


def cross_entropy(**options) -> CrossEntropy:
    """Five classes of ready features of length 4, at the first step."""
    learner = CrossEntropy(nn.Linear(4, 4), TRANSFORM, steps=1, dim=4, **options)
    learner.begin_experience(five_classes())
    return learner


# The loss


def slow_loss(embeddings, way, shot, query):
    """The paper's equation, one number at a time."""
    rows = embeddings.double().numpy().reshape(way, shot + query, -1)
    losses = []
    for true_class in range(way):
        for q in range(shot, shot + query):
            distances = []
            for c in range(way):
                prototype = sum(rows[c, s] for s in range(shot)) / shot
                distances.append(sum((rows[true_class, q] - prototype) ** 2))
            weights = [math.exp(-d) for d in distances]
            losses.append(-math.log(weights[true_class] / sum(weights)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("way", "shot", "query"), [(2, 1, 1), (3, 1, 2), (5, 4, 3)])
def test_loss_is_the_papers(way, shot, query):
    rng = torch.Generator().manual_seed(way)
    embeddings = torch.randn(way * (shot + query), 6, generator=rng)
    loss = protonet(way=way, shot=shot, query=query).loss(embeddings, torch.empty(0))
    assert float(loss) == pytest.approx(slow_loss(embeddings, way, shot, query), rel=1e-5)


def test_one_shot_prototype_is_the_support_embedding():
    # Each query equals its class's one support: its distance to the right prototype is zero.
    support = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    embeddings = support.repeat_interleave(2, dim=0)
    loss = protonet(way=2, shot=1, query=1).loss(embeddings, torch.empty(0))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-25)), abs=1e-7)


def test_loss_does_not_depend_on_the_order_of_classes():
    learner = protonet(way=5, shot=2, query=3)
    embeddings = torch.randn(
        5, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    there = learner.loss(embeddings.flatten(0, 1), torch.empty(0))
    back = learner.loss(embeddings.flip(0).flatten(0, 1), torch.empty(0))
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gradient_reaches_support_and_query(metric):
    learner = protonet(way=3, shot=2, query=2, metric=metric)
    embeddings = torch.randn(12, 4, requires_grad=True)
    learner.loss(embeddings, torch.empty(0)).backward()
    assert (embeddings.grad.abs().sum(1) > 0).all()


def test_distances_are_a_linear_classifier():
    # The Bregman form: argmin of the distance = argmax of 2 p x - |p|^2.
    rng = torch.Generator().manual_seed(0)
    queries, prototypes = torch.randn(50, 8, generator=rng), torch.randn(7, 8, generator=rng)
    logits = squared_distance_logits(queries, prototypes)
    torch.testing.assert_close(
        logits, -torch.cdist(queries, prototypes).square(), atol=1e-4, rtol=0
    )
    linear = nn.functional.linear(queries, 2 * prototypes, -prototypes.square().sum(1))
    assert torch.equal(linear.argmax(1), logits.argmax(1))


def test_cosine_metric_ignores_lengths():
    learner = protonet(way=3, shot=1, query=2, metric="cosine", temperature=10.0)
    embeddings = torch.randn(9, 5)
    lengths = torch.rand(9, 1) + 0.5
    torch.testing.assert_close(
        learner.loss(embeddings, torch.empty(0)), learner.loss(embeddings * lengths, torch.empty(0))
    )


@pytest.mark.parametrize("head", ["linear", "cosine", "euclidean"])
def test_cross_entropy_heads_against_numpy(head):
    learner = cross_entropy(head=head, temperature=3.0)
    embeddings, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    z, w = embeddings.double().numpy(), learner.weight.detach().double().numpy()
    expected = []
    for i in range(6):
        logits = {
            "linear": [w[c] @ z[i] for c in range(5)],
            "cosine": [
                3 * w[c] @ z[i] / np.linalg.norm(w[c]) / np.linalg.norm(z[i]) for c in range(5)
            ],
            "euclidean": [-3 * ((w[c] - z[i]) ** 2).sum() for c in range(5)],
        }[head]
        expected.append(-logits[labels[i]] + np.log(np.exp(logits).sum()))
    assert learner.loss(embeddings, labels).item() == pytest.approx(np.mean(expected), rel=1e-5)
    learner.loss(embeddings, labels).backward()
    assert learner.weight.grad is not None
    assert (learner.scale.grad is not None) == (head == "euclidean")


def test_rotated_classes_have_heads_of_their_own():
    learner = cross_entropy(rotations=True)
    assert learner.logits(torch.zeros(2, 4)).shape == (2, 20)


def test_the_head_is_thrown_away():
    learner = cross_entropy()
    assert learner.weight.shape == (5, 4)
    learner.finish(five_classes())
    assert learner.weight.shape == (0, 4)


@pytest.mark.parametrize(
    "options", [{"train": "all"}, {"head": "round"}, {"temperature": 0.0}, {"batch_size": 1}]
)
def test_bad_options_of_cross_entropy_are_refused(options):
    with pytest.raises(ConfigError):
        cross_entropy(**options)


# Schedules


def test_step_schedule_halves():
    learner = protonet(schedule="step", halve_every=2000, lr=1e-3)
    assert [learner.rate(step) for step in (0, 1999, 2000, 3999, 4000)] == [1, 1, 0.5, 0.5, 0.25]


def test_optimiser_really_follows_the_schedule():
    learner = protonet(schedule="step", halve_every=3, lr=0.8, optimizer="sgd")
    setup = learner.configure_optimizers()
    rates = []
    for _ in range(7):
        rates.append(setup["optimizer"].param_groups[0]["lr"])
        setup["optimizer"].step()
        setup["lr_scheduler"]["scheduler"].step()
    assert setup["lr_scheduler"]["interval"] == "step"
    assert rates == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2])


def test_cosine_schedule_and_warmup():
    learner = protonet(schedule="cosine", steps=100)
    assert learner.rate(0) == 1
    assert learner.rate(50) == pytest.approx(0.5)
    assert 0 < learner.rate(99) < 0.001
    rising = protonet(warmup=3)
    assert [rising.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "sine"},
        {"optimizer": "lamb"},
        {"steps": 0},
        {"lr": 0.0},
        {"ema": 1.0},
        {"weight_decay": -1.0},
        {"metric": "manhattan"},
        {"way": 1},
        {"shot": 0},
        {"query": 0},
        {"icnn_set": "all"},
        {"proto_triplet": -1.0},
        {"prototypical": 0.0},
        {"margin": -0.1},
        {"augmentation": {"padding": "wood"}},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        protonet(**options)


def test_running_average_of_the_weights():
    torch_side, ours = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(torch_side.weight, 5.0)
    torch_side.num_batches_tracked += 7
    average_weights(ours, torch_side, decay=0.75)
    assert ours.weight.tolist() == [2.0, 2.0]  # 0.75 * 1 + 0.25 * 5
    assert int(ours.num_batches_tracked) == 7


# Draws


def episodes(data: ImageSet, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = {"way": 3, "per_class": (2, 1), "steps": range(5), "seed": 0} | options
    return list(Episodes(data, **options))


def test_episodes_have_distinct_images_of_distinct_classes():
    data = drawings(6, 4)
    places = {image.numpy().tobytes(): place for place, image in enumerate(data.images)}
    for images, labels in episodes(data):
        assert images.shape == (9, 1, 16, 16)
        found = [places[image.numpy().tobytes()] for image in images]
        assert len(set(found)) == 9
        assert torch.equal(data.labels[found], labels)
        assert (labels.reshape(3, 3) == labels.reshape(3, 3)[:, :1]).all()
        assert len(labels.unique()) == 3


def test_episodes_draw_every_image_of_unequal_classes():
    data = drawings(3, 6)
    keep = torch.ones(len(data), dtype=torch.bool)
    keep[data.indices_by_class()[1][3:]] = False
    uneven = data.subset(keep)
    seen = {
        image.numpy().tobytes()
        for images, _ in episodes(uneven, steps=range(60))
        for image in images
    }
    assert len(seen) == 15


def test_a_step_depends_on_seed_and_number_alone():
    data = drawings(6, 4)
    options = {"rotations": True, "augmentation": Augmentation()}
    whole = episodes(data, **options)
    tail = episodes(data, steps=range(3, 5), **options)
    assert torch.equal(whole[3][0], tail[0][0])
    assert not torch.equal(whole[3][0], whole[4][0])
    assert not torch.equal(whole[0][0], episodes(data, seed=1, **options)[0][0])


def test_rotations_are_classes_of_their_own():
    data = drawings(2, 3)
    for images, labels in episodes(data, way=8, rotations=True, steps=range(2)):
        assert labels.reshape(8, 3)[:, 0].sort().values.tolist() == list(range(8))
        upright = rotate(images, (4 - labels // 2) % 4)
        for image, label in zip(upright, labels, strict=True):
            member = data.images[data.labels == label % 2]
            assert (member == image).flatten(1).all(1).any()


def test_rotate_turns_each_image_by_its_own_amount():
    images = drawings(1, 4).images
    turned = rotate(images, torch.arange(4))
    for turns in range(4):
        assert torch.equal(turned[turns], torch.rot90(images[turns], turns, (-2, -1)))


@pytest.mark.parametrize(
    ("options", "both"),
    [({"way": 7}, ("7", "6")), ({"way": 25, "rotations": True}, ("25", "24"))],
)
def test_too_many_classes_are_refused(options, both):
    with pytest.raises(NotEnoughData) as caught:
        episodes(drawings(6, 4), **options)
    assert all(number in str(caught.value) for number in both)


def test_too_many_images_are_refused():
    data = drawings(6, 4)
    short = data.subset(
        torch.ones(24, dtype=torch.bool).index_fill(0, data.indices_by_class()[2][:1], False)
    )
    with pytest.raises(NotEnoughData, match=r"2 \+ 2 = 4 images .*'class02' has 3"):
        episodes(short, per_class=(2, 2))


@pytest.mark.parametrize("options", [{"way": 1}, {"per_class": (0, 1)}, {"per_class": (1, 0)}])
def test_empty_episodes_are_refused(options):
    with pytest.raises(ConfigError):
        episodes(drawings(6, 4), **options)


def test_only_square_images_are_rotated():
    flat = ImageSet(
        torch.zeros(4, 1, 8, 6, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b")
    )
    with pytest.raises(ConfigError, match="8x6"):
        episodes(flat, way=2, per_class=(1, 1), rotations=True)
    ready = ImageSet(torch.zeros(4, 8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    with pytest.raises(ConfigError, match="neither rotated nor augmented"):
        episodes(ready, way=2, per_class=(1, 1), rotations=True)


def test_shuffled_batches_label_rotations():
    data = drawings(3, 4)
    for images, labels in Shuffled(data, batch_size=50, steps=range(2), seed=0, rotations=True):
        assert images.shape == (50, 1, 16, 16)
        assert 3 < int(labels.max()) < 12
        back = rotate(images, (4 - labels // 3) % 4)
        for image, label in zip(back, labels, strict=True):
            assert (data.images[data.labels == label % 3] == image).flatten(1).all(1).any()


def test_all_rotations_of_a_set():
    data = drawings(3, 4)
    turned = with_rotations(data)
    assert len(turned.classes) == 12
    assert torch.bincount(turned.labels).tolist() == [4] * 12
    quarter = turned.labels // 3
    assert torch.equal(rotate(turned.images, (4 - quarter) % 4), data.images.repeat(4, 1, 1, 1))
    assert torch.equal(turned.labels % 3, data.labels.repeat(4))


def test_no_augmentation_leaves_images_alone():
    images = drawings(2, 3).images
    still = Augmentation(rotation=0, scale=0, shear=0, shift=0)
    torch.testing.assert_close(still(images, torch.Generator()), images.float(), atol=1e-2, rtol=0)
    mirrored = Augmentation(rotation=0, scale=0, shear=0, shift=0, flip=True)
    both = mirrored(images.repeat(20, 1, 1, 1), torch.Generator().manual_seed(0))
    original, other = images.repeat(20, 1, 1, 1).float(), images.repeat(20, 1, 1, 1).flip(3).float()
    same = (both - original).abs().flatten(1).amax(1) < 1e-2
    flipped = (both - other).abs().flatten(1).amax(1) < 1e-2
    assert (same | flipped).all() and 30 < int(flipped.sum()) < 90


# Validation


def test_validation_split_takes_shots_of_every_class():
    data = drawings(4, 8)
    support = validation_split(data, shots=5, seed=0)
    assert torch.bincount(data.labels[support]).tolist() == [5, 5, 5, 5]
    assert torch.equal(support, validation_split(data, shots=5, seed=0))
    assert not torch.equal(support, validation_split(data, shots=5, seed=1))
    assert torch.bincount(data.labels[validation_split(data, 15, 0)]).tolist() == [6] * 4
    with pytest.raises(NotEnoughData, match="has 1"):
        validation_split(drawings(2, 1), 1, 0)
    assert len(validation_split(data.of_classes([]), 5, 0)) == 0


def test_validation_accuracy_agrees_with_sklearn():
    from sklearn.neighbors import NearestCentroid

    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(20)
    embeddings = torch.randn(6, 5, generator=rng)[labels] + torch.randn(120, 5, generator=rng)
    support = torch.rand(120, generator=rng) < 0.5
    theirs = NearestCentroid().fit(embeddings[support], labels[support])
    expected = theirs.score(embeddings[~support], labels[~support])
    assert nearest_mean_accuracy(embeddings, labels, support) == pytest.approx(expected)


# Training


def test_same_seed_same_bytes(tmp_path):
    data = benchmark()
    first = train_base(CFG, data, seed=3, cache=tmp_path / "a")
    torch.randn(5)  # ambient randomness must not matter
    second = train_base(CFG, data, seed=3, cache=tmp_path / "b")
    assert first.encoder.to_bytes() == second.encoder.to_bytes()
    assert first.summary.validation == second.summary.validation
    other = train_base(CFG, data, seed=4, cache=tmp_path / "b")
    assert other.encoder.embedding_id != first.encoder.embedding_id


def test_training_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    base_encoder(CFG, benchmark(), seed=0, cache=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert sorted(p.suffix for p in (tmp_path / "cache" / "base").iterdir()) == [
        ".json",
        ".safetensors",
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_summary_tells_the_validation_curve(tmp_path):
    said = []
    trained = train_base(
        CFG, benchmark(), seed=0, cache=tmp_path, progress=lambda *told: said.append(told)
    )
    summary = trained.summary
    assert [step for step, _ in summary.validation] == [2, 4, 6]
    best = max(accuracy for _, accuracy in summary.validation)
    assert dict(map(tuple, summary.validation))[summary.best_step] == best
    assert summary.steps == 6 and summary.seconds > 0 and summary.precision == "32"
    assert [(step, total) for step, total, _ in said] == [(step, 6) for step in range(1, 7)]
    assert "validation" in said[-1][2]


def test_training_learns(tmp_path):
    data = benchmark(base=12, validation=12, images=12)
    longer = replace(CFG, learner={**PROTONET, "steps": 60, "way": 12, "augmentation": None})
    longer = replace(longer, trainer=replace(TRAINER, validate_every=60))
    curve = train_base(longer, data, seed=0, cache=tmp_path).summary.validation
    start = train_base(replace(longer, learner={}), data, seed=0, cache=tmp_path)
    held_out = data.train.of_classes(data.groups["validation"])
    untrained = nearest_mean_accuracy(
        start.encoder.embed(held_out.images), held_out.labels, validation_split(held_out, 15, 0)
    )
    assert curve[-1][1] > untrained


def test_field_and_test_images_do_not_matter(tmp_path):
    data = benchmark()
    other = benchmark(field=3)
    images = other.train.images.clone()
    field = torch.isin(other.train.labels, torch.tensor([9, 10, 11]))
    images[field] = 255 - images[field]
    other = replace(other, train=ImageSet(images, other.train.labels, other.train.classes))
    first = base_encoder(CFG, data, seed=0, cache=tmp_path / "a")
    second = base_encoder(CFG, other, seed=0, cache=tmp_path / "b")
    assert first.to_bytes() == second.to_bytes()


def test_cache_is_used(tmp_path):
    first = train_base(CFG, benchmark(), seed=0, cache=tmp_path)
    again = train_base(CFG, benchmark(), seed=0, cache=tmp_path)
    assert not first.cached and again.cached
    assert again.encoder.to_bytes() == first.encoder.to_bytes()
    assert again.summary == first.summary


def test_cache_key_tells_settings_apart():
    data = benchmark()
    base, held_out = (data.train.of_classes(data.groups[g]) for g in ("base", "validation"))

    def key(cfg=CFG, data=data, base=base, held_out=held_out, seed=0):
        return cache_key(cfg, data, base, held_out, seed)

    keys = {
        key(),
        key(seed=1),
        key(base=held_out),
        key(held_out=base),
        key(data=replace(data, mean=(0.4,))),
        key(replace(CFG, learner={**PROTONET, "lr": 0.02})),
        key(replace(CFG, backbone={**BACKBONE, "widths": [4, 4, 4, 4]})),
        key(replace(CFG, trainer=replace(TRAINER, precision="bf16-mixed"))),
        key(replace(CFG, trainer=replace(TRAINER, threads=2))),
        key(replace(CFG, feature_map={"_target_": "clfed.prototypes.features.tukey"})),
    }
    assert len(keys) == 10
    assert key() == key(replace(CFG, trainer=replace(TRAINER, resume_every=9)))


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"rubbish"])
def test_damaged_cache_is_reported_and_made_again(tmp_path, caplog, suffix, content):
    first = train_base(CFG, benchmark(), seed=0, cache=tmp_path)
    (file,) = (tmp_path / "base").glob(f"*{suffix}")
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = train_base(CFG, benchmark(), seed=0, cache=tmp_path)
    assert not again.cached and "damaged" in caplog.text
    assert again.encoder.to_bytes() == first.encoder.to_bytes()
    assert train_base(CFG, benchmark(), seed=0, cache=tmp_path).cached


class Stop(Exception):
    pass


@pytest.mark.parametrize("cut", [3, 5])
@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_an_interrupted_training_ends_in_the_same_bytes(tmp_path, cut, ema):
    cfg = replace(
        CFG,
        learner={**PROTONET, "ema": ema, "schedule": "cosine"},
        trainer=replace(TRAINER, resume_every=2),
    )
    whole = train_base(cfg, benchmark(), seed=0, cache=tmp_path / "whole")

    def stop(step, total, text):
        if step == cut:
            raise Stop

    with pytest.raises(Stop):
        train_base(cfg, benchmark(), seed=0, cache=tmp_path / "cut", progress=stop)
    (checkpoint,) = (tmp_path / "cut" / "base").iterdir()
    assert checkpoint.suffix == ".ckpt"
    steps = []
    resumed = train_base(
        cfg,
        benchmark(),
        seed=0,
        cache=tmp_path / "cut",
        progress=lambda step, total, text: steps.append(step),
    )
    assert steps == list(range(cut // 2 * 2 + 1, 7))
    assert resumed.encoder.to_bytes() == whole.encoder.to_bytes()
    assert resumed.summary.validation == whole.summary.validation
    assert resumed.summary.best_step == whole.summary.best_step
    assert not checkpoint.exists()


def test_a_damaged_checkpoint_is_reported(tmp_path, caplog):
    cfg = replace(CFG, trainer=replace(TRAINER, resume_every=2))
    data = benchmark()
    key = cache_key(
        cfg, data, *(data.train.of_classes(data.groups[g]) for g in ("base", "validation")), 0
    )
    checkpoint = tmp_path / "base" / f"{key}.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"rubbish")
    with caplog.at_level(logging.WARNING):
        trained = train_base(cfg, data, seed=0, cache=tmp_path)
    assert "damaged" in caplog.text
    whole = train_base(cfg, data, seed=0, cache=tmp_path / "other")
    assert trained.encoder.to_bytes() == whole.encoder.to_bytes()


def test_a_checkpoint_that_cannot_be_written_is_reported(tmp_path, caplog, monkeypatch):
    import lightning

    def full_disk(self, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", full_disk)
    cfg = replace(CFG, trainer=replace(TRAINER, resume_every=2))
    with caplog.at_level(logging.WARNING):
        trained = train_base(cfg, benchmark(), seed=0, cache=tmp_path)
    assert "No space left" in caplog.text
    assert sorted(p.suffix for p in (tmp_path / "base").iterdir()) == [".json", ".safetensors"]
    assert trained.summary.best_step > 0


def test_a_cache_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cache"):
        base_encoder(CFG, benchmark(), seed=0, cache=tmp_path / "file")


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_bytes(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from dataclasses import replace; import test_learners as t;"
        "cfg = replace(t.CFG, trainer=replace(t.TRAINER, resume_every=2));"
        "say = lambda step, total, text: print(step, flush=True);"
        "t.train_base(cfg, t.benchmark(), seed=0, cache=Path(sys.argv[2]), progress=say)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "cut")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "3":
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    cfg = replace(CFG, trainer=replace(TRAINER, resume_every=2))
    resumed = train_base(cfg, benchmark(), seed=0, cache=tmp_path / "cut")
    whole = train_base(CFG, benchmark(), seed=0, cache=tmp_path / "whole")
    assert resumed.encoder.to_bytes() == whole.encoder.to_bytes()


def test_cross_entropy_trains(tmp_path):
    learner = {
        "_target_": "clfed.learners.CrossEntropy",
        "steps": 4,
        "batch_size": 8,
        "head": "euclidean",
        "temperature": 0.1,
        "rotations": True,
    }
    cfg = replace(CFG, learner=learner)
    first = base_encoder(cfg, benchmark(), seed=0, cache=tmp_path / "a")
    assert (
        first.to_bytes() == base_encoder(cfg, benchmark(), seed=0, cache=tmp_path / "b").to_bytes()
    )


def test_bfloat16_trains_on_any_processor(tmp_path):
    cfg = replace(CFG, trainer=replace(TRAINER, precision="bf16-mixed"))
    low = train_base(cfg, benchmark(), seed=0, cache=tmp_path)
    assert low.summary.precision == "bf16-mixed"
    full = train_base(CFG, benchmark(), seed=0, cache=tmp_path)
    assert low.encoder.embedding_id != full.encoder.embedding_id
    assert low.encoder.embed(benchmark().train.images).dtype == torch.float32


def test_auto_precision_follows_the_processor(monkeypatch):
    monkeypatch.setattr("clfed.learners.options.fast_bfloat16", lambda: True)
    assert TrainerOptions().resolved_precision() == "bf16-mixed"
    monkeypatch.setattr("clfed.learners.options.fast_bfloat16", lambda: False)
    assert TrainerOptions().resolved_precision() == "32"
    assert TrainerOptions(precision=32).resolved_precision() == "32"
    assert isinstance(fast_bfloat16(), bool)


def test_divergence_is_a_sentence(tmp_path):
    cfg = replace(CFG, learner={**PROTONET, "lr": 1e30, "optimizer": "sgd"})
    with pytest.raises(InvalidEmbedding, match=r"diverged|not finite"):
        base_encoder(cfg, benchmark(), seed=0, cache=tmp_path)


def test_without_validation_the_last_step_is_taken(tmp_path):
    trained = train_base(CFG, benchmark(validation=0), seed=0, cache=tmp_path)
    assert trained.summary.validation == [] and trained.summary.best_step == 6


def test_nothing_is_trained_without_a_learner(tmp_path):
    cfg = replace(CFG, learner={"_target_": None})
    first = train_base(cfg, benchmark(), seed=0, cache=tmp_path / "cache")
    assert first.summary.steps == 0
    assert not (tmp_path / "cache").exists()
    assert (
        first.encoder.to_bytes()
        == base_encoder(cfg, benchmark(), seed=0, cache=tmp_path).to_bytes()
    )
    assert (
        base_encoder(cfg, benchmark(), seed=1, cache=tmp_path).embedding_id
        != first.encoder.embedding_id
    )


def features(base: int = 2) -> Benchmark:
    names = tuple("abcd")
    data = ImageSet(torch.randn(8, 5), torch.arange(4).repeat(2), names)
    groups = {"base": names[:base], "validation": (), "field": names[base:]}
    return Benchmark("ready", data, None, groups, (), (), "Ready features.")


def test_ready_features_need_no_training_and_no_base(tmp_path):
    cfg = BaseTraining(PROTONET, {"_target_": "clfed.backbones.Identity"}, TRAINER)
    data = features(base=0)
    encoder = base_encoder(cfg, data, seed=0, cache=tmp_path)
    assert torch.equal(encoder.embed(data.train.images), data.train.images)


def test_data_and_backbone_must_fit(tmp_path):
    with pytest.raises(ConfigError, match="ready features"):
        base_encoder(CFG, features(), seed=0, cache=tmp_path)


def test_pixels_themselves_need_no_training(tmp_path):
    identity = replace(CFG, backbone={"_target_": "clfed.backbones.Identity"})
    trained = train_base(identity, benchmark(), seed=0, cache=tmp_path)
    assert trained.summary.steps == 0 and trained.encoder.dim == 16 * 16


def test_base_training_needs_base_classes(tmp_path):
    with pytest.raises(NotEnoughData, match="base classes"):
        base_encoder(CFG, benchmark(base=0), seed=0, cache=tmp_path)
    with pytest.raises(NotEnoughData, match="99 classes"):
        base_encoder(
            replace(CFG, learner={**PROTONET, "way": 99}), benchmark(), seed=0, cache=tmp_path
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"learner": {**PROTONET, "colour": "red"}},
        {"learner": {**PROTONET, "augmentation": {"colour": "red"}}},
        {"learner": {"_target_": "clfed.learners.Nothing"}},
        {"learner": {"_target_": "clfed.learners.FineTuning"}},
        {"backbone": {**BACKBONE, "colour": "red"}},
        {"backbone": {"_target_": "clfed.backbones.Nothing"}},
        {"backbone": {"_target_": "torch.nn.Flatten"}},
    ],
    ids=str,
)
def test_what_cannot_be_built_is_a_sentence(tmp_path, changes):
    with pytest.raises((ConfigError, EncoderError)):
        base_encoder(replace(CFG, **changes), benchmark(), seed=0, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "16"},
        {"threads": 0},
        {"validate_every": 0},
        {"validation_shots": 0},
        {"resume_every": -1},
    ],
)
def test_bad_trainer_options_are_refused(options):
    with pytest.raises(ConfigError):
        TrainerOptions(**options)


def test_a_learner_with_a_layer_of_its_own_makes_no_encoder(tmp_path):
    cfg = compose(["learner=adagauss", "backbone.widths=[4,4,4,8]"])
    with pytest.raises(ConfigError, match="layer of its own"):
        base_encoder(BaseTraining.from_config(cfg), benchmark(), seed=0, cache=tmp_path)


NO_TRAINING = ("adagauss", "from_file")


@pytest.mark.parametrize("name", [n for n, _ in choices("learner") if n not in NO_TRAINING])
def test_every_configuration_trains(name, tmp_path):
    cfg = compose([f"learner={name}", "backbone.widths=[4,4,4,8]", "trainer.threads=1"])
    read = BaseTraining.from_config(cfg)
    small = {"steps": 2, "way": 3, "shot": 2, "query": 2, "batch_size": 8}
    known = {**read.learner, **{key: small[key] for key in small if key in read.learner}}
    encoder = base_encoder(replace(read, learner=known), benchmark(), seed=0, cache=tmp_path)
    images = benchmark().train.images
    assert encoder.embed(images).shape == (len(images), encoder.dim)
    assert Encoder.from_bytes(encoder.to_bytes()).embedding_id == encoder.embedding_id


def test_configuration_is_read():
    read = BaseTraining.from_config(compose(["trainer.precision=32", "learner.steps=7"]))
    assert read.trainer.precision == "32" and read.learner["steps"] == 7
    assert read.feature_map is None
    with pytest.raises(ConfigError, match="colour"):
        BaseTraining.from_config(compose(["+trainer.colour=red"]))


def test_fine_tuning_starts_from_an_encoder():
    network = Conv4(1, 16, (4, 4, 4, 8))
    encoder = Encoder(network, BACKBONE, input_shape=(1, 16, 16), mean=(0.5,), std=(0.25,))
    data = benchmark().train
    learner = FineTuning(encoder, data.classes, lr=0.05)
    before = encoder.embed(data.images)
    learner.fit(
        data.images, data.labels, epochs=2, batch_size=16, rng=torch.Generator().manual_seed(0)
    )
    assert learner.predict(data.images).shape == (len(data),)
    assert torch.equal(encoder.embed(data.images), before)


def test_summary_is_plain_json(tmp_path):
    train_base(CFG, benchmark(), seed=0, cache=tmp_path)
    (file,) = (tmp_path / "base").glob("*.json")
    assert set(json.loads(file.read_text())) == {
        "steps",
        "best_step",
        "validation",
        "precision",
        "seconds",
    }


def test_identity_is_no_network():
    assert not list(Identity().parameters())
