r"""What a model answers, and how far that is from what a retrained model answers.

:math:`f(x) \in \mathbb R^K` are open outputs (no class is masked when it is judged),
:math:`p = \mathrm{softmax}(f)` and :math:`z` the embedding. A class that a memory has lost has the
output :math:`-\infty`: probability 0, and never an answer. Everything here is float64 and
natural logarithms. ``docs/unlearning_metrics.md`` lists every measure with its populations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clfed.errors import InvalidEmbedding, NotEnoughData

if TYPE_CHECKING:
    from clfed.learners.base import ContinualLearner

#: Where logarithms of probabilities and of odds are cut off, so that all measures stay finite.
LIMIT = 100.0


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model says of some labelled images.

    Attributes:
        logits: ``(N, K)`` float32 or float64, open outputs; minus infinity where a class was lost.
        embeddings: ``(N, D)`` float32.
        labels: ``(N,)`` int64, columns of ``logits``.

    Raises:
        InvalidEmbedding: Shapes do not fit, or there are outputs that are no numbers.
    """

    logits: Tensor
    embeddings: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = (len(self.labels),)
        if self.logits.dim() != 2 or {self.logits.shape[:1], self.embeddings.shape[:1]} != {count}:
            raise InvalidEmbedding(
                "Expected logits (N, K), embeddings (N, D) and labels (N,), got "
                f"{tuple(self.logits.shape)}, {tuple(self.embeddings.shape)} and "
                f"{tuple(self.labels.shape)}."
            )
        if len(self.labels):
            _check_outputs(self.logits)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """``(N, K)`` float64, minus infinity where a class was lost."""
        return torch.log_softmax(self.logits.double(), dim=1)

    @cached_property
    def probabilities(self) -> Tensor:
        """``(N, K)`` float64."""
        return self.log_probabilities.exp()

    @cached_property
    def right(self) -> Tensor:
        """``(N,)`` bool: whether the largest output is that of the label."""
        return self.logits.argmax(1) == self.labels if len(self) else self.labels.bool()


@dataclass(frozen=True, eq=False)
class Sheet:
    """Everything that one model is asked about one request.

    Attributes:
        forget: Training images that were to be forgotten.
        retain: Training images that stay.
        validation: Held-out images.
        test: Test images; for a class request those of the classes that stay.
        test_forget: For a class request the test images of the classes that went; else none.
    """

    forget: Answers
    retain: Answers
    validation: Answers
    test: Answers
    test_forget: Answers


def answers(learner: ContinualLearner, images: Tensor, labels: Tensor) -> Answers:
    """Ask a model about images, each embedded once, in eval mode.

    Args:
        learner: Whoever answers.
        images: What its transform takes.
        labels: ``(N,)`` int64, rows of its classes.
    """
    was_training = learner.training
    learner.eval()
    with torch.no_grad():
        embeddings = learner.embed_all(images)
        logits = torch.empty(0, len(learner.classes))
        if len(images):
            logits = learner.scores(embeddings.to(learner.device)).cpu()
    learner.train(was_training)
    return Answers(logits, embeddings, labels)


def accuracy(said: Answers) -> float:
    """Share of right answers.

    Raises:
        NotEnoughData: There is none.
    """
    if not len(said):
        raise NotEnoughData("Expected at least one image to compute an accuracy, got none.")
    return float(said.right.double().mean())


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-odds of the true class, in a form that neither overflows nor saturates.

    .. math:: \varphi(x) = \ln\frac{p_y}{1 - p_y} = f_y - \ln\sum_{i \ne y} e^{f_i}

    cut off at :math:`\pm 100`.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.

    Returns:
        ``(N,)`` float64.

    Example:
        >>> odds = margins(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1]))
        >>> round(float(odds.exp()), 6)
        0.5
    """
    if not len(labels):
        return torch.empty(0, dtype=torch.float64)
    own = logits.double().gather(1, labels[:, None])
    others = logits.double().scatter(1, labels[:, None], -torch.inf)
    return (own.squeeze(1) - others.logsumexp(1)).clamp(-LIMIT, LIMIT)


def losses(said: Answers) -> Tensor:
    r"""Cross-entropy :math:`-\ln p_y` of each image, at most 100; ``(N,)`` float64."""
    found = said.log_probabilities.gather(1, said.labels[:, None]).squeeze(1)
    # 0 minus the value, so that a certain answer has the loss 0 and not minus 0.
    return (0 - found).clamp(max=LIMIT)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of each pair of rows.

    .. math:: \mathrm{JS} = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m)
        = H(m) - \tfrac12 H(p) - \tfrac12 H(q), \qquad m = \tfrac12 (p + q)

    between 0 and :math:`\ln 2`. (The public code of bad teaching averages
    :math:`\mathrm{KL}(m \,\|\, p)` over samples and classes instead; its values are smaller and
    depend on the number of classes.)

    Args:
        p: ``(N, K)`` probabilities.
        q: The same.

    Returns:
        ``(N,)`` float64.
    """
    p, q = p.double(), q.double()
    mean = (p + q) / 2
    inner = (torch.xlogy(p, p) + torch.xlogy(q, q)) / 2 - torch.xlogy(mean, mean)
    return inner.sum(1).clamp(min=0)


def activation_distance(p: Tensor, q: Tensor) -> Tensor:
    r"""Distance :math:`\|p - q\|_2` of each pair of rows, between 0 and :math:`\sqrt 2`; (N,)."""
    found: Tensor = (p.double() - q.double()).norm(dim=1)
    return found


def zero_retrain_forgetting(p: Tensor, untrained: Tensor) -> float:
    r"""Zero-retrain forgetting score (Chundawat et al. 2023, arXiv 2205.08096).

    .. math:: \mathrm{ZRF} = 1 - \frac1{|D_f|} \sum_{x \in D_f} \mathrm{JS}(p(x), p_0(x))

    with :math:`p_0` of a network that was never trained; between :math:`1 - \ln 2` and 1. Not 1 is
    right, but what a retrained model has.

    Args:
        p: ``(N, K)`` probabilities on the forget set.
        untrained: :math:`p_0`, the same shape.
    """
    return 1 - float(jensen_shannon(p, untrained).mean())


def adaptive_unlearning(original: float, test: float, delta: float) -> float:
    r"""Adaptive unlearning score (Cotogni et al. 2023, arXiv 2312.02052).

    .. math:: \mathrm{AUS} = \frac{1 - (A_o - A_u)}{1 + |\Delta|}

    Two variants share it. Class removal: :math:`A` on test images of the classes that stay and
    :math:`\Delta = A_f^t`, the accuracy on test images of the classes that went. Homogeneous
    removal: :math:`A` on all test images and :math:`\Delta = A_f - A_u`, with :math:`A_f` on the
    forget set. It exceeds 1 where unlearning improves the test accuracy.

    Args:
        original: :math:`A_o`, test accuracy before.
        test: :math:`A_u`, test accuracy after.
        delta: :math:`\Delta`.

    Example:
        >>> round(adaptive_unlearning(0.7755, 0.7797, 0.0), 3)
        1.004
    """
    return (1 - (original - test)) / (1 + abs(delta))


def tug_of_war(pairs: Iterable[tuple[float, float]]) -> float:
    r"""Tug of war (Zhao et al. 2024, arXiv 2406.01257): the oracle has 1, everything else less.

    .. math:: \mathrm{ToW} = \prod_S (1 - |a_u(S) - a_r(S)|)

    Args:
        pairs: Value of the model and of the oracle on each set.

    Example:
        >>> tug_of_war([(0.5, 0.0), (1.0, 1.0)])
        0.5
    """
    pairs = torch.tensor([*pairs], dtype=torch.float64)
    return float((1 - (pairs[:, 0] - pairs[:, 1]).abs()).prod())


def linear_cka(x: Tensor, y: Tensor) -> float:
    r"""Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414).

    .. math:: \frac{\|X^\top Y\|_F^2}{\|X^\top X\|_F\, \|Y^\top Y\|_F}

    of centred embeddings: 1 for equal ones up to rotation and scale; 0 where one side is constant.

    Args:
        x: ``(N, D)``.
        y: ``(N, E)`` of the same images.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    scale = float((x.T @ x).norm() * (y.T @ y).norm())
    return float((x.T @ y).square().sum()) / scale if scale else 0.0


def _check_outputs(logits: Tensor) -> None:
    if not logits.shape[1] or not bool(torch.isfinite(logits.amax(1)).all()):
        raise InvalidEmbedding(
            "Expected outputs that are numbers, or minus infinity for classes that are lost, and a "
            "finite one for each image; got NaN, infinity, or no finite output at all."
        )
