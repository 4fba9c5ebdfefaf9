"""Whether settings of a strategy, or of its half at nodes, make sense."""

from __future__ import annotations

import math

from clfed.errors import ConfigError


def check_whole(least: int, **values: int) -> None:
    """Refuse settings that are no whole numbers of at least ``least``.

    Raises:
        ConfigError: Names the first one.
    """
    for name, value in values.items():
        if type(value) is not int or value < least:
            raise ConfigError(
                f"strategy.{name} must be a whole number of at least {least}, got {value!r}."
            )


def check_weights(**values: float) -> None:
    """Refuse settings that are no finite numbers of at least 0.

    Raises:
        ConfigError: Names the first one.
    """
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ConfigError(f"strategy.{name} must be a number of at least 0, got {value!r}.")


def check_rates(**values: float) -> None:
    """Refuse learning rates, temperatures and the like that are no finite numbers above 0.

    Raises:
        ConfigError: Names the first one.
    """
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(f"strategy.{name} must be a number above 0, got {value!r}.")
