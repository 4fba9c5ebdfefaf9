r"""Forget a class by projecting it out of the embedding, from class statistics alone.

The direction of the class, :math:`v = \hat\mu_u`, disappears from every embedding,

.. math:: T = I - v v^\top, \qquad z \to T z, \qquad S_c \to T S_c, \qquad M_c \to T M_c T^\top

A linear edit commutes with sums, so the statistics of the other classes follow without a look at
any image. The form is that of POUR (CVPR 2026). Where class means form a simplex of :math:`K`
equally distant vertices, the others form one of :math:`K - 1` afterwards, with cosines of
:math:`-1/(K - 2)`.

That geometry is one of means about their common centre; embeddings after a ReLU have a centre far
from zero, which a projection along the raw mean would remove from all classes together. So
:math:`v` is the mean less the mean of all classes (``centred``); the raw mean is the other choice.

Several classes go along the plane that their directions span. The model answers by the nearest
mean of the classes that stay. Sums are kept as fixed-point numbers, which a projection has to
round, so the result is not exact to the bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.prototypes import PrototypeMemory
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need


class LinearMap(nn.Module):
    """A matrix that nothing trains.

    Args:
        matrix: ``(D', D)``.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to ``(B, D')``."""
        return nn.functional.linear(embeddings, self.matrix)


class Projection(Unlearner):
    """Project classes out of the embedding and of the class statistics.

    Args:
        learner: The original.
        centred: Whether directions point from the mean of all class means instead of from zero.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`; none of them counts.
    """

    needs: ClassVar[Need] = Need.CLASS_STATS
    schedule = "none"
    scope = "embedding and class statistics, by a linear edit"
    reads: ClassVar[str] = "memory"

    def __init__(self, learner: ContinualLearner, *, centred: bool = True, **options: Any) -> None:
        super().__init__(learner, **options)
        self.centred = centred

    def check_request(self, context: Context) -> None:
        """Refuse what has no direction, and statistics of anything but the embeddings.

        Raises:
            ConfigError: Another kind of request, no statistics, or statistics of something else.
        """
        super().check_request(context)
        if context.request.kind != "class":
            raise ConfigError(
                "unlearner=projection removes the direction of a class from an embedding, and a "
                f"{context.request.kind} has none.",
                remedy="Choose unlearner=exact, or a request for classes.",
            )
        statistics = context.statistics
        plain = type(self.learner).scores is ContinualLearner.scores
        if statistics is None or self.learner.feature_map is not None or not plain:
            raise ConfigError(
                "unlearner=projection needs class statistics of the embeddings themselves, got "
                f"{'none' if statistics is None else 'those of something else'}.",
                remedy="Choose learner=naive with learner.moments=none.",
            )
        if set(statistics.total.classes) <= set(context.request.classes):
            raise ConfigError("unlearner=projection needs a class that stays, got none.")

    def solve(self, context: Context) -> None:
        """Append the projection to the backbone and apply it to the statistics."""
        statistics = context.statistics
        assert statistics is not None
        names = [name for name in context.request.classes if name in statistics.total]
        matrix = projector(directions(statistics.total, names, centred=self.centred))
        self.learner.backbone = nn.Sequential(self.learner.backbone, LinearMap(matrix.float()))
        # Pooled second moments hold those of the class that goes, and cannot be divided.
        pooled = statistics.total.moments == "shared"
        known = statistics.total.with_moments("none") if pooled else statistics.total
        self.memory = edited(known.without(names), matrix, self.learner.version())
        self.lineage = {"removed_directions": matrix.shape[0] - round(float(matrix.trace()))}

    def finalize(self, context: Context) -> None:
        """Answer by the nearest mean of the edited statistics."""
        super().finalize(context)
        self.learner.memory, self.learner.classifier = self.memory, {"name": "ncm"}
        self.learner.moments = self.memory.moments


def directions(memory: PrototypeMemory, names: list[str], *, centred: bool) -> Tensor:
    """Return what points to some classes, ``(len(names), D)`` float64.

    Args:
        memory: Of all classes.
        names: Classes in it.
        centred: Whether from the mean of all class means instead of from zero.
    """
    means = memory.means()
    centre = means.mean(0) if centred else torch.zeros_like(means[0])
    return (means - centre)[memory.rows(names)]


def projector(rows: Tensor) -> Tensor:
    r"""Return :math:`T = I - V V^\top`, where the columns of :math:`V` span the rows.

    Args:
        rows: ``(R, D)`` float64; rows that depend on others, or are zero, add nothing.

    Example:
        >>> projector(torch.tensor([[3.0, 0.0], [6.0, 0.0]]).double()).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    _, sizes, spanning = torch.linalg.svd(rows, full_matrices=False)
    kept = spanning[sizes > 1e-9 * sizes.amax().clamp(min=1e-30)]
    complement: Tensor = torch.eye(rows.shape[1], dtype=rows.dtype) - kept.T @ kept
    return complement


def edited(memory: PrototypeMemory, matrix: Tensor, embedding_id: str) -> PrototypeMemory:
    """Apply a linear map to sums and second moments.

    Args:
        memory: Statistics of embeddings :math:`z`.
        matrix: :math:`T`, ``(D, D)`` float64.
        embedding_id: Identity of the embedding :math:`T z`.

    Returns:
        The statistics of :math:`T z`, each sum rounded to its unit.
    """
    outer = memory.outer
    return PrototypeMemory.of(
        memory.classes,
        memory.counts,
        (memory.sums.double() @ matrix.T).round().long(),
        embedding_id,
        moments=memory.moments,
        outer=None if outer is None else (matrix @ outer.double() @ matrix.T).round().long(),
    )
