"""What every table of class statistics must satisfy, wherever it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from clfed.errors import InvalidMessage

Moments = Literal["none", "shared", "class"]
NAME_LIMIT = 128


def checked_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Refuse names that could not be printed, stored or compared.

    Two names are one class when they are equal letter by letter; Unicode is not normalised.

    Args:
        names: Strings of 1 to 128 printable characters.
        what: What they name, for the message.

    Raises:
        InvalidMessage: Not strings, empty, too long, or with control characters.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InvalidMessage(f"expected a sequence of {what}s, got {type(names).__name__}")
    try:
        text = "".join(names)
    except TypeError:
        kinds = sorted({type(name).__name__ for name in names})
        raise InvalidMessage(f"expected strings as {what}s, got {', '.join(kinds)}") from None
    if names:
        lengths = [*map(len, names)]
        if min(lengths) < 1 or max(lengths) > NAME_LIMIT:
            bad = min(lengths) if min(lengths) < 1 else max(lengths)
            raise InvalidMessage(
                f"expected {what}s of 1 to {NAME_LIMIT} characters, got one of {bad}"
            )
        if not text.isprintable():
            bad_name = next(name for name in names if not name.isprintable())
            raise InvalidMessage(f"expected printable {what}s, got {bad_name!r}")
    return tuple(map(str, names))


def check_tables(
    classes: Sequence[str],
    counts: Tensor,
    sums: Tensor,
    embedding_id: str,
    *,
    moments: str,
    outer: Tensor | None,
) -> None:
    """Refuse tables whose names, dtypes or shapes do not fit together.

    Args:
        classes: ``C`` names, already checked one by one.
        counts: Expected ``(C,)`` int64.
        sums: Expected ``(C, D)`` int64 with ``D >= 1``.
        embedding_id: Expected a printable name.
        moments: Expected one of the :data:`Moments`.
        outer: Expected symmetric int64 of the shape that ``moments`` says.

    Raises:
        InvalidMessage: One of them is not as expected.
    """
    checked_names([embedding_id], "embedding identity")
    if moments not in get_args(Moments):
        raise InvalidMessage(f"expected moments among {get_args(Moments)}, got {moments!r}")
    if len(set(classes)) != len(classes):
        raise InvalidMessage(
            f"expected every class once, got {len(classes) - len(set(classes))} twice"
        )
    dim = sums.shape[1] if isinstance(sums, Tensor) and sums.ndim == 2 else 0
    if dim < 1:
        raise InvalidMessage("expected sums of shape (C, D) with D of at least 1")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "counts": (counts, (len(classes),)),
        "sums": (sums, (len(classes), dim)),
    }
    if moments == "none" and outer is not None:
        raise InvalidMessage("expected no second moments with moments='none', got some")
    if moments != "none":
        expected["outer"] = (outer, (len(classes), dim, dim) if moments == "class" else (dim, dim))
    for name, (table, shape) in expected.items():
        if not isinstance(table, Tensor):
            raise InvalidMessage(f"expected a tensor {name}, got {type(table).__name__}")
        if table.dtype != torch.int64 or tuple(table.shape) != shape:
            raise InvalidMessage(
                f"expected {name} of shape {shape} int64, got {tuple(table.shape)} {table.dtype}"
            )
    if outer is not None and not torch.equal(outer, outer.mT):
        raise InvalidMessage("expected symmetric second moments, got others")
