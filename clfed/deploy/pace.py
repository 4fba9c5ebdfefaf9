"""How long the server of real nodes waits for what."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clfed.errors import ConfigError


@dataclass(frozen=True)
class Pace:
    """How long the server waits for what.

    Attributes:
        every: Pause between two rounds, seconds.
        patience: Longest wait for the replies of a round, seconds; later ones merge later.
        nodes: Number of connected nodes that the first round waits for.
        gather: Longest wait for them, seconds; then it starts with those that are there.
        rounds: Stop when this many rounds are finished, those of earlier runs included; None:
            never.

    Raises:
        ConfigError: A time that is no time, or a number below one.
    """

    every: float = 10.0
    patience: float = 45.0
    nodes: int = 1
    gather: float = 600.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "patience", "gather"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"Expected seconds of at least 0 as {name}, got {getattr(self, name)}."
                )
        for name in ("nodes", "rounds"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"Expected at least 1 as {name}, got {number}.")
