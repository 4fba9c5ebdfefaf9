r"""Boundary shrinking: forget images get their nearest wrong label (Chen et al. 2023, CVPR).

.. math:: y' = \arg\max_{k \ne y} f_o(x')_k, \qquad
          x' = x + \epsilon\, \mathrm{sign}\, \nabla_x \mathrm{CE}(f_o(x), y), \qquad
          L = \mathrm{CE}(f(x), y')

The step across the boundary is one of the original, which stays frozen; pixels lie in [0, 1] and
are clipped to it, ready features are not. The paper asks for the nearest *incorrect* class. Its
code takes the largest output whatever it is, which is the true class again where the step was too
short; ``wrong_only=false`` does that for single samples. A class that goes as a whole is never a
label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Pool
from clfed.unlearning.schedules import Batches

CHUNK = 256


class BoundaryShrink(Unlearner):
    """Fine-tune the forget set on the classes across its nearest boundaries.

    Args:
        learner: The original.
        epsilon: Length of the step for each pixel, of [0, 1].
        wrong_only: Never take the true label.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: A negative step.
    """

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        epsilon: float = 0.1,
        wrong_only: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if epsilon < 0:
            raise ConfigError(f"Expected unlearner.epsilon >= 0, got {epsilon}.")
        self.epsilon, self.wrong_only = epsilon, wrong_only

    def pools(self, context: Context) -> dict[str, Pool]:
        """Return the forget set with its labels across the boundary."""
        allowed = torch.zeros(len(self.learner.classes), dtype=torch.bool)
        allowed[context.kept_rows] = True
        images, labels = context.forget.images, context.forget.labels
        chunks = zip(torch.split(images, CHUNK), torch.split(labels, CHUNK), strict=True)
        crossed = torch.cat([self.across(*chunk, allowed) for chunk in chunks])
        crossing = Pool(images, crossed, context.forget.ids)
        return {"forget": crossing.guarded(context.guard, (Need.FORGET_X, Need.FORGET_Y))}

    def loss(self, batch: Batches) -> Tensor:
        """Cross-entropy with the label across the boundary."""
        images, labels, _ = batch["forget"]
        assert labels is not None
        return F.cross_entropy(self.logits(images), labels)

    def across(self, images: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
        """Return the classes that the original sees one step off, ``(B,)`` int64.

        Args:
            images: ``(B, C, H, W)`` uint8, or ``(B, D)`` float32.
            labels: ``(B,)`` int64.
            allowed: ``(K,)`` bool, the classes to choose from.
        """
        scores = self.teacher_logits(self.attacked(images, labels))
        closed = ~allowed.expand_as(scores)
        if self.wrong_only:
            closed = closed | F.one_hot(labels, len(allowed)).bool()
        return scores.masked_fill(closed, -torch.inf).argmax(1)

    def attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images one step of the gradient's sign off, float32 of the same shape."""
        inputs = images.float().requires_grad_(True)
        with torch.enable_grad():
            logits = self.teacher.scores(self.teacher.embed(inputs))
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels), inputs)
        if not self.teacher.transform.mean:
            return inputs.detach() + self.epsilon * slope.sign()
        return (inputs.detach() + 255 * self.epsilon * slope.sign()).clamp(0, 255)
