r"""What several noisy releases reveal together.

Gaussian releases compose without loss (Dong, Roth & Su 2019, arXiv 1905.02383, corollary 3.3):
releases with sensitivities :math:`\Delta_i` and noise :math:`\sigma_i` on the same data are exactly
as private as one with

.. math:: \mu = \frac{\Delta}{\sigma} = \sqrt{\sum_i \Delta_i^2 / \sigma_i^2}

also when a release is chosen after looking at the earlier ones, as long as the noise levels are
fixed beforehand. So one number is the whole account, and :math:`\varepsilon(\delta)` of the
analytic curve is exact. The zCDP and Rényi figures beside it are upper bounds that other programs
print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clfed.errors import ConfigError
from clfed.privacy.gaussian import (
    check_delta,
    check_epsilon,
    check_positive,
    gaussian_delta,
    gaussian_epsilon,
)

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *map(float, range(11, 64)),
    *(128.0, 256.0, 512.0, 1024.0),
)
"""Rényi orders at which the package ``dp-accounting`` looks by default."""


@dataclass(frozen=True)
class GaussianAccount:
    r"""All Gaussian releases that one example (or client) took part in.

    ``a + b`` is what both reveal of the same data; the account of nothing is the zero.

    Attributes:
        mu_squared: :math:`\mu^2 = \sum_i \Delta_i^2 / \sigma_i^2`.

    Example:
        >>> mission = GaussianAccount.of(sensitivity=1.0, sigma=5.0)
        >>> spent = sum([mission] * 10, start=GaussianAccount())
        >>> round(mission.epsilon(1e-5), 3), round(spent.epsilon(1e-5), 3)
        (0.726, 2.594)
    """

    mu_squared: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mu_squared < math.inf:
            raise ConfigError(
                f"expected a finite sum of (sensitivity / sigma)² of at least 0, "
                f"got {self.mu_squared!r}",
                remedy="Give every release a sigma that is not vanishingly small.",
            )

    @classmethod
    def of(cls, sensitivity: float, sigma: float, releases: int = 1) -> GaussianAccount:
        """The account of some releases of one kind.

        Args:
            sensitivity: L2 sensitivity of each.
            sigma: Standard deviation of its noise, in the same unit.
            releases: How many, at least 0.

        Raises:
            ConfigError: A value is out of range.
        """
        check_positive("sensitivity", sensitivity)
        check_positive("sigma", sigma)
        if type(releases) is not int or releases < 0:
            raise ConfigError(f"expected a number of releases of at least 0, got {releases!r}")
        ratio = sensitivity / sigma
        return cls(releases * ratio * ratio)

    def __add__(self, other: GaussianAccount) -> GaussianAccount:
        return GaussianAccount(self.mu_squared + other.mu_squared)

    @property
    def rho(self) -> float:
        r""":math:`\rho = \sum_i \Delta_i^2 / 2\sigma_i^2` of zero-concentrated privacy."""
        return self.mu_squared / 2

    def epsilon(self, delta: float) -> float:
        r"""The exact :math:`\varepsilon` at a :math:`\delta`.

        Raises:
            ConfigError: ``delta`` is not between 0 and 1.
        """
        check_delta(delta)
        if not self.mu_squared:
            return 0.0
        return gaussian_epsilon(1.0, delta, math.sqrt(self.mu_squared))

    def delta(self, epsilon: float) -> float:
        r"""The exact :math:`\delta` at an :math:`\varepsilon`.

        Raises:
            ConfigError: ``epsilon`` is negative or not finite.
        """
        check_epsilon(epsilon)
        if not self.mu_squared:
            return 0.0
        return gaussian_delta(1.0, epsilon, math.sqrt(self.mu_squared))

    def zcdp_epsilon(self, delta: float) -> float:
        r"""Upper bound :math:`\rho + 2\sqrt{\rho \ln(1/\delta)}` (Bun & Steinke 2016, prop. 1.3).

        Raises:
            ConfigError: ``delta`` is not between 0 and 1.
        """
        check_delta(delta)
        return self.rho + 2 * math.sqrt(self.rho * math.log(1 / delta))

    def rdp_epsilon(self, delta: float, orders: Sequence[float] = ORDERS) -> float:
        r"""Upper bound from Rényi divergences (Canonne, Kamath & Steinke 2020, arXiv 2004.00010).

        The divergence of order :math:`\alpha` is :math:`\alpha\rho`; proposition 12 makes of it

        .. math:: \varepsilon = \min_\alpha\; \alpha\rho + \ln\frac{\alpha-1}{\alpha}
                  - \frac{\ln(\delta\alpha)}{\alpha-1}

        and :math:`\varepsilon = 0` where :math:`\delta^2 > 1 - e^{-\alpha\rho}` (Bretagnolle &
        Huber), as in the accountant of ``dp-accounting``.

        Args:
            delta: :math:`\delta` in (0, 1).
            orders: The :math:`\alpha` looked at, each above 1.

        Raises:
            ConfigError: A value is out of range.
        """
        check_delta(delta)
        if not orders or not all(1 < order < math.inf for order in orders):
            raise ConfigError(f"expected finite orders above 1, got {[*orders]!r}")
        if delta * delta > -math.expm1(-min(orders) * self.rho):
            return 0.0
        bounds = (
            order * self.rho + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
            for order in orders
        )
        return max(0.0, min(bounds))


def parallel(accounts: Iterable[GaussianAccount]) -> GaussianAccount:
    """What releases over *disjoint* data reveal of any one example: the largest of them.

    Holds where every example enters one release and which one does not depend on other examples:
    missions that use each image once and send the noised statistics of their own images alone. Not
    for cumulative messages, which carry the images of earlier missions again (add those accounts),
    not for clients that come back, and for a replaced example only if its successor enters the same
    release (otherwise it is one example removed here and one added there: add the two largest).

    Example:
        >>> missions = [GaussianAccount.of(1.0, sigma) for sigma in (5.0, 4.0, 8.0)]
        >>> parallel(missions) == missions[1]
        True
    """
    return max(accounts, key=lambda account: account.mu_squared, default=GaussianAccount())
