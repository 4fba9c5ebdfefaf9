r"""Curricula: what comes first when not everything is trained on at once.

Vahidian et al. 2023 (ICCV, arXiv 2212.12712) put the examples of a node in order of difficulty and
train on a prefix of them that grows with the node's steps; nodes likewise. Of :math:`n` things,

.. math:: g(t) = b n + (1 - b) n \, h\!\left(\tfrac{t}{a T}\right)

may be used after :math:`t` of :math:`T` steps: a share :math:`b` at the beginning, everything from
the share :math:`a` of the time on. Their score by an expert, trained on everybody's images, is left
out; so is their learning rate that decays within each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.fine_tuning import FineTuning, Order
from clfed.seeding import generator

ORDERINGS = ("curr", "anti", "rand")
SCORINGS = ("global", "local", "both")
#: Examples that a node trains on at least, where it has as many.
FLOOR = 32

_STEEP = 10.0
#: :math:`h`, which maps the share of the growing time to the share of what is still to come.
#: ``step`` opens all at once, at the end of that time.
PACES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda time: time,
        "quad": lambda time: time * time,
        "sqrt": math.sqrt,
        "exp": lambda time: math.expm1(_STEEP * time) / math.expm1(_STEEP),
        "log": lambda time: 1 + math.log(time + math.exp(-_STEEP)) / _STEEP,
        "step": lambda time: 0.0,
    }
)


@dataclass(frozen=True)
class Curriculum:
    """An order of things and how many of them may be used when.

    Args:
        ordering: ``curr``: the easiest first; ``anti``: the hardest first, the same order
            backwards; ``rand``: drawn.
        pacing: A name in :data:`PACES`.
        full: Share :math:`a` of the time after which everything is used, above 0 and at most 1.
        start: Share :math:`b` of the things to begin with, from 0 to 1.

    Raises:
        ConfigError: A setting is out of range.
    """

    key: ClassVar[str] = "curriculum"

    ordering: str = "curr"
    pacing: str = "linear"
    full: float = 0.8
    start: float = 0.2

    def __post_init__(self) -> None:
        self._one_of("ordering", ORDERINGS)
        self._one_of("pacing", tuple(PACES))
        if not (_is_number(self.full) and 0 < self.full <= 1):
            raise ConfigError(f"{self.key}.full must be above 0 and at most 1, got {self.full!r}.")
        if not (_is_number(self.start) and 0 <= self.start <= 1):
            raise ConfigError(f"{self.key}.start must be from 0 to 1, got {self.start!r}.")

    def _one_of(self, name: str, known: Sequence[str]) -> None:
        if (value := getattr(self, name)) not in known:
            raise ConfigError(
                f"{self.key}.{name} must be one of {', '.join(known)}, got {value!r}."
            )

    @property
    def scored(self) -> bool:
        """Whether the order depends on how hard things are."""
        return self.ordering != "rand"

    def available(self, done: float, budget: float, count: int) -> float:
        """Return :math:`g`, clipped to 1 to ``count``.

        Args:
            done: Steps so far, :math:`t`.
            budget: All steps, :math:`T`, above 0.
            count: Number of things, :math:`n`.
        """
        time = done / (self.full * budget)
        if time >= 1:
            return float(count)
        grown = count * (self.start + (1 - self.start) * PACES[self.pacing](time))
        return min(float(count), max(1.0, grown))

    def size(self, done: float, budget: float, count: int) -> int:
        """Return :meth:`available` in whole things; rounding errors do not cost one."""
        return math.floor(self.available(done, budget, count) + 1e-9)

    def arranged(self, scores: Tensor | None, count: int, rng: torch.Generator) -> Tensor:
        """Return the positions of things in order, ``(count,)`` int64.

        What is equally hard is in random order: before the first training all examples are, and a
        data set is often sorted by class.

        Args:
            scores: ``(count,)``, how hard each is; None will do where the order is drawn.
            count: Number of things.
            rng: Decides everything random; every ordering takes the same from it.
        """
        drawn = torch.randperm(count, generator=rng)
        if scores is None or not self.scored:
            return drawn
        easy_first = drawn[torch.argsort(scores[drawn], stable=True)]
        return easy_first if self.ordering == "curr" else easy_first.flip(0)


@dataclass(frozen=True)
class ExampleCurriculum(Curriculum):
    r"""A curriculum over the examples of a node, put in order anew each round.

    Args:
        ordering: See :class:`Curriculum`.
        pacing: See :class:`Curriculum`.
        full: See :class:`Curriculum`.
        start: See :class:`Curriculum`.
        scoring: Whose loss says how hard an example is: ``global``: that of the model that was sent
            (:math:`s_G`); ``local``: that of the node's own last one, before there is one
            :math:`s_G` (:math:`s_L`); ``both``: their sum.
        predictions: Whether wrong answers count instead of losses.
    """

    key: ClassVar[str] = "curriculum.examples"

    scoring: str = "global"
    predictions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("scoring", SCORINGS)
        if not isinstance(self.predictions, bool):
            raise ConfigError(
                f"{self.key}.predictions must be true or false, got {self.predictions!r}."
            )

    def order(self, scores: Tensor | None) -> Order:
        r"""Return how examples are divided into batches.

        A prefix is gone through in shuffled batches, then its size is set anew, until
        :math:`(\lfloor n / B \rfloor + 1) E` batches are used, whatever the ordering. That is
        as many as :func:`~clfed.learners.fine_tuning.passes` makes, except where :math:`B` divides
        :math:`n`: there it makes :math:`E` fewer.

        Args:
            scores: ``(n,)``, how hard each example is; None will do where the order is drawn.
        """

        def growing(
            count: int, epochs: int, batch_size: int, rng: torch.Generator
        ) -> Iterator[Tensor]:
            positions = self.arranged(scores, count, rng)
            budget, done = (count // batch_size + 1) * epochs, 0
            while done < budget:
                size = min(count, max(FLOOR, self.size(done, budget, count)))
                prefix = positions[torch.randperm(size, generator=rng)]
                batches = torch.split(prefix, batch_size)[: budget - done]
                yield from batches
                done += len(batches)

        return growing


class NodeCurriculum(Curriculum):
    """A curriculum over the nodes that take part: how hard a node is, is its mean loss."""

    key: ClassVar[str] = "curriculum.nodes"


class Turns:
    """Whose turn it is when nodes follow a curriculum.

    A pool, the nodes that may be used by now, is gone through as a whole in random groups, one a
    round; then it is known anew how hard each node is, and a larger pool is drawn. Time is the
    number of updates that nodes made. A new mission brings new images, so time starts again.

    Args:
        curriculum: Their order.
        rounds: Rounds on a mission.
        seed: Decides everything random.
    """

    def __init__(self, curriculum: NodeCurriculum, rounds: int, seed: int) -> None:
        self.curriculum = curriculum
        self._rounds, self._seed = rounds, seed
        self._mission = self._updates = 0
        self._pool: list[int] = []

    def next(
        self,
        mission: int,
        round_: int,
        here: Collection[int],
        count: int,
        ask: Callable[[], Mapping[str, tuple[int, float]]],
    ) -> list[int]:
        """Return the ids of the nodes that take part in a round.

        Args:
            mission: Its mission.
            round_: Its number.
            here: Ids of the nodes that are connected.
            count: Nodes in a group; the last group of a pool may be smaller.
            ask: Returns id and score of each node by name, at least one.
        """
        if mission != self._mission:
            self._mission, self._updates, self._pool = mission, 0, []
        self._pool = [node for node in self._pool if node in here]
        if not self._pool:
            nodes, scores = zip(*(found for _, found in sorted(ask().items())), strict=True)
            rng = generator(self._seed, "node-curriculum", round_)
            every = torch.tensor(scores, dtype=torch.float64)
            order = self.curriculum.arranged(every, len(nodes), rng)
            size = self.curriculum.size(self._updates, self._rounds * count, len(nodes))
            turns = order[torch.randperm(size, generator=rng)]
            self._pool = [nodes[place] for place in turns.tolist()]
        group, self._pool = self._pool[:count], self._pool[count:]
        self._updates += len(group)
        return group


@torch.no_grad()
def difficulties(
    network: FineTuning,
    images: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    predictions: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Return how hard each image is for a network, ``(N,)`` float32; the network stays as it is.

    Args:
        network: Is looked at in eval mode.
        images: ``(N, C, H, W)`` uint8 or ``(N, D)``.
        labels: ``(N,)`` int64, rows of the head.
        rows: The rows of the head that compete, sorted; None: all.
        predictions: Whether it is 1 for a wrong answer and 0 for a right one, instead of the
            cross-entropy.
        batch_size: Images at a time.
    """
    if rows is not None:
        labels = torch.searchsorted(rows, labels)
    mode = network.training
    network.eval()
    found = []
    parts = torch.split(images, batch_size), torch.split(labels, batch_size)
    for batch, right in zip(*parts, strict=True):
        logits = network(batch) if rows is None else network(batch)[:, rows]
        found.append(
            (logits.argmax(1) != right).float()
            if predictions
            else F.cross_entropy(logits, right, reduction="none")
        )
    network.train(mode)
    return torch.cat(found) if found else torch.empty(0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
