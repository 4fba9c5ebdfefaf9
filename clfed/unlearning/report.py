"""What one act of unlearning did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """The account of an unlearner.

    Attributes:
        unlearner: Name of the method.
        request: Id of the request.
        exact: Whether an algorithm guarantees the result, for what ``scope`` names.
        scope: What is as if the forget set had never been seen.
        touched: Distinct samples that were looked at, by kind of data.
        steps: Steps of an optimiser.
        seconds: Wall time, from taking the request to the finished model.
        before: SHA-256 of the model before.
        after: SHA-256 of the model after.
        stopped: Whether a stop rule ended it early.
        lineage: Where the result comes from, in the method's own words and numbers.
    """

    unlearner: str
    request: str
    exact: bool
    scope: str
    touched: dict[str, int]
    steps: int
    seconds: float
    before: str
    after: str
    stopped: bool = False
    lineage: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the account as plain values."""
        return asdict(self)
