"""How well a score tells images of known classes from images of unknown ones."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clfed.errors import ConfigError, NotEnoughData


def auroc(known: ArrayLike, unknown: ArrayLike) -> float:
    r"""Chance that a known image scores higher than an unknown one; a tie counts one half.

    .. math:: \frac{1}{nm} \sum_{i,j} \left([k_i > u_j] + \tfrac12 [k_i = u_j]\right)

    Args:
        known: :math:`k`, shape ``(n,)``, scores of images of known classes; higher means more
            surely known.
        unknown: :math:`u`, shape ``(m,)``, the same of unknown classes.

    Raises:
        NotEnoughData: One side has no score.
        ConfigError: Scores are not one-dimensional, or are ``nan``.

    Example:
        >>> auroc([0.9, 0.8, 0.3], [0.3, 0.1])
        0.9166666666666666
    """
    inside, outside = _scores(known, "known"), np.sort(_scores(unknown, "unknown"))
    below = np.searchsorted(outside, inside, side="left")
    not_above = np.searchsorted(outside, inside, side="right")
    # Whole numbers up to here, so the result does not depend on the order of the scores.
    return int((below + not_above).sum()) / (2 * len(inside) * len(outside))


def fpr_at_tpr(known: ArrayLike, unknown: ArrayLike, tpr: float = 0.95) -> float:
    r"""Share of unknown images that pass where a share of known ones must pass (FPR95).

    The threshold is the highest score :math:`\tau` that lets at least that share of the known
    images through:

    .. math:: \tau = \max \{t : \tfrac1n \#\{k_i \ge t\} \ge \text{tpr}\}, \qquad
        \tfrac1m \#\{u_j \ge \tau\}

    Args:
        known: :math:`k`, shape ``(n,)``, scores of images of known classes; higher means more
            surely known.
        unknown: :math:`u`, shape ``(m,)``, the same of unknown classes.
        tpr: Above 0, at most 1.

    Raises:
        NotEnoughData: One side has no score.
        ConfigError: Scores are not one-dimensional or are ``nan``, or ``tpr`` is out of range.

    Example:
        >>> fpr_at_tpr([5, 4, 3, 2, 1], [2.5, 1.5, 0.5, 0], tpr=0.8)
        0.25
    """
    inside, outside = np.sort(_scores(known, "known")), _scores(unknown, "unknown")
    if isinstance(tpr, bool) or not 0 < tpr <= 1:
        raise ConfigError(f"Expected a true positive rate above 0 and at most 1, got {tpr!r}.")
    # 0.7 * 10 is a little more than 7 in floating point, and 8 images would be one too many.
    accepted = math.ceil(tpr * len(inside) - 1e-9)
    threshold = inside[len(inside) - max(accepted, 1)]
    return float((outside >= threshold).mean())


def _scores(values: ArrayLike, which: str) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ConfigError(
            f"Expected one score for each {which} image, got shape {scores.shape}"
            f"{' with nan' if np.isnan(scores).any() else ''}."
        )
    if not len(scores):
        raise NotEnoughData(f"Expected scores of {which} images, got none.")
    return scores
