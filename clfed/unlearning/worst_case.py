r"""The forget set that is hardest to forget (Fan, Liu, Hero and Liu 2024, arXiv 2403.07362).

Weights :math:`w` choose :math:`m` of :math:`N` samples so that a model that was made to forget them
still knows them best,

.. math:: \min_{w \in [0, 1]^N,\; 1^\top w = m}\; \sum_i w_i\, \ell(\theta_u(w); z_i)
          + \gamma \lVert w \rVert^2, \qquad
          \theta_u(w) = \arg\min_\theta \sum_i (1 - w_i)\, \ell(\theta; z_i)

The lower level is a few passes of SignSGD from the original, :math:`\theta \leftarrow \theta -
\beta\, \mathrm{sign}(\nabla)`. A sign has no derivative, so no gradient flows through
:math:`\theta_u(w)`, and the upper level is

.. math:: w \leftarrow \Pi\bigl(w - \alpha\,(\ell(\theta_u; z) + 2 \gamma w)\bigr)

with :math:`\Pi` the projection on the capped simplex. At the end the :math:`m` largest weights are
taken; equal ones in the order of the samples.

The released code starts from a random binary :math:`w`. The losses of a model that fits its
training data are around 0.01, so a few steps of usual size carry no weight across the gap from 1 to
0, and the random set comes back. We start from :math:`w = m / N` (``start=uniform``), where the
smallest step already puts the samples in order. Batch norm keeps its statistics in the lower level,
for these would count every sample in full, whatever its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import RequestError
from clfed.seeding import generator
from clfed.unlearning.base import named_weights
from clfed.unlearning.requests import Request

if TYPE_CHECKING:
    from clfed.learners.base import ContinualLearner
    from clfed.scenarios.holdings import Holdings

LEVELS = ("sample", "class")
STARTS = ("uniform", "random")


def select(
    *,
    holdings: Holdings,
    seed: int,
    original: Callable[[], ContinualLearner],
    share: float = 0.1,
    level: str = "sample",
    outer: int = 5,
    epochs: int = 1,
    lr: float = 1e-4,
    weight_lr: float = 1e-2,
    gamma: float = 0.0,
    start: str = "uniform",
    batch_size: int = 256,
) -> list[Request]:
    r"""Return one request for the samples, or classes, that are hardest to forget.

    Args:
        holdings: The data.
        seed: Of the order of the batches, and of a random start.
        original: Returns the trained model.
        share: Of all samples, or of all classes; at least one.
        level: ``sample`` or ``class``, whose loss is the mean over its samples.
        outer: Steps of the upper level; 0 takes those with the smallest losses of the original.
        epochs: Passes of the lower level in each of them.
        lr: :math:`\beta`.
        weight_lr: :math:`\alpha`.
        gamma: :math:`\gamma`.
        start: ``uniform`` or ``random``.
        batch_size: Images a step of the lower level.

    Raises:
        RequestError: An option has no such choice or is out of range.
    """
    if level not in LEVELS or start not in STARTS:
        raise RequestError(
            f"Expected forget.level of {LEVELS} and forget.start of {STARTS}, got {level!r} and "
            f"{start!r}."
        )
    if not 0 < share < 1 or outer < 0 or epochs < 0 or batch_size < 1:
        raise RequestError(
            "forget=worst_case needs 0 < share < 1, outer >= 0, epochs >= 0 and batch_size >= 1, "
            f"got {share}, {outer}, {epochs} and {batch_size}."
        )
    if lr <= 0 or weight_lr <= 0 or gamma < 0:
        raise RequestError(
            "forget=worst_case needs lr > 0, weight_lr > 0 and gamma >= 0, got "
            f"{lr}, {weight_lr} and {gamma}."
        )
    learner, train = original(), holdings.train
    labels = learner.rows(train.classes)[train.labels]
    keys = holdings.ids if level == "sample" else train.labels
    groups, members = torch.unique(keys, return_inverse=True)
    size = max(1, round(share * len(groups)))

    def losses(model: ContinualLearner) -> Tensor:
        each = F.cross_entropy(model.scores_of(train.images).double(), labels, reduction="none")
        sums = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, members, each)
        return sums / torch.bincount(members)

    if not outer:
        chosen = losses(learner).argsort(stable=True)[:size]
    else:
        weights = first_weights(len(groups), size, start, seed)
        for step in range(outer):
            orders = [
                torch.randperm(len(labels), generator=generator(seed, "worst case", step, epoch))
                for epoch in range(epochs)
            ]
            batches = [rows for order in orders for rows in torch.split(order, batch_size)]
            model = sign_descent(
                learner, train.images, labels, 1 - weights[members], batches, lr=lr
            )
            slope = losses(model) + 2 * gamma * weights
            weights = on_capped_simplex(weights - weight_lr * slope, size)
        chosen = weights.argsort(descending=True, stable=True)[:size]
    found = groups[chosen].sort().values.tolist()
    if level == "class":
        return [Request("worst_case", "class", classes=tuple(train.classes[row] for row in found))]
    return [Request("worst_case", "sample", samples=tuple(found))]


def first_weights(count: int, size: int, start: str, seed: int) -> Tensor:
    """Return ``(count,)`` float64 weights with the sum ``size``: equal, or a random set of ones."""
    if start == "uniform":
        return torch.full((count,), size / count, dtype=torch.float64)
    weights = torch.zeros(count, dtype=torch.float64)
    drawn = torch.randperm(count, generator=generator(seed, "worst case start"))
    weights[drawn[:size]] = 1
    return weights


def sign_descent(
    learner: ContinualLearner,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
    batches: list[Tensor],
    *,
    lr: float,
) -> ContinualLearner:
    """Return a copy of a model after steps along the sign of a weighted loss's gradient.

    Args:
        learner: Stays as it is.
        images: ``(N, ...)``.
        labels: ``(N,)`` int64, rows of its classes.
        weights: ``(N,)``, of the cross-entropy of each image.
        batches: Positions of each step.
        lr: How far each weight of the model moves in a step.
    """
    model = copy.deepcopy(learner).eval().requires_grad_(True)
    parameters = list(named_weights(model).values())
    for rows in batches:
        logits = model.scores(model.embed(images[rows]).float())
        each = F.cross_entropy(logits, labels[rows], reduction="none")
        gradients = torch.autograd.grad(
            (weights[rows] * each).sum(), parameters, materialize_grads=True
        )
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(lr * gradient.sign())
    return model


def on_capped_simplex(values: Tensor, total: float) -> Tensor:
    r"""Return the nearest point with entries in :math:`[0, 1]` and a given sum.

    .. math:: \Pi(a) = \mathrm{clip}(a - \mu, 0, 1), \qquad \sum_i \Pi(a)_i = m

    where :math:`\mu` is found by bisection.

    Args:
        values: :math:`a`, ``(N,)`` float64.
        total: :math:`m`, in :math:`[0, N]`.

    Example:
        >>> on_capped_simplex(torch.tensor([9.0, 1.5, 1.5]).double(), 2.0)
        tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    low, high = values.min() - 1, values.max()
    for _ in range(100):
        middle = (low + high) / 2
        if float((values - middle).clamp(0, 1).sum()) > total:
            low = middle
        else:
            high = middle
    return (values - (low + high) / 2).clamp(0, 1)
