r"""NegGrad+: ascent on the forget set while descending on the rest.

Kurmanji et al. 2023 (arXiv 2302.09880) weigh the two,

.. math:: L = a\, \mathrm{CE}(D_r) - (1 - a)\, \min(\mathrm{CE}(D_f),\; c \ln K)

with the ceiling of :mod:`clfed.unlearning.gradient_ascent` for each image, and the same stop rule.
Forget images pass with frozen batch norm, so that its statistics are those of images that stay.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.gradient_ascent import GradientAscent
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches


class NegGradPlus(GradientAscent):
    """Ascend on the forget set while descending on the rest.

    Args:
        learner: The original.
        balance: :math:`a`, the weight of the images that stay.
        options: Options of :class:`~clfed.unlearning.gradient_ascent.GradientAscent`.

    Raises:
        ConfigError: The balance is no share.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN
    schedule = "nested"

    def __init__(self, learner: ContinualLearner, *, balance: float = 0.95, **options: Any) -> None:
        super().__init__(learner, **options)
        if not 0 <= balance <= 1:
            raise ConfigError(f"Expected unlearner.balance in [0, 1], got {balance}.")
        self.balance = balance

    def loss(self, batch: Batches) -> Tensor:
        """Weighted difference of the two cross-entropies."""
        images, labels, _ = batch["retain"]
        assert labels is not None
        kept = F.cross_entropy(self.logits(images), labels)
        self.learner.eval()
        return self.balance * kept + (1 - self.balance) * super().loss(batch)
