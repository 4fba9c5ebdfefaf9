"""What models are asked, each once, and what the answers show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clfed.evaluation.evidence import Sheet, answers, evidence
from clfed.jobs.unlearning_stage import Stage, of_classes
from clfed.learners.base import ContinualLearner
from clfed.learners.tables import rows_of
from clfed.seeding import derive_seed


class Examiner:
    """Asks models about the images of a request, and remembers what they said.

    Args:
        stage: Data and models.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._sheets: dict[tuple[object, ...], Sheet] = {}

    def sheet(self, learner: ContinualLearner, number: int) -> Sheet:
        """Ask a model everything that evidence needs."""
        request = self.stage.requests[number]
        went = set(request.classes) if request.kind == "class" else set()
        test = self.stage.holdings.test
        parts = {
            "forget": self.stage.part(self.stage.gone[number]),
            "retain": self.stage.staying(number),
            "validation": self.stage.staying_classes(self.stage.holdings.validation, number),
            "test": self.stage.staying_classes(test, number),
            "test_forget": of_classes(test, went, inside=True),
        }
        return Sheet(
            **{name: answers(learner, part.images, part.labels) for name, part in parts.items()}
        )

    def judging(self, number: int) -> dict[str, Any]:
        """Return what all judgements of a request have in common."""
        request = self.stage.requests[number]
        went = request.classes if request.kind == "class" else ()
        return {
            "untrained": self.untrained_sheet(number),
            "kind": request.kind,
            "seed": derive_seed(self.stage.cfg.seed, "evidence", number),
            "forgotten_rows": rows_of(self.stage.holdings.train.classes, went),
        }

    def evidence(self, subject: Sheet, original: Sheet, number: int) -> dict[str, float]:
        """Return all measures of a model that answered before and after a request."""
        return evidence(
            subject,
            original=original,
            oracles=self.oracle_sheets(number),
            **self.judging(number),
        )

    def before(self, model: ContinualLearner, number: int, original: int, seed: int) -> Sheet:
        """Return the answers of a model before a request; the first one is the same for all."""
        key = ("before", number, original, seed if number else 0)
        return self._known(key, lambda: self.stage.reading(model), number)

    def oracle_sheets(self, number: int) -> list[Sheet]:
        """Return the answers of all oracles of a request."""
        return [self._oracle(number, seed) for seed in self.stage.seeds["oracle"]]

    def _oracle(self, number: int, seed: int) -> Sheet:
        return self._known(
            ("oracle", number, seed),
            lambda: self.stage.reading(self.stage.oracle(number, seed)[0]),
            number,
        )

    def untrained_sheet(self, number: int) -> Sheet:
        """Return the answers of a network that was never trained."""
        seed = derive_seed(self.stage.cfg.seed, "untrained")
        classes = self.stage.holdings.train.classes
        return self._known(
            ("untrained", number), lambda: self.stage.recipe.fresh(classes, seed).eval(), number
        )

    def _known(
        self, key: tuple[object, ...], make: Callable[[], ContinualLearner], number: int
    ) -> Sheet:
        if key not in self._sheets:
            self._sheets[key] = self.sheet(make(), number)
        return self._sheets[key]
