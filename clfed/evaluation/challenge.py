r"""Score of the NeurIPS 2023 unlearning challenge (Triantafillou et al. 2024, arXiv 2406.09073).

For each sample: how well can one tell, from its log-odds :math:`\varphi`, whether a model has
unlearned it or was retrained without it? Functions of matrices (models × samples).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation.matrix import Array, as_array
from clfed.evaluation.shadows import check_pair

#: What an epsilon without bound counts as.
_CAP = 50.0


def epsilons(
    unlearned: ArrayLike, oracle: ArrayLike, *, delta: float = 1e-5, cuts: int = 64
) -> Array:
    r"""How well the best rule tells an unlearned model from a retrained one, by sample.

    A rule takes a model for unlearned if :math:`\varphi(x)` lies in an interval, or outside of it;
    single thresholds are intervals that end at infinity. With its error rates,

    .. math:: \varepsilon = \max\left(\ln\frac{1 - \delta - \mathrm{FPR}}{\mathrm{FNR}},\;
        \ln\frac{1 - \delta - \mathrm{FNR}}{\mathrm{FPR}},\; 0\right)

    and :math:`\varepsilon_x` is the largest over all rules. A rule without any error counts 50, one
    with exactly one rate of 0 is no evidence and is left out. A sample on which the unlearned
    models hardly differ (a range below 1 % of that of the retrained ones) has 50 as well.

    The rule is chosen on the models that it is judged by, as the challenge defines it: with few
    models :math:`\varepsilon` is too large, never too small.

    Args:
        unlearned: ``(A, N)`` log-odds of unlearned models.
        oracle: ``(B, N)`` log-odds of retrained models.
        delta: :math:`\delta`.
        cuts: Ends of intervals: so many quantiles of both samples together (all values where
            there are no more).

    Returns:
        ``(N,)``.

    Raises:
        ConfigError: Shapes do not fit, or values are not finite.
    """
    ours, theirs = check_pair(unlearned, oracle)
    pooled = np.sort(np.concatenate([ours, theirs]), axis=0)
    chosen = np.unique(np.linspace(0, len(pooled) - 1, min(cuts, len(pooled))).round().astype(int))
    edges = pooled[chosen]
    start, end = np.triu_indices(len(edges) + 1, k=1)
    found = np.zeros(ours.shape[1])
    # All pairs of cuts for a block of samples at once; a block holds about 64 MiB of rates.
    block = max(1, 2**23 // len(start))
    for first in range(0, len(found), block):
        part = slice(first, first + block)
        mass = [_below(side[:, part], edges[:, part]) for side in (ours, theirs)]
        hit, false = (side[end] - side[start] for side in mass)
        found[part] = _worst(hit, false, len(ours), len(theirs), delta)
    span = np.ptp(ours, axis=0) / np.maximum(np.ptp(theirs, axis=0), 1e-300)
    return np.where(span < 0.01, _CAP, found)


def _below(values: Array, edges: Array) -> NDArray[np.int64]:
    """Number of models up to each edge, ``(cuts + 1, N)``, with 0 before the first."""
    counts = (values[None] <= edges[:, None]).sum(1)
    return np.concatenate([np.zeros((1, values.shape[1]), dtype=np.int64), counts])


def _worst(
    hit: NDArray[np.int64], false: NDArray[np.int64], ours: int, theirs: int, delta: float
) -> Array:
    """Largest epsilon of the rules "inside" and "outside", over all intervals."""
    inside = _epsilon(false / theirs, (ours - hit) / ours, delta)
    outside = _epsilon((theirs - false) / theirs, hit / ours, delta)
    found: Array = np.maximum(inside, outside).max(0)
    return found


def _epsilon(fpr: Array, fnr: Array, delta: float) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.log((1 - delta - fpr).clip(0)) - np.log(fnr)
        other = np.log((1 - delta - fnr).clip(0)) - np.log(fpr)
    usable = (fpr > 0) & (fnr > 0)
    found = np.where(usable, np.maximum(one, other).clip(0, _CAP), 0.0)
    return np.where((fpr == 0) & (fnr == 0), _CAP, found)


def challenge_points(epsilon: ArrayLike, models: int) -> Array:
    r"""Points of each sample by the bucket of its epsilon.

    .. math:: 2^{-k}, \qquad k = \lfloor 2 \varepsilon \rfloor

    A bucket that :math:`n` models cannot tell from infinity,
    :math:`(k + 1) / 2 > \lceil \ln(n - 1) \rceil`, has none.

    Args:
        epsilon: ``(N,)``, see :func:`epsilons`.
        models: :math:`n`, of each kind; at least 3.

    Example:
        >>> challenge_points([0.0, 0.6, 6.9, 7.0], 512).tolist()
        [1.0, 0.5, 0.0001220703125, 0.0]
    """
    if models < 3:
        raise NotEnoughData(f"The challenge score needs at least three models, got {models}.")
    bucket = np.floor(as_array(epsilon, "epsilons") / 0.5)
    return np.where((bucket + 1) * 0.5 <= math.ceil(math.log(models - 1)), 0.5**bucket, 0.0)


def challenge_score(
    unlearned: ArrayLike,
    oracle: ArrayLike,
    *,
    retain: tuple[float, float],
    test: tuple[float, float],
    delta: float = 1e-5,
    cuts: int = 64,
) -> float:
    r"""Score of the NeurIPS 2023 challenge (Triantafillou et al. 2024, arXiv 2406.09073).

    .. math:: \frac1{|D_f|} \sum_{x \in D_f} 2^{-\lfloor 2 \varepsilon_x \rfloor} \cdot
        \frac{\mathrm{RA}_u}{\mathrm{RA}_r} \cdot \frac{\mathrm{TA}_u}{\mathrm{TA}_r}

    Compare only scores of equally many models.

    Args:
        unlearned: ``(A, N)`` log-odds of unlearned models on the forget set.
        oracle: ``(B, N)`` log-odds of retrained models.
        retain: Mean accuracy of both kinds on what stays.
        test: Mean accuracy of both kinds on test images.
        delta: As in :func:`epsilons`.
        cuts: As in :func:`epsilons`.

    Raises:
        ConfigError: Shapes do not fit, or the retrained models are never right.
    """
    if not (retain[1] > 0 and test[1] > 0):
        raise ConfigError(f"Expected retrained models that are right at times, got {retain, test}.")
    found = epsilons(unlearned, oracle, delta=delta, cuts=cuts)
    models = min(len(np.asarray(unlearned)), len(np.asarray(oracle)))
    share = float(challenge_points(found, models).mean())
    return share * retain[0] / retain[1] * test[0] / test[1]
