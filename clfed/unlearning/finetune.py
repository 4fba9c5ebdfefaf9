r"""Training on with the images that stay, and hoping that the rest fades.

.. math:: L = \mathrm{CE}(\Gamma(\Psi(x_r)), y_r)

The weakest baseline of every paper, and the strongest protection of what stays.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.unlearning.base import Unlearner
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches


class Finetune(Unlearner):
    """Fine-tune on the images that stay."""

    needs: ClassVar[Need] = Need.RETAIN

    def loss(self, batch: Batches) -> Tensor:
        """Cross-entropy of the images that stay."""
        images, labels, _ = batch["retain"]
        assert labels is not None
        return F.cross_entropy(self.logits(images), labels)
