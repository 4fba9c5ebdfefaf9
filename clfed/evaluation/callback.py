"""Evaluation during training: what a learner still knows, every few updates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning as L  # noqa: N812
import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation import stability
from clfed.seeding import generator


class Scorer(Protocol):
    """What is evaluated: any learner that scores images by class name."""

    classes: tuple[str, ...]

    def scores_of(self, images: Tensor) -> Tensor:
        """Score images ``(N, ...)`` over ``classes``, ``(N, C)``, changing nothing."""
        ...


class ContinualEvaluation(L.Callback):
    r"""Measures every task met so far while the present one is learned (arXiv 2205.13452).

    One evaluation before the first update of the stream, one every :math:`\rho` updates, and one
    where each experience ends. The test images of a task are drawn once. Nothing of the learner
    and no random state changes, so a training ends with the same bits with and without this.

    A loop of one's own calls the hooks that Lightning would, with None as the trainer.
    ``begin_experience`` comes before the training of each experience, ``end_experience`` after
    everything that the learner does at its end.

    Args:
        every: :math:`\rho`, updates between two evaluations.
        samples: Test images of each task; None takes all.
        windows: Windows of the windowed forgetting and plasticity, in evaluations.
        seed: Of the draw of the test images.
        task_classes: Whether only the classes of the image's own task compete, as where every
            question names its task.

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(
        self,
        every: int = 10,
        samples: int | None = 256,
        windows: Sequence[int] = (10,),
        *,
        seed: int = 0,
        task_classes: bool = False,
    ) -> None:
        for name, value in (("every", every), ("samples", samples)):
            optional = name == "samples" and value is None
            if not optional and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(
                    f"Expected {name} as a whole number of at least 1, got {value!r}."
                )
        if not isinstance(task_classes, bool):
            raise ConfigError(f"Expected task_classes as true or false, got {task_classes!r}.")
        self.every, self.samples, self.seed = every, samples, seed
        self.windows = tuple(stability.check_window(window) for window in windows)
        self.task_classes = task_classes
        self.updates = 0
        #: Time that the looking took so far, which is none of the learning's.
        self.seconds = 0.0
        self._when: list[int] = []
        self._rows: list[list[float]] = []
        self._ends: list[int] = []
        self._tests: list[ImageSet] = []
        self._images = torch.empty(0)

    def begin_experience(self, number: int, test: ImageSet) -> None:
        """Add the task of an experience to those that are watched.

        After :meth:`restore` the experiences that are over are named again, in order.

        Args:
            number: From 0, without gaps.
            test: Test images of this experience, with class names.

        Raises:
            ConfigError: Another experience is due.
            NotEnoughData: There is no test image.
        """
        begun, ended = len(self._tests), len(self._ends)
        if number != begun or begun > ended:
            due = f"the end of experience {ended}" if begun > ended else f"experience {begun}"
            raise ConfigError(
                f"Expected {due} next, got the beginning of experience {number!r}.",
                remedy="Call begin_experience and end_experience in turn, from 0.",
            )
        if not len(test):
            raise NotEnoughData(f"Experience {number} has no test image to be watched by.")
        if self.samples is not None and self.samples < len(test):
            rng = generator(self.seed, "continual evaluation", number)
            drawn = torch.randperm(len(test), generator=rng)[: self.samples]
            test = test.subset(drawn.sort().values)
        self._tests.append(test)
        self._images = torch.cat([part.images for part in self._tests])

    def end_experience(self, learner: Scorer) -> None:
        """Measure the learner as the experience leaves it.

        Raises:
            ConfigError: No experience has begun.
        """
        if len(self._ends) >= len(self._tests):
            raise ConfigError("Expected an experience that has begun, got the end of another one.")
        row = self._measure(learner)
        # What a learner does at the end may change its answers without an update.
        if not self._when or self._when[-1] != self.updates or self._rows[-1] != row:
            self._append(row)
        self._ends.append(len(self._rows) - 1)

    def on_train_start(self, trainer: L.Trainer | None, pl_module: Any) -> None:
        """Measure once before the first update of the stream."""
        if not self._rows and self._tests:
            self._append(self._measure(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer | None, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count an update, and measure after every so many.

        Raises:
            ConfigError: No experience has begun.
        """
        if len(self._ends) >= len(self._tests):
            raise ConfigError(
                "Expected begin_experience before the first update of an experience.",
                remedy="After restore, name the experiences that are over as well.",
            )
        self.updates += 1
        if self.updates % self.every == 0:
            self._append(self._measure(pl_module))

    def result(self) -> dict[str, Any]:
        """Return the trajectories and what follows from them, ready for ``results.json``.

        Returns:
            ``updates`` of each evaluation; ``accuracy``, one row an evaluation and one column a
            task, None before a task is met; ``ends``, the row at which each experience ended; the
            settings; and the numbers of :func:`clfed.evaluation.stability.summary`.

        Raises:
            NotEnoughData: Nothing was measured yet.
        """
        if not self._rows:
            raise NotEnoughData("Expected at least one evaluation, got none.")
        tasks = len(self._rows[-1])
        padded = [row + [float("nan")] * (tasks - len(row)) for row in self._rows]
        return {
            "updates": list(self._when),
            "ends": list(self._ends),
            "accuracy": [row + [None] * (tasks - len(row)) for row in self._rows],
            "every": self.every,
            "samples": self.samples,
            **stability.summary(padded, self._ends, self._when, self.windows),
        }

    def state(self) -> dict[str, Any]:
        """Return what a resumed stream goes on with, as plain lists and numbers."""
        return {
            "updates": list(self._when),
            "accuracy": [list(row) for row in self._rows],
            "ends": list(self._ends),
            "total": self.updates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state`; :meth:`begin_experience` then names past experiences again."""
        self._when, self._ends = list(state["updates"]), list(state["ends"])
        self._rows = [list(row) for row in state["accuracy"]]
        self.updates = int(state["total"])
        self._tests, self._images = [], torch.empty(0)

    def _append(self, row: list[float]) -> None:
        self._when.append(self.updates)
        self._rows.append(row)

    @torch.no_grad()
    def _measure(self, learner: Scorer) -> list[float]:
        """Accuracy on the images of each task."""
        begin = time.perf_counter()
        row = self._accuracies(learner)
        self.seconds += time.perf_counter() - begin
        return row

    def _accuracies(self, learner: Scorer) -> list[float]:
        place = {name: column for column, name in enumerate(learner.classes)}
        device = getattr(learner, "device", torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                scores = learner.scores_of(self._images).cpu() if place else None
        except NotEnoughData:
            scores = None
        if scores is None:
            # Who knows nothing yet has no right answer.
            return [0.0] * len(self._tests)
        parts = torch.split(scores, [len(test) for test in self._tests])
        return [
            self._share(test, part, place) for test, part in zip(self._tests, parts, strict=True)
        ]

    def _share(self, test: ImageSet, scores: Tensor, place: Mapping[str, int]) -> float:
        columns = torch.tensor([place.get(name, -1) for name in test.classes], dtype=torch.int64)
        asked = torch.arange(scores.shape[1])
        if self.task_classes:
            asked = columns[columns >= 0]
        if not len(asked):
            return 0.0
        best = scores[:, asked].max(dim=1)
        # A class that the learner does not know has column -1, which no answer equals. A class
        # that it cannot score yet has minus infinity, which is no answer.
        right = (asked[best.indices] == columns[test.labels]) & (best.values > -torch.inf)
        return int(right.sum()) / len(test)
