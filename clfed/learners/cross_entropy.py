r"""Classification of all base classes at once; the head is thrown away afterwards.

.. math:: L = -\log \frac{\exp(z_y)}{\sum_c \exp(z_c)}, \qquad
    z_c = w_c^\top f(x) + b_c \quad\text{or}\quad
    z_c = \tau \cos(w_c, f(x)) \quad\text{or}\quad z_c = -\alpha \|f(x) - w_c\|^2

The linear head is the plain baseline that few-shot papers found hard to beat (Chen et al. 2019,
arXiv 1904.04232, where the cosine head is "Baseline++"; Gidaris & Komodakis 2018, arXiv
1804.09458). The Euclidean head learns a proxy a class in place of an episode's prototypes
(Movshovitz-Attias et al. 2017, arXiv 1703.07464), so that the nearest class mean fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import EmbeddingLearner
from clfed.learners.episodes import ROTATIONS, Augmentation, Shuffled
from clfed.learners.protonet import squared_distance_logits

HEADS = ("linear", "cosine", "euclidean")


class CrossEntropy(EmbeddingLearner):
    """Learn embeddings by telling all base classes apart.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        batch_size: Images a step.
        head: ``linear``, ``cosine`` or ``euclidean``.
        temperature: Factor of the cosines, or of the squared distances at the start (there it is
            learned).
        label_smoothing: Share of the target spread over all classes.
        rotations: Take each class rotated by 90, 180 and 270 degrees as three further classes.
        augmentation: Options of :class:`~clfed.learners.episodes.Augmentation`, or None.
        options: Options of :class:`~clfed.learners.base.EmbeddingLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        batch_size: int = 500,
        head: str = "cosine",
        temperature: float = 16.0,
        label_smoothing: float = 0.0,
        rotations: bool = False,
        augmentation: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, **options)
        if head not in HEADS or batch_size < 2 or temperature <= 0:
            raise ConfigError(
                f"Expected learner.head of {HEADS}, batch_size >= 2 and temperature > 0, got "
                f"{head!r}, {batch_size} and {temperature}."
            )
        self.head, self.batch_size, self.label_smoothing = head, batch_size, label_smoothing
        self.rotations = rotations
        self.augmentation = None if augmentation is None else Augmentation(**augmentation)
        rows = self.num_classes * (ROTATIONS if rotations else 1)
        self.weight = nn.Parameter(torch.randn(rows, self.dim) / self.dim**0.5)
        self.bias = nn.Parameter(torch.zeros(rows), requires_grad=head == "linear")
        self.scale = nn.Parameter(torch.tensor(temperature), requires_grad=head == "euclidean")

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> Shuffled:
        """Return batches of images drawn with equal chance, with replacement."""
        return Shuffled(
            images,
            batch_size=self.batch_size,
            steps=range(start, self.steps),
            seed=seed,
            rotations=self.rotations,
            augmentation=self.augmentation,
        )

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of embeddings ``(B, D)`` with labels ``(B,)``."""
        return F.cross_entropy(
            self.logits(embeddings), labels, label_smoothing=self.label_smoothing
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to one logit for each base class and rotation."""
        if self.head == "linear":
            return F.linear(embeddings, self.weight, self.bias)
        if self.head == "cosine":
            return self.scale * F.linear(F.normalize(embeddings), F.normalize(self.weight))
        return self.scale * squared_distance_logits(embeddings, self.weight)
