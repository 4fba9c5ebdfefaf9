r"""Random labels for the forget set (Graves et al. 2021), and SalUn with a mask of salient weights.

.. math:: L = \mathbb{E}_{D_f,\, y' \sim U}\, \mathrm{CE}(o(x), y')
          + \mathbb{E}_{D_r}\, \mathrm{CE}(o(x), y)

SalUn (Fan et al. 2024, arXiv 2310.12508) is this with ``mask={density: 0.5}``, see
:class:`~clfed.unlearning.masks.Saliency`, or with ``proximal=0.5`` in its soft form.

The paper draws labels from all :math:`K` classes, the true one among them. Where a class goes as a
whole that would teach it again in one of :math:`K` cases, so labels come from the other classes.
Its code passes through the forget set and then through the rest (``schedule=sequential``) on small
data sets, and mixes both (``schedule=concat``) on larger ones; labels are drawn anew in each pass.
We mix: in a pass of its own the forget set pulls everything along, and what stays suffers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.unlearning.base import Unlearner, other_labels
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches


class RandomLabel(Unlearner):
    """Fine-tune on random labels of the forget set and true ones of the rest."""

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN

    def prepare(self, context: Context) -> None:
        """See which labels may be drawn."""
        self.allowed = context.kept_rows
        self.whole_class = context.request.kind == "class"

    def loss(self, batch: Batches) -> Tensor:
        """Cross-entropy with a drawn label or the true one, over all images of the batch."""
        images, labels = [], []
        if "forget" in batch:
            part = batch["forget"]
            assert part.labels is not None
            images.append(part.images)
            labels.append(self.drawn_labels(part.labels))
        if "retain" in batch:
            part = batch["retain"]
            assert part.labels is not None
            images.append(part.images)
            labels.append(part.labels)
        return F.cross_entropy(self.logits(torch.cat(images)), torch.cat(labels))

    def drawn_labels(self, labels: Tensor) -> Tensor:
        """Draw a label for each forget image, never a class that goes as a whole."""
        rng = self.rng("labels")
        if self.whole_class:
            return other_labels(labels, self.allowed, rng)
        return self.allowed[torch.randint(len(self.allowed), labels.shape, generator=rng)]
