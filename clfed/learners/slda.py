r"""Streaming linear discriminant analysis (Hayes & Kanan 2020, arXiv 1909.01520).

.. math:: \Lambda = ((1 - \varepsilon) \Sigma + \varepsilon I)^{-1}, \qquad
          w_c = \Lambda \mu_c, \quad b_c = -\tfrac12 \mu_c^\top \Lambda \mu_c

The paper follows the covariance from sample to sample,

.. math:: \Sigma_{n+1} = \frac{n \Sigma_n + \Delta_n}{n + 1}, \qquad
          \Delta_n = \frac{n}{n + 1} (h_n - \mu_{y_n}) (h_n - \mu_{y_n})^\top

where :math:`\mu_{y_n}` is the mean of the class *before* the sample (zero for its first one) and
:math:`n` counts samples of all classes. This overstates the spread, and the answer depends on the
order of the images. By default (``mode="exact"``) :math:`\Sigma` is the pooled within-class
covariance, which depends on neither order nor partition; ``mode="paper"`` is the recursion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.frozen import FrozenLearner
from clfed.prototypes import RESOLUTION, Classifier, LinearClassifier, Moments, PrototypeMemory
from clfed.prototypes.covariance import solve
from clfed.prototypes.fixed_point import quantise

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

MODES = ("exact", "paper")
_BLOCK = 4096


class StreamingLDA(FrozenLearner):
    """Class means and one covariance on a frozen network.

    Args:
        backbone: The network; pre-trained in the paper.
        transform: Its input transform.
        mode: ``exact`` or ``paper``.
        classifier: ``lda`` with its options; ``mode="paper"`` takes ``shrinkage`` alone.
        moments: Second moments; None takes what the mode needs.
        options: Options of :class:`~clfed.learners.frozen.FrozenLearner`.

    Raises:
        ConfigError: No such mode, or options that the recursion does not have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        mode: str = "exact",
        classifier: Mapping[str, Any] | None = None,
        moments: Moments | None = None,
        **options: Any,
    ) -> None:
        chosen = {"name": "lda"} if classifier is None else classifier
        if mode not in MODES:
            raise ConfigError(f"Expected learner.mode of {MODES}, got {mode!r}.")
        if mode == "paper" and not (
            chosen["name"] == "lda" and set(chosen) <= {"name", "shrinkage"}
        ):
            raise ConfigError(
                "learner.mode=paper takes the classifier lda with a shrinkage alone, got "
                f"{dict(chosen)}."
            )
        super().__init__(
            backbone, transform, classifier=chosen, moments=moments or "shared", **options
        )
        self.mode = mode
        if mode == "paper":
            self.merges, self.moments = "none", "none"

    def study(self, mapped: Tensor, labels: Tensor, experience: Experience) -> None:
        """Follow the paper's recursion through the images in their order."""
        if self.mode == "exact" or self.memory is None:
            return
        q, _ = quantise(mapped, self.memory.dim)
        old, index = self.memory, self.memory.index
        rows = torch.tensor([index.get(name, -1) for name in experience.classes])
        met = rows >= 0
        counts = torch.zeros(len(rows), dtype=torch.int64)
        sums = torch.zeros(len(rows), old.dim, dtype=torch.int64)
        counts[met], sums[met] = old.counts[rows[met]], old.sums[rows[met]]
        total = old.total_count
        scatter = self.kept.get("scatter", q.new_zeros(old.dim, old.dim))
        for part, names in zip(
            torch.split(q.long(), _BLOCK), torch.split(labels, _BLOCK), strict=True
        ):
            scatter = scatter + recursive_scatter(part, names, counts, sums, total)
            counts += torch.bincount(names, minlength=len(counts))
            sums.index_add_(0, names, part)
            total += len(part)
        self.kept["scatter"] = scatter

    def read(self, memory: PrototypeMemory) -> Classifier:
        """Make the classifier from the exact covariance, or from the recursion's."""
        if self.mode == "exact":
            return super().read(memory)
        names = self.remembered(memory)
        shrinkage = (self.classifier or {}).get("shrinkage", 1e-4)
        means = memory.means()[memory.rows(names)]
        covariance = self.kept["scatter"] / memory.total_count
        matrix = (1 - shrinkage) * covariance + shrinkage * torch.eye(memory.dim).double()
        weight = solve(matrix, means.T).T
        return LinearClassifier(tuple(names), weight, -0.5 * (weight * means).sum(1))


def recursive_scatter(
    q: Tensor, labels: Tensor, counts: Tensor, sums: Tensor, total: int
) -> Tensor:
    r"""What some samples add to :math:`n \Sigma_n` of the recursion, all at once.

    The recursion unrolls to :math:`\sum_n \frac{n}{n+1} d_n d_n^\top`, and the class means that the
    deviations :math:`d_n` are taken from are running sums of whole numbers, so nothing is lost by
    taking them together.

    Args:
        q: Embeddings in units of ``RESOLUTION``, shape ``(B, D)`` int64, in their order.
        labels: Shape ``(B,)`` int64, rows of ``counts``.
        counts: Samples of each class before these, shape ``(C,)`` int64.
        sums: Their sums, shape ``(C, D)`` int64.
        total: :math:`n`, samples of all classes before these.

    Returns:
        Shape ``(D, D)`` float64.
    """
    ordered, order = labels.sort(stable=True)
    here = torch.bincount(labels, minlength=len(counts))
    first = here.cumsum(0) - here
    running = F.pad(q[order].cumsum(0), (0, 0, 1, 0))
    before = running[:-1] - running[first[ordered]] + sums[ordered]
    seen = torch.arange(len(q)) - first[ordered] + counts[ordered]
    deviation = (q[order] - before / seen.clamp(min=1).double()[:, None]) * RESOLUTION
    position = (order + total).double()
    weighted = deviation * (position / (position + 1))[:, None]
    return weighted.T @ deviation
