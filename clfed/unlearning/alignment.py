r"""Unlearners that move what goes to the nearest class that is not its own.

.. math:: L = \lambda_f \frac{1}{|B_f|} \sum_{j \in B_f} w_j\, d(\Psi(x_j), c^*(j)) + L_{keep},
          \qquad c^*(j) = \arg\min_{c \ne y_j} d(\Psi_o(x_j), c)

Goals are found once, with the original, and kept by sample id: the order and the number of batches
do not matter. Each forget batch meets ``ratio + 1`` batches of what protects the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.pools import Batch, ById, Pool
from clfed.unlearning.schedules import Batches

CHECKS = ("pass", "step")


class Alignment(Unlearner):
    r"""Base of DUCK and SCAR.

    A method sets ``self.rows`` and calls :meth:`aim` in ``prepare``, and overrides
    :meth:`distances` and :meth:`keeping`.

    Training ends when the share of forget images that are still recognised falls below a
    threshold: ``class_stop`` where a class goes as a whole; else what the original gets right of
    held-out images, less ``margin``, for that is what never seen images look like. (Public code
    takes the test images, which then no longer test anything.)

    Args:
        learner: The original.
        forget_weight: :math:`\lambda_f`.
        class_stop: Threshold where a class goes, a share.
        margin: How far below the held-out accuracy to go for other requests.
        check: Whether the rule is asked after each ``pass`` or each ``step``.
        earliest: Passes before the rule is asked for the first time.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    schedule = "nested"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        forget_weight: float = 1.0,
        class_stop: float = 0.01,
        margin: float = 0.0,
        check: str = "pass",
        earliest: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if check not in CHECKS:
            raise ConfigError(f"Expected unlearner.check of {CHECKS}, got {check!r}.")
        if forget_weight < 0 or not 0 <= class_stop <= 1 or not 0 <= margin <= 1 or earliest < 0:
            raise ConfigError(
                "Expected unlearner.forget_weight >= 0, class_stop and margin in [0, 1] and "
                f"earliest >= 0, got {forget_weight}, {class_stop}, {margin} and {earliest}."
            )
        self.forget_weight, self.class_stop, self.margin = forget_weight, class_stop, margin
        self.stops_after, self.earliest = check, earliest
        #: Rows of the classes that the columns of :meth:`distances` stand for, ``(C,)`` int64.
        self.rows = torch.empty(0, dtype=torch.int64)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Distance ``(B, C)`` of embeddings ``(B, D)`` to each class of ``self.rows``."""
        raise NotImplementedError

    def keeping(self, batch: Batches) -> Tensor:
        """Return the loss that protects what stays."""
        raise NotImplementedError

    def shares(self, forget: Batch) -> Tensor:
        """Weights :math:`w_j` of the images of a forget batch, ``(B,)``."""
        return torch.ones(len(forget.ids), device=forget.ids.device)

    def aim(self, pool: Pool, labels: Tensor, context: Context) -> None:
        """Find the goal of each image that goes, and the threshold of the stop rule.

        Args:
            pool: What goes.
            labels: ``(N,)`` int64, its classes.
            context: Request and held-out images.
        """
        parts = torch.split(self.teacher.embed_all(pool.images), 256)
        found = torch.cat([self.distances(part) for part in parts])
        self.goals = ById(pool.ids, nearest_other(found, self.rows, labels))
        self.context = context
        if context.request.kind == "class":
            self.threshold = self.class_stop
        elif len(context.validation):
            self.threshold = self.accuracy(context.validation) - self.margin
        else:
            raise ConfigError(
                f"unlearner={self.method or type(self).__name__} stops by the accuracy on held-out "
                "images, got none."
            )
        self.lineage = {"stops below": self.threshold}

    def loss(self, batch: Batches) -> Tensor:
        """Distance to the goals, and what protects the rest."""
        kept = self.keeping(batch)
        forget = batch["forget"]
        # In eval mode, and last: images that go must not shift the statistics of batch norm.
        self.learner.eval()
        distances = self.distances(self.learner.embed(forget.images).float())
        goals = self.goals[forget.ids]
        moved = distances.gather(1, goals[:, None]).squeeze(1)
        return self.forget_weight * (self.shares(forget) * moved).mean() + kept

    def recognised(self) -> float:
        """Share of the images that go that are still taken for what they are."""
        return self.accuracy(self.context.forget)

    def should_stop(self, context: Context) -> bool:
        """Whether the images that go are recognised no more than the threshold says."""
        assert self.batches is not None
        return self.batches.passes > self.earliest and self.recognised() < self.threshold


def nearest_other(distances: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Return for each row of distances the column of the nearest class that is not its own.

    Args:
        distances: ``(N, C)``.
        rows: ``(C,)`` int64: which class a column stands for; any subset in any order, so a column
            is never compared with a label.
        labels: ``(N,)`` int64.

    Raises:
        ConfigError: There is no other class.

    Example:
        >>> d = torch.tensor([[0.1, 0.2, 0.9]])
        >>> nearest_other(d, torch.tensor([0, 2, 3]), torch.tensor([0])).tolist()
        [1]
    """
    own = rows == labels[:, None]
    if bool(own.all(1).any()):
        raise ConfigError("Expected at least one other class to move images to, got none.")
    return distances.masked_fill(own, torch.inf).argmin(1)
