r"""Training again from scratch without the forget set: what all others are compared with.

.. math:: \theta_r = \mathrm{train}(D \setminus D_f)

With the recipe of the original, not with another one: otherwise the comparison would be one of
recipes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need


class Retrain(Unlearner):
    """Train a new model on what stays.

    Args:
        learner: The original.
        same_seed: Start from the original's seed instead of one of its own.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`; only ``seed`` counts.
    """

    needs: ClassVar[Need] = Need.RETAIN | Need.HISTORY
    schedule = "none"
    exact = True
    scope = "the whole model, by the recipe of the original"

    def __init__(
        self, learner: ContinualLearner, *, same_seed: bool = False, **options: Any
    ) -> None:
        super().__init__(learner, **options)
        self.same_seed = same_seed

    def solve(self, context: Context) -> None:
        """Train from scratch."""
        if context.history is None:
            raise ConfigError(
                "unlearner=retrain needs the recipe of the original, got a model without one."
            )
        seed = context.history.seed if self.same_seed else self.seed
        context.guard.touch(Need.RETAIN_X, context.retain.ids)
        context.guard.touch(Need.RETAIN_Y, context.retain.ids)
        kept = context.history.without(context.forget.ids)
        self.learner = context.history.train(kept, seed)
        self.lineage = {"seed": seed, "images": len(kept)}
