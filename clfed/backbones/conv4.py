"""The four-block convolutional network of the few-shot literature.

Vinyals et al. 2016 (arXiv 1606.04080) introduced it; Snell, Swersky & Zemel 2017 (arXiv
1703.05175) train it as a prototypical network.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from clfed.errors import ConfigError

POOLINGS = 4


class Conv4(nn.Module):
    """Four blocks of conv 3x3 (padding 1, bias), batch norm, ReLU and max-pool 2, then flatten.

    With 64 channels it has 111,936 parameters for one input channel (64 numbers for a 28x28
    image) and 113,088 for three (1,600 numbers for 84x84).

    Args:
        in_channels: Channels of the input.
        image_size: Height and width of the input in pixels, at least 16.
        widths: Channels after each of the four blocks.

    Attributes:
        dim: Length of the embedding, ``widths[3] * (image_size // 16) ** 2``.

    Raises:
        ConfigError: Not four positive widths, or an image that pools to nothing.
    """

    def __init__(
        self, in_channels: int, image_size: int, widths: Sequence[int] = (64, 64, 64, 64)
    ) -> None:
        super().__init__()
        if len(widths) != POOLINGS or min(widths) < 1:
            raise ConfigError(f"Conv4 needs four positive widths, got {list(widths)}.")
        if image_size < 2**POOLINGS:
            raise ConfigError(
                f"Conv4 needs images of at least 16x16 pixels, got {image_size}.",
                remedy="Choose larger images or another backbone; data=digits goes with "
                "data.as_features=true data.base_classes=0 backbone=identity learner=none.",
            )
        blocks: list[nn.Module] = []
        for narrow, wide in zip((in_channels, *widths[:-1]), widths, strict=True):
            blocks += [
                nn.Conv2d(narrow, wide, kernel_size=3, padding=1),
                nn.BatchNorm2d(wide),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Flatten())
        self.dim = widths[-1] * (image_size // 2**POOLINGS) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` float32 to ``(B, dim)``."""
        embeddings: Tensor = self.layers(images)
        return embeddings
