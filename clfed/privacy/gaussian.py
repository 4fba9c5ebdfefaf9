r"""The Gaussian mechanism, exactly (Balle & Wang 2018, arXiv 1805.06530).

A release of L2 sensitivity :math:`\Delta` with noise :math:`N(0, \sigma^2 I)` is
:math:`(\varepsilon, \delta)`-differentially private if and only if, with
:math:`\mu = \Delta / \sigma`,

.. math:: \Phi(\mu/2 - \varepsilon/\mu) - e^\varepsilon \Phi(-\mu/2 - \varepsilon/\mu) \le \delta

Everything here is this one curve, solved for one of its three numbers. With
:math:`x = \varepsilon/\mu - \mu/2` and :math:`y = \varepsilon/\mu + \mu/2` we have
:math:`y^2 - x^2 = 2\varepsilon`, so :math:`e^\varepsilon e^{-y^2/2} = e^{-x^2/2}` and the scaled
complementary error function takes the exponential out of the difference:

.. math:: \delta = \tfrac12 e^{-x^2/2} [erfcx(x/\sqrt2) - erfcx(y/\sqrt2)]

which neither overflows nor cancels where the formula above is :math:`\infty \cdot 0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.special import erfcx  # type: ignore[import-untyped]

from clfed.errors import ConfigError

_ROOT_TWO = math.sqrt(2.0)
_HINT = "Privacy parameters are finite numbers: epsilon, sigma and norms above 0, 0 < delta < 1."


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    r"""Smallest :math:`\delta` of the Gaussian mechanism at an :math:`\varepsilon`.

    Args:
        sigma: Standard deviation of the noise on each coordinate.
        epsilon: :math:`\varepsilon \ge 0`.
        sensitivity: :math:`\Delta`, in the unit of ``sigma``.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> round(gaussian_delta(sigma=1.0, epsilon=0.0), 6)  # total variation distance, erf(√2/4)
        0.382925
    """
    check_positive("sigma", sigma)
    check_positive("sensitivity", sensitivity)
    check_epsilon(epsilon)
    return _delta(sensitivity / sigma, epsilon)


def gaussian_epsilon(sigma: float, delta: float, sensitivity: float = 1.0) -> float:
    r"""Smallest :math:`\varepsilon` of the Gaussian mechanism at a :math:`\delta`.

    Args:
        sigma: Standard deviation of the noise on each coordinate.
        delta: :math:`\delta` in (0, 1).
        sensitivity: :math:`\Delta`, in the unit of ``sigma``.

    Returns:
        To the last bits of a float, on the safe side; 0 where the two laws are closer than
        ``delta`` altogether.

    Raises:
        ConfigError: A value is out of range.
    """
    check_positive("sigma", sigma)
    check_positive("sensitivity", sensitivity)
    check_delta(delta)
    mu = sensitivity / sigma
    if _delta(mu, 0.0) <= delta:
        return 0.0
    return _smallest(lambda epsilon: _delta(mu, epsilon) <= delta)


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    r"""Smallest :math:`\sigma` that gives :math:`(\varepsilon, \delta)`.

    For :math:`T` releases on the same data ask with ``sensitivity`` :math:`\Delta\sqrt T`: they
    compose to one Gaussian mechanism, see :mod:`clfed.privacy.accountant`.

    Args:
        epsilon: :math:`\varepsilon \ge 0`.
        delta: :math:`\delta` in (0, 1).
        sensitivity: :math:`\Delta`; the answer is in its unit.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> [round(gaussian_sigma(epsilon, 1e-5), 3) for epsilon in (0.5, 1, 2, 4, 8)]
        [7.032, 3.731, 1.994, 1.081, 0.6]
    """
    check_epsilon(epsilon)
    check_delta(delta)
    check_positive("sensitivity", sensitivity)
    return sensitivity * _smallest(lambda sigma: _delta(1.0 / sigma, epsilon) <= delta)


def classical_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    r"""The textbook's noise, to compare with.

    .. math:: \sigma = \Delta \sqrt{2 \ln(1.25/\delta)} / \varepsilon

    Dwork & Roth 2014, theorem A.1. Its proof needs :math:`\varepsilon \le 1`; beyond that the
    formula promises too much for small :math:`\delta`, so it is refused there.

    Args:
        epsilon: :math:`\varepsilon` in (0, 1].
        delta: :math:`\delta` in (0, 1).
        sensitivity: :math:`\Delta`; the answer is in its unit.

    Raises:
        ConfigError: A value is out of range.
    """
    check_positive("epsilon", epsilon)
    check_delta(delta)
    check_positive("sensitivity", sensitivity)
    if epsilon > 1:
        raise ConfigError(
            f"expected an epsilon of at most 1 for the classical formula, got {epsilon:g}",
            remedy="Use the analytic noise; it is smaller and holds for every epsilon.",
        )
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def check_positive(name: str, value: float) -> None:
    """Refuse what is not a finite number above 0."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"expected a finite {name} above 0, got {value!r}", remedy=_HINT)


def check_epsilon(epsilon: float) -> None:
    """Refuse what is not a finite number of at least 0."""
    if not _is_number(epsilon) or not 0 <= epsilon < math.inf:
        raise ConfigError(f"expected a finite epsilon of at least 0, got {epsilon!r}", remedy=_HINT)


def check_delta(delta: float) -> None:
    """Refuse what is not strictly between 0 and 1."""
    if not _is_number(delta) or not 0 < delta < 1:
        raise ConfigError(f"expected a delta between 0 and 1, got {delta!r}", remedy=_HINT)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _delta(mu: float, epsilon: float) -> float:
    """The curve of the module's docstring at ``mu`` = sensitivity / sigma."""
    x, y = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    scale = math.exp(-x * x / 2) / 2
    if x <= 0:  # the first term is a probability of at least one half: no need to scale it
        return math.erfc(x / _ROOT_TWO) / 2 - scale * float(erfcx(y / _ROOT_TWO))
    return scale * float(erfcx(x / _ROOT_TWO) - erfcx(y / _ROOT_TWO))


def _smallest(holds: Callable[[float], bool]) -> float:
    """Smallest positive number where a condition holds that, once true, stays true.

    Bisection of the logarithm down to neighbouring floats; what is returned satisfies it.
    """
    high = 1.0
    while not holds(high):
        high *= 2
    low = high / 2
    while holds(low):
        high, low = low, low / 2
    while low < (middle := math.sqrt(low) * math.sqrt(high)) < high:
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
