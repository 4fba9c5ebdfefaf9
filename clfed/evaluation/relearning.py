r"""How easily what was forgotten comes back.

An oracle learns a class from a few examples too, if its embedding is good. What counts is the
difference from the oracle, not whether it comes back at all.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation.unlearning import Answers
from clfed.learners.base import ContinualLearner
from clfed.seeding import generator
from clfed.unlearning.base import named_weights

#: Share of the new row in the mixture with the old one.
SHARES = (0.2, 0.4, 0.6, 0.8)


def prototypical_relearning(
    forget: Answers,
    retain: Answers,
    rows: Tensor,
    *,
    seed: int,
    shots: int = 5,
    drop: float = 0.01,
) -> float:
    r"""Prototypical relearning attack (Ha, Park and Yoon 2025, arXiv 2506.01318).

    The mean :math:`\hat\mu` of a few forgotten examples of a class becomes a row of the head,

    .. math:: w_u \leftarrow a \hat w + (1 - a) w_u, \qquad b_u \leftarrow a \hat b + (1 - a) b_u

    with :math:`\hat w = \hat\mu / \|\hat\mu\|, \hat b = 0` or
    :math:`\hat w = 2 \hat\mu, \hat b = -\|\hat\mu\|^2`. As outputs are linear in the row, old
    outputs and embeddings are all that the attack needs. Where the class was lost, the new row
    stands alone; for memories that compare directions, the cosine with :math:`\hat\mu` is a third
    choice.

    Which row and which :math:`a \in \{0.2, 0.4, 0.6, 0.8\}` restores most, at a loss of at most one
    point on what stays, is decided on one half of both sets (without the examples) and judged on
    the other half, both ways; to leave the model as it is, is one of the choices.

    Args:
        forget: Of the forget set.
        retain: Of what stays.
        rows: ``(M,)`` int64, classes that went; each gets its own examples.
        seed: Of the examples and the halves.
        shots: Examples of each class.
        drop: Largest loss of accuracy on what stays.

    Returns:
        Accuracy on the forget set after the attack.

    Raises:
        NotEnoughData: A class has fewer than ``2 * shots`` images in the forget set, or fewer than
            two images stay.
    """
    counts = torch.bincount(forget.labels, minlength=forget.logits.shape[1])[rows]
    if not len(rows) or int(counts.min()) < 2 * shots or len(retain) < 2:
        raise NotEnoughData(
            f"Relearning from {shots} examples needs {2 * shots} images of each class that went "
            f"and two that stay, got {counts.tolist()} and {len(retain)}."
        )
    order = _shuffled(forget, seed)
    place = (forget.labels[order] == rows[:, None]).long().cumsum(1)
    among = (forget.labels[order] == rows[:, None]) & (place <= shots)
    means = (among.double() @ forget.embeddings[order].double()) / shots
    judged = order[~among.any(0)]
    kept = _shuffled(retain, seed)
    back = _attacks(forget, judged, rows, means)
    stay = _attacks(retain, kept, rows, means)
    found = []
    for fit, judge in ((0, 1), (1, 0)):
        restored, left = back[:, fit::2].mean(1), stay[:, fit::2].mean(1)
        allowed = left >= left[0] - drop
        best = int(restored.masked_fill(~allowed, -1.0).argmax())
        found.append(float(back[best, judge::2].mean()))
    return sum(found) / 2


def _shuffled(said: Answers, seed: int) -> Tensor:
    """Return a random order of the images that does not depend on the order they came in."""
    canonical = np.lexsort((*said.embeddings.T.numpy(), said.labels.numpy()))
    order = torch.randperm(len(said), generator=generator(seed, "relearning"))
    return torch.from_numpy(canonical)[order]


def _attacks(said: Answers, chosen: Tensor, rows: Tensor, means: Tensor) -> Tensor:
    """Whether each image is right after each attack, ``(attacks, n)``; the first does nothing."""
    logits, z = said.logits[chosen].double(), said.embeddings[chosen].double()
    old, unit = logits[:, rows], F.normalize(means)
    new_outputs = (
        z @ unit.T,
        2 * z @ means.T - means.square().sum(1),
        F.normalize(z) @ unit.T,
    )
    right = [said.right[chosen]]
    for share, new in itertools.product(SHARES, new_outputs):
        mixed = torch.where(old.isfinite(), share * new + (1 - share) * old, new)
        said_now = logits.index_copy(1, rows, mixed).argmax(1)
        right.append(said_now == said.labels[chosen])
    return torch.stack(right).double()


def relearn_steps(
    learner: ContinualLearner,
    forget: ImageSet,
    retain: ImageSet,
    *,
    target: float,
    most: int = 200,
    tolerance: float = 0.05,
    lr: float = 0.01,
    batch_size: int = 128,
    seed: int = 0,
) -> int:
    r"""Steps of plain gradient descent on everything until the forget set is known again.

    Relearning time (Tarun et al. 2021, arXiv 2111.08947): the first step at
    which the accuracy on :math:`D_f` is at least :math:`(1 - 0.05)` of the original's.

    Args:
        learner: Whose copy learns.
        forget: :math:`D_f`.
        retain: :math:`D_r`.
        target: Accuracy of the original on :math:`D_f`.
        most: Steps; also what is returned where they were not enough.
        tolerance: Share of the target that may be missing.
        lr: Learning rate, without momentum and decay.
        batch_size: Images a step, drawn from both sets together.
        seed: Of the draws.

    Raises:
        ConfigError: The learner answers from a memory, which takes no gradient steps.
    """
    if learner.classifier is not None:
        raise ConfigError(
            "Relearning takes gradient steps on a head, got a learner that answers from a memory."
        )
    student = copy.deepcopy(learner)
    student.backbone.requires_grad_(True)
    student.head.requires_grad_(True)
    images = torch.cat([forget.images, retain.images])
    labels = torch.cat([student.rows(part.classes)[part.labels] for part in (forget, retain)])
    optimiser = torch.optim.SGD(list(named_weights(student).values()), lr)
    rng = generator(seed, "relearning steps")
    goal = (1 - tolerance) * target
    for step in range(most):
        said = student.scores_of(forget.images, closed=False).argmax(1)
        if float((said == labels[: len(forget)]).double().mean()) >= goal:
            return step
        rows = torch.randint(len(labels), (batch_size,), generator=rng)
        student.train()
        optimiser.zero_grad()
        with torch.enable_grad():
            logits = student.scores(student.embed(images[rows]).float())
            F.cross_entropy(logits, labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return most


def anamnesis_index(steps: int, oracle: float) -> float:
    r"""Relearning time of the unlearned model by that of the oracle; 1 is right.

    Below 1 something is left of the forget set, above 1 more was forgotten than there was
    (Chundawat et al. 2022, arXiv 2201.05629).

    Args:
        steps: Of the unlearned model, see :func:`relearn_steps`.
        oracle: Of the retrained model, or the mean over several.

    Raises:
        NotEnoughData: The oracle needs no step: it knows the forget set without having seen it.
    """
    if not oracle > 0:
        raise NotEnoughData(
            "Expected an oracle that has to learn the forget set, got one that knows it at once."
        )
    return steps / oracle
