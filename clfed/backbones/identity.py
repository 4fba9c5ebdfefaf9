"""Features that are ready: somebody else's network made them."""

from __future__ import annotations

from torch import Tensor, nn


class Identity(nn.Module):
    """Hand ready features ``(B, D)`` through unchanged; nothing is trained.

    Args:
        in_channels: Ignored; every backbone is built with the shape of the data.
        image_size: Ignored.
    """

    def __init__(self, in_channels: int = 0, image_size: int = 0) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        """Return the ``(B, D)`` float32 features themselves."""
        return features
