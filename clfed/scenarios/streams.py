"""Streams: which classes, or which view of them, a continual learner meets one after another.

Experiences are drawn through Avalanche's benchmark generators (Lomonaco et al. 2021, arXiv
2104.00405; Carta et al. 2023, arXiv 2302.01766), so its strategies and metrics run on the same
ones; what a learner of this package reads are plain tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from clfed.data.benchmark import ImageSet

Setting = Literal["class", "task", "domain"]


@dataclass(frozen=True, eq=False)
class Experience:
    """What a learner meets at once.

    Attributes:
        number: From 0.
        train: Images; their classes are the ones met here, in order.
        phase: Number of the test set that belongs to it; several experiences of an online stream
            share one.
        announced: False where the learner is not told that something new begins here.
        revisited: Those of the classes that were met before.
        upcoming: Classes that are still to come, None where nobody knows.
    """

    number: int
    train: ImageSet
    phase: int
    announced: bool = True
    revisited: tuple[str, ...] = ()
    upcoming: int | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes met here, in the order of the labels."""
        return self.train.classes


@dataclass(frozen=True, eq=False)
class Stream:
    """Experiences in their order, and what they are judged by.

    Attributes:
        experiences: One after another.
        tests: One set a phase: test images of its classes, or of its domain.
        setting: ``class``: all classes seen compete; ``task``: a question names its phase, whose
            classes compete; ``domain``: the classes stay and their images change.
        protocol: One sentence for the table of results.
        replay_free: False where the world itself shows old images again.
    """

    experiences: tuple[Experience, ...]
    tests: tuple[ImageSet, ...]
    setting: Setting
    protocol: str
    replay_free: bool = True

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """All class names in the order of their first appearance."""
        return tuple(dict.fromkeys(name for e in self.experiences for name in e.classes))

    @cached_property
    def _benchmark(self) -> Any:
        from clfed.scenarios.avalanche_benchmarks import benchmark_of

        return benchmark_of(self)

    def benchmark(self) -> Any:
        """Return Avalanche's benchmark object over the same images, made once.

        Its ``train_stream`` holds one Avalanche experience for each of ``experiences``, its
        ``test_stream`` one for each of ``tests``. Samples are ``(image, label, task)``: the image
        as it is held here (0..255, or ready features), the label an index into ``classes``, the
        task the phase in the ``task`` setting and 0 otherwise.
        """
        return self._benchmark
