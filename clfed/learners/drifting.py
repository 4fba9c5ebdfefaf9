"""What methods share that let the network go on learning and move their old statistics after it.

Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282) slows the drift of the embedding,
a guess of the drift moves the class means, and the nearest mean answers. Published recipe of the
comparisons of SDC, LDC and ADC: distillation of weight 10 at temperature 2, cosine head, SGD 0.1
for 200 epochs, then 0.05 for 100, batch 128.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.lwf import LearningWithoutForgetting
from clfed.prototypes import Moments, PrototypeMemory
from clfed.prototypes.drift import moved

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class Drifting(ContinualLearner):
    """Move the statistics of old classes whenever the network has changed.

    Args:
        backbone: The network.
        transform: Its input transform.
        classifier: What is read off the memory.
        moments: ``none`` or ``class``; one matrix for all classes cannot be moved.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: ``moments`` is neither.
    """

    merges = "approximate"
    needs_boundaries = True
    snapshot_parts: ClassVar[tuple[str, ...]] = ("backbone",)

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: Mapping[str, Any] | None = None,
        moments: Moments = "none",
        **options: Any,
    ) -> None:
        if moments not in ("none", "class"):
            raise ConfigError(
                "Statistics that follow a drift keep no second moments or those of each class, "
                f"got learner.moments={moments!r}."
            )
        super().__init__(
            backbone,
            transform,
            classifier=classifier or {"name": "ncm"},
            moments=moments,
            **options,
        )

    @abstractmethod
    def drifted(
        self, memory: PrototypeMemory, experience: Experience, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Guess where old classes are by now.

        Args:
            memory: What the older network left of them.
            experience: The present experience.
            before: ``(N, D)``, its images by the older network.
            after: ``(N, D)``, the same by the present one.

        Returns:
            Means ``(C, D)`` and biased covariances ``(C, D, D)``, in the order of the memory; None
            keeps the covariances that it holds.
        """

    def compensate(
        self, memory: PrototypeMemory, version: str, experience: Experience, after: Tensor
    ) -> PrototypeMemory:
        """Move old classes to where the method guesses them."""
        before = self.embed_all(experience.train.images, self.teacher["backbone"])
        means, covariances = self.drifted(
            memory, experience, self.mapped(before), self.mapped(after)
        )
        return moved(memory, means, version, None if memory.outer is None else covariances)


class DistilledDrifting(Drifting, LearningWithoutForgetting):
    """The same, trained by classification and distillation of old outputs.

    Its options are those of :class:`Drifting` and of
    :class:`~clfed.learners.lwf.LearningWithoutForgetting`.
    """

    snapshot_parts = ("backbone", "head")
