"""Backbones: sizes against the published counts, and refusals."""

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from clfed.backbones import Conv4, Identity, ResNet18, TorchvisionBackbone
from clfed.config import choices, compose
from clfed.errors import ConfigError


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("channels", "size", "count", "dim"), [(1, 28, 111_936, 64), (3, 84, 113_088, 1600)]
)
def test_conv4_has_the_published_size(channels, size, count, dim):
    network = Conv4(channels, size)
    assert parameters(network) == count
    assert network.dim == dim
    assert network(torch.zeros(2, channels, size, size)).shape == (2, dim)


def test_conv4_is_the_published_chain_of_layers():
    kinds = [type(layer) for layer in Conv4(1, 28).layers]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d] * 4 + [nn.Flatten]


def test_conv4_takes_widths():
    assert Conv4(1, 28, (8, 16, 24, 32))(torch.zeros(2, 1, 28, 28)).shape == (2, 32)


@pytest.mark.parametrize(
    ("size", "widths"), [(15, (64,) * 4), (28, (64,) * 3), (28, (64, 64, 64, 0)), (28, (64,) * 5)]
)
def test_conv4_refuses_what_pools_to_nothing(size, widths):
    with pytest.raises(ConfigError):
        Conv4(1, size, widths)


@pytest.mark.parametrize("channels", [1, 3])
def test_resnet18_keeps_the_resolution_of_small_images(channels):
    network = ResNet18(channels, 32).eval()
    stem = network.network.maxpool(network.network.conv1(torch.zeros(1, channels, 32, 32)))
    assert stem.shape == (1, 64, 32, 32)
    # torchvision's 11,689,512 less the 1000-way classifier and the 7x7 stem, plus the 3x3 stem
    assert parameters(network) == 11_689_512 - 513_000 - 3 * 64 * 49 + channels * 64 * 9
    assert network(torch.zeros(2, channels, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize(
    ("name", "dim"),
    [("resnet18", 512), ("mobilenet_v3_small", 1024), ("squeezenet1_1", 512), ("mnasnet0_5", 1280)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_lose_their_classifier(name, dim, channels):
    network = TorchvisionBackbone(name, channels, 64).eval()
    assert network(torch.zeros(2, channels, 64, 64)).shape == (2, dim)


def test_grey_images_are_repeated():
    network = TorchvisionBackbone("resnet18", 1, 32).eval()
    grey = torch.rand(2, 1, 32, 32)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.slow
def test_every_torchvision_classifier_gives_flat_embeddings():
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith("regnet"):  # cannot be built without memory
            continue
        size = 299 if name == "inception_v3" else 224
        with torch.device("meta"):
            network = TorchvisionBackbone(name, 3, size).eval()
            assert network(torch.zeros(2, 3, size, size)).dim() == 2, name


def test_unknown_names_get_near_ones():
    with pytest.raises(ConfigError, match="resnet50"):
        TorchvisionBackbone("resnet_50", 3)
    with pytest.raises(ConfigError, match="1 or 3 channels, got 4"):
        TorchvisionBackbone("resnet18", 4)


def test_identity_changes_nothing():
    features = torch.randn(5, 7)
    assert torch.equal(Identity()(features), features)


@pytest.mark.parametrize("name", [name for name, _ in choices("backbone")])
def test_every_configuration_builds(name):
    cfg = compose([f"backbone={name}"])
    network = instantiate(cfg.backbone, in_channels=1, image_size=32)
    inputs = torch.zeros(2, 9) if name == "identity" else torch.zeros(2, 1, 32, 32)
    assert network.eval()(inputs).dim() == 2


def test_every_configuration_has_a_sentence():
    assert all(sentence for _, sentence in choices("backbone"))
