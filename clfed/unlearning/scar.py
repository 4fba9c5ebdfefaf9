r"""SCAR: unlearning without the data that stay (Bonato et al. 2024, arXiv 2404.12922).

What goes moves to the nearest distribution of a wrong class, by a Mahalanobis distance of
Tukey-transformed embeddings; what stays is protected by the original's answers to images of another
data set:

.. math:: q_c(x) = \frac{\Psi(x)^\delta}{\|\Psi(x)^\delta\|} - \frac{\mu_c}{\|\mu_c\|}, \qquad
          d_c(x) = \sqrt{q_c^\top \hat\Sigma_c^{+} q_c}, \qquad
          L = \lambda_1 \frac{1}{|B_f|} \sum_j w_j\, d_{c^*(j)}(x_j)
          + \lambda_2\, \mathrm{div}(p_o^T, p)

with :math:`\hat\Sigma_c` the covariance, shrunk ``rounds`` times and scaled to a correlation. The
statistics are made from the embeddings that the class statistics keep, so that no image that
stays is looked at; samples that are to be forgotten are left out of them.

Where paper and public code differ:

* the paper's distance has a root, the code's has not (``root``); we keep the root, without which
  the gradient shrinks with the distance and the weights mean something else;
* the paper's divergence is the mean of both directions (``divergence: symmetric``), the code's is
  :math:`\mathrm{KL}(p_o \| p)` (``forward``); only the teacher is softened by :math:`T` in both;
* places in a list are not labels, see :mod:`clfed.unlearning.duck`.

A class that goes: images that the original takes for it are left out, and its output falls to the
smallest of each row in the teacher. Single samples: other images are drawn so that all classes the
original sees in them count alike, and :math:`w_j` is the accuracy on the forget images of that
class, zero below ``gate``, so that classes are no longer pushed when they are forgotten enough.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.losses import soft_divergence
from clfed.prototypes.covariance import correlation
from clfed.prototypes.features import tukey
from clfed.seeding import generator
from clfed.unlearning.alignment import Alignment
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Batch, Pool
from clfed.unlearning.schedules import Batches

DIVERGENCES = ("symmetric", "forward")
# Powers below 1 have no slope at zero; a smaller number than this counts as zero.
TINY = 1e-8
# Classes that the original sees in fewer other images than this are drawn as if it saw five.
RARE, AS_IF = 3, 5.0


class Scar(Alignment):
    r"""Align with wrong class distributions, distil on other images.

    Args:
        learner: The original.
        delta: :math:`\delta`; 1 for embeddings that may be negative.
        gammas: Shrinkage: shares of the mean variance and of the mean covariance that are added.
        rounds: How often it is applied.
        root: Whether the distance is the root of the quadratic form.
        divergence: ``symmetric`` or ``forward``.
        keep_weight: :math:`\lambda_2`.
        temperature: :math:`T` of the teacher.
        gate: Accuracy below which a class is no longer pushed, for requests of samples.
        options: Options of :class:`~clfed.unlearning.alignment.Alignment`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.OOD_X | Need.CLASS_STATS | Need.EVAL

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        delta: float = 0.5,
        gammas: tuple[float, float] = (3.0, 3.0),
        rounds: int = 2,
        root: bool = True,
        divergence: str = "symmetric",
        keep_weight: float = 5.0,
        temperature: float = 1.0,
        gate: float = 0.8,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if divergence not in DIVERGENCES:
            raise ConfigError(
                f"Expected unlearner.divergence of {DIVERGENCES}, got {divergence!r}."
            )
        if not 0 < delta <= 1 or len(gammas) != 2 or not gammas[0] >= gammas[1] >= 0 or rounds < 0:
            # A larger second share could leave a matrix with negative directions.
            raise ConfigError(
                "Expected unlearner.delta in (0, 1], two gammas that do not grow and rounds >= 0, "
                f"got {delta}, {list(gammas)} and {rounds}."
            )
        if keep_weight < 0 or temperature <= 0 or not 0 <= gate <= 1:
            raise ConfigError(
                "Expected unlearner.keep_weight >= 0, temperature > 0 and gate in [0, 1], got "
                f"{keep_weight}, {temperature} and {gate}."
            )
        self.delta, self.gammas, self.rounds = delta, (gammas[0], gammas[1]), rounds
        self.root, self.divergence, self.keep_weight = root, divergence, keep_weight
        self.temperature, self.gate = temperature, gate

    def check_request(self, context: Context) -> None:
        """Refuse a model without class statistics of plain embeddings.

        Raises:
            ConfigError: It has none.
        """
        if context.statistics is None or self.learner.feature_map is not None:
            raise ConfigError(
                f"unlearner={self.method or type(self).__name__} needs class statistics of "
                "embeddings without a feature map, got none.",
                remedy="Train the original with learner.moments=none (sums alone), shared or "
                "class, and without learner.feature_map.",
            )
        super().check_request(context)

    def pools(self, context: Context) -> dict[str, Pool]:
        """Return what goes, and other images that stand in for what stays."""
        self.answers = self.teacher.scores_of(context.ood.images)
        seen = self.answers.argmax(1)
        rows = (~torch.isin(seen, context.forgotten_rows)).nonzero().flatten()
        if not len(rows):
            raise ConfigError(
                "Expected other images (job.ood) that the original does not all take for what is "
                "to be forgotten, got only such."
            )
        if context.request.kind != "class":
            rng = generator(self.seed, "other images")
            rows = torch.multinomial(evenly(seen), len(seen), replacement=True, generator=rng)
        return {"forget": self.going(context, seen), "ood": context.ood.part(rows)}

    def going(self, context: Context, seen: Tensor) -> Pool:
        """Return what is to be moved.

        Args:
            context: The request.
            seen: ``(N,)`` int64, what the original takes other images for.
        """
        return context.forget

    def labels(self, context: Context) -> Tensor:
        """Classes of what is to be moved, int64."""
        return context.forget.labels

    def prepare(self, context: Context) -> None:
        """Find the distributions, the goals, and what the teacher says."""
        known = context.statistics
        assert known is not None and self.batches is not None
        stays = ~torch.isin(known.ids, context.forget.ids)
        embeddings, labels = known.embeddings[stays], known.labels[stays]
        powers = embeddings if self.delta == 1 else tukey(embeddings, self.delta)
        self.rows, means, covariances = distributions(powers.double(), labels)
        precisions = torch.linalg.pinv(
            correlation(covariances, self.gammas, self.rounds), hermitian=True
        )
        self.means, self.precisions = F.normalize(means).float(), precisions.float()
        self.answers = lowered(self.answers, context.forgotten_rows) / self.temperature
        self.pace = torch.ones(len(self.learner.classes))
        self.paced = context.request.kind != "class"
        going = self.batches.pools["forget"]
        self.aim(going, self.labels(context), context)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Mahalanobis distance to each class."""
        powers = embeddings
        if self.delta != 1:
            powers = embeddings.clamp(min=TINY) ** self.delta
        device = embeddings.device
        away = F.normalize(powers)[:, None] - self.means.to(device)
        squares = torch.einsum("bcd,cde,bce->bc", away, self.precisions.to(device), away)
        return squares.clamp(min=TINY).sqrt() if self.root else squares

    def keeping(self, batch: Batches) -> Tensor:
        """Divergence from the original's answers to other images."""
        images, _, ids = batch["ood"]
        student, teacher = self.logits(images), self.answers[ids.cpu()].to(images.device)
        loss = soft_divergence(teacher, student)
        if self.divergence == "symmetric":
            loss = (loss + soft_divergence(student, teacher)) / 2
        return self.keep_weight * loss

    def shares(self, forget: Batch) -> Tensor:
        """Weight of each image: the pace of its class."""
        if not self.paced:
            return super().shares(forget)
        assert forget.labels is not None
        return self.pace.to(forget.labels.device)[forget.labels]

    def recognised(self) -> float:
        """Share of the images that go that are still recognised; sets the pace of each class."""
        assert self.batches is not None
        if not self.paced:
            return self.accuracy(self.batches.pools["forget"])
        pool = self.context.forget
        right = self.learner.scores_of(pool.images, closed=False).argmax(1) == pool.labels
        rows = len(self.pace)
        found = torch.bincount(pool.labels, right.double(), minlength=rows)
        accuracy = found / torch.bincount(pool.labels, minlength=rows).clamp(min=1)
        self.pace = torch.where(accuracy < self.gate, 0.0, accuracy).float()
        return float(right.double().mean())


def distributions(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and covariance of each class that occurs.

    Args:
        embeddings: ``(N, D)``.
        labels: ``(N,)`` int64.

    Returns:
        Rows ``(C,)`` int64 ascending, means ``(C, D)`` and covariances ``(C, D, D)``, the latter
        zero of a class with a single image.
    """
    order = labels.argsort(stable=True)
    rows, counts = torch.unique(labels, return_counts=True)
    groups = torch.split(embeddings[order], counts.tolist())
    padded = pad_sequence([*groups], batch_first=True)
    means = padded.sum(1) / counts[:, None]
    there = torch.arange(padded.shape[1]) < counts[:, None]
    centred = (padded - means[:, None]) * there[..., None]
    return rows, means, centred.mT @ centred / (counts - 1).clamp(min=1)[:, None, None]


def lowered(logits: Tensor, rows: Tensor) -> Tensor:
    """Return outputs ``(B, K)`` of which some columns are the smallest number of each row.

    Example:
        >>> lowered(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([1])).tolist()
        [[1.0, 1.0, 2.0]]
    """
    found = logits.clone()
    found[:, rows] = logits.amin(1, keepdim=True).expand(-1, len(rows))
    return found


def evenly(classes: Tensor) -> Tensor:
    """Weights ``(N,)`` with which all frequent classes are drawn alike, rare ones less often.

    Args:
        classes: ``(N,)`` int64.
    """
    counts = torch.bincount(classes).double()
    return torch.where(counts < RARE, AS_IF, counts).reciprocal()[classes]
