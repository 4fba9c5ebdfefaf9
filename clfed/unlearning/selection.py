"""What is to be forgotten: the choices of ``conf/forget``, each a function that gives requests.

Each takes the ``holdings``, the ``seed`` of its draws, ``original``, which returns the trained
model when it is called, and options of its own; it uses what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clfed.errors import RequestError
from clfed.seeding import generator
from clfed.unlearning.requests import Request, read_requests

if TYPE_CHECKING:
    from clfed.learners.base import ContinualLearner
    from clfed.scenarios.holdings import Holdings

    Original = Callable[[], ContinualLearner]


def of_classes(
    *,
    holdings: Holdings,
    seed: int,
    original: Original,
    classes: Sequence[str | int] | str | int | None = None,
    one_by_one: bool = False,
) -> list[Request]:
    """Return one request for whole classes, or one for each of them.

    Args:
        holdings: The data.
        seed: Of the draw.
        original: Ignored.
        classes: Names; numbers become names. None: one class that has images, drawn by the seed.
        one_by_one: Whether each class is a request of its own.
    """
    if classes is None:
        classes = holdings.train.classes[_drawn(holdings.train.labels, seed)]
    names = tuple(str(name) if type(name) is int else name for name in _several(classes))
    if not one_by_one:
        return [Request("class", "class", classes=names)]
    return [
        Request(f"class{number}", "class", classes=(name,)) for number, name in enumerate(names, 1)
    ]


def at_random(
    *, holdings: Holdings, seed: int, original: Original, share: float = 0.1
) -> list[Request]:
    """Return one request for samples of all classes, drawn by the seed.

    Args:
        holdings: The data.
        seed: Of the draw.
        original: Ignored.
        share: Of all training images; at least one is drawn.

    Raises:
        RequestError: The share is not between 0 and 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise RequestError(f"Expected forget.share between 0 and 1, got {share!r}.")
    total = len(holdings.ids)
    drawn = torch.randperm(total, generator=generator(seed, "forget"))[
        : max(1, round(share * total))
    ]
    samples = holdings.ids[drawn].sort().values
    return [Request("random", "sample", samples=tuple(samples.tolist()))]


def of_samples(
    *, holdings: Holdings, seed: int, original: Original, samples: Sequence[int] | int
) -> list[Request]:
    """Return one request for single samples, by id; data, seed and original are ignored."""
    return [Request("samples", "sample", samples=_several(samples))]


def of_contributor(
    *, holdings: Holdings, seed: int, original: Original, contributor: str | None = None
) -> list[Request]:
    """Return one request for everything of a contributor.

    Args:
        holdings: The data.
        seed: Of the draw.
        original: Ignored.
        contributor: A name. None: one that holds images, drawn by the seed.
    """
    if contributor is None:
        contributor = holdings.contributors[_drawn(holdings.owners, seed)]
    return [Request("contributor", "contributor", contributor=contributor)]


def from_file(
    *, holdings: Holdings, seed: int, original: Original, path: str | None
) -> list[Request]:
    """Return the requests of a file, see :func:`read_requests`; the rest is ignored.

    Raises:
        RequestError: No file is named, or it cannot be read.
    """
    if not path:
        raise RequestError("Expected a file of requests, got no forget.path.")
    return read_requests(path)


def _drawn(numbers: Tensor, seed: int) -> int:
    present = torch.unique(numbers)
    return int(present[torch.randint(len(present), (1,), generator=generator(seed, "forget"))])


def _several(values: Any) -> tuple[Any, ...]:
    return (values,) if isinstance(values, str | int) else tuple(values)
