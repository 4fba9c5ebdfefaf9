"""When an image fits no known class: the score of the nearest class, and where to cut it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clfed.backbones import Encoder
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, InvalidEmbedding
from clfed.prototypes import PrototypeMemory, read_off

# Matrix products change in their last bits with the number of rows, so every block has as many.
BLOCK = 64
FEWEST_CLASSES = 4
FEWEST_IMAGES = 20


def rank_classes(
    memory: PrototypeMemory, embeddings: Tensor, top: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Nearest classes of each embedding, and how surely the image is one of theirs.

    Classes are in the order of :func:`clfed.prototypes.classifiers.nearest_mean`. The score is
    minus the squared distance to the mean of :math:`n_c` images, in units of what an image of
    that class is expected to have:

    .. math:: s_c(z) = -\frac{\|z - \mu_c\|^2}{1 + 1 / n_c}

    An image and the mean of :math:`n` others of variance :math:`\sigma^2` are
    :math:`\sigma^2 (1 + 1/n)` apart on average, so one threshold serves classes of few and of many
    images. As it looks at one class alone, it serves memories of few and of many classes too.

    Each row is computed in a block of fixed shape: its bits do not depend on the other rows.

    Args:
        memory: :math:`C` classes, at least one.
        embeddings: :math:`z`, shape ``(B, D)``, finite.
        top: How many classes; at most :math:`C` are given.

    Returns:
        Rows of the memory ``(B, K)`` int64, nearest first, and their scores ``(B, K)`` float64,
        never positive; a higher one is more surely known.

    Raises:
        NotEnoughData: The memory has no class.
        InvalidEmbedding: Wrong shape, or values that are not finite.
        ConfigError: ``top`` is less than 1.

    Example:
        >>> owls = PrototypeMemory.empty(1, "demo").observe(torch.tensor([[1.0]]), ["owl"])
        >>> [part.tolist() for part in rank_classes(owls, torch.tensor([[3.0]]))]
        [[[0]], [[-2.0]]]
    """
    if top < 1:
        raise ConfigError(f"Expected at least one class to rank, got {top}.")
    nearest = read_off("ncm", memory)
    if embeddings.ndim != 2 or embeddings.shape[1] != memory.dim:
        raise InvalidEmbedding(
            f"Expected embeddings of shape (B, {memory.dim}), got {tuple(embeddings.shape)}."
        )
    means, spread = memory.means(), 1 + 1 / memory.counts.double()
    count = min(top, len(memory))
    rows = torch.empty(len(embeddings), count, dtype=torch.int64)
    scores = torch.empty(len(embeddings), count, dtype=torch.float64)
    for start in range(0, len(embeddings), BLOCK):
        part = embeddings[start : start + BLOCK].detach().to("cpu", torch.float64)
        block = part.new_zeros(BLOCK, memory.dim)
        block[: len(part)] = part
        # A stable sort, because equally near classes must come in one order, as argmax has it.
        order = nearest.scores(block).sort(dim=1, descending=True, stable=True).indices
        chosen = order[: len(part), :count]
        distance = (part[:, None] - means[chosen]).square().sum(dim=2)
        rows[start : start + BLOCK] = chosen
        scores[start : start + BLOCK] = -distance / spread[chosen]
    return rows, scores


def calibrate(
    encoder: Encoder,
    images: ImageSet,
    *,
    generator: torch.Generator,
    shots: int = 5,
    tpr: float = 0.95,
    draws: int = 10,
) -> float | None:
    r"""Threshold that a share of the images of known classes reaches.

    As often as ``draws`` says, half of the classes are known by ``shots`` images each, and the
    others of their images are scored by :func:`rank_classes`. Over the scores :math:`k` of all
    draws,

    .. math:: \tau = \max \{t : \tfrac1n \#\{k_i \ge t\} \ge \text{tpr}\}

    which is the threshold of :func:`clfed.evaluation.unknown.fpr_at_tpr`. It promises a share of
    known images that pass. How many unknown ones pass is not promised: the more classes are
    known, the nearer some of them is to anything.

    Args:
        encoder: What makes the embeddings.
        images: Classes that neither trained the encoder nor will be tested: those of the group
            ``validation`` of a benchmark.
        generator: Draws classes and shots.
        shots: Images of a class that make its mean.
        tpr: Above 0, at most 1.
        draws: How many times to draw.

    Returns:
        The threshold, or None where it would be a guess: fewer than 4 classes of more than
        ``shots`` images, or fewer than 20 images beyond the shots.

    Raises:
        ConfigError: ``shots``, ``tpr`` or ``draws`` is out of range.
        InvalidEmbedding: The images do not fit the encoder.
    """
    if min(shots, draws) < 1 or not 0 < tpr <= 1:
        raise ConfigError(
            "Expected at least 1 shot and 1 draw and a true positive rate above 0 and at most 1, "
            f"got {shots}, {draws} and {tpr}."
        )
    members = [places for places in images.indices_by_class() if len(places) > shots]
    spare = sum(len(places) - shots for places in members)
    if len(members) < FEWEST_CLASSES or spare < FEWEST_IMAGES:
        return None
    classes = [encoder.embed(images.images[places]) for places in members]
    empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id)
    scores = torch.cat([_known_scores(empty, classes, shots, generator) for _ in range(draws)])
    return float(-np.quantile(-scores.numpy(), tpr, method="inverted_cdf"))


def _known_scores(
    memory: PrototypeMemory, classes: list[Tensor], shots: int, generator: torch.Generator
) -> Tensor:
    """Scores ``(M,)`` of the images that are left when half of the classes are learned."""
    queries = []
    for number in torch.randperm(len(classes), generator=generator)[: len(classes) // 2].tolist():
        order = torch.randperm(len(classes[number]), generator=generator)
        memory += memory.observe(classes[number][order[:shots]], [str(number)] * shots)
        queries.append(classes[number][order[shots:]])
    return rank_classes(memory, torch.cat(queries))[1][:, 0]
