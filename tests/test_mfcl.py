"""MFCL: its losses against plain loops, how the generator is guided, and what travels when."""

import copy
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
    pixels,
    request,
    run,
    taught,
    trained,
    vectors,
    visit,
)
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
from scipy.ndimage import convolve
from torch import nn

from clfed.errors import ConfigError, InvalidMessage
from clfed.federated.grid import LocalGrid
from clfed.federated.networks import network_record
from clfed.federated.wire import record_bytes
from clfed.learners.generators import Generator, batch_moments, moments_divergence
from clfed.strategies.fedavg import FedAvgTraining
from clfed.strategies.mfcl import (
    MFCL,
    MFCLTraining,
    imbalance,
    roughness,
)

SMALL = {"steps": 3, "batch_size": 6, "code": 8, "width": 4}


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


def server(encoder, **options):
    return MFCL(encoder, local={}, session="s", nodes=2, wait=0.0, **(SMALL | options))


def maker(encoder, seed=6):
    """A generator as a server sends it."""
    return Generator.drawn(seed, encoder.input_shape, code=8, width=4, output="standard").eval()


def lesson(encoder, labels, teacher, made):
    kept = taught(teacher, generator=made.state_dict(), code=8, width=4)
    return visit(encoder, labels, kept)


# The loss of a node


def logs(row):
    peak = max(row)
    return [value - peak - math.log(sum(math.exp(v - peak) for v in row)) for value in row]


@pytest.mark.parametrize("labels", [("ant", "bee", "ant", "bee"), ("ant", "dog", "dog", "ant")])
def test_the_loss_is_that_of_plain_loops(labels):
    encoder = pixels()
    teacher, made = network(encoder, OLD).eval(), maker(encoder)
    seen = lesson(encoder, labels, teacher, made)
    model = network(pixels(4), [*OLD, *NEW], seed=5)
    half = MFCLTraining(w_kd=0.7, w_ft=0.3, synthetic_batch_size=5)
    rows = model.label(labels)
    loss = half.loss(model, seen, request(model, 2))(model, seen.images, rows).item()

    codes = torch.randn(5, 8, generator=seen.rng("synthetic"))
    with torch.no_grad():
        inputs = torch.cat([encoder.transform(seen.images), made(codes)])
        ours, theirs = model.backbone(inputs), teacher.backbone(inputs)
        outputs = model.head(ours).tolist()
        answers = teacher.head(theirs)[4:].argmax(1).tolist()
        now, before = teacher.head(ours).tolist(), teacher.head(theirs).tolist()
    current = sorted({*rows.tolist(), 3, 4})
    new = [
        -logs([outputs[i][k] for k in current])[current.index(y)]
        for i, y in enumerate(rows.tolist())
    ]
    head = [-logs(outputs[i])[y] for i, y in enumerate([*rows.tolist(), *answers])]
    kept = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(OLD)
        for x, y in zip(now, before, strict=True)
    ]
    expected = sum(new) / 4 + 0.3 * sum(head) / 9 + 0.7 * sum(kept) / 9
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_head_alone_follows_the_second_term():
    encoder = pixels()
    teacher, made = network(encoder, OLD).eval(), maker(encoder)

    def gradients(w_ft, part):
        model = network(pixels(4), [*OLD, *NEW], seed=5)
        seen = lesson(encoder, ("ant", "bee", "ant"), teacher, made)
        half = MFCLTraining(w_ft=w_ft, synthetic_batch_size=5)
        loss = half.loss(model, seen, request(model, 2))
        loss(model, seen.images, model.label(seen.labels)).backward()
        return [weights.grad for weights in getattr(model, part).parameters()]

    for without, strong in zip(gradients(0.0, "backbone"), gradients(9.0, "backbone"), strict=True):
        assert without.abs().max() > 0
        torch.testing.assert_close(without, strong)
    # Without it, rows of old classes get no gradient at all.
    assert gradients(0.0, "head")[0][:3].abs().max() == 0
    assert gradients(1.0, "head")[0][:3].abs().max() > 0


def test_an_unchanged_network_has_nothing_to_recall():
    encoder = pixels()
    teacher, made = network(encoder, OLD).eval(), maker(encoder)
    seen = lesson(encoder, ("cat", "dog"), teacher, made)
    of_batch = seen.images, teacher.label(seen.labels)
    strong, none = (
        MFCLTraining(w_kd=weight).loss(teacher, seen, request(teacher, 2))(teacher, *of_batch)
        for weight in (1e6, 0.0)
    )
    assert strong.item() == pytest.approx(none.item(), rel=1e-6)


# The losses of the generator


def test_balance_is_entropy_over_the_batch():
    assert float(imbalance(1e3 * torch.eye(4))) == pytest.approx(0, abs=1e-6)
    one_class = torch.tensor([[1e3, 0.0, 0.0]] * 5)
    assert float(imbalance(one_class)) == pytest.approx(1, abs=1e-6)
    assert float(imbalance(torch.randn(5, 1))) == 0
    values = np.random.default_rng(0).normal(size=(6, 3))
    share = np.mean([np.exp(logs(row)) for row in values.tolist()], axis=0)
    entropy = -sum(p * math.log(p) for p in share)
    expected = 1 - entropy / math.log(3)
    assert float(imbalance(torch.from_numpy(values))) == pytest.approx(expected, rel=1e-9)


def test_a_batch_with_the_running_statistics_has_no_divergence():
    rng = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm2d(3).eval()
    batch = torch.randn(9, 3, 5, 5, generator=rng)
    layer.running_mean.copy_(batch.mean((0, 2, 3)))
    layer.running_var.copy_(batch.var((0, 2, 3), correction=0))
    with batch_moments(layer) as seen:
        layer(batch)
        assert float(moments_divergence(seen)) == pytest.approx(0, abs=1e-6)
        layer(2 * batch + 1)
        found = float(moments_divergence(seen))
    kept = torch.distributions.Normal(layer.running_mean, layer.running_var.sqrt())
    of_batch = torch.distributions.Normal(2 * layer.running_mean + 1, 2 * layer.running_var.sqrt())
    expected = torch.distributions.kl_divergence(kept, of_batch).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_divergences_of_layers_are_averaged():
    rng = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).eval()
    with torch.no_grad(), batch_moments(layers) as both:
        layers(1 + 2 * torch.randn(20, 4, generator=rng))
        parts = [float(moments_divergence({layer: both[layer]})) for layer in layers]
        assert float(moments_divergence(both)) == pytest.approx(sum(parts) / 2, rel=1e-6)
    assert float(moments_divergence({})) == 0


def test_roughness_is_what_blurring_removes():
    images = np.random.default_rng(0).normal(size=(2, 3, 7, 9))
    place = np.arange(-2, 3)
    kernel = np.exp(-(place[:, None] ** 2 + place**2) / 4)  # a variance of 2
    blurred = [
        [convolve(c, kernel / kernel.sum(), mode="mirror") for c in image] for image in images
    ]
    expected = np.mean((images - np.array(blurred)) ** 2)
    assert float(roughness(torch.from_numpy(images).float())) == pytest.approx(expected, rel=1e-5)
    assert float(roughness(torch.ones(1, 3, 8, 8))) == pytest.approx(0, abs=1e-12)
    assert float(roughness(torch.randn(4, 5))) == 0


# The generator


@pytest.mark.parametrize("encoder", [pixels, normalised, vectors])
def test_the_generator_depends_on_seed_and_mission_alone(encoder):
    encoder = encoder()
    teacher = network(encoder, OLD).eval().requires_grad_(False)
    before, state = bits(network_record(teacher)), torch.random.get_rng_state()

    def made(seed, *missions):
        one = server(encoder, seed=seed)
        found = [copy.deepcopy(one.guided(teacher, m).state_dict()) for m in missions]
        return [b"".join(v.numpy().tobytes() for v in part.values()) for part in found]

    assert made(1, 2, 3) == made(1, 2, 3)
    first, second = made(1, 2, 3)
    assert first != second  # it goes on from mission to mission
    assert made(1, 3)[0] not in (first, second)
    assert made(2, 2)[0] != first
    assert torch.equal(state, torch.random.get_rng_state())
    assert bits(network_record(teacher)) == before


def test_guidance_works():
    encoder = normalised()
    teacher = network(encoder, OLD).eval().requires_grad_(False)

    def far(**options):
        made = server(encoder, batch_size=16, lr=0.02, **options).guided(teacher, 2)
        codes = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), batch_moments(teacher.backbone) as seen:
            outputs = teacher.head(teacher.backbone(made(codes)))
            return float(moments_divergence(seen)), float(imbalance(outputs))

    assert far(steps=25)[0] < 0.5 * far(steps=1)[0]
    assert far(steps=25, w_ie=100.0)[1] < 0.5 * far(steps=25, w_ie=0.0)[1]


# What travels


def test_the_first_mission_is_fedavg_bit_for_bit():
    encoder = pixels()
    asked = request(network(encoder, ()), 0)
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.1}
    seen = visit(encoder, list(OLD) * 3, round_=1)
    ours = MFCLTraining(**settings).train(seen, asked)
    theirs = FedAvgTraining(**settings).train(visit(encoder, list(OLD) * 3, round_=1), asked)
    assert bits(ours["model"]) == bits(theirs["model"])
    assert dict(ours["status"]) == dict(theirs["status"]) and not seen.state


def test_the_generator_goes_to_every_node_once_a_mission():
    one = server(pixels(), rounds_per_mission=2)
    arrays = first_mission(one)
    begin = ask(one, 3, arrays)
    assert {"lesson", "generator"} <= {*begin[1]} and "teacher" not in begin[1]
    content = begin[1]
    without = RecordDict({k: v for k, v in content.items() if k not in ("lesson", "generator")})
    weights = sum(v.numel() * v.element_size() for v in maker(pixels()).state_dict().values())
    assert 0 <= record_bytes(content) - record_bytes(without) - weights < 4000  # 18 names, shapes

    model = network_record(network(pixels(), (*OLD, *NEW)))
    later, _ = one.aggregate_train(3, [trained(1, [*OLD, *NEW], 4, model), failed(2)])
    second = ask(one, 4, later)
    assert {*second[1]} == {"round", "model"}
    assert bits(second[2]["teacher"]) == bits(arrays)
    assert bits(second[2]["generator"]) == bits(begin[2]["generator"])
    one.aggregate_train(4, [trained(n, [*OLD, *NEW], 4, model) for n in (1, 2)])
    third = ask(one, 5, later)
    assert bits(third[1]["generator"]) != bits(begin[1]["generator"])


@pytest.mark.parametrize("encoder", [pixels, normalised, vectors])
def test_a_node_keeps_the_generator_and_sends_weights_alone(encoder):
    encoder = encoder()
    one = server(encoder)
    arrays = first_mission(one)
    asked = ask(one, 2, arrays)[1]
    state = torch.random.get_rng_state()
    seen = visit(encoder, ["ant", "bee", "ant", "cat"])
    answer = MFCLTraining(epochs=1, batch_size=2, lr=0.01).train(seen, asked)
    assert {*answer} == {"model", "status"} and {*answer["status"]} == {"classes", "examples"}
    assert {*answer["model"]} == {*arrays}
    assert {*seen.state} == {"lesson", "generator", "teacher"}
    assert bits(answer["model"]) != bits(arrays)
    again = visit(encoder, ["ant", "bee", "ant", "cat"])
    same = MFCLTraining(epochs=1, batch_size=2, lr=0.01).train(again, asked)
    assert bits(same["model"]) == bits(answer["model"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_node_without_the_generator_says_so():
    model = network(pixels(), OLD)
    with pytest.raises(InvalidMessage, match="lesson"):
        MFCLTraining().train(visit(pixels(), ["cat", "ant"]), request(model, 2))


# Settings and a whole run


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": "votes"},
        {"steps": 0},
        {"batch_size": 1},
        {"code": 1.5},
        {"width": 1},
        {"lr": 0},
        {"temperature": -1.0},
        {"w_ie": math.nan},
        {"w_bn": -1},
        {"w_noise": "x"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"strategy.{next(iter(wrong))} must be"):
        server(pixels(), **wrong)


@pytest.mark.parametrize("wrong", [{"w_kd": -1}, {"w_ft": None}, {"synthetic_batch_size": 1}])
def test_wrong_settings_of_nodes_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"strategy.local.{next(iter(wrong))} must be"):
        MFCLTraining(**wrong)


def test_it_forgets_less_than_fedavg(tmp_path):
    small = ["steps=30", "batch_size=64", "width=16"]
    lower = run(tmp_path, "fedavg")["final"]
    kept = run(tmp_path, "mfcl", *(f"strategy.{setting}" for setting in small))["final"]
    assert kept["forgetting"] < lower["forgetting"] - 0.2
    assert kept["accuracy"]["union"] > lower["accuracy"]["union"] + 0.1
    assert kept["bytes"]["up"] == lower["bytes"]["up"]
