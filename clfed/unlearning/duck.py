r"""DUCK: distance-based unlearning via centroid kinematics (Cotogni et al. 2023, arXiv 2312.02052).

.. math:: L = \lambda_f \frac{1}{|B_f|} \sum_{j \in B_f} \big(1 - \cos(\Psi(x_j), \mu_{c^*(j)})\big)
          + \lambda_r\, \mathrm{CE}(\Gamma(\Psi(x_r)) / T, y_r)

with :math:`\mu_c` the mean embedding of the images that stay, by the original, and :math:`c^*(j)`
the nearest centroid of a wrong class.

Where public code does something else: it compares the place of a centroid in a list with a label,
so that images whose nearest class follows the forgotten one go to the second nearest; and it keeps
the goals by the number of the batch, which only fits if all images make one. Here centroids know
their class, and goals are kept by sample id. Its later versions polish the model for two more
epochs; the first one, like the paper, does not, and neither does this.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.unlearning.alignment import Alignment
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches


class Duck(Alignment):
    r"""Pull embeddings to the nearest wrong centroid, and train on what stays.

    Args:
        learner: The original.
        retain_weight: :math:`\lambda_r`.
        temperature: :math:`T`.
        label_smoothing: Of the cross-entropy; as in the training of the original.
        options: Options of :class:`~clfed.unlearning.alignment.Alignment`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN | Need.EVAL

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        retain_weight: float = 1.4,
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if retain_weight < 0 or temperature <= 0 or not 0 <= label_smoothing <= 1:
            raise ConfigError(
                "Expected unlearner.retain_weight >= 0, temperature > 0 and label_smoothing in "
                f"[0, 1], got {retain_weight}, {temperature} and {label_smoothing}."
            )
        self.retain_weight, self.temperature = retain_weight, temperature
        self.label_smoothing = label_smoothing

    def prepare(self, context: Context) -> None:
        """Find the centroids, and the goal of each image that goes."""
        assert self.batches is not None
        retain = self.batches.pools["retain"]
        self.rows, self.centroids = centroids(self.teacher.embed_all(retain.images), retain.labels)
        self.aim(context.forget, context.forget.labels, context)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Cosine distance to each centroid."""
        return 1 - F.normalize(embeddings) @ F.normalize(self.centroids).T.to(embeddings.device)

    def keeping(self, batch: Batches) -> Tensor:
        """Cross-entropy of the images that stay, by softened outputs."""
        images, labels, _ = batch["retain"]
        assert labels is not None
        logits = self.logits(images) / self.temperature
        return self.retain_weight * F.cross_entropy(
            logits, labels, label_smoothing=self.label_smoothing
        )


def centroids(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes that occur and the mean embedding of each.

    Args:
        embeddings: ``(N, D)``.
        labels: ``(N,)`` int64.

    Returns:
        Rows ``(C,)`` int64 ascending, and means ``(C, D)``; a class without images has none.

    Example:
        >>> rows, means = centroids(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([4, 4, 2]))
        >>> rows.tolist(), means.tolist()
        ([2, 4], [[5.0], [2.0]])
    """
    rows, place, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = embeddings.new_zeros(len(rows), embeddings.shape[1])
    return rows, sums.index_add_(0, place, embeddings) / counts[:, None]
