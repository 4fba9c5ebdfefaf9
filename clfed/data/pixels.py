"""Small functions on tensors of pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 20  # pixels widened at once, few enough for the cache


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    r"""Mean and standard deviation of ``x / 255`` for each channel, to four decimals.

    .. math:: \mu = \frac{1}{255 n} \sum x, \qquad
        \sigma^2 = \frac{n \sum x^2 - (\sum x)^2}{(255 n)^2}

    The sums are integers, exact in any order.

    Args:
        images: ``(N, C, H, W)`` uint8, N at least 1.

    Returns:
        Means and standard deviations, one a channel; a constant channel gets 1.

    Example:
        >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
        ((0.5,), (0.5,))
    """
    means, stds = [], []
    for channel in images.unbind(1):
        total = squares = 0
        for part in torch.split(channel.flatten(), CHUNK):
            wide = part.to(torch.int32)
            total += int(wide.sum())
            squares += int(wide.square_().sum())
        count = channel.numel()
        means.append(round(total / (255 * count), 4))
        stds.append(round(math.sqrt(count * squares - total**2) / (255 * count), 4) or 1.0)
    return tuple(means), tuple(stds)
