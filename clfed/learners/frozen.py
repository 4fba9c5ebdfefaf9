"""Learners of exact statistics: the network is trained once at most, then only counted with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, Merge
from clfed.prototypes import Moments


class FrozenLearner(ContinualLearner):
    """What all learners of this kind share: exact sums of embeddings, and a way to read them.

    The state after a stream does not depend on the order of its experiences or images, several
    learners of one network become one by adding their memories, and what is subtracted was never
    there. One pass over the images of an experience is all that it takes.

    Args:
        backbone: The network.
        transform: Its input transform.
        classifier: Name and options of a classifier of :mod:`clfed.prototypes.classifiers`.
        moments: Second moments that it needs.
        train: ``first`` (train on the first experience, then freeze) or ``none``.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: Another ``train``, no such classifier, or options that it does not take.
        UnsupportedStatistics: The classifier needs more second moments.
    """

    merges: Merge = "exact"

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: Mapping[str, Any],
        moments: Moments = "none",
        train: str = "first",
        **options: Any,
    ) -> None:
        if train not in ("first", "none"):
            raise ConfigError(
                f"Expected learner.train of ('first', 'none'), got {train!r}.",
                remedy="Statistics of a network that goes on learning lose their meaning; sdc, "
                "ldc and adc move them along.",
            )
        super().__init__(
            backbone, transform, classifier=classifier, moments=moments, train=train, **options
        )
