"""How many test images a memory, or a network, names correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.prototypes import Classifier


class Judge:
    """Scores classifiers on the test images of the classes known so far.

    Answers compete over all classes that a classifier knows; an image whose class it does not know
    counts as wrong. Accuracies are over images.

    Args:
        test: Test images with their class names.
        embeddings: ``(N, D)``, one row for each test image; for :meth:`correct` alone.
    """

    def __init__(self, test: ImageSet, embeddings: Tensor | None = None) -> None:
        self.images = test
        self._embeddings = torch.empty(len(test), 0) if embeddings is None else embeddings
        self._place = {name: i for i, name in enumerate(test.classes)}

    def of(self, known: Iterable[str]) -> Tensor:
        """Return the positions of the test images of these classes, int64."""
        chosen = torch.zeros(len(self.images.classes), dtype=torch.bool)
        chosen[[self._place[name] for name in known]] = True
        return chosen[self.images.labels].nonzero().flatten()

    def correct(self, classifier: Classifier | None, images: Tensor) -> Tensor:
        """Return for each of these test images whether the classifier names it rightly, bool.

        ``None`` stands for a node that knows nothing: all of its answers are wrong.
        """
        if classifier is None:
            return torch.zeros(len(images), dtype=torch.bool)
        return self.right(classifier.classes, classifier.predict(self._embeddings[images]), images)

    def correct_network(
        self, classes: Sequence[str], predict: Callable[[Tensor], Tensor], images: Tensor
    ) -> Tensor:
        """Return for each of these test images whether a network names it rightly, bool.

        Args:
            classes: Names of the network's outputs.
            predict: Maps images to output numbers.
            images: Positions of test images.
        """
        return self.right(classes, predict(self.images.images[images]), images)

    def right(self, classes: Sequence[str], predicted: Tensor, images: Tensor) -> Tensor:
        """Return for each of these test images whether it was named rightly, bool.

        Args:
            classes: Names that were to choose from.
            predicted: ``(M,)`` int64, the number of the chosen one for each image.
            images: ``(M,)``, positions of test images.
        """
        # Names outside the test classes (base classes) get -1, which no label equals.
        place = torch.tensor([self._place.get(name, -1) for name in classes], dtype=torch.int64)
        return place[predicted] == self.images.labels[images]


def fraction(correct: Tensor) -> float:
    """Return the accuracy over images; without images there is none, and 0 is returned."""
    return float(correct.double().mean()) if len(correct) else 0.0
