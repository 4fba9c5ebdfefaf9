r"""Gradient ascent: learning backwards on the forget set (Thudi et al. 2022, arXiv 2109.13398).

.. math:: L = -\frac{1}{|B|} \sum_{x \in B} \min(\mathrm{CE}(o(x), y),\; c \ln K)

Without a bound the loss falls forever, and the weights end as infinities. So an image is pushed no
further once its loss has reached :math:`c` times that of guessing among :math:`K` classes; the
published codes have no such ceiling (``ceiling=null``) and rely on few steps instead.

It needs nothing but the forget set, and nothing protects what stays.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.schedules import Batches


class GradientAscent(Unlearner):
    """Maximise the cross-entropy of the forget set.

    Args:
        learner: The original.
        ceiling: :math:`c`, in units of the loss of guessing; None: no ceiling.
        until: Stop after the first pass that leaves at most this share of the forget set right;
            None: never. For whole classes nearly 0, for single samples the accuracy that is usual
            for images never seen.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: The ceiling is not positive, or ``until`` no share.
    """

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        ceiling: float | None = 1.0,
        until: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if ceiling is not None and ceiling <= 0:
            raise ConfigError(f"Expected unlearner.ceiling > 0, got {ceiling}.")
        if until is not None and not 0 <= until <= 1:
            raise ConfigError(f"Expected unlearner.until in [0, 1], got {until}.")
        self.ceiling, self.until = ceiling, until

    def loss(self, batch: Batches) -> Tensor:
        """Negative cross-entropy of the forget images, each at most at its ceiling."""
        images, labels, _ = batch["forget"]
        assert labels is not None
        logits = self.logits(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.ceiling is not None:
            losses = losses.clamp(max=self.ceiling * math.log(logits.shape[1]))
        return -losses.mean()

    def should_stop(self, context: Context) -> bool:
        """Whether few enough of the forget images are still right."""
        return self.until is not None and self.accuracy(context.forget) <= self.until
