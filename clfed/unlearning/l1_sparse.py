r"""Fine-tuning towards few weights (Jia et al. 2023, arXiv 2304.04934).

.. math:: L = \mathrm{CE}(D_r) + \alpha_t \lVert \theta \rVert_1, \qquad
          \alpha_t = \alpha\, (1 - t / T)

A sparse model remembers less of single images. :math:`t` counts passes, as the public code does:
the penalty is full in the first of :math:`T` passes and :math:`\alpha / T` in the last. The norm is
taken of all weights of encoder and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.base import named_weights
from clfed.unlearning.finetune import Finetune
from clfed.unlearning.schedules import Batches


class L1Sparse(Finetune):
    """Fine-tune on the images that stay, with a fading penalty of the weights' sizes.

    Args:
        learner: The original.
        alpha: Strength of the penalty in the first pass.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: A negative strength.
    """

    def __init__(self, learner: ContinualLearner, *, alpha: float = 1e-4, **options: Any) -> None:
        super().__init__(learner, **options)
        if alpha < 0:
            raise ConfigError(f"Expected unlearner.alpha >= 0, got {alpha}.")
        self.alpha = alpha

    def loss(self, batch: Batches) -> Tensor:
        """Cross-entropy of the images that stay, and the penalty."""
        weights = named_weights(self.learner).values()
        norm = torch.stack([weight.abs().sum() for weight in weights]).sum()
        return super().loss(batch) + self.strength(self.current_epoch) * norm

    def strength(self, number: int) -> float:
        """Return the strength of the penalty in a pass, counted from 0."""
        return self.alpha * (1 - number / max(self.epochs, 1))
