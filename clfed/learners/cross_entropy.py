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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm
from clfed.learners.episodes import ROTATIONS
from clfed.learners.protonet import squared_distance_logits
from clfed.seeding import derive_seed

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

HEADS = ("linear", "cosine", "euclidean")


class CrossEntropy(ContinualLearner):
    """Learn embeddings by telling the first classes apart; the nearest class mean answers.

    Args:
        backbone: The network to train.
        transform: Its input transform.
        batch_size: Images a step.
        head: ``linear``, ``cosine`` or ``euclidean``.
        temperature: Factor of the cosines, or of the squared distances at the start (there it is
            learned).
        label_smoothing: Share of the target spread over all classes.
        train: ``first``, or ``none`` to leave the network as it is.
        classifier: What is read off the memory in a stream.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`; ``rotations`` takes
            each class turned by 90, 180 and 270 degrees as three further classes.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    merges = "exact"

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        batch_size: int = 500,
        head: str = "cosine",
        temperature: float = 16.0,
        label_smoothing: float = 0.0,
        train: str = "first",
        classifier: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            transform,
            batch_size=batch_size,
            train=train,
            classifier=classifier or {"name": "ncm"},
            **options,
        )
        if head not in HEADS or batch_size < 2 or temperature <= 0:
            raise ConfigError(
                f"Expected learner.head of {HEADS}, batch_size >= 2 and temperature > 0, got "
                f"{head!r}, {batch_size} and {temperature}."
            )
        if train == "all":
            raise ConfigError(
                "cross_entropy learns from the first experience alone, got learner.train=all.",
                remedy="Choose learner=naive or another learner that goes on learning.",
            )
        self.kind, self.label_smoothing = head, label_smoothing
        self.temperature = temperature
        third = {"linear": ("bias",), "cosine": (), "euclidean": ("scale",)}[head]
        self.terms = (LossTerm("classification", 1.0, ("backbone", "weight", *third)),)
        self._make_proxies(0)

    def begin_experience(self, experience: Experience) -> None:
        """Draw a proxy for each class, and for each of its rotations."""
        super().begin_experience(experience)
        if self.length:
            self._make_proxies(len(self.classes) * (ROTATIONS if self.rotations else 1))

    def training_data(self, experience: Experience) -> ImageSet:
        """Return the images, their classes by name: the order that they came in is chance."""
        data, names = experience.train, tuple(sorted(self.classes))
        place = torch.tensor([*map(names.index, data.classes)], dtype=torch.int64)
        return ImageSet(data.images, place[data.labels], names)

    def finish(self, experience: Experience) -> None:
        """Throw the head away."""
        self._make_proxies(0)

    def _make_proxies(self, rows: int) -> None:
        rng = torch.Generator().manual_seed(derive_seed(self.seed, "learner"))
        weight = torch.randn(rows, self.dim, generator=rng) / max(self.dim, 1) ** 0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(rows), requires_grad=self.kind == "linear")
        self.scale = nn.Parameter(
            torch.tensor(self.temperature), requires_grad=self.kind == "euclidean"
        )

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of embeddings ``(B, D)`` with labels ``(B,)``."""
        return F.cross_entropy(
            self.logits(embeddings), labels, label_smoothing=self.label_smoothing
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to one logit for each class and rotation."""
        if self.kind == "linear":
            return F.linear(embeddings, self.weight, self.bias)
        if self.kind == "cosine":
            return self.scale * F.linear(F.normalize(embeddings), F.normalize(self.weight))
        return self.scale * squared_distance_logits(embeddings, self.weight)
