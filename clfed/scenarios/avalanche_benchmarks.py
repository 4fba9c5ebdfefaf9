"""Avalanche's benchmark generators over image sets, and its view of a finished stream.

Avalanche 0.6 (arXiv 2302.01766) decides which sample belongs to which experience; a data attribute
that carries each sample's position through its splits is read back, so that both sides hold the
same images in the same order. Avalanche is imported when a function is called, never before.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clfed.data.benchmark import ImageSet

if TYPE_CHECKING:
    from clfed.scenarios.streams import Stream

POSITIONS = "positions"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Avalanche prints and warns about while it builds something to itself."""
    # Recorded, because Avalanche overrules filters to tell of its own deprecations.
    with warnings.catch_warnings(record=True), contextlib.redirect_stdout(io.StringIO()):
        yield


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images with Python numbers as labels, as Avalanche takes them.

    Args:
        images: ``(N, ...)``.
        targets: N labels.
    """

    def __init__(self, images: Tensor, targets: list[int]) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def dataset(images: Tensor, targets: Tensor, task: int = 0) -> Any:
    """Return an Avalanche dataset of ``(image, label, task)`` that knows its samples' positions.

    Args:
        images: ``(N, ...)``.
        targets: ``(N,)`` int64 labels.
        task: Task label of all samples.
    """
    from avalanche.benchmarks.utils import (
        ConstantSequence,
        DataAttribute,
        TaskAwareSupervisedClassificationDataset,
        TaskLabels,
    )

    labels = targets.tolist()
    return TaskAwareSupervisedClassificationDataset(
        [Labelled(images, labels)],
        data_attributes=[
            DataAttribute(labels, "targets"),
            TaskLabels(ConstantSequence(task, len(labels))),
            DataAttribute(list(range(len(labels))), POSITIONS),
        ],
    )


def positions(experiences: Any) -> list[Tensor]:
    """Return which samples each Avalanche experience holds, in its order, as int64 positions."""
    return [
        torch.tensor(list(getattr(e.dataset, POSITIONS)), dtype=torch.int64) for e in experiences
    ]


def class_incremental(
    train: ImageSet, test: ImageSet, sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Let Avalanche divide two sets into experiences of consecutive classes.

    Args:
        train: Every class with at least one image.
        test: The same classes in the same order, every one with at least one image.
        sizes: Classes of each experience; they add up to all, so none is dropped.

    Returns:
        For each experience positions in ``train``, and positions in ``test``.
    """
    with quiet():
        from avalanche.benchmarks import class_incremental_benchmark

        made = class_incremental_benchmark(
            {name: dataset(s.images, s.labels) for name, s in (("train", train), ("test", test))},
            class_order=list(range(len(train.classes))),
            num_classes_per_exp=list(sizes),
        )
        return positions(made.train_stream), positions(made.test_stream)


def cut(count: int, size: int, seed: int) -> list[Tensor]:
    """Let Avalanche shuffle the samples of one experience and cut them into small ones.

    Args:
        count: Samples of the experience.
        size: Samples of a small one; the last may be smaller.
        seed: Of the shuffling.

    Returns:
        Positions of the samples of each small experience, int64.
    """
    with quiet():
        from avalanche.benchmarks import benchmark_from_datasets, split_online_stream

        blank = torch.zeros(count, dtype=torch.int64)
        whole = benchmark_from_datasets(train=[dataset(blank, blank)])
        return positions(split_online_stream(whole.train_stream, size, seed=seed))


def benchmark_of(stream: Stream) -> Any:
    """Return the Avalanche benchmark over the images of a stream, see ``Stream.benchmark``."""
    number = {name: index for index, name in enumerate(stream.classes)}

    def make(images: ImageSet, phase: int) -> Any:
        index = torch.tensor([number[name] for name in images.classes], dtype=torch.int64)
        task = phase if stream.setting == "task" else 0
        return dataset(images.images, index[images.labels], task)

    made = assembled(
        train=[make(e.train, e.phase) for e in stream.experiences],
        test=[make(images, phase) for phase, images in enumerate(stream.tests)],
    )
    # Read by strategies and checks that were written for older kinds of benchmarks.
    made.n_classes_per_exp = [len(e.classes) - len(e.revisited) for e in stream.experiences]
    made.classes_order = list(range(len(number)))
    return made


def assembled(**streams: Sequence[Any]) -> Any:
    """Return a benchmark of named streams of datasets, with class timelines and task labels."""
    with quiet():
        from avalanche.benchmarks import (
            benchmark_from_datasets,
            with_classes_timeline,
            with_task_labels,
        )

        made = with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))
        for stream in made.streams.values():
            stream.benchmark = made
            for experience in stream:
                experience.benchmark = made
        return made
