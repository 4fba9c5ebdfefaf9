r"""Networks that make inputs of another network without any data, and what guides them.

A trained network keeps, in its batch normalisation layers, mean and variance of what passed through
them; inputs that lead to the same moments resemble the data (DeepInversion, Yin et al. 2020, arXiv
1912.08795). The generator is that of data-free adversarial distillation (Fang et al. 2019, arXiv
1912.11006), which most methods of data-free continual learning use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clfed.learners.training import initialisation

#: Mean and biased variance of the latest input of a layer, ``(C,)`` each.
Moments = tuple[Tensor, Tensor]


class Generator(nn.Module):
    """Maps random codes to images by two upsamplings, or to ready features by one hidden layer.

    Args:
        shape: ``(C, H, W)`` of the images, or ``(D,)`` of ready features.
        code: Length of a code.
        width: Channels of the first two of three convolutions, the last but one has half as many;
            units of the hidden layer for ready features.
        output: ``unit``: from 0 to 1; ``standard``: mean 0 and variance 1 of each channel over a
            batch, as a network's standardised input has. Ready features have no range: for them
            the last layer is linear.
    """

    def __init__(
        self, shape: Sequence[int], *, code: int, width: int, output: str = "unit"
    ) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = nn.Sequential(
                nn.Linear(code, width),
                nn.BatchNorm1d(width),
                nn.LeakyReLU(0.2),
                nn.Linear(width, shape[0]),
            )
            return
        channels, *size = shape
        quarter, half = ([-(-side // part) for side in size] for part in (4, 2))
        last: dict[str, list[nn.Module]] = {
            "unit": [nn.Sigmoid()],
            "standard": [nn.Tanh(), nn.BatchNorm2d(channels, affine=False)],
        }
        self.layers = nn.Sequential(
            nn.Linear(code, width * quarter[0] * quarter[1]),
            nn.Unflatten(1, (width, *quarter)),
            nn.BatchNorm2d(width),
            nn.Upsample(size=tuple(half)),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(size=tuple(size)),
            nn.Conv2d(width, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            *last[output],
        ).to(memory_format=torch.channels_last)

    @classmethod
    def drawn(
        cls, seed: int, shape: Sequence[int], *, code: int, width: int, output: str = "unit"
    ) -> Generator:
        """Return a generator whose initial weights depend on a seed alone."""
        with initialisation(seed, "generator"):
            return cls(shape, code=code, width=width, output=output)

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes ``(B, code)`` to ``(B, *shape)``."""
        made: Tensor = self.layers(codes)
        return made


@contextmanager
def batch_moments(network: nn.Module) -> Iterator[Mapping[_BatchNorm, Moments]]:
    """Watch the inputs of a network's batch normalisation layers.

    Args:
        network: Any; layers without running statistics are left out.

    Yields:
        The moments of each layer's latest input, with gradient; empty where there is no such layer.
    """
    seen: dict[_BatchNorm, Moments] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        others = [axis for axis in range(inputs[0].dim()) if axis != 1]
        variance, mean = torch.var_mean(inputs[0], others, correction=0)
        seen[layer] = mean, variance

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def kept_moments(layer: _BatchNorm) -> Moments:
    """Return the mean and variance that a layer kept of the data, ``(C,)`` each."""
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def mixed_moments(now: Moments, before: Moments | None, momentum: float) -> Moments:
    """Return the statistics of a batch smoothed with those before.

    Args:
        now: Of the batch.
        before: None where there are none.
        momentum: Their weight.
    """
    if before is None:
        return now
    mean, variance = (
        (1 - momentum) * new + momentum * old for new, old in zip(now, before, strict=True)
    )
    return mean, variance


def moments_distance(
    seen: Mapping[_BatchNorm, Moments], smoothed: Mapping[_BatchNorm, Moments], momentum: float
) -> Tensor:
    r"""Sum over layers of the distances between running statistics and those of the inputs.

    .. math:: \sum_l \|\mu_l - \hat\mu_l\|_2 + \|\sigma^2_l - \hat\sigma^2_l\|_2

    Args:
        seen: Statistics of the latest batch.
        smoothed: Of batches before; empty before the first one.
        momentum: Their weight.

    Returns:
        A scalar, 0 without layers.
    """
    total = torch.zeros(())
    for layer, now in seen.items():
        mixed = mixed_moments(now, smoothed.get(layer), momentum)
        for kept, found in zip(kept_moments(layer), mixed, strict=True):
            total = total + torch.linalg.vector_norm(kept - found)
    return total


def moments_divergence(seen: Mapping[_BatchNorm, Moments]) -> Tensor:
    r"""Mean over layers and channels of the divergence between two normal distributions.

    .. math:: \mathrm{KL}(\mathcal N(\mu, \sigma^2) \,\|\, \mathcal N(\hat\mu, \hat\sigma^2))
        = \ln\frac{\hat\sigma}{\sigma} - \frac12\Bigl(1 - \frac{\sigma^2 + (\mu - \hat\mu)^2}
        {\hat\sigma^2}\Bigr)

    The hats are of the batch; :math:`10^{-8}` is added to both variances, as released.

    Args:
        seen: Statistics of the latest batch.

    Returns:
        A scalar, 0 without layers.
    """
    found = []
    for layer, (mean, variance) in seen.items():
        kept_mean, kept_variance = kept_moments(layer)
        now, then = variance + 1e-8, kept_variance + 1e-8
        spread = 0.5 * (now.log() - then.log())
        found.append((spread - 0.5 * (1 - (then + (kept_mean - mean) ** 2) / now)).mean())
    return torch.stack(found).mean() if found else torch.zeros(())
