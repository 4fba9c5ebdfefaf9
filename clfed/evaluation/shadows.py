r"""Measures over many models: likelihood-ratio attacks and the divergence of margins.

All are functions of matrices (models × samples) of log-odds :math:`\varphi`, see
:func:`clfed.evaluation.unlearning.margins`; :mod:`clfed.evaluation.shadow_models` makes them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation.matrix import Array, as_array
from clfed.evaluation.unknown import auroc

#: Smallest variance of a Gaussian, for samples of which all models say the same.
_TINY = 1e-10


def lira(
    confidences: ArrayLike,
    inside: ArrayLike,
    target: ArrayLike,
    *,
    shared_variance: bool = False,
) -> Array:
    r"""Likelihood-ratio attack (Carlini et al. 2022, arXiv 2112.03570), online.

    .. math:: \ln \Lambda(x) = \ln \mathcal N(\varphi;\, \mu_{in}, \sigma^2_{in})
        - \ln \mathcal N(\varphi;\, \mu_{out}, \sigma^2_{out})

    with means and variances over the models that were trained with :math:`x` and without it.

    Args:
        confidences: ``(S, N)`` log-odds of each shadow model on each sample.
        inside: ``(S, N)`` bool, whether a model was trained on a sample.
        target: ``(N,)`` log-odds of the model under attack.
        shared_variance: One variance a side for all samples, around each sample's own mean; what
            few shadow models need.

    Returns:
        ``(N,)``, higher means more surely a member.

    Raises:
        ConfigError: Shapes do not fit or values are not finite.
        NotEnoughData: Some sample has too few models on a side: two, or one where variances are
            shared.
    """
    values = check_models(confidences, "confidences")
    mask = np.asarray(inside, dtype=bool)
    asked = as_array(target, "confidences of the target")
    if mask.shape != values.shape or asked.shape != values.shape[1:]:
        raise ConfigError(
            f"Expected masks {values.shape} and a target {values.shape[1:]} like the confidences, "
            f"got {mask.shape} and {asked.shape}."
        )
    fewest = int(np.minimum(mask.sum(0), (~mask).sum(0)).min(initial=len(values)))
    least = 1 if shared_variance else 2
    if fewest < least or (shared_variance and min(mask.sum(), (~mask).sum()) <= mask.shape[1]):
        raise NotEnoughData(
            f"Expected at least {least} shadow models with and {least} without each sample, and "
            f"more than one of some, got {fewest}.",
            remedy="Train more shadow models, or share the variance.",
        )
    inner = _log_density(values, mask, asked, shared_variance)
    return inner - _log_density(values, ~mask, asked, shared_variance)


def _log_density(values: Array, mask: NDArray[np.bool_], target: Array, shared: bool) -> Array:
    counts = mask.sum(0)
    means = (values * mask).sum(0) / counts
    squares = (np.square(values - means) * mask).sum(0)
    variances = squares.sum() / (counts - 1).sum() if shared else squares / (counts - 1)
    variances = np.maximum(variances, _TINY)
    found: Array = -0.5 * (np.square(target - means) / variances + np.log(2 * np.pi * variances))
    return found


def u_lira(
    confidences: ArrayLike,
    inside: ArrayLike,
    target: ArrayLike,
    *,
    shared_variance: bool = False,
) -> Array:
    r"""Likelihood-ratio attack on unlearning (Hayes et al. 2024, arXiv 2403.01218).

    .. math:: \frac{\mathcal N(\varphi; in)}{\mathcal N(\varphi; in) + \mathcal N(\varphi; out)}

    The same as :func:`lira` with other shadow models: all have unlearned. Those inside were trained
    with the sample and then made to forget it, those outside never saw it and were made to forget
    other samples. Above one half: it was forgotten, not absent.

    Args:
        confidences: As in :func:`lira`, of models after unlearning.
        inside: Whether a model had been trained on a sample, which it then unlearned.
        target: As in :func:`lira`.
        shared_variance: As in :func:`lira`.

    Returns:
        ``(N,)`` in [0, 1].
    """
    ratio = lira(confidences, inside, target, shared_variance=shared_variance)
    return np.exp(-np.logaddexp(0, -ratio))


def tpr_at_fpr(members: ArrayLike, others: ArrayLike, fpr: float) -> float:
    """Share of members found where at most a share of the others is taken for members.

    Args:
        members: ``(n,)`` scores, higher means more surely a member.
        others: ``(m,)``, the same of non-members.
        fpr: At most this share; with fewer than ``1 / fpr`` others that is none at all.

    Example:
        >>> tpr_at_fpr([5.0, 3.0, 1.0], [4.0, 2.0, 0.0, 0.0], 0.25)
        0.6666666666666666
    """
    outside = np.sort(as_array(others, "scores of non-members"))
    allowed = math.floor(fpr * len(outside) + 1e-9)
    if allowed >= len(outside):
        return 1.0
    return float((as_array(members, "scores of members") > outside[-1 - allowed]).mean())


def attack_summary(scores: ArrayLike, members: ArrayLike) -> dict[str, float]:
    """Return area under the curve and true positive rates at 0.1 % and 1 % false positives.

    Args:
        scores: ``(N,)``, higher means more surely a member.
        members: ``(N,)`` bool, the truth.

    Returns:
        ``auc``, ``tpr_at_0.1`` and ``tpr_at_1``.
    """
    values, truth = as_array(scores, "scores"), np.asarray(members, dtype=bool)
    inside, outside = values[truth], values[~truth]
    return {
        "auc": auroc(inside, outside),
        "tpr_at_0.1": tpr_at_fpr(inside, outside, 0.001),
        "tpr_at_1": tpr_at_fpr(inside, outside, 0.01),
    }


def klom(unlearned: ArrayLike, oracle: ArrayLike, *, bins: int = 20, floor: float = 1e-5) -> Array:
    r"""Divergence of the margins of unlearned models from those of retrained ones, by sample.

    KLOM (Georgiev et al. 2024, arXiv 2410.23232). Both samples of :math:`\varphi(x)` are counted in
    equal bins over their joint range, the last of which holds its upper edge;

    .. math:: \mathrm{KLOM}(x) = \sum_b u_b \ln \frac{u_b}{\max(r_b, 10^{-5})}

    where :math:`u_b > 0`. Disjoint samples have :math:`\ln 10^5 = 11.5`. Two samples of 100 models
    of the *same* distribution have about 0.33: compare with :func:`klom_floor`, not with 0.

    Args:
        unlearned: ``(A, N)`` margins of unlearned models.
        oracle: ``(B, N)`` margins of retrained models.
        bins: Number of bins.
        floor: Smallest share of a bin of the oracle.

    Returns:
        ``(N,)``.

    Raises:
        ConfigError: Shapes do not fit or values are not finite.
    """
    ours, theirs = check_pair(unlearned, oracle)
    low = np.minimum(ours.min(0), theirs.min(0))
    width = np.maximum(ours.max(0), theirs.max(0)) - low
    width = np.where(width > 0, width, 1.0)
    u, r = (_shares((side - low) / width, bins) for side in (ours, theirs))
    filled = u > 0
    terms = u * np.log(np.where(filled, u, 1.0) / np.maximum(r, floor))
    found: Array = np.where(filled, terms, 0.0).sum(0)
    return found


def _shares(places: Array, bins: int) -> Array:
    """Share of the models in each bin, ``(bins, N)``, of places in [0, 1]."""
    number = np.minimum((places * bins).astype(np.int64), bins - 1)
    cell = number * places.shape[1] + np.arange(places.shape[1])
    counts = np.bincount(cell.ravel(), minlength=bins * places.shape[1])
    shares: Array = counts.reshape(bins, -1) / len(places)
    return shares


def klom_floor(oracle: ArrayLike, *, bins: int = 20, floor: float = 1e-5) -> Array:
    """Divergence of one half of the retrained models from the other, ``(N,)``.

    What no unlearner can be better than. With halves of half the models each it is larger than that
    of two full sets.

    Raises:
        NotEnoughData: Fewer than two models.
    """
    values = check_models(oracle, "margins")
    if len(values) < 2:
        raise NotEnoughData(f"Expected at least two retrained models, got {len(values)}.")
    return klom(values[::2], values[1::2], bins=bins, floor=floor)


def summarised(values: ArrayLike) -> dict[str, float]:
    """Return ``mean``, ``median`` and 95th percentile (``p95``) over samples."""
    found = as_array(values, "values")
    return {
        "mean": float(found.mean()),
        "median": float(np.median(found)),
        "p95": float(np.quantile(found, 0.95)),
    }


def check_models(values: ArrayLike, what: str) -> Array:
    """Return numbers (models, samples) as float64.

    Raises:
        ConfigError: Another shape, or values that are not finite; the message says of ``what``.
    """
    found = as_array(values, what)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise ConfigError(
            f"Expected finite {what} (models, samples), got shape {found.shape}"
            f"{'' if np.isfinite(found).all() else ' with nan or infinity'}."
        )
    return found


def check_pair(unlearned: ArrayLike, oracle: ArrayLike) -> tuple[Array, Array]:
    """Return the margins of two kinds of models on the same samples as float64.

    Raises:
        ConfigError: They are not of the same samples, or not finite.
    """
    ours, theirs = check_models(unlearned, "margins"), check_models(oracle, "margins")
    if ours.shape[1] != theirs.shape[1]:
        raise ConfigError(
            f"Expected margins of the same samples, got {ours.shape[1]} and {theirs.shape[1]}."
        )
    return ours, theirs
