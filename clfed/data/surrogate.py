"""Images of another data set, brought into the shape of one's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.data.benchmark import Benchmark
from clfed.errors import ConfigError
from clfed.seeding import generator


def surrogates(benchmark: Benchmark, shape: tuple[int, ...], number: int, seed: int) -> Tensor:
    """Draw training images of a data set and give them another size and other channels.

    Args:
        benchmark: Where they come from.
        shape: ``(C, H, W)`` that they get; grey becomes equal channels, colour their mean.
        number: How many; all where there are fewer.
        seed: Of the draw.

    Returns:
        ``(N, C, H, W)`` uint8.

    Raises:
        ConfigError: One of the two data sets holds ready features.
    """
    images = benchmark.train.images
    if len(shape) != 3 or images.ndim != 4:
        raise ConfigError(
            "Images of another data set can stand in for images alone, got ready features.",
            remedy="Choose data that are images, or an unlearner that needs no other images.",
        )
    order = torch.randperm(len(images), generator=generator(seed, "surrogates"))
    drawn = images[order[:number]].float()
    if drawn.shape[1] != shape[0]:
        drawn = drawn.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if drawn.shape[2:] != shape[1:]:
        drawn = F.interpolate(drawn, shape[1:], mode="bilinear", antialias=True)
    return drawn.round().clamp(0, 255).to(torch.uint8).contiguous()
