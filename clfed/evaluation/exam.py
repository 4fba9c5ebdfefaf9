"""What a continual learner knows of every part of its stream at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet


class Examinee(Protocol):
    """What an exam asks of a learner."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the columns of the scores."""
        ...

    def scores_of(self, images: Tensor) -> Tensor:
        """Score images, ``(N, C)``."""
        ...


@dataclass(frozen=True)
class Marks:
    """The outcome of one exam.

    Attributes:
        phases: Accuracy over the images of each test set, None where the learner does not know
            its classes yet.
        images: Accuracy over all images of the test sets that belong to what was met so far.
        per_class: Accuracy of each class over the same images.
    """

    phases: list[float | None]
    images: float
    per_class: dict[str, float]

    @property
    def balanced(self) -> float:
        """Mean of the accuracies of the classes."""
        return sum(self.per_class.values()) / len(self.per_class) if self.per_class else 0.0


class Exam:
    """Test sets of a stream, asked all at once.

    Args:
        tests: One test set a phase.
        restricted: Whether a question names its phase, so that only the phase's classes compete
            (task-incremental).
    """

    def __init__(self, tests: Sequence[ImageSet], *, restricted: bool = False) -> None:
        self.tests = tuple(tests)
        self.restricted = restricted
        self._sizes = [len(test) for test in self.tests]

    def take(self, learner: Examinee, met: int) -> Marks:
        """Ask a learner about every test set whose classes it knows.

        Args:
            learner: Who is asked.
            met: Phases met so far; the accuracy over images is over these.
        """
        known = set(learner.classes)
        asked = [i for i, test in enumerate(self.tests) if known.issuperset(test.classes)]
        phases: list[float | None] = [None] * len(self.tests)
        if not asked:
            return Marks(phases, 0.0, {})
        scores = learner.scores_of(torch.cat([self.tests[i].images for i in asked]))
        place = {name: column for column, name in enumerate(learner.classes)}
        right_so_far, classes = [], []
        parts = torch.split(scores, [self._sizes[i] for i in asked])
        for i, part in zip(asked, parts, strict=True):
            columns = torch.tensor([place[name] for name in self.tests[i].classes])
            answers = columns[part[:, columns].argmax(1)] if self.restricted else part.argmax(1)
            truth = columns[self.tests[i].labels]
            right = answers == truth
            phases[i] = float(right.double().mean()) if len(right) else None
            if i < met:
                right_so_far.append(right)
                classes.append(truth)
        if not right_so_far:
            return Marks(phases, 0.0, {})
        right, truth = torch.cat(right_so_far).double(), torch.cat(classes)
        asked_of = torch.bincount(truth, minlength=len(place)).double()
        hits = torch.bincount(truth, right, minlength=len(place)).double()
        per_class = {
            name: float(hits[column] / asked_of[column])
            for name, column in place.items()
            if asked_of[column]
        }
        return Marks(phases, float(right.mean()), per_class)
