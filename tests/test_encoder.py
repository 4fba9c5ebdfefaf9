"""The frozen embedding: the same bits for the same image, and nothing foreign from bytes."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from clfed.backbones import Conv4, Encoder, Identity, ResNet18, TorchvisionBackbone
from clfed.backbones.encoder import BATCH
from clfed.errors import ConfigError, EncoderError, InvalidEmbedding

CONV4 = {"_target_": "clfed.backbones.Conv4", "widths": [8, 8, 8, 16]}
PROJECTION = {"_target_": "clfed.prototypes.features.RandomProjection", "dim_out": 5, "seed": 3}


def conv4_encoder(seed: int = 0, **options) -> Encoder:
    rng = torch.Generator().manual_seed(seed)
    network = Conv4(1, 28, (8, 8, 8, 16))
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) - 0.3 * (tensor.dim() > 1))
    return Encoder(network, CONV4, input_shape=(1, 28, 28), mean=(0.1,), std=(0.3,), **options)


def pictures(number: int, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 1, 28, 28), generator=rng, dtype=torch.uint8)


ENCODER = conv4_encoder()
IMAGES = pictures(3 * BATCH + 7)
WHOLE = ENCODER.embed(IMAGES)


def test_embeds_like_the_backbone():
    expected = ENCODER.backbone((IMAGES.float() / 255 - 0.1) / 0.3)
    assert WHOLE.dtype == torch.float32
    torch.testing.assert_close(WHOLE, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ENCODER.transform(IMAGES), (IMAGES.float() / 255 - 0.1) / 0.3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=BATCH + 9))
def test_an_image_has_the_same_bits_in_any_company(places):
    assert torch.equal(ENCODER.embed(IMAGES[places]), WHOLE[places])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ENCODER.embed(IMAGES), WHOLE)
    finally:
        torch.set_num_threads(before)


def test_layout_and_autocast_of_the_caller_do_not_matter():
    rgb = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    network = Conv4(3, 32, (8, 8, 8, 16))
    encoder = Encoder(network, CONV4, input_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    expected = encoder.embed(rgb)
    assert torch.equal(encoder.embed(rgb.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.embed(rgb), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "config", "shape"),
    [
        (Conv4(1, 28), {"_target_": "clfed.backbones.Conv4"}, (1, 28, 28)),
        (Conv4(3, 84), {"_target_": "clfed.backbones.Conv4"}, (3, 84, 84)),
        (ResNet18(3, 32), {"_target_": "clfed.backbones.ResNet18"}, (3, 32, 32)),
        (
            TorchvisionBackbone("mobilenet_v3_small", 1, 32),
            {"_target_": "clfed.backbones.TorchvisionBackbone", "name": "mobilenet_v3_small"},
            (1, 32, 32),
        ),
    ],
    ids=["conv4-28", "conv4-84", "resnet18", "mobilenet"],
)
def test_company_and_threads_do_not_matter_at_full_size(network, config, shape):
    encoder = Encoder(
        network, config, input_shape=shape, mean=(0.4,) * shape[0], std=(0.3,) * shape[0]
    )
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * BATCH + 5, *shape), generator=rng, dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = encoder.embed(images)
        torch.set_num_threads(2)
        order = torch.randperm(len(images), generator=rng)
        assert torch.equal(encoder.embed(images[order]), whole[order])
        assert torch.equal(encoder.embed(images[7:8]), whole[7:8])
        assert torch.equal(Encoder.from_bytes(encoder.to_bytes()).embed(images[:3]), whole[:3])
    finally:
        torch.set_num_threads(before)


def test_no_image_gives_no_embedding():
    assert ENCODER.embed(IMAGES[:0]).shape == (0, 16)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 28, 28),
        torch.zeros(2, 3, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 28, dtype=torch.uint8),
        torch.zeros(1, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 784, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_refused(images):
    with pytest.raises(InvalidEmbedding, match=r"\(N, 1, 28, 28\)"):
        ENCODER.embed(images)


def test_numbers_that_are_not_finite_are_refused():
    network = Conv4(1, 28, (8, 8, 8, 16))
    with torch.no_grad():
        network.layers[12].bias.fill_(float("nan"))
    encoder = Encoder(network, CONV4, input_shape=(1, 28, 28), mean=(0.0,), std=(1.0,))
    with pytest.raises(InvalidEmbedding, match="4 of 4"):
        encoder.embed(IMAGES[:4])


def test_the_encoder_is_frozen_and_apart_from_its_source():
    network = Conv4(1, 28, (8, 8, 8, 16)).train()
    encoder = Encoder(network, CONV4, input_shape=(1, 28, 28), mean=(0.1,), std=(0.3,))
    before = encoder.embed(IMAGES[:5])
    network(torch.rand(8, 1, 28, 28))
    nn.init.zeros_(network.layers[0].weight)
    assert torch.equal(encoder.embed(IMAGES[:5]), before)
    assert not any(p.requires_grad for p in encoder.backbone.parameters())
    assert network.training


def test_identity_says_what_was_embedded_with_what():
    same = conv4_encoder()
    assert same.embedding_id == ENCODER.embedding_id
    assert len(same.embedding_id) == 64
    others = {
        conv4_encoder(seed=1).embedding_id,
        conv4_encoder(feature_map=PROJECTION).embedding_id,
        conv4_encoder(feature_map=PROJECTION | {"seed": 4}).embedding_id,
        Encoder(
            ENCODER.backbone, CONV4, input_shape=(1, 28, 28), mean=(0.2,), std=(0.3,)
        ).embedding_id,
        ENCODER.embedding_id,
    }
    assert len(others) == 5


def test_ready_features_pass_unchanged():
    config = {"_target_": "clfed.backbones.Identity"}
    encoder = Encoder(Identity(), config, input_shape=(64,))
    features = torch.randn(70, 64)
    assert torch.equal(encoder.embed(features), features)
    assert encoder.dim == 64
    restored = Encoder.from_bytes(encoder.to_bytes())
    assert restored.embedding_id == encoder.embedding_id
    assert restored.embedding_id != Encoder(Identity(), config, input_shape=(32,)).embedding_id
    with pytest.raises(InvalidEmbedding):
        encoder.embed(features.to(torch.uint8))


def test_feature_maps_follow_the_backbone():
    projected = conv4_encoder(feature_map=PROJECTION)
    assert projected.dim == 5
    expected = projected._feature_map(WHOLE[:9]).float()
    torch.testing.assert_close(projected.embed(IMAGES[:9]), expected)
    restored = Encoder.from_bytes(projected.to_bytes())
    assert torch.equal(restored.embed(IMAGES[:9]), projected.embed(IMAGES[:9]))
    tukey = conv4_encoder(feature_map={"_target_": "clfed.prototypes.features.tukey", "beta": 0.5})
    torch.testing.assert_close(tukey.embed(IMAGES[:9]), WHOLE[:9].sqrt())
    with pytest.raises(EncoderError, match="does not fit"):
        conv4_encoder(feature_map=PROJECTION | {"colour": 1})


def test_round_trip_through_bytes_and_files(tmp_path):
    data = ENCODER.to_bytes()
    restored = Encoder.from_bytes(data)
    assert restored.embedding_id == ENCODER.embedding_id
    assert restored.to_bytes() == data
    assert torch.equal(restored.embed(IMAGES), WHOLE)
    ENCODER.save(tmp_path / "deep" / "encoder.safetensors")
    assert Encoder.load(tmp_path / "deep" / "encoder.safetensors").to_bytes() == data
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["encoder.safetensors"]


def test_another_process_gives_the_same_bits(tmp_path):
    ENCODER.save(tmp_path / "encoder")
    save = "import sys, torch; from clfed.backbones import Encoder; torch.set_num_threads(1);"
    save += "images = torch.load(sys.argv[2]); e = Encoder.load(sys.argv[1]);"
    save += "print(e.embedding_id, e.embed(images).numpy().tobytes().hex())"
    torch.save(IMAGES[5:9], tmp_path / "images")
    command = [sys.executable, "-c", save, str(tmp_path / "encoder"), str(tmp_path / "images")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told == [ENCODER.embedding_id, WHOLE[5:9].numpy().tobytes().hex()]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused(data):
    whole = ENCODER.to_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        header = 8 + int.from_bytes(whole[:8], "little")  # where most of the meaning is
        place = data.draw(st.integers(0, header) | st.integers(0, len(whole) - 1))
        flipped = whole[place] ^ (1 << data.draw(st.integers(0, 7)))
        damaged = whole[:place] + bytes([flipped]) + whole[place + 1 :]
    try:
        restored = Encoder.from_bytes(damaged)
    except (EncoderError, ConfigError):
        return
    # A flipped bit may fall on white space of the header; then nothing has changed.
    assert restored.to_bytes() == whole


def test_damaged_or_missing_files_are_named(tmp_path):
    with pytest.raises(EncoderError, match=r"nothing\.safetensors"):
        Encoder.load(tmp_path / "nothing.safetensors")
    (tmp_path / "cut").write_bytes(ENCODER.to_bytes()[:-3])
    with pytest.raises(EncoderError, match="cut"):
        Encoder.load(tmp_path / "cut")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(EncoderError):
        Encoder.load(tmp_path / "empty")


def tampered(**changes) -> bytes:
    data = ENCODER.to_bytes()
    length = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["clfed_encoder"])
    return save_tensors(load_tensors(data), {"clfed_encoder": json.dumps(meta | changes)})


@pytest.mark.parametrize(
    "backbone",
    [
        {"_target_": "os.system", "command": "touch /tmp/harm"},
        {"_target_": "torch.nn.Linear"},
        {"_target_": "clfed.backbones.encoder.os.system", "command": "touch /tmp/harm"},
        {"_target_": "clfed.backbones.encoder.torch.hub.load"},
        {"_target_": "clfed.backbones.encoder.nn.Linear"},
        {"_target_": "clfed.backbones.encoder.Path"},
        {"_target_": "clfed.backbones.Encoder"},
        {"_target_": "clfed.backbones.build.build_backbone", "meta": {}, "tensors": {}},
        {"_target_": "clfed.backbones"},
        {"_target_": "clfed.backbones.Nothing"},
        {"_target_": "clfed.backbones..Conv4"},
        {"_target_": "clfed.backbonesque.Conv4"},
        {"_target_": 5},
        {"_target_": None},
        {},
        [],
        None,
        {**CONV4, "widths": {"_target_": "os.getcwd"}},
        {**CONV4, "widths": [8, 8, 8, 10**9]},
        {**CONV4, "widths": "wide"},
        {**CONV4, "colour": "red"},
        {"_target_": "clfed.backbones.Identity"},
        {"_target_": "clfed.backbones.ResNet18"},
        {"_target_": "clfed.backbones.TorchvisionBackbone", "name": "nothing"},
    ],
    ids=str,
)
def test_foreign_or_unfit_backbones_are_refused(backbone):
    with pytest.raises((EncoderError, ConfigError)):
        Encoder.from_bytes(tampered(backbone=backbone))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"colour": "red"},
        {"input_shape": [1, 28]},
        {"input_shape": [1, 28, 10**9]},
        {"input_shape": "28"},
        {"input_shape": [1, 2048, 2049]},
        {"input_shape": [1, 2048, 2048]},
        {"feature_map": PROJECTION | {"dim_out": 10**14}},
        {"input_shape": [3, 28, 28]},
        {"mean": []},
        {"mean": ["0"]},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"std": [float("nan")]},
        {"mean": [0.2]},
        {"feature_map": {"_target_": "clfed.prototypes.features.torch.load", "f": "x"}},
        {"feature_map": {"_target_": "clfed.prototypes.memory.PrototypeMemory"}},
        {"embedding_id": "0" * 64},
    ],
    ids=str,
)
def test_tampered_metadata_are_refused(changes):
    with pytest.raises(EncoderError):
        Encoder.from_bytes(tampered(**changes))


def test_pretrained_weights_are_never_fetched_from_bytes():
    config = {"_target_": "clfed.backbones.TorchvisionBackbone", "name": "squeezenet1_1"}
    encoder = Encoder(
        TorchvisionBackbone("squeezenet1_1", 1, 32),
        config | {"weights": "DEFAULT"},
        input_shape=(1, 32, 32),
        mean=(0.5,),
        std=(0.5,),
    )
    assert b"DEFAULT" not in encoder.to_bytes()
    assert Encoder.from_bytes(encoder.to_bytes()).embedding_id == encoder.embedding_id


def test_a_backbone_that_does_not_fit_the_images_is_refused():
    with pytest.raises(EncoderError, match=r"\(3, 28, 28\)"):
        Encoder(
            Conv4(1, 28, (8, 8, 8, 16)),
            CONV4,
            input_shape=(3, 28, 28),
            mean=(0.1,) * 3,
            std=(0.3,) * 3,
        )
    with pytest.raises(EncoderError, match="one row"):
        Encoder(
            nn.Sequential(nn.Conv2d(1, 2, 3)), CONV4, input_shape=(1, 8, 8), mean=(0,), std=(1,)
        )
