"""Any learner as a strategy of Avalanche, for its benchmarks, metrics and plugins.

strategy = as_avalanche(learner, evaluator=EvaluationPlugin(accuracy_metrics(stream=True)))
for experience in benchmark.train_stream:
    strategy.train(experience)
    strategy.eval(benchmark.test_stream)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.optimisers import pack
from clfed.scenarios.avalanche_benchmarks import quiet
from clfed.scenarios.streams import Experience
from clfed.seeding import derive_seed

with quiet():
    from avalanche.training.templates import SupervisedTemplate

UNSEEN = 1000.0  # how far the output of a class that never came lies below all others


def as_avalanche(
    learner: ContinualLearner,
    *,
    names: Sequence[str] | None = None,
    pictures: Callable[[Tensor], Tensor] | None = None,
    **template: Any,
) -> LearnerStrategy:
    """Return an Avalanche strategy that trains and asks a learner.

    Args:
        learner: Changed in place; it brings its own batches, optimiser and length of training.
        names: Class name of each label of the benchmark; None names them by their number.
        pictures: Turns a batch of the benchmark's inputs into images of 0..255 (uint8) or ready
            features ``(B, D)``; None takes those as they are, and colours of 0..1 times 255.
        template: Other arguments of Avalanche's ``SupervisedTemplate``: ``evaluator``,
            ``plugins``, ``eval_mb_size``, ``eval_every``.
    """
    return LearnerStrategy(
        learner=learner, names=names, pictures=pictures or to_pictures, **template
    )


def to_pictures(inputs: Tensor) -> Tensor:
    """Turn inputs of a benchmark into what learners take.

    Args:
        inputs: ``(B, C, H, W)`` uint8, or floating point of 0..1; or ``(B, D)`` features.

    Raises:
        ConfigError: Floating-point pictures outside 0..1, as after a normalisation.
    """
    if inputs.dim() == 2:
        return inputs.float()
    if inputs.dtype == torch.uint8:
        return inputs
    if not 0 <= float(inputs.min()) <= float(inputs.max()) <= 1:
        raise ConfigError(
            "Expected pictures of 0..255 or 0..1, got values of "
            f"{float(inputs.min()):.3g}..{float(inputs.max()):.3g}.",
            remedy="Give as_avalanche a function pictures= that undoes the benchmark's transform.",
        )
    return (inputs * 255).round().to(torch.uint8)


class LearnerStrategy(SupervisedTemplate):  # type: ignore[misc]
    """Avalanche's training and evaluation loops around a learner, see :func:`as_avalanche`.

    One epoch of Avalanche's is the whole training of an experience, whose batches are the
    learner's: plugins see every iteration, may add to ``strategy.loss`` and stop the training,
    but a plugin that exchanges the data loader changes nothing.
    """

    def __init__(
        self,
        *,
        learner: ContinualLearner,
        names: Sequence[str] | None,
        pictures: Callable[[Tensor], Tensor],
        **template: Any,
    ) -> None:
        super().__init__(
            model=learner,
            optimizer=None,
            criterion=nn.CrossEntropyLoss(),
            **{"eval_mb_size": 256, **template},
        )
        self.names, self.pictures = names, pictures
        self._labels: dict[str, int] = {}
        self._of_task: dict[int, set[int]] = {}

    def make_train_dataloader(self, **_: Any) -> None:
        """Leave the batches to the learner."""

    def make_optimizer(self, **_: Any) -> None:
        """Leave the optimiser to the learner."""

    def check_model_and_optimizer(self, **_: Any) -> None:
        """Let the learner make room for new classes."""
        self.ours = self._ours()
        self.model.begin_experience(self.ours)

    def training_epoch(self, **kwargs: Any) -> None:
        """Run the whole training of an experience, with Avalanche's hooks and the learner's."""
        learner: ContinualLearner = self.model
        if learner.length:
            self._train(learner, **kwargs)
        learner.end_experience(self.ours)

    def _train(self, learner: ContinualLearner, **kwargs: Any) -> None:
        batches = learner.batches(
            learner.training_data(self.ours),
            seed=derive_seed(learner.seed, "experience", self.ours.number),
        )
        configured = learner.configure_optimizers()
        self.optimizer = configured["optimizer"]
        scheduler = configured.get("lr_scheduler", {}).get("scheduler")
        labels_of_rows = torch.tensor([self._labels[name] for name in learner.classes])
        learner.train()
        for number, batch in enumerate(batches):
            if self._stop_training:
                break
            images, rows = batch
            self.mbatch = [images, labels_of_rows[rows], torch.zeros_like(rows)]
            self._before_training_iteration(**kwargs)
            self.optimizer.zero_grad()
            self._before_forward(**kwargs)
            self.loss = learner.training_step(batch, number)
            with torch.no_grad():
                step = learner._last
                assert step is not None
                self.mb_output = self._by_label(learner.scores(step.h))
            self._after_forward(**kwargs)
            self._before_backward(**kwargs)
            self.backward()
            self._after_backward(**kwargs)
            learner.on_after_backward()
            learner.on_before_optimizer_step(self.optimizer)
            self._before_update(**kwargs)
            self.optimizer_step()
            self._after_update(**kwargs)
            if scheduler is not None:
                scheduler.step()
            learner.on_train_batch_end(None, batch, number)
            self._after_training_iteration(**kwargs)
        learner.optimiser_state = {} if self.ours.announced else pack(self.optimizer, learner)

    def forward(self) -> Tensor:
        """Return scores by the benchmark's labels, ``(B, largest label + 1)``.

        Classes that never came lie below all others. Where the benchmark showed several tasks,
        only the classes of a question's task compete.
        """
        scores = self._by_label(self.model.scores_of(self.pictures(self.mb_x)))
        if len(self._of_task) < 2:
            return scores
        allowed = torch.zeros(len(scores), scores.shape[1], dtype=torch.bool)
        for task, labels in self._of_task.items():
            allowed[(self.mb_task_id == task).nonzero(), list(labels)] = True
        return scores.masked_fill(~allowed, float(scores.min()) - UNSEEN)

    def _by_label(self, scores: Tensor) -> Tensor:
        """Put the column of each class at the place of its label."""
        columns = torch.tensor([self._labels[name] for name in self.model.classes])
        finite = scores[scores.isfinite()]
        below = (float(finite.min()) if len(finite) else 0.0) - UNSEEN
        width = 1 + int(torch.cat([columns, self.mb_y]).max())
        placed = torch.full((len(scores), width), below, dtype=torch.float32)
        placed[:, columns] = scores.float().clamp(min=below)
        return placed

    def _ours(self) -> Experience:
        """Read Avalanche's experience once, without random augmentation."""
        theirs = self.experience
        samples = [tuple(sample) for sample in self.adapted_dataset.eval()]
        inputs = torch.stack([sample[0] for sample in samples])
        labels = torch.tensor([int(sample[1]) for sample in samples])
        here, rows = torch.unique(labels, return_inverse=True)
        named = {self._name(label): label for label in here.tolist()}
        again = tuple(name for name in named if name in self._labels)
        self._labels |= named
        for sample in samples:
            task = int(sample[2]) if len(sample) > 2 else 0
            self._of_task.setdefault(task, set()).add(int(sample[1]))
        future = getattr(theirs, "future_classes", None)
        return Experience(
            theirs.current_experience,
            ImageSet(self.pictures(inputs), rows, tuple(named)),
            theirs.current_experience,
            announced=bool(getattr(theirs, "access_task_boundaries", True)),
            revisited=again,
            upcoming=None if future is None else len(future),
        )

    def _name(self, label: int) -> str:
        return str(label) if self.names is None else self.names[label]
