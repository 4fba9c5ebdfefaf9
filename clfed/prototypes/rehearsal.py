"""Whether a classifier can be read off a memory, asked before anything is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clfed.errors import ConfigError
from clfed.prototypes.classifiers import read_off
from clfed.prototypes.memory import Moments, PrototypeMemory


def check_classifier(classifier: Mapping[str, Any], moments: Moments) -> None:
    """Refuse a classifier that could not be read off a memory of two classes.

    Args:
        classifier: ``name`` and options.
        moments: Second moments of the memory.

    Raises:
        ConfigError: No such classifier, or options that it does not take.
        UnsupportedStatistics: It needs more second moments.
    """
    # Base classes have names that are known later.
    options = {key: value for key, value in classifier.items() if key != "base"}
    if "name" not in options:
        raise ConfigError(f"Expected learner.classifier to have a name, got {options}.")
    zero = PrototypeMemory.empty(2, "rehearsal", moments)
    probe = zero.observe(torch.eye(4)[:, :2], ["a", "b", "a", "b"])
    try:
        read_off(options.pop("name"), probe, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"learner.classifier does not fit: {error}.") from error
