r"""Stochastic-teacher network (Zhang et al. 2023, arXiv 2308.14322), reconstructed.

First the images that go are taught by a network that has learned nothing, then those that stay by
the original:

.. math:: L_{erase} = \mathrm{KL}(p_{random}(x) \,\|\, p(x)), \qquad
          L_{rebuild} = (1 - \alpha)\, \mathrm{CE}(p(x), y)
          + \alpha T^2\, \mathrm{KL}(p_o^T(x) \,\|\, p^T(x))

There is no code of the authors, and this is made from the paper's abstract: the direction of the
divergences, the weights and one pass of each are our reading. Where a class goes as a whole, its
output is closed in the original that teaches, which would otherwise bring it back.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.losses import soft_divergence
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.distillation import closed, stranger
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import ById
from clfed.unlearning.schedules import Batches


class StochasticTeacher(Unlearner):
    r"""Erase with a random teacher, rebuild with the original.

    Args:
        learner: The original.
        alpha: :math:`\alpha`, share of the teacher in the rebuilding.
        temperature: :math:`T`.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET_X | Need.RETAIN
    schedule = "sequential"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        alpha: float = 0.1,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if not 0 <= alpha <= 1 or temperature <= 0:
            raise ConfigError(
                "Expected unlearner.alpha in [0, 1] and temperature > 0, got "
                f"{alpha} and {temperature}."
            )
        self.alpha, self.temperature = alpha, temperature

    def prepare(self, context: Context) -> None:
        """Ask the random network once about all images that go."""
        noise = stranger(self.teacher, self.seed).scores_of(context.forget.images)
        self.noise = ById(context.forget.ids, noise)
        self.gone = context.forgotten_rows

    def loss(self, batch: Batches) -> Tensor:
        """Erase what goes, or rebuild what stays."""
        if "forget" in batch:
            images, _, ids = batch["forget"]
            return soft_divergence(self.noise[ids], self.logits(images))
        images, labels, _ = batch["retain"]
        assert labels is not None
        logits = self.logits(images)
        taught = soft_divergence(
            closed(self.teacher_logits(images), self.gone), logits, self.temperature
        )
        return (1 - self.alpha) * F.cross_entropy(
            logits, labels
        ) + self.alpha * self.temperature**2 * taught
