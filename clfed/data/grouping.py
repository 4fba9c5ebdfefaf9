"""Division of classes into base, validation and field."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clfed.errors import ConfigError
from clfed.seeding import generator


def leading_groups(
    classes: Sequence[str], base: int, validation: int, class_seed: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Take the base from the front, the validation from the end of the base, and leave the field.

    Args:
        classes: All classes.
        base: How many are known beforehand, those of validation among them.
        validation: How many of the base are held out to pick checkpoints.
        class_seed: Seed that shuffles the classes first; None keeps their order.

    Raises:
        ConfigError: A number is negative or larger than what it is taken from.

    Example:
        >>> leading_groups("abcde", base=3, validation=1)
        {'base': ('a', 'b'), 'validation': ('c',), 'field': ('d', 'e')}
    """
    if not 0 <= base <= len(classes):
        raise ConfigError(f"data.base_classes must lie in 0..{len(classes)}, got {base}.")
    if not 0 <= validation <= base:
        raise ConfigError(
            f"data.validation_classes must lie in 0..{base} (the base classes), got {validation}."
        )
    names = tuple(classes)
    if class_seed is not None:
        order = torch.randperm(len(names), generator=generator(class_seed, "class order"))
        names = tuple(names[index] for index in order.tolist())
    return {
        "base": names[: base - validation],
        "validation": names[base - validation : base],
        "field": names[base:],
    }
