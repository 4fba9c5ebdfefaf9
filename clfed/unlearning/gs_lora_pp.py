r"""GS-LoRA++: the same with prototypes (Zhao et al. 2025, arXiv 2501.09705).

What goes shall also leave the place of its class among the embeddings:

.. math:: L_{++} = L + \lambda_f\, \mathrm{ReLU}(\mathrm{BND}_p - \mathrm{KL}_f)
          + \lambda_r\, \mathrm{KL}_r, \qquad
          \mathrm{KL} = \frac1B \sum_i \mathrm{KL}(\sigma(p_{y_i}) \,\|\, \sigma(z_i))

where :math:`\sigma` is the softmax, :math:`z` the embedding and :math:`p_c` the mean embedding of
class :math:`c` under the model before this request. Prototypes come from the images that the
method may draw on, the forget set and the small share of what stays.

The paper's bound of 18 fits embeddings of 512 numbers. Where samples of classes go that stay, the
bound is the divergence of held-out images from their prototypes, so that what is forgotten ends as
far from its class as what was never seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.context import Context
from clfed.unlearning.gs_lora import GroupSparseLora
from clfed.unlearning.pools import Pool
from clfed.unlearning.schedules import Batches


class GroupSparseLoraPlus(GroupSparseLora):
    r"""Train low-rank adapters to forget outputs and places among the embeddings.

    Args:
        learner: The original.
        forget_pull: :math:`\lambda_f`, weight of leaving one's prototype.
        retain_pull: :math:`\lambda_r`, weight of staying at one's prototype.
        prototype_bound: :math:`\mathrm{BND}_p` for classes; samples take that of held-out images.
        options: Options of :class:`~clfed.unlearning.gs_lora.GroupSparseLora`.

    Raises:
        ConfigError: An option is negative.
    """

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        forget_pull: float = 0.01,
        retain_pull: float = 0.0,
        prototype_bound: float = 18.0,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if min(forget_pull, retain_pull, prototype_bound) < 0:
            raise ConfigError(
                "Expected unlearner.forget_pull, retain_pull and prototype_bound >= 0, got "
                f"{forget_pull}, {retain_pull} and {prototype_bound}."
            )
        self.forget_pull, self.retain_pull = forget_pull, retain_pull
        self.prototype_bound = prototype_bound
        self.prototypes = torch.empty(0)

    def prepare(self, context: Context) -> None:
        """Take the prototypes of the model as it is, then do as without them."""
        self.prototypes = self._prototypes([context.forget, self.drawn(context.retain)])
        super().prepare(context)
        if not self.whole_class:
            held = context.validation
            embeddings = self.teacher.embed_all(held.images)
            self.prototype_bound = float(self.divergence(embeddings, held.labels))

    def loss(self, batch: Batches) -> Tensor:
        """Add the two terms with prototypes."""
        forget, retain = batch["forget"], batch["retain"]
        assert forget.labels is not None and retain.labels is not None
        here, there = (self.learner.embed(part.images).float() for part in (forget, retain))
        total = self.of_outputs(
            self.outputs(here), forget.labels, self.outputs(there), retain.labels
        )
        away = F.relu(self.prototype_bound - self.divergence(here, forget.labels))
        return (
            total
            + self.forget_pull * away
            + self.retain_pull * self.divergence(there, retain.labels)
        )

    def divergence(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean divergence of embeddings ``(B, D)`` from the prototypes of rows ``(B,)``."""
        return F.kl_div(
            F.log_softmax(embeddings, 1),
            F.log_softmax(self.prototypes[labels], 1),
            reduction="batchmean",
            log_target=True,
        )

    def _prototypes(self, pools: list[Pool]) -> Tensor:
        """Mean embedding ``(K, D)`` of each class; that of a class without an image is zero."""
        labels = torch.cat([pool.labels for pool in pools])
        embeddings = torch.cat([self.teacher.embed_all(pool.images) for pool in pools])
        sums = embeddings.new_zeros(len(self.learner.classes), embeddings.shape[1])
        counts = torch.bincount(labels, minlength=len(sums)).clamp(min=1)
        return sums.index_add_(0, labels, embeddings) / counts[:, None]
