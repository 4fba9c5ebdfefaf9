"""Classification models of torchvision with their classifier removed."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from clfed.errors import ConfigError

RGB = 3


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) for small images.

    The stem is one 3x3 convolution of stride 1 without max-pool, so that a 32x32 image keeps its
    resolution up to the first stage; the mean over positions gives 512 numbers.

    Args:
        in_channels: Channels of the input.
        image_size: Height and width in pixels; any size works.
    """

    dim = 512

    def __init__(self, in_channels: int, image_size: int = 32) -> None:
        super().__init__()
        from torchvision.models import resnet18

        network = resnet18(weights=None)
        network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
        network.fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` float32 to ``(B, 512)``."""
        embeddings: Tensor = self.network(images)
        return embeddings


class TorchvisionBackbone(nn.Module):
    """Any classification model of torchvision by name, its classifier removed.

    Args:
        name: A name that ``torchvision.models.list_models(module=torchvision.models)`` lists.
        in_channels: 3, or 1: grey images are repeated to three channels.
        image_size: Height and width in pixels; handed to the model where it asks for it (vision
            transformers do).
        weights: Name of torchvision's pretrained weights, e.g. ``"DEFAULT"``, or None. They are
            downloaded by torchvision when they are not in its cache.

    Raises:
        ConfigError: No model of that name (the message lists near ones), or another number of
            channels.
    """

    def __init__(
        self, name: str, in_channels: int = 3, image_size: int = 224, weights: str | None = None
    ) -> None:
        super().__init__()
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
            raise ConfigError(
                f"torchvision has no classification model {name!r}"
                + (f"; near names: {', '.join(near)}." if near else "."),
                remedy="Choose another backbone.name; torchvision.models.list_models() has all.",
            )
        if in_channels not in (1, RGB):
            raise ConfigError(f"{name} takes images of 1 or 3 channels, got {in_channels}.")
        options: dict[str, Any] = {"image_size": image_size} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):
            # Otherwise weights would switch on a second input transform, which no state dict keeps.
            options |= {"transform_input": False}
            options |= {"aux_logits": False, "init_weights": True} if weights is None else {}
        self.network = torchvision.models.get_model(name, weights=weights, **options)
        _remove_classifier(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, 1 or 3, H, W)`` float32 to ``(B, D)``."""
        if images.shape[1] == 1:
            images = images.expand(-1, RGB, -1, -1)
        embeddings: Tensor = self.network(images)
        return embeddings.flatten(1)


def _remove_classifier(network: nn.Module) -> None:
    """Let a network end with what its last linear layer was given."""
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if linear:
        parent, _, child = linear[-1].rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
    else:  # SqueezeNet classifies each position with a convolution
        network.classifier = nn.AdaptiveAvgPool2d(1)
