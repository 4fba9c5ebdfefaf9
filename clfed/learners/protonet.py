r"""Prototypical networks (Snell, Swersky & Zemel 2017, arXiv 1703.05175).

.. math:: p_c = \frac{1}{s} \sum_{i \in S_c} f(x_i), \qquad
    L = -\log \frac{\exp(-\|f(x) - p_y\|^2)}{\sum_c \exp(-\|f(x) - p_c\|^2)}

A training step is one episode: it draws some classes, makes a prototype of each from its support
images and classifies its query images. Support and query go through the backbone in one batch.
Two further losses of an episode can be added to the paper's or take its place, see
:mod:`clfed.learners.episodic_losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.episodes import ROTATIONS, Episodes
from clfed.learners.episodic_losses import icnn, proto_triplet

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

METRICS = ("euclidean", "cosine")
SETS = ("both", "support", "query")


class PrototypicalNetwork(ContinualLearner):
    """Learn embeddings in which the nearest class mean is right.

    In base training an episode has exactly ``way`` classes of ``shot + query`` images; in a stream
    it has what there is: at most ``way`` classes, and ``shot`` and ``query`` shrink alike to the
    smallest class. A class with a single image has no query and is left out of the episodes.

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
        prototypical: Weight of the paper's loss.
        proto_triplet: Weight of the triplet loss of prototypes.
        margin: Its margin.
        icnn: Weight of the nearest-neighbour score's loss.
        icnn_set: Images of an episode that the score is over: ``both``, ``support`` or ``query``.
        train: ``first`` or ``all``; ``none`` leaves the network as it is.
        classifier: What is read off the memory in a stream.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    merges = "exact"

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
        prototypical: float = 1.0,
        proto_triplet: float = 0.0,
        margin: float = 0.5,
        icnn: float = 0.0,
        icnn_set: str = "both",
        train: str = "first",
        classifier: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone, transform, train=train, classifier=classifier or {"name": "ncm"}, **options
        )
        if metric not in METRICS or icnn_set not in SETS:
            raise ConfigError(
                f"Expected learner.metric of {METRICS} and learner.icnn_set of {SETS}, got "
                f"{metric!r} and {icnn_set!r}."
            )
        if way < 2 or min(shot, query) < 1:
            raise ConfigError(
                "An episode needs learner.way >= 2, learner.shot >= 1 and learner.query >= 1, got "
                f"{way}, {shot} and {query}."
            )
        weights = {"prototypical": prototypical, "proto_triplet": proto_triplet, "icnn": icnn}
        if min(weights.values()) < 0 or not any(weights.values()) or margin < 0:
            raise ConfigError(
                "Expected weights of at least 0 for prototypical, proto_triplet and icnn, one of "
                f"them above 0, and a margin of at least 0, got {prototypical}, {proto_triplet}, "
                f"{icnn} and {margin}."
            )
        self.way, self.shot, self.query = way, shot, query
        self.metric, self.temperature, self.label_smoothing = metric, temperature, label_smoothing
        self.margin, self.icnn_set = margin, icnn_set
        self.terms = tuple(
            LossTerm(name, weight, ("backbone",)) for name, weight in weights.items() if weight
        )
        #: Classes, support and query images of the present experience's episodes.
        self.episode = (way, shot, query)

    def check_base(self, base: ImageSet) -> None:
        """Refuse base classes that have no whole episode."""
        self._episodes(base, (self.way, self.shot, self.query), seed=0, start=0)

    def trains(self, experience: Experience) -> bool:
        """Whether two classes at least, turned ones included, have a query beside a support."""
        turns = ROTATIONS if self.rotations else 1
        return super().trains(experience) and turns * len(_with_queries(experience.train)) > 1

    def begin_experience(self, experience: Experience) -> None:
        """Fit the episodes to what the experience has."""
        super().begin_experience(experience)
        if self.length:
            data = experience.train
            counts = torch.bincount(data.labels, minlength=len(data.classes))
            usable = _with_queries(data)
            classes = len(usable) * (ROTATIONS if self.rotations else 1)
            images = min(int(counts[usable].min()), self.shot + self.query)
            query = max(1, images * self.query // (self.shot + self.query))
            self.episode = (min(self.way, classes), images - query, query)

    def training_data(self, experience: Experience) -> ImageSet:
        """Return the classes that have queries, by name: the order that they came in is chance."""
        data = experience.train
        return data.of_classes(sorted(data.classes[row] for row in _with_queries(data)))

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> Episodes:
        """Return the episodes; each is ``way`` classes in a row, support before query."""
        return self._episodes(images, self.episode, seed=seed, start=start)

    def _episodes(
        self, images: ImageSet, episode: tuple[int, int, int], *, seed: int, start: int
    ) -> Episodes:
        way, shot, query = episode
        return Episodes(
            images,
            way=way,
            per_class=(shot, query),
            steps=range(start, self.length),
            seed=seed,
            rotations=self.rotations,
            augmentation=self.augmentation,
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the losses of one episode that have a weight."""
        return {term.name: getattr(self, f"_{term.name}")(step.h) for term in self.terms}

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the queries of one episode.

        Args:
            embeddings: ``(way * (shot + query), D)``, class by class, support before query.
            labels: Ignored: the place says it all.
        """
        queries, prototypes, targets = self._parts(embeddings)
        logits = (
            squared_distance_logits(queries, prototypes)
            if self.metric == "euclidean"
            else self.temperature * F.normalize(queries) @ F.normalize(prototypes).T
        )
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def _prototypical(self, embeddings: Tensor) -> Tensor:
        return self.loss(embeddings, torch.empty(0))

    def _proto_triplet(self, embeddings: Tensor) -> Tensor:
        return proto_triplet(*self._parts(embeddings), self.margin)

    def _icnn(self, embeddings: Tensor) -> Tensor:
        grouped = self._grouped(embeddings)
        shot = self.episode[1]
        first = shot if self.icnn_set == "query" else 0
        chosen = grouped[:, first : shot if self.icnn_set == "support" else None]
        labels = torch.arange(len(chosen), device=chosen.device).repeat_interleave(chosen.shape[1])
        return icnn(chosen.flatten(0, 1), labels)

    def _grouped(self, embeddings: Tensor) -> Tensor:
        _, shot, query = self.episode
        return embeddings.reshape(-1, shot + query, embeddings.shape[1])

    def _parts(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(Q, D)``, prototypes ``(N, D)``, and the prototype of each query."""
        grouped, (_, shot, query) = self._grouped(embeddings), self.episode
        prototypes = grouped[:, :shot].mean(1)
        targets = torch.arange(len(prototypes), device=embeddings.device).repeat_interleave(query)
        return grouped[:, shot:].flatten(0, 1), prototypes, targets


def _with_queries(images: ImageSet) -> list[int]:
    """Labels of the classes with two images at least."""
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    return [*map(int, (counts > 1).nonzero().flatten())]


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
