"""Everything around one act of unlearning: the request, the model, and guarded data."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.learners.base import ContinualLearner
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Guard, Pool, pool_of

if TYPE_CHECKING:
    from clfed.unlearning.requests import Request
    from clfed.unlearning.statistics import Statistics


class Train(Protocol):
    """Trains a model by the recipe of the original."""

    def __call__(
        self, images: ImageSet, seed: int, *, start: ContinualLearner | None = None
    ) -> ContinualLearner:
        """Return a model trained on some images, in eval mode.

        Args:
            images: Every class name gets an output, also one without images.
            seed: Of the first weights and of the order of the images.
            start: A model to go on from, which stays as it is; None: from scratch.
        """


@dataclass(frozen=True, eq=False)
class History:
    """How a model came about.

    Attributes:
        train: The recipe: images and a seed give a new model.
        images: What the original was trained on, in order; labels are rows of its classes.
        ids: ``(N,)`` int64 sample ids of these images.
        seed: Seed of the original.
    """

    train: Train
    images: ImageSet
    ids: Tensor
    seed: int

    def without(self, ids: Tensor) -> ImageSet:
        """Return the images that stay when some samples go; all class names stay."""
        return self.images.subset(~torch.isin(self.ids, ids))


@dataclass(eq=False)
class Context:
    """What one request means for one model.

    An unlearner gets it behind its own guard, see :meth:`behind`.

    Attributes:
        request: What is to be forgotten.
        learner: The original, which nobody changes.
        forget: Training images to be forgotten.
        retain: Training images that stay.
        ood: Images of another data set, of the same shape, without labels.
        validation: Images that were held out of the training.
        statistics: Class statistics by contributor; None where none were kept.
        history: How the original came about.
        seed: Of everything random in the unlearning.
    """

    request: Request
    learner: ContinualLearner
    forget: Pool
    retain: Pool
    ood: Pool
    validation: Pool
    _statistics: Statistics | None = None
    _history: History | None = None
    seed: int = 0
    guard: Guard = field(default_factory=lambda: Guard(~Need.NOTHING))

    @property
    def forgotten_rows(self) -> Tensor:
        """Rows of the classes that go as a whole, int64; empty for other requests."""
        names = self.request.classes if self.request.kind == "class" else ()
        return self.learner.rows(names)

    @property
    def kept_rows(self) -> Tensor:
        """Rows of the classes that stay, int64: no request so far took them."""
        mask = torch.ones(len(self.learner.classes), dtype=torch.bool)
        mask[self.forgotten_rows] = False
        mask[self.learner.rows(self.learner.retired)] = False
        return mask.nonzero().flatten()

    @property
    def statistics(self) -> Statistics | None:
        """The class statistics.

        Raises:
            UndeclaredData: The unlearner did not declare them.
        """
        self.guard.touch(Need.CLASS_STATS)
        return self._statistics

    @property
    def history(self) -> History | None:
        """How the original came about.

        Raises:
            UndeclaredData: The unlearner did not declare it.
        """
        self.guard.touch(Need.HISTORY)
        return self._history

    def behind(self, needs: Need) -> Context:
        """Return the same context, through which only what is declared can be seen."""
        guard = Guard(needs)
        seen = copy.copy(self)
        seen.guard = guard
        seen.forget = self.forget.guarded(guard, (Need.FORGET_X, Need.FORGET_Y))
        seen.retain = self.retain.guarded(guard, (Need.RETAIN_X, Need.RETAIN_Y))
        seen.ood = self.ood.guarded(guard, (Need.OOD_X, Need.OOD_X))
        seen.validation = self.validation.guarded(guard, (Need.EVAL, Need.EVAL))
        return seen


def make_context(
    request: Request,
    learner: ContinualLearner,
    images: ImageSet,
    ids: Tensor,
    *,
    gone: Tensor,
    ood: Tensor | None = None,
    validation: ImageSet | None = None,
    statistics: Statistics | None = None,
    train: Train | None = None,
    learner_seed: int = 0,
    seed: int = 0,
) -> Context:
    """Divide training images into what goes and what stays.

    Args:
        request: What is to be forgotten.
        learner: The original.
        images: Its training images; their classes are the learner's.
        ids: ``(N,)`` int64 sample ids.
        gone: Ids of the samples to be forgotten.
        ood: Images of another data set of the same shape.
        validation: Images held out of the training.
        statistics: Class statistics by contributor.
        train: The recipe of the original.
        learner_seed: Its seed.
        seed: Of the unlearning.
    """
    labels = learner.rows(images.classes)[images.labels]
    whole = pool_of(images.images, labels, ids)
    goes = torch.isin(ids, gone)
    held = images.subset(torch.zeros(0, dtype=torch.int64)) if validation is None else validation
    return Context(
        request,
        learner,
        forget=whole.part(goes.nonzero().flatten()),
        retain=whole.part((~goes).nonzero().flatten()),
        ood=pool_of(images.images[:0] if ood is None else ood),
        validation=pool_of(held.images, learner.rows(held.classes)[held.labels]),
        _statistics=statistics,
        _history=None if train is None else History(train, images, ids, learner_seed),
        seed=seed,
    )
