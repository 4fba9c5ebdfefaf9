r"""Prototypical networks (Snell, Swersky & Zemel 2017, arXiv 1703.05175).

.. math:: p_c = \frac{1}{s} \sum_{i \in S_c} f(x_i), \qquad
    L = -\log \frac{\exp(-\|f(x) - p_y\|^2)}{\sum_c \exp(-\|f(x) - p_c\|^2)}

A training step is one episode: it draws some classes, makes a prototype of each from its support
images and classifies its query images. Support and query go through the backbone in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import EmbeddingLearner
from clfed.learners.episodes import Augmentation, Episodes

METRICS = ("euclidean", "cosine")


class PrototypicalNetwork(EmbeddingLearner):
    """Learn embeddings in which the nearest class mean is right.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        way: Classes an episode; many help where many classes are to be told apart.
        shot: Support images a class.
        query: Query images a class.
        metric: ``euclidean`` is the paper's, without any scale; ``cosine`` multiplies cosines by
            ``temperature``.
        temperature: Factor of the cosines.
        label_smoothing: Share of the target spread over all classes.
        rotations: Take each class rotated by 90, 180 and 270 degrees as three further classes.
        augmentation: Options of :class:`~clfed.learners.episodes.Augmentation`, or None.
        options: Options of :class:`~clfed.learners.base.EmbeddingLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        way: int = 60,
        shot: int = 5,
        query: int = 5,
        metric: str = "euclidean",
        temperature: float = 16.0,
        label_smoothing: float = 0.0,
        rotations: bool = False,
        augmentation: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, **options)
        if metric not in METRICS:
            raise ConfigError(f"Expected learner.metric of {METRICS}, got {metric!r}.")
        self.way, self.shot, self.query = way, shot, query
        self.metric, self.temperature, self.label_smoothing = metric, temperature, label_smoothing
        self.rotations = rotations
        self.augmentation = None if augmentation is None else Augmentation(**augmentation)

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> Episodes:
        """Return the episodes; each is ``way`` classes in a row, support before query."""
        return Episodes(
            images,
            way=self.way,
            per_class=(self.shot, self.query),
            steps=range(start, self.steps),
            seed=seed,
            rotations=self.rotations,
            augmentation=self.augmentation,
        )

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the queries of one episode.

        Args:
            embeddings: ``(way * (shot + query), D)``, class by class, support before query.
            labels: Ignored: the place says it all.
        """
        grouped = embeddings.reshape(-1, self.shot + self.query, embeddings.shape[1])
        prototypes = grouped[:, : self.shot].mean(1)
        queries = grouped[:, self.shot :].flatten(0, 1)
        targets = torch.arange(len(prototypes)).repeat_interleave(self.query)
        logits = (
            squared_distance_logits(queries, prototypes)
            if self.metric == "euclidean"
            else self.temperature * F.normalize(queries) @ F.normalize(prototypes).T
        )
        return F.cross_entropy(
            logits, targets.to(logits.device), label_smoothing=self.label_smoothing
        )


def squared_distance_logits(queries: Tensor, prototypes: Tensor) -> Tensor:
    r"""Return :math:`-\|q - p_c\|^2`, up to rounding.

    Written as the linear classifier :math:`w_c = 2 p_c,\; b_c = -\|p_c\|^2` less
    :math:`\|q\|^2`: one matrix product instead of a table of differences.

    Args:
        queries: ``(Q, D)``.
        prototypes: ``(C, D)``.

    Returns:
        ``(Q, C)``.

    Example:
        >>> squared_distance_logits(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).tolist()
        [[-25.0]]
    """
    bias = prototypes.square().sum(1)
    return 2 * queries @ prototypes.T - bias - queries.square().sum(1, keepdim=True)
