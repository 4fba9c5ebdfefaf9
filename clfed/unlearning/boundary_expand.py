r"""Boundary expanding: forget images move to a class that does not exist (Chen et al. 2023, CVPR).

.. math:: L = \mathrm{CE}([f(x), s(x)],\; K + 1)

:math:`s` is one more output beside the :math:`K` of the model. It is trained together with it, and
dropped at the end, so that an image falls to the best of the real classes. Evaluated with it in
place, as is easily done, every forget image would count as forgotten for free; here it belongs to
the unlearner and never to the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.learners.tables import Head
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches


class BoundaryExpand(Unlearner):
    """Fine-tune the forget set on an additional class that is dropped afterwards."""

    needs = Need.FORGET

    def prepare(self, context: Context) -> None:
        """Make the additional output, of the same kind as the model's."""
        head = self.learner.head
        width = head.column("weight").shape[1]
        self.shadow = Head(width, head.kind, temperature=head.temperature, seed=self.seed)
        self.shadow.grow(["shadow"])

    def loss(self, batch: Batches) -> Tensor:
        """Cross-entropy with the additional class as the label."""
        embeddings = self.learner.embed(batch["forget"].images).float()
        logits = torch.cat([self.outputs(embeddings), self.shadow(embeddings)], 1)
        target = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        return F.cross_entropy(logits, target)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the student and of the additional output."""
        found = super().configure_optimizers()
        optimiser = found["optimizer"] if isinstance(found, dict) else found
        optimiser.param_groups[0]["params"].extend(self.shadow.parameters())
        return found
