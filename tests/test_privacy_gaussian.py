"""The Gaussian mechanism and its accounts: against numeric integration, mpmath and dp-accounting."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from clfed.errors import ConfigError
from clfed.privacy.accountant import ORDERS, GaussianAccount, parallel
from clfed.privacy.gaussian import (
    classical_sigma,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_sigma,
)

# sigma, releases of sensitivity 1, delta, and the epsilon that dp-accounting 0.6.0 gives:
# exactly (get_epsilon_gaussian), by its RdpAccountant and by its PLDAccountant, each with its
# defaults. Made in an environment of its own, with no other packages of clfed:
#
#   pip install dp-accounting==0.6.0
#   python -c "
#   import dp_accounting as d, math
#   from dp_accounting import pld, rdp
#   for sigma in (0.6, 5.0, 100.0):
#       for steps in (1, 10, 100):
#           for delta in (1e-3, 1e-5, 1e-8):
#               event = d.GaussianDpEvent(sigma)
#               print((sigma, steps, delta, d.get_epsilon_gaussian(sigma / math.sqrt(steps), delta),
#                      float(rdp.RdpAccountant().compose(event, steps).get_epsilon(delta)),
#                      float(pld.PLDAccountant().compose(event, steps).get_epsilon(delta))))"
DP_ACCOUNTING = [
    (0.6, 1, 0.001, 5.979014649426299, 6.665773053715516, 5.979014651182173),
    (0.6, 1, 1e-05, 8.003691055600607, 8.603286599774938, 8.003691057033608),
    (0.6, 1, 1e-08, 10.305824504132847, 10.832000813769406, 10.305824508254846),
    (0.6, 10, 0.001, 29.392184171923134, 31.833989384567303, 29.39218417217816),
    (0.6, 10, 1e-05, 35.636460970915884, 37.72064290794515, 35.6364609723968),
    (0.6, 10, 1e-08, 42.787406040668266, 44.59162441012615, 42.78740604082343),
    (0.6, 100, 0.001, 189.4761556308019, 198.50207580837954, 189.4761556342704),
    (0.6, 100, 1e-05, 209.08065326370837, 216.5910891551046, 209.0806532679258),
    (0.6, 100, 1e-08, 231.56089251505918, 238.40220274427693, 231.56089251892075),
    (5.0, 1, 0.001, 0.4539201557417135, 0.5309860626473291, 0.4539201666240838),
    (5.0, 1, 1e-05, 0.7255217508577959, 0.794522032537103, 0.7255217677404247),
    (5.0, 1, 1e-08, 1.0211706150235123, 1.082464808931983, 1.021170643948671),
    (5.0, 10, 0.001, 1.7939472003584793, 2.040847162237852, 1.7939472071062017),
    (5.0, 10, 1e-05, 2.5943833805275993, 2.8136532471298397, 2.594383385595596),
    (5.0, 10, 1e-08, 3.491255025563451, 3.6855390011153206, 3.4912550381913534),
    (5.0, 100, 0.001, 7.581279924570115, 8.416496187447095, 7.581279926592959),
    (5.0, 100, 1e-05, 9.997256146434315, 10.725509696418232, 9.99725615024243),
    (5.0, 100, 1e-08, 12.749246399635458, 13.38639080137985, 12.74924640438469),
    (100.0, 1, 0.001, 0.009048072593038102, 0.014229543167109062, 0.009048254024886574),
    (100.0, 1, 1e-05, 0.027219419814571183, 0.03228903409255256, 0.02721965781197027),
    (100.0, 1, 1e-08, 0.04429478475768026, 0.04748519240277367, 0.04429489870277038),
    (100.0, 10, 0.001, 0.046698817729040554, 0.060090312727600875, 0.04669882129334835),
    (100.0, 10, 1e-05, 0.09697911060547974, 0.10860481624803403, 0.09697919829285609),
    (100.0, 10, 1e-08, 0.14776972683784506, 0.1629965900982871, 0.14776989000630913),
    (100.0, 100, 0.001, 0.19753397323969582, 0.23606016208123376, 0.19753400011367173),
    (100.0, 100, 1e-05, 0.34066936468432835, 0.37529122236627654, 0.34066940409917734),
    (100.0, 100, 1e-08, 0.49285036535491517, 0.5235647050118015, 0.4928504306065801),
]

multipliers = st.floats(0.05, 1000)
epsilons = st.floats(0, 50)
deltas = st.floats(-12, -0.5).map(lambda exponent: 10**exponent)


def hockey_stick(sigma, epsilon):
    """The definition: the integral of max(0, p - exp(epsilon) q) for N(1, sigma²), N(0, sigma²)."""

    def difference(x):
        return max(
            0.0,
            stats.norm.pdf(x, 1, sigma) - math.exp(epsilon) * stats.norm.pdf(x, 0, sigma),
        )

    cut = 0.5 + epsilon * sigma**2  # the densities cross here
    return integrate.quad(difference, cut, cut + 40 * sigma, epsabs=0, epsrel=1e-10)[0]


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0])
def test_delta_is_the_hockey_stick_divergence(sigma, epsilon):
    assert gaussian_delta(sigma, epsilon) == pytest.approx(hockey_stick(sigma, epsilon), rel=1e-7)


@pytest.mark.parametrize(
    ("sigma", "epsilon"),
    [(0.012, 3.0), (1.0, 12.0), (0.02, 1000.0), (0.02, 1500.0), (30.0, 0.5), (2e4, 1e-6)],
)
def test_delta_keeps_its_digits_where_the_plain_formula_loses_them(sigma, epsilon):
    with mpmath.workdps(60):
        mu, e = 1 / mpmath.mpf(sigma), mpmath.mpf(epsilon)
        exact = mpmath.ncdf(mu / 2 - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mu / 2 - e / mu)
        assert gaussian_delta(sigma, epsilon) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "multiplier"), [(0.5, 7.032), (1, 3.731), (2, 1.994), (4, 1.081), (8, 0.600)]
)
def test_sigma_reproduces_published_digits(epsilon, multiplier):
    assert round(gaussian_sigma(epsilon, 1e-5), 3) == multiplier
    assert gaussian_sigma(epsilon, 1e-5, sensitivity=7.0) == pytest.approx(
        7 * gaussian_sigma(epsilon, 1e-5), rel=1e-15
    )


@pytest.mark.parametrize(("epsilon", "multiplier"), [(0.5, 9.690), (1, 4.845)])
def test_classical_sigma_is_larger_than_needed(epsilon, multiplier):
    assert round(classical_sigma(epsilon, 1e-5), 3) == multiplier
    assert gaussian_sigma(epsilon, 1e-5) < classical_sigma(epsilon, 1e-5)
    assert gaussian_epsilon(classical_sigma(epsilon, 1e-5, 3.0), 1e-5, 3.0) < epsilon


def test_classical_sigma_is_refused_where_it_is_not_proven():
    with pytest.raises(ConfigError, match=r"epsilon of at most 1 .* got 1\.5"):
        classical_sigma(1.5, 1e-5)


@settings(deadline=None)
@given(st.floats(0.001, 100), deltas)
def test_sigma_is_enough_and_no_larger_than_needed(epsilon, delta):
    sigma = gaussian_sigma(epsilon, delta)
    assert gaussian_delta(sigma, epsilon) <= delta
    assert gaussian_delta(sigma * (1 - 1e-6), epsilon) > delta
    assert gaussian_epsilon(sigma, delta) == pytest.approx(epsilon, rel=1e-6)


@settings(deadline=None)
@given(multipliers, epsilons, st.floats(0, 10), st.floats(1, 3))
def test_more_noise_or_a_larger_epsilon_never_raises_delta(sigma, epsilon, more, factor):
    delta = gaussian_delta(sigma, epsilon)
    assert 0 <= delta <= 1
    assert gaussian_delta(sigma, epsilon + more) <= delta * (1 + 1e-9)
    assert gaussian_delta(sigma * factor, epsilon) <= delta * (1 + 1e-9)


@pytest.mark.parametrize(("sigma", "steps", "delta", "exact", "renyi", "lattice"), DP_ACCOUNTING)
def test_accounts_equal_those_of_dp_accounting(sigma, steps, delta, exact, renyi, lattice):
    account = GaussianAccount.of(1.0, sigma, steps)
    assert account.epsilon(delta) == pytest.approx(exact, rel=0, abs=1e-9)
    assert account.rdp_epsilon(delta) == pytest.approx(renyi, rel=1e-12)
    # Its PLD accountant rounds privacy losses up to a grid, so it comes out a little larger.
    assert -1e-8 <= lattice - account.epsilon(delta) <= 1e-6


def test_zcdp_is_the_closed_form_and_bounds_order_as_they_must():
    account = GaussianAccount.of(3.0, 6.0, 4) + GaussianAccount.of(1.0, 2.0)
    assert account.rho == 0.5 * (4 * 0.25 + 0.25) == 0.625
    assert account.zcdp_epsilon(1e-5) == pytest.approx(
        0.625 + 2 * math.sqrt(0.625 * math.log(1e5)), rel=1e-15
    )
    fine = [1 + 10**exponent for exponent in np.linspace(-1.5, 3, 2000)]
    assert account.epsilon(1e-5) < account.rdp_epsilon(1e-5, fine) < account.zcdp_epsilon(1e-5)
    assert account.rdp_epsilon(1e-5, fine) <= account.rdp_epsilon(1e-5)


def test_releases_compose_to_one_gaussian():
    """Two releases together are one in two dimensions, at the length of both ratios."""
    both = GaussianAccount.of(3.0, 1.0) + GaussianAccount.of(8.0, 2.0)
    assert both.mu_squared == 25.0
    assert both.epsilon(1e-6) == gaussian_epsilon(1.0, 1e-6, sensitivity=5.0)
    assert both.delta(4.0) == gaussian_delta(0.2, 4.0)


@settings(deadline=None)
@given(st.lists(multipliers, max_size=6), multipliers, deltas)
def test_account_only_grows(noises, another, delta):
    spent = sum((GaussianAccount.of(1.0, sigma) for sigma in noises), start=GaussianAccount())
    more = spent + GaussianAccount.of(1.0, another)
    for method in ("epsilon", "zcdp_epsilon", "rdp_epsilon"):
        assert getattr(more, method)(delta) >= getattr(spent, method)(delta)
    assert parallel([spent, more]) == more


def test_budget_over_missions_can_be_planned():
    missions = 7
    sigma = gaussian_sigma(1.0, 1e-5, sensitivity=2.0 * math.sqrt(missions))
    spent = GaussianAccount.of(2.0, sigma, missions)
    assert spent.epsilon(1e-5) == pytest.approx(1.0, rel=1e-12)


def test_disjoint_missions_cost_what_the_worst_of_them_costs():
    missions = [GaussianAccount.of(1.0, sigma) for sigma in (5.0, 3.0, 4.0)]
    assert parallel(missions) == missions[1]
    assert parallel(missions).epsilon(1e-5) < sum(missions, GaussianAccount()).epsilon(1e-5)
    assert parallel([]) == GaussianAccount()


def test_nothing_released_costs_nothing():
    account = GaussianAccount()
    assert account.epsilon(1e-9) == account.zcdp_epsilon(1e-9) == account.rdp_epsilon(1e-9) == 0
    assert account.delta(0.0) == 0
    assert GaussianAccount.of(1.0, 2.0, 0) == account


def test_a_delta_above_the_total_variation_needs_no_epsilon():
    assert gaussian_delta(1.0, 0.0) == pytest.approx(0.3829249, abs=1e-7)
    assert gaussian_epsilon(1.0, 0.3830) == 0.0 < gaussian_epsilon(1.0, 0.3829)
    assert GaussianAccount.of(1.0, 100.0).rdp_epsilon(0.2, ORDERS) == 0.0


NOT_POSITIVE = [0.0, -1.0, math.nan, math.inf, True, "1"]


@pytest.mark.parametrize("bad", NOT_POSITIVE)
def test_bad_noise_and_sensitivity_are_refused(bad):
    for call in (
        lambda: gaussian_delta(bad, 1.0),
        lambda: gaussian_delta(1.0, 1.0, bad),
        lambda: gaussian_epsilon(bad, 1e-5),
        lambda: gaussian_epsilon(1.0, 1e-5, bad),
        lambda: gaussian_sigma(1.0, 1e-5, bad),
        lambda: classical_sigma(bad, 1e-5),
        lambda: GaussianAccount.of(bad, 1.0),
        lambda: GaussianAccount.of(1.0, bad),
    ):
        with pytest.raises(ConfigError, match="above 0, got"):
            call()


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 2.0, math.nan, None])
def test_bad_delta_is_refused(bad):
    account = GaussianAccount.of(1.0, 1.0)
    for call in (
        lambda: gaussian_epsilon(1.0, bad),
        lambda: gaussian_sigma(1.0, bad),
        lambda: classical_sigma(1.0, bad),
        lambda: account.epsilon(bad),
        lambda: account.zcdp_epsilon(bad),
        lambda: account.rdp_epsilon(bad),
    ):
        with pytest.raises(ConfigError, match="delta between 0 and 1"):
            call()


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_bad_epsilon_is_refused(bad):
    for call in (
        lambda: gaussian_delta(1.0, bad),
        lambda: gaussian_sigma(bad, 1e-5),
        lambda: GaussianAccount().delta(bad),
    ):
        with pytest.raises(ConfigError, match="epsilon of at least 0"):
            call()


def test_bad_accounts_are_refused():
    with pytest.raises(ConfigError, match="number of releases"):
        GaussianAccount.of(1.0, 1.0, -1)
    with pytest.raises(ConfigError, match="orders above 1"):
        GaussianAccount.of(1.0, 1.0).rdp_epsilon(1e-5, [1.0, 2.0])
    with pytest.raises(ConfigError, match="orders above 1"):
        GaussianAccount.of(1.0, 1.0).rdp_epsilon(1e-5, [])
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="expected a finite sum"):
            GaussianAccount(value)
