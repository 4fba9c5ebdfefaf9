r"""Transductive prediction: all queries are clustered together, starting from the class means.

Scalable Laplacian clustering for few-shot tasks (Ziko et al. 2021, arXiv 2106.09516) lowers

.. math:: E(Y, C) = \sum_p \omega_p \sum_k y_{pk}\, d(x_p, c_k)
          - \frac{\lambda}{2} \sum_k y_k^\top W y_k + \sum_{pk} y_{pk} \log y_{pk}

over assignments :math:`y_p` on the simplex and prototypes :math:`c_k`, where :math:`W` joins each
point with its nearest neighbours. Class :math:`k` is the cluster that began at its mean, and the
assignments of labelled points are clamped to their labels. An answer depends on the other
questions, so it must not be compared with answers given one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.prototypes.heads import LinearClassifier, unit
from clfed.prototypes.neighbours import affinity, bandwidth, squared_distances

MODES = ("kmeans", "meanshift")
INNER_STEPS, OUTER_ROUNDS, MODE_STEPS = 600, 100, 100
INNER_TOLERANCE, OUTER_TOLERANCE = 1e-6, 1e-5


@dataclass(frozen=True)
class Laplacian:
    r"""How questions are clustered.

    Args:
        strength: :math:`\lambda`, not negative; the paper chooses 0.05 to 1 on validation tasks.
        mode: ``kmeans`` (:math:`d` the squared distance, prototypes are means) or ``meanshift``
            (:math:`d = -\exp(-\|x - c\|^2 / 2 \sigma^2)`, prototypes are modes).
        neighbours: Others that a point is joined with.
        shift: Whether the questions are moved so that their mean is that of the class means; the
            paper does, but it is right only where all classes are asked about equally often.

    Raises:
        ConfigError: A value is out of range.
    """

    strength: float = 0.7
    mode: str = "kmeans"
    neighbours: int = 2
    shift: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.neighbours, int) and not isinstance(self.neighbours, bool)
        if self.mode not in MODES or not self.strength >= 0 or not whole or self.neighbours < 1:
            raise ConfigError(
                f"expected mode of {MODES}, strength >= 0 and neighbours >= 1, got "
                f"{self.mode!r}, {self.strength} and {self.neighbours!r}"
            )


@dataclass(frozen=True)
class Clustering:
    """Where the optimisation ended.

    Attributes:
        logits: Shape ``(Q, K)``; the assignments of the queries are their softmax.
        prototypes: :math:`C`, shape ``(K, D)``.
        energies: :math:`E` after every step; it never rises.
    """

    logits: Tensor
    prototypes: Tensor
    energies: tuple[float, ...]

    @property
    def assignments(self) -> Tensor:
        """:math:`Y` of the queries, shape ``(Q, K)``."""
        return torch.softmax(self.logits, dim=1)


@dataclass(frozen=True)
class _Problem:
    """Points, which of them are labelled, and how they are weighed."""

    points: Tensor
    labelled: Tensor
    weights: Tensor
    graph: Tensor
    strength: float
    sigma: float | None

    def costs(self, centres: Tensor) -> Tensor:
        squares = squared_distances(self.points, centres)
        return squares if self.sigma is None else -torch.exp(-0.5 * squares / self.sigma)

    def pull(self, y: Tensor) -> Tensor:
        """What the neighbours say of each point, ``W Y``."""
        result: Tensor = torch.sparse.mm(self.graph, y)
        return result

    def energy(self, y: Tensor, costs: Tensor, pull: Tensor) -> float:
        unary = self.weights[:, None] * y * costs
        pairwise = 0.5 * self.strength * y * pull
        return float((unary - pairwise + torch.special.xlogy(y, y)).sum())

    def assign(self, y: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Lower the energy over the queries' assignments, all at once in each step."""
        labelled = len(self.labelled)
        pull = self.pull(y)
        trace = [self.energy(y, costs, pull)]
        for _ in range(INNER_STEPS):
            logits = self.strength * pull - costs
            y = torch.cat([self.labelled, torch.softmax(logits[labelled:], dim=1)])
            pull = self.pull(y)
            trace.append(self.energy(y, costs, pull))
            if _settled(trace, INNER_TOLERANCE):
                break
        return y, logits[labelled:], trace

    def recentre(self, y: Tensor, centres: Tensor) -> Tensor:
        """Lower the energy over the prototypes: weighted means, or modes of the kernel density."""
        mass = self.weights[:, None] * y
        if self.sigma is None:
            return mass.T @ self.points / mass.sum(0)[:, None]
        for _ in range(MODE_STEPS):
            kernel = -mass * self.costs(centres)
            total = kernel.sum(0)[:, None]
            # Where no point is within reach of the kernel, a mode stays.
            moved = torch.where(total > 1e-200, kernel.T @ self.points / total, centres)
            small = (moved - centres).norm() <= OUTER_TOLERANCE * centres.norm()
            centres = moved
            if bool(small):
                break
        return centres


def cluster(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    weights: Tensor | None = None,
    options: Laplacian | None = None,
) -> Clustering:
    r"""Assign all queries jointly, by alternating bound steps on :math:`Y` and on :math:`C`.

    With the prototypes fixed, the exact minimiser of the bound that replaces the concave term by
    its tangent is :math:`Y \leftarrow \mathrm{softmax}(-d + \lambda W Y)`.

    Args:
        support: Labelled points, shape ``(S, D)``: images, or the mean of each class.
        labels: :math:`0..K-1`, shape ``(S,)`` int64, each class at least once.
        queries: Shape ``(Q, D)``, one at least.
        weights: :math:`\omega` of the support, shape ``(S,)``: the images that a mean stands for;
            1 when omitted.
        options: How; ``shift`` is left to the caller.
    """
    options = options or Laplacian()
    points = torch.cat([support, queries]).double()
    labelled = F.one_hot(labels).double()
    own = labelled.new_ones(len(support)) if weights is None else weights.double()
    problem = _Problem(
        points,
        labelled,
        torch.cat([own, own.new_ones(len(queries))]),
        affinity(points, options.neighbours),
        options.strength,
        bandwidth(points) if options.mode == "meanshift" else None,
    )
    mass = labelled * own[:, None]
    centres = mass.T @ support.double() / mass.sum(0)[:, None]
    costs = problem.costs(centres)
    y = torch.cat([labelled, torch.softmax(-costs[len(support) :], dim=1)])
    energies: list[float] = []
    rounds: list[float] = []
    for _ in range(OUTER_ROUNDS):
        y, logits, trace = problem.assign(y, costs)
        centres = problem.recentre(y, centres)
        costs = problem.costs(centres)
        rounds.append(problem.energy(y, costs, problem.pull(y)))
        energies += [*trace, rounds[-1]]
        if _settled(rounds, OUTER_TOLERANCE):
            break
    return Clustering(logits, centres, tuple(energies))


@dataclass(frozen=True, eq=False)
class TransductiveClassifier:
    r"""A nearest-mean classifier that answers a whole batch of questions together.

    Features are centred by the mean of the class means and scaled to unit length before they are
    compared (the class means too), as the paper does with the mean of its base classes.

    Args:
        inductive: What answers one by one: nearest mean, by distance or cosine, calibrated or not.
        counts: Examples behind each class mean, shape ``(C,)``.
        options: How questions are clustered.
    """

    inductive: LinearClassifier
    counts: Tensor
    options: Laplacian

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the score columns."""
        return self.inductive.classes

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score of every class, ``(B, D)`` to ``(B, C)`` float64; the largest wins.

        Raises:
            InvalidEmbedding: Wrong shape, or values that are not finite.
        """
        scores = self.inductive.scores(embeddings)
        if not len(scores):
            return scores
        cosine = self.inductive.normalise
        # A nearest mean by distance is the linear classifier of twice the mean.
        means = self.inductive.weight if cosine else 0.5 * self.inductive.weight
        questions = embeddings.detach().to("cpu", torch.float64)
        centre = means.mean(0)
        support = unit(means - centre)
        queries = unit((unit(questions) if cosine else questions) - centre)
        if self.options.shift:
            queries = queries + support.mean(0) - queries.mean(0)
        return cluster(
            support,
            torch.arange(len(support)),
            queries,
            weights=self.counts,
            options=self.options,
        ).logits

    def predict(self, embeddings: Tensor) -> Tensor:
        """Index of the best class, ``(B, D)`` to ``(B,)`` int64; ties go to the first."""
        return self.scores(embeddings).argmax(dim=1)


def _settled(trace: list[float], tolerance: float) -> bool:
    return len(trace) > 1 and abs(trace[-2] - trace[-1]) <= tolerance * abs(trace[-2])
