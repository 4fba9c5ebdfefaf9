"""A multilayer perceptron, the network of the small continual learning benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from clfed.errors import ConfigError


class MLP(nn.Module):
    """Fully connected layers with a ReLU after each, on flattened images or ready features.

    Two layers of 400 are the network of van de Ven & Tolias 2019 (arXiv 1904.07734) for MNIST.

    Args:
        in_channels: Channels of the images, or length of ready features.
        image_size: Height and width in pixels, 0 for ready features.
        widths: Outputs of each layer.

    Attributes:
        dim: Length of the embedding, ``widths[-1]``.

    Raises:
        ConfigError: No layer, or one without outputs.
    """

    def __init__(
        self, in_channels: int, image_size: int = 0, widths: Sequence[int] = (400, 400)
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ConfigError(f"An MLP needs at least one positive width, got {list(widths)}.")
        sizes = [in_channels * max(image_size, 1) ** 2, *widths]
        layers: list[nn.Module] = [nn.Flatten()]
        for narrow, wide in pairwise(sizes):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.dim = widths[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 ``(B, C, H, W)`` or ``(B, D)`` to ``(B, dim)``."""
        embeddings: Tensor = self.layers(images)
        return embeddings
