"""Checked input of the metrics: accuracies and counts as float64 arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clfed.errors import ConfigError

Array = NDArray[np.float64]


def check_matrix(matrix: ArrayLike) -> Array:
    """Return a matrix of accuracies as float64; None, as in ``results.json``, becomes ``nan``.

    Raises:
        ConfigError: It is not square, empty, not measured on or below its diagonal, or holds
            something else than fractions.
    """
    values = as_array(matrix, "accuracies")
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise ConfigError(
            "Expected accuracies (T, T), one row and one column an experience, got shape "
            f"{values.shape}.",
            remedy="Put the accuracy on experience i after experience t at [t, i].",
        )
    if np.isnan(values[np.tri(len(values), dtype=bool)]).any():
        raise ConfigError(
            "Expected an accuracy on every experience learned so far, got nan on or below the "
            "diagonal.",
            remedy="Evaluate on all earlier experiences after each one.",
        )
    _check_range(values[~np.isnan(values)], "accuracies")
    return values


def check_counts(values: ArrayLike, length: int, what: str) -> Array:
    """Return whole numbers of at least 1 as float64 ``(length,)``.

    Raises:
        ConfigError: Another shape, or other numbers; the message says of ``what``.
    """
    counts = _vector(values, length, what)
    if not (np.isfinite(counts) & (counts >= 1) & (counts == np.floor(counts))).all():
        raise ConfigError(f"Expected whole numbers of {what}, 1 or more, got {counts.tolist()}.")
    return counts


def check_fractions(values: ArrayLike, length: int, what: str) -> Array:
    """Return fractions as float64 ``(length,)``.

    Raises:
        ConfigError: Another shape, or other numbers; the message says of ``what``.
    """
    fractions = _vector(values, length, what)
    _check_range(fractions, what)
    return fractions


def _vector(values: ArrayLike, length: int, what: str) -> Array:
    vector = as_array(values, what)
    if vector.shape != (length,):
        raise ConfigError(f"Expected {length} {what}, got an array of shape {vector.shape}.")
    return vector


def as_array(values: Any, what: str) -> Array:
    """Return numbers as float64.

    Raises:
        ConfigError: They are none, or their rows have different lengths.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected numbers as {what}, got {type(values).__name__}.") from error


def _check_range(values: Array, what: str) -> None:
    if not ((values >= 0) & (values <= 1)).all():
        bad = next(v for v in values.tolist() if not 0 <= v <= 1)
        shown = "nan" if math.isnan(bad) else f"{bad:g}"
        raise ConfigError(f"Expected fractions from 0 to 1 as {what}, got {shown}.")
