r"""Integer noise from random bytes.

Noise hides nothing from someone who can draw it again. The source of randomness is ``os.urandom``
wherever privacy is meant; ``numpy.random.default_rng(seed).bytes`` repeats a simulation. A
``torch.Generator`` would not do: it keeps 32 bits of its seed, and the noise of one empty slot is
enough to try them all.

Noise is drawn as an integer, whatever the data are, and added to integers, so the low bits of a
float cannot betray the data as they do in naive implementations (Mironov 2012). What remains is
that a draw is a float64 quantile of 64 random bits instead of a real number: the tails of the
Gaussian end at 9 standard deviations, and the probabilities of single integers are off in their
last bits. That is thought to be far below any :math:`\delta` in use, but it is not proven; an exact
sampler over the integers would close it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri  # type: ignore[import-untyped]
from torch import Tensor

from clfed.errors import ConfigError
from clfed.privacy.gaussian import check_positive

Entropy = Callable[[int], bytes]
"""Gives that many random bytes, like ``os.urandom``."""


def integer_gaussian(shape: Sequence[int], sigma: float, entropy: Entropy) -> Tensor:
    r"""Independent integers :math:`round(\sigma \xi)`, :math:`\xi \sim N(0, 1)`.

    The lowest of 64 bits is the sign, the others choose the quantile, so both tails are as fine as
    :math:`2^{-65}`.

    Args:
        shape: Shape of the result.
        sigma: :math:`\sigma`, from 1 to :math:`2^{59}`.
        entropy: Source of randomness.

    Returns:
        int64 of that shape.

    Raises:
        ConfigError: ``sigma`` is out of range.
    """
    if not 1 <= sigma <= 2.0**59:  # 9.1 of these still fit into 64 bits
        raise ConfigError(
            f"expected noise from 1 to 2**59 units of the statistics, got {sigma:g}",
            remedy="Choose another sigma: less than one unit protects nothing.",
        )
    bits = _words(math.prod(shape), entropy)
    quantile = ((bits >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
    signs = np.where(bits & np.uint64(1), sigma, -sigma)
    return torch.from_numpy(np.rint(ndtri(quantile) * signs).astype(np.int64)).reshape(*shape)


def integer_laplace(size: int, rate: float, entropy: Entropy) -> Tensor:
    r"""Independent integers with :math:`P(z) = \frac{1-q}{1+q} q^{|z|}`, :math:`q = e^{-rate}`.

    The difference of two geometric numbers, each :math:`\lfloor \ln u / \ln q \rfloor` of a uniform
    :math:`u` in (0, 1].

    Args:
        size: How many.
        rate: :math:`\varepsilon` divided by the L1 sensitivity.
        entropy: Source of randomness.

    Returns:
        Shape ``(size,)`` int64.

    Raises:
        ConfigError: ``rate`` is out of range.
    """
    check_positive("rate", rate)
    uniform = (_words(2 * size, entropy).astype(np.float64) + 1) * 2.0**-64
    geometric = np.floor(np.log(uniform) / -rate).reshape(2, size)
    return torch.from_numpy((geometric[0] - geometric[1]).astype(np.int64))


def shuffled(names: Sequence[str], entropy: Entropy) -> list[str]:
    """The names in random order; which came first before does not matter."""
    keys = _words(len(names), entropy)
    return [names[place] for place in np.argsort(keys, kind="stable").tolist()]


def _words(size: int, entropy: Entropy) -> NDArray[np.uint64]:
    return np.frombuffer(entropy(8 * size), dtype="<u8").astype(np.uint64)
