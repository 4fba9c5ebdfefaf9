"""No network at all: ready features, or the pixels themselves."""

from __future__ import annotations

from torch import Tensor, nn


class Identity(nn.Module):
    """Hand ready features ``(B, D)`` through, or images as rows of pixels; nothing is trained.

    Args:
        in_channels: Ignored; every backbone is built with the shape of the data.
        image_size: Ignored.
    """

    def __init__(self, in_channels: int = 0, image_size: int = 0) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        """Return float32 ``(B, D)`` features themselves, ``(B, C, H, W)`` as ``(B, C * H * W)``."""
        return features.flatten(1)
