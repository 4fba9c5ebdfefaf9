"""TARGET: its losses against plain loops, what the server makes, and what travels when."""

import math

import numpy as np
import pytest
import torch
from data_free import (
    NEW,
    OLD,
    ask,
    bits,
    failed,
    first_mission,
    network,
    normalised,
    pictures,
    pixels,
    plain,
    request,
    run,
    taught,
    trained,
    vectors,
    visit,
)
from flwr.app import Array, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from clfed.errors import ConfigError, InvalidMessage
from clfed.federated.grid import LocalGrid
from clfed.federated.networks import network_record
from clfed.federated.wire import record_bytes
from clfed.learners.generators import Generator, batch_moments, moments_distance
from clfed.strategies.fedavg import FedAvgTraining
from clfed.strategies.target import TARGET, TARGETTraining, disagreement

SMALL = {"images": 12, "batch_size": 4, "steps": 2, "warmup": 1, "student_steps": 2}
SMALL |= {"code": 8, "width": 4}


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


def server(encoder, **options):
    return TARGET(encoder, local={}, session="s", nodes=2, wait=0.0, **(SMALL | options))


# The losses


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def drawn(images, seen, count):
    """Which images a node drew, from a generator in the same state."""
    return images[torch.randperm(len(images), generator=seen.rng("synthetic"))[:count]]


@pytest.mark.parametrize("labels", [("ant", "bee", "ant", "bee"), ("ant", "dog", "dog", "ant")])
def test_the_loss_is_that_of_plain_loops(labels):
    encoder = pixels()
    teacher = network(encoder, OLD).eval()
    images = pictures(encoder, 7, seed=9)
    seen = visit(encoder, labels, taught(teacher, images={"images": Array(images.numpy())}))
    model = network(pixels(4), [*OLD, "ant", "bee"], seed=5)
    half = TARGETTraining(kd=3.0, temperature=2.0, synthetic_batch_size=5)
    rows = model.label(labels)
    loss = half.loss(model, seen, request(model, 2))(model, seen.images, rows).detach()

    current = sorted({*rows.tolist(), 3, 4})  # what is new, and old classes that came back
    with torch.no_grad():
        real, made = model(seen.images).tolist(), drawn(images, seen, 5)
        told, say = teacher(made).tolist(), model(made).tolist()
    new = [
        -math.log(softmax([row[k] for k in current])[current.index(y)])
        for row, y in zip(real, rows.tolist(), strict=True)
    ]
    kept = [
        divergence(softmax(old, 2.0), softmax(now[:3], 2.0))
        for old, now in zip(told, say, strict=True)
    ]
    expected = sum(new) / len(new) + 3.0 * sum(kept) / len(kept)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_with_logits_met_classes_of_other_nodes_do_not_compete():
    encoder = pixels()
    teacher = network(encoder, OLD).eval()
    seen = visit(encoder, ("bee", "bee"), taught(teacher))
    model = network(encoder, [*OLD, *NEW])
    assert TARGETTraining(logits="met").current(model, seen, teacher).tolist() == [4]
    assert TARGETTraining().current(model, seen, teacher).tolist() == [3, 4]


def test_the_teacher_agrees_with_itself_and_gets_no_gradient():
    encoder = normalised()
    teacher = network(encoder, OLD).eval()
    images = pictures(encoder, 6)
    seen = visit(encoder, ("cat", "dog"), taught(teacher, images={"images": Array(images.numpy())}))
    before = bits(seen.state["teacher"])
    TARGETTraining(epochs=1, batch_size=2).train(seen, request(network(encoder, OLD), 2))
    assert bits(seen.state["teacher"]) == before

    model = network(encoder, OLD).eval()
    strong = TARGETTraining(kd=1000.0).loss(model, seen, request(model, 2))
    alone = TARGETTraining(kd=0.0).loss(model, seen, request(model, 2))
    of_batch = seen.images, model.label(seen.labels)
    assert strong(model, *of_batch).item() == pytest.approx(alone(model, *of_batch).item(), 1e-5)


def layers_and_inputs(count=9):
    """Layers whose running statistics are exactly those of an input each."""
    rng = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(4)).eval()
    inputs = torch.randn(count, 3, 5, 5, generator=rng), torch.randn(count, 4, generator=rng)
    for layer, values in zip(layers, inputs, strict=True):
        array = values.numpy().astype(float)
        axes = (0, 2, 3) if array.ndim == 4 else (0,)
        layer.running_mean.copy_(torch.from_numpy(array.mean(axes)))
        layer.running_var.copy_(torch.from_numpy(array.var(axes)))
    return layers, inputs


def test_a_batch_with_the_running_statistics_has_no_distance():
    layers, inputs = layers_and_inputs()
    with batch_moments(layers) as seen:
        for layer, values in zip(layers, inputs, strict=True):
            layer(values)
        assert float(moments_distance(seen, {}, 0.9)) == pytest.approx(0, abs=1e-5)
        for layer, values in zip(layers, inputs, strict=True):
            layer(values + 1)
        # Every mean is off by one: the roots of 3 and of 4.
        assert float(moments_distance(seen, {}, 0.9)) == pytest.approx(3**0.5 + 2, rel=1e-5)
        mean = {layer: (m - 1, v) for layer, (m, v) in seen.items()}
        smooth = float(moments_distance(seen, mean, 0.75))
        assert smooth == pytest.approx(0.25 * (3**0.5 + 2), rel=1e-4)
    layers[0](inputs[0])
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_without_batch_normalisation_there_is_no_distance():
    with batch_moments(pixels().backbone) as seen:
        assert not seen and float(moments_distance(seen, {}, 0.9)) == 0


def test_students_that_answer_otherwise_do_not_count():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 40, 3))
    each = [
        divergence(softmax(t), softmax(s)) if np.argmax(t) == np.argmax(s) else 0.0
        for t, s in zip(teacher, student, strict=True)
    ]
    assert 0 < sum(value > 0 for value in each) < 40
    found = disagreement(torch.from_numpy(teacher), torch.from_numpy(student))
    assert float(found) == pytest.approx(sum(each) / 40, rel=1e-9)


# What the server makes


@pytest.mark.parametrize("encoder", [pixels, normalised, vectors])
def test_images_depend_on_seed_and_mission_alone(encoder):
    encoder = encoder()
    teacher = network(encoder, OLD).eval().requires_grad_(False)
    before, state = bits(network_record(teacher)), torch.random.get_rng_state()
    made = server(encoder, seed=1).synthesise(teacher, 2)
    again = server(encoder, seed=1)
    again.synthesise(teacher, 3)
    assert torch.equal(made, again.synthesise(teacher, 2))
    assert not torch.equal(made, again.synthesise(teacher, 3))
    assert not torch.equal(made, server(encoder, seed=2).synthesise(teacher, 2))
    assert made.shape == (12, *encoder.input_shape)
    assert made.dtype == (torch.uint8 if len(encoder.input_shape) == 3 else torch.float32)
    assert torch.equal(state, torch.random.get_rng_state())
    assert bits(network_record(teacher)) == before


def test_the_adversarial_term_begins_after_the_warm_up():
    teacher = network(normalised(), OLD).eval().requires_grad_(False)
    without, mild, strong = (
        server(normalised(), adv=weight).synthesise(teacher, 2) for weight in (0.0, 1.0, 100.0)
    )
    assert torch.equal(without[:4], mild[:4]) and torch.equal(without[:4], strong[:4])
    assert not torch.equal(mild[4:], strong[4:])
    untaught = server(normalised(), adv=100.0, student_steps=0).synthesise(teacher, 2)
    assert not torch.equal(untaught[4:], strong[4:])


def test_more_steps_come_closer_to_what_is_asked():
    encoder = normalised()
    teacher = network(encoder, OLD).eval().requires_grad_(False)

    def short_of(steps):
        made = server(encoder, steps=steps, images=8, batch_size=8, lr=0.01).synthesise(teacher, 2)
        with batch_moments(teacher.backbone) as seen:
            teacher(made)
            return float(moments_distance(seen, {}, 0.9))

    assert short_of(40) < 0.7 * short_of(1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 18, 18), (3, 9, 30), (5,)])
@pytest.mark.parametrize("output", ["unit", "standard"])
def test_a_generator_makes_what_the_network_takes(shape, output):
    made = Generator.drawn(0, shape, code=6, width=4, output=output)
    codes = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found = made(codes).detach()
    assert found.shape == (50, *shape)
    if len(shape) == 3 and output == "unit":
        assert float(found.min()) >= 0 and float(found.max()) <= 1
    if len(shape) == 3 and output == "standard":
        assert float(found.mean((0, 2, 3)).abs().max()) < 1e-4
        assert float((found.var((0, 2, 3)) - 1).abs().max()) < 0.05
    again = Generator.drawn(0, shape, code=6, width=4, output=output)
    assert torch.equal(found, again(codes).detach())


# What travels


def test_the_first_mission_is_fedavg_bit_for_bit():
    encoder = pixels()
    seen = visit(encoder, list(OLD) * 3, round_=1)
    asked = request(network(encoder, ()), 0)
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.1}
    ours = TARGETTraining(**settings).train(seen, asked)
    theirs = FedAvgTraining(**settings).train(visit(encoder, list(OLD) * 3, round_=1), asked)
    assert bits(ours["model"]) == bits(theirs["model"])
    assert dict(ours["status"]) == dict(theirs["status"]) and not seen.state


def test_the_lesson_goes_to_every_node_once_a_mission():
    one = server(pixels(), rounds_per_mission=2)
    arrays = first_mission(one)
    begin = ask(one, 3, arrays)
    images = begin[1]["images"]["images"].numpy()
    assert images.shape == (12, 1, 8, 8) and images.dtype == np.uint8
    assert begin[1]["lesson"]["classes"] == '["cat", "dog", "owl"]'
    assert begin[1]["round"]["lesson"] == begin[1]["lesson"]["mission"] == 2
    assert bits(begin[1]["images"]) == bits(begin[2]["images"])
    assert "teacher" not in begin[1]  # the model of this round is the teacher

    model = network_record(network(pixels(), (*OLD, *NEW)))
    later, _ = one.aggregate_train(3, [trained(1, [*OLD, *NEW], 4, model), failed(2)])
    second = ask(one, 4, later)
    assert {*second[1]} == {"round", "model"}
    assert second[1]["round"]["lesson"] == 2
    assert bits(second[2]["teacher"]) == bits(arrays) != bits(second[2]["model"])
    assert bits(second[2]["images"]) == bits(begin[2]["images"])

    one.aggregate_train(4, [trained(n, [*OLD, *NEW], 4, model) for n in (1, 2)])
    third = ask(one, 5, later)
    assert third[1]["lesson"]["mission"] == 3
    assert third[1]["lesson"]["classes"] == '["ant", "bee", "cat", "dog", "owl"]'
    assert bits(third[1]["images"]) != bits(begin[1]["images"])


def test_a_lesson_takes_the_bytes_of_its_images():
    one = server(pixels())
    content = ask(one, 2, first_mission(one))[1]
    without = RecordDict({k: v for k, v in content.items() if k not in ("lesson", "images")})
    extra = record_bytes(content) - record_bytes(without)
    assert 0 <= extra - 12 * 64 < 400  # names, shapes and types of two records


def test_without_classes_there_is_no_lesson():
    one = server(pixels())
    sent = ask(one, 2, one.arrays())
    assert {*sent[1]} >= {"round", "model"} and "lesson" not in sent[1]
    assert sent[1]["round"]["lesson"] == 0


def test_a_node_keeps_the_lesson_and_sends_weights_alone():
    one = server(pixels())
    arrays = first_mission(one)
    asked = ask(one, 2, arrays)[1]
    seen = visit(pixels(), ["ant", "bee", "ant"])
    answer = TARGETTraining(epochs=1).train(seen, asked)
    assert {*answer} == {"model", "status"} and {*answer["status"]} == {"classes", "examples"}
    assert {*plain(answer["model"])} == {*plain(arrays)}
    assert {*seen.state} == {"lesson", "images", "teacher"}
    assert bits(seen.state["teacher"]) == bits(arrays)


def test_a_node_without_the_lesson_that_counts_says_so():
    encoder = pixels()
    model = network(encoder, OLD)
    with pytest.raises(InvalidMessage, match="lesson"):
        TARGETTraining().train(visit(encoder, ["cat", "ant"]), request(model, 2))
    seen = visit(encoder, ["cat", "ant"], taught(model))
    with pytest.raises(InvalidMessage, match="Expected the lesson for mission 3"):
        TARGETTraining().train(seen, request(model, 3))


@pytest.mark.parametrize(("weights", "shares"), [("uniform", (1, 1)), ("examples", (10, 30))])
def test_the_average_counts_nodes_alike_unless_told_otherwise(weights, shares):
    one = server(pixels(), weights=weights)
    ask(one, 1, one.arrays())
    models = [network_record(network(pixels(n), OLD, seed=n)) for n in (1, 2)]
    replies = [trained(n, OLD, 10 if n == 1 else 30, models[n - 1]) for n in (1, 2)]
    arrays, metrics = one.aggregate_train(1, replies)
    for key, values in plain(arrays).items():
        parts = [plain(model)[key].astype(float) for model in models]
        np.testing.assert_allclose(
            values, np.average(parts, axis=0, weights=shares), rtol=1e-5, atol=1e-7
        )
    assert dict(metrics) == {"classes": 3, "examples": 40}


# Settings and a whole run


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": "votes"},
        {"images": 0},
        {"images": 2.5},
        {"steps": True},
        {"batch_size": 1},
        {"warmup": 0},
        {"student_steps": -1},
        {"student_lr": 0.0},
        {"code": "x"},
        {"width": 1},
        {"lr": -1.0},
        {"code_lr": math.nan},
        {"bn": math.inf},
        {"bn_momentum": 1.0},
        {"oh": -0.5},
        {"adv": None},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"strategy.{next(iter(wrong))} must be"):
        server(pixels(), **wrong)


@pytest.mark.parametrize("wrong", [{"kd": -1}, {"temperature": 0}, {"synthetic_batch_size": 1}])
def test_wrong_settings_of_nodes_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"strategy.local.{next(iter(wrong))} must be"):
        TARGETTraining(**wrong)


def test_it_forgets_less_than_fedavg(tmp_path):
    small = ["images=256", "batch_size=64", "width=16", "student_steps=5"]
    lower = run(tmp_path, "fedavg")["final"]
    kept = run(tmp_path, "target", *(f"strategy.{setting}" for setting in small))["final"]
    assert kept["forgetting"] < lower["forgetting"] - 0.2
    assert kept["accuracy"]["union"] > lower["accuracy"]["union"] + 0.1
    assert kept["bytes"]["up"] == lower["bytes"]["up"]
    images = 2 * 2 * 256 * 64  # missions with a lesson, nodes, images, pixels
    assert 0 <= kept["bytes"]["down"] - lower["bytes"]["down"] - images < 0.05 * images
