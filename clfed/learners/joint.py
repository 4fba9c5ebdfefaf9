r"""Training on everything seen so far, the upper bound of every comparison.

.. math:: L = \mathrm{CE}(W f(x) + b,\; y), \qquad (x, y) \in D_0 \cup \dots \cup D_t

It keeps every image, so it is no continual learner; what it keeps is counted like anybody's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.buffer import ImageBuffer
from clfed.prototypes import PrototypeMemory

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

INITIAL = "initial."


class JointTraining(ContinualLearner):
    """Learn from all images again in every experience.

    Args:
        backbone: The network.
        transform: Its input transform.
        restart: Start every experience from the weights that the backbone came with, and from a
            new head; otherwise go on from where the last one ended.
        logits: ``seen`` or ``all``.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`; ``epochs`` are over
            all images so far.

    Raises:
        ConfigError: ``logits="current"``, which joint training cannot mean.
    """

    buffer: ImageBuffer

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        restart: bool = True,
        logits: str = "seen",
        **options: Any,
    ) -> None:
        if logits == "current":
            raise ConfigError(
                "Joint training learns all classes at once: expected learner.logits of seen or "
                "all, got 'current'."
            )
        super().__init__(backbone, transform, logits=logits, **options)
        self.buffer = ImageBuffer(None)
        self.restart = restart
        if restart:
            for name, tensor in self.backbone.state_dict().items():
                self.kept[INITIAL + name] = tensor.clone().cpu()

    def begin_experience(self, experience: Experience) -> None:
        """Go back to the start."""
        super().begin_experience(experience)
        if self.restart and self.length:
            initial = {n.removeprefix(INITIAL): t for n, t in self.kept.items()}
            self.backbone.load_state_dict(initial)
            self.head.without(self.head.classes)
            self.head.adopt(self.classes)
            if self.trained_logits == "all":
                self.head.reserve(experience.upcoming or 0)
            self.optimiser_state = {}

    def data(self, experience: Experience) -> ImageSet:
        """Return all images so far."""
        everything = ImageBuffer(None)
        everything.restore(self.buffer.state())
        everything.append(experience.train)
        return everything.content() or experience.train

    def compensate(
        self, memory: PrototypeMemory, version: str, experience: Experience, after: Tensor
    ) -> PrototypeMemory:
        """Compute the statistics of old images anew."""
        fresh = PrototypeMemory.empty(memory.sums.shape[1], version, memory.moments)
        old = self.buffer.content()
        if old is None:
            return fresh
        names = [*map(old.classes.__getitem__, old.labels.tolist())]
        return fresh + fresh.observe(self.mapped(self.embed_all(old.images)), names)

    def end_experience(self, experience: Experience) -> None:
        """Keep the images."""
        super().end_experience(experience)
        if len(experience.train):
            self.buffer.append(experience.train)
