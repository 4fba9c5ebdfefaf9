r"""Losses that several methods share: contrast between labelled embeddings, and soft targets.

Supervised contrast is Khosla et al. 2020 (arXiv 2004.11362, equation 2) with the sum over positives
outside the logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def contrast(scores: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    r"""Mean over anchors of how unlikely their positives are among their candidates.

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{j \in P(i)}
        \log \frac{\exp s_{ij}}{\sum_{a \in A(i)} \exp s_{ia}}

    Anchors without a positive are left out of the mean; without any the loss is 0.

    Args:
        scores: :math:`s`, similarities over temperature, ``(I, J)``.
        positives: :math:`P`, ``(I, J)`` bool, among the candidates.
        candidates: :math:`A`, ``(I, J)`` bool.

    Returns:
        A scalar with gradient to ``scores``.

    Example:
        >>> positives = torch.tensor([[True, False]])
        >>> round(float(contrast(torch.zeros(1, 2), positives, torch.ones(1, 2) > 0)), 6)
        0.693147
    """
    # A finite floor, since an anchor without candidates would make NaN gradients of infinities.
    logs = scores.masked_fill(~candidates, torch.finfo(scores.dtype).min / 2).log_softmax(1)
    number = positives.sum(1)
    each = -logs.masked_fill(~positives, 0.0).sum(1) / number.clamp(min=1)
    return each.sum() / (number > 0).sum().clamp(min=1)


def supervised_contrast(
    anchors: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    others: Tensor | None = None,
    other_labels: Tensor | None = None,
) -> Tensor:
    r"""Supervised contrast of unit vectors: same label near, other labels far.

    An anchor is compared with all other anchors and all ``others``; those of its own label are its
    positives.

    Args:
        anchors: ``(N, D)``, unit rows.
        labels: ``(N,)`` int64.
        temperature: What cosines are divided by.
        others: ``(M, D)``, unit rows that are compared with but are no anchors.
        other_labels: ``(M,)`` int64.

    Returns:
        A scalar, the mean over the anchors that have a positive.

    Example:
        >>> z = torch.eye(2)[[0, 0, 1, 1]]
        >>> round(float(supervised_contrast(z, torch.tensor([0, 0, 1, 1]), temperature=0.5)), 6)
        0.239545
    """
    rows, names = anchors, labels
    if others is not None and other_labels is not None:
        rows, names = torch.cat([anchors, others]), torch.cat([labels, other_labels])
    candidates = torch.ones(len(anchors), len(rows), dtype=torch.bool, device=anchors.device)
    candidates.fill_diagonal_(False)
    positives = (labels[:, None] == names) & candidates
    return contrast(anchors @ rows.T / temperature, positives, candidates)


def soft_divergence(old: Tensor, new: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Mean over rows of the divergence of softened scores from older ones.

    .. math:: \frac1N \sum_i \mathrm{KL}\big(\mathrm{softmax}(o^-_i / T) \,\|\,
        \mathrm{softmax}(o_i / T)\big)

    Args:
        old: :math:`o^-`, ``(N, C)``; the caller cuts its gradient.
        new: :math:`o`, ``(N, C)``.
        temperature: :math:`T`.

    Returns:
        A scalar, 0 where both agree; not multiplied by :math:`T^2`.

    Example:
        >>> float(soft_divergence(torch.eye(2), torch.eye(2) + 3.0))
        0.0
    """
    return F.kl_div(
        (new / temperature).log_softmax(1),
        (old / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
