r"""Membership inference: can somebody tell from the answers what was in the training?

Every attack draws equally many images of each class from the two populations that it compares:
otherwise it would tell classes apart, not members. No threshold and no classifier is ever chosen on
the images that it judges. Scores are sorted before anything is drawn, so no number depends on the
order of the images.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from clfed.errors import NotEnoughData
from clfed.evaluation.matrix import Array
from clfed.evaluation.unknown import auroc
from clfed.evaluation.unlearning import LIMIT, Answers, Sheet, losses, margins
from clfed.seeding import derive_seed, generator

#: Images on each side of an attack; more make support vector machines slow, not better.
MOST = 1000
#: Fewer images on each side are no attack.
LEAST = 10

Labels = NDArray[np.int64]


def confidences(said: Answers) -> Array:
    """Probability of the true class, ``(N,)``."""
    found: Array = said.probabilities.gather(1, said.labels[:, None]).squeeze(1).numpy()
    return found


def entropies(said: Answers) -> Array:
    r"""Entropy :math:`-\sum_i p_i \ln p_i` of each answer, ``(N,)``."""
    p = said.probabilities
    found: Array = (0 - torch.xlogy(p, p).sum(1)).numpy()
    return found


def modified_entropies(said: Answers) -> Array:
    r"""Entropy that knows the label (Song and Mittal 2021, arXiv 2003.10595), ``(N,)``.

    .. math:: -(1 - p_y) \ln p_y - \sum_{i \ne y} p_i \ln(1 - p_i)
    """
    p, own = said.probabilities, said.labels[:, None]
    others = (p * torch.log1p(-p).clamp(min=-LIMIT)).scatter(1, own, 0.0)
    found: Array = ((1 - p.gather(1, own).squeeze(1)) * losses(said) - others.sum(1)).numpy()
    return found


def scores(said: Answers) -> Array:
    r"""Scores of the threshold attack, ``(N, 4)``; higher means more surely a member.

    Log-odds of the label (which order images as confidence and loss do, without ties where these
    saturate), probability margin :math:`p_y - \max_{i \ne y} p_i`, minus the entropy, and minus
    the modified entropy.
    """
    own = said.labels[:, None]
    best = said.probabilities.scatter(1, own, 0.0).amax(1).numpy()
    columns = (
        margins(said.logits, said.labels).numpy(),
        confidences(said) - best,
        -entropies(said),
        -modified_entropies(said),
    )
    return np.stack(columns, axis=1)


def matched(
    first: Array,
    first_labels: Labels,
    second: Array,
    second_labels: Labels,
    *,
    seed: int,
    most: int = MOST,
) -> tuple[Array, Array]:
    """Draw equally many rows of each class from two populations, in random order.

    Args:
        first: ``(N, F)`` features.
        first_labels: ``(N,)`` int64.
        second: ``(M, F)``.
        second_labels: ``(M,)`` int64.
        seed: Of the draw.
        most: Rows of each population; classes keep their shares.

    Returns:
        Two arrays ``(n, F)`` of the same length.

    Raises:
        NotEnoughData: They have fewer than ten rows of common classes.
    """
    classes = int(max(first_labels.max(initial=0), second_labels.max(initial=0))) + 1
    counts = np.minimum(
        np.bincount(first_labels, minlength=classes), np.bincount(second_labels, minlength=classes)
    )
    if (total := int(counts.sum())) < LEAST:
        raise NotEnoughData(
            f"An attack needs at least {LEAST} images of common classes on each side, got {total}."
        )
    counts = counts * min(most, total) // total
    return (
        _draw(first, first_labels, counts, derive_seed(seed, "first")),
        _draw(second, second_labels, counts, derive_seed(seed, "second")),
    )


def _draw(features: Array, labels: Labels, counts: Labels, seed: int) -> Array:
    """Return ``counts[c]`` rows of each class ``c``, whatever the order of the rows was."""
    canonical = np.lexsort((*features.T, labels))
    shuffled = canonical[torch.randperm(len(labels), generator=generator(seed)).numpy()]
    by_class = np.argsort(labels[shuffled], kind="stable")
    ordered = labels[shuffled][by_class]
    place = np.empty(len(labels), dtype=np.int64)
    place[by_class] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    drawn: Array = features[shuffled[place < counts[labels[shuffled]]]]
    return drawn


def called_non_members(
    members: tuple[Array, Labels],
    others: tuple[Array, Labels],
    judged: Array,
    *,
    seed: int,
    most: int = MOST,
) -> float:
    r"""Share of some images that a support vector machine takes for non-members.

    It has a radial kernel with :math:`C = 3` and :math:`\gamma = 1`, as the public code of
    saliency unlearning (Fan et al. 2024, arXiv 2310.12508) and of bad teaching (Chundawat et al.
    2023, arXiv 2205.08096) have it, and learns from members that stay and from test images, never
    from the images that it judges.

    Args:
        members: Scores ``(N,)`` and labels of training images that stay.
        others: The same of images that were never trained on.
        judged: ``(M,)`` scores of the forget set.
        seed: Of the draw.
        most: Images of each side that it learns from.
    """
    from sklearn.svm import SVC

    inside, outside = matched(
        members[0][:, None], members[1], others[0][:, None], others[1], seed=seed, most=most
    )
    truth = np.repeat([1, 0], len(inside))
    machine = SVC(C=3, gamma="auto").fit(np.concatenate([inside, outside]), truth)
    return float((machine.predict(judged[:, None]) == 0).mean())


def loss_attack(forget: Array, others: Array, *, seed: int) -> float:
    """Accuracy of a logistic regression that tells forgotten images from others by their loss.

    Mean over ten stratified splits, each judged on a tenth that it did not learn from; the attack
    of the starting kit of the NeurIPS 2023 challenge (Triantafillou et al. 2024, arXiv 2406.09073).

    Args:
        forget: ``(n, 1)`` losses of the forget set, see :func:`matched`.
        others: ``(n, 1)`` losses of images that were never trained on.
        seed: Of the splits.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    splits = StratifiedShuffleSplit(
        n_splits=10, test_size=0.1, random_state=derive_seed(seed, "splits") % 2**32
    )
    truth = np.repeat([1, 0], [len(forget), len(others)])
    losses = np.concatenate([forget, others])
    return float(cross_val_score(LogisticRegression(), losses, truth, cv=splits).mean())


def threshold_attack(members: Array, others: Array) -> tuple[float, float]:
    """Balanced accuracy and area under the curve of the best thresholded score.

    Score and threshold are chosen on one half of the images and judged on the other, both ways.

    Args:
        members: ``(n, F)`` scores in random order, see :func:`scores` and :func:`matched`.
        others: The same of images that were never trained on.
    """
    half, parts = len(members) // 2, []
    for fit, judge in (
        (slice(half), slice(half, None)),
        (slice(half, None), slice(half)),
    ):
        thresholds, reached = zip(*map(best_threshold, members[fit].T, others[fit].T), strict=True)
        curves = [auroc(a, b) for a, b in zip(members[fit].T, others[fit].T, strict=True)]
        best, largest = int(np.argmax(reached)), int(np.argmax(curves))
        hits = (members[judge, best] > thresholds[best]).mean()
        misses = (others[judge, best] > thresholds[best]).mean()
        area = auroc(members[judge, largest], others[judge, largest])
        parts.append(((1 + hits - misses) / 2, area))
    reached_both, area_both = np.mean(parts, axis=0)
    return float(reached_both), float(area_both)


def best_threshold(members: Array, others: Array) -> tuple[float, float]:
    """Return the threshold with the largest balanced accuracy of ``score > threshold``, and that.

    Args:
        members: ``(n,)``.
        others: ``(m,)``.

    Example:
        >>> best_threshold(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
        (2.0, 1.0)
    """
    candidates = np.concatenate([members, others, [-np.inf]])
    candidates.sort()
    above = [
        1 - np.searchsorted(np.sort(side), candidates, side="right") / len(side)
        for side in (members, others)
    ]
    reached = (1 + above[0] - above[1]) / 2
    best = int(reached.argmax())
    return float(candidates[best]), float(reached[best])


def attack_scores(sheet: Sheet, kind: str) -> dict[str, Array]:
    """Return the confidences that attacks look at, for a histogram.

    Args:
        sheet: Of one model.
        kind: Of the request.

    Returns:
        ``retain`` (members), ``test`` (non-members) and ``forget``; for a class request also
        ``test_forget``. Each ``(N,)``.
    """
    parts = ("retain", "test", "forget", *(("test_forget",) if kind == "class" else ()))
    return {part: confidences(getattr(sheet, part)) for part in parts}
