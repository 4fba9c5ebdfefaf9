"""Learners of exact statistics: the network is trained once at most, then only counted with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, Merge
from clfed.prototypes import Classifier, Moments, PrototypeMemory, read_off

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


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
        check_classifier(classifier, moments)
        super().__init__(
            backbone, transform, classifier=classifier, moments=moments, train=train, **options
        )

    def observe(self, experience: Experience) -> None:
        """Look at the embeddings of an experience, then add their sums to the memory."""
        mapped = self.mapped(self.embed_all(experience.train.images))
        if self.memory is None:
            self.memory = PrototypeMemory.empty(
                mapped.shape[1], self.version(), self.moments or "none"
            )
        self.study(mapped, experience.train.labels, experience)
        names = [*map(experience.classes.__getitem__, experience.train.labels.tolist())]
        self.memory = self.memory + self.memory.observe(mapped, names)

    def study(self, mapped: Tensor, labels: Tensor, experience: Experience) -> None:
        """Learn what plain sums do not tell, while ``self.memory`` is still without these images.

        Args:
            mapped: Embeddings after the feature map, ``(N, D)``.
            labels: ``(N,)`` int64, index into ``experience.classes``.
            experience: Where they come from.
        """

    def reading(self, memory: PrototypeMemory) -> dict[str, Any]:
        """Return name and options of the classifier that is read off a memory."""
        return dict(self.classifier or {})

    def read(self, memory: PrototypeMemory) -> Classifier:
        """Make the classifier over the classes of a memory, in the order of ``self.classes``."""
        options = self.reading(memory)
        return read_off(options.pop("name"), memory, classes=self.known(memory), **options)

    def known(self, memory: PrototypeMemory) -> list[str]:
        """Return the classes of a memory in the order of ``self.classes``."""
        return [name for name in self.classes if name in memory]


def check_classifier(classifier: Mapping[str, Any], moments: Moments) -> None:
    """Refuse a classifier that could not be read off a memory, before anything is learned.

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
    zero = PrototypeMemory.empty(2, "probe", moments)
    probe = zero.observe(torch.eye(4)[:, :2], ["a", "b", "a", "b"])
    try:
        read_off(options.pop("name"), probe, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"learner.classifier does not fit: {error}.") from error
