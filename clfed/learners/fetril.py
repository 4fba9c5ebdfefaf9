r"""Feature translation (Petit et al. 2023, FeTrIL, WACV; arXiv 2211.13131).

.. math:: \hat h = h(x_n) - \mu_n + \mu_p, \qquad
    n(p) = \arg\max_{n\ present} \cos(\mu_n, \mu_p)

The network is frozen after the first experience. Images of the present class that is most like an
old one lend it their spread: moved to the old class's mean, their embeddings are pseudo-features of
it, and a linear classifier is trained on real and pseudo-features of unit length. What is kept of a
class is its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

KINDS = ("linear", "svm")


class FeatureTranslation(ContinualLearner):
    """Train a linear classifier on present features and on their copies at old class means.

    Args:
        backbone: The network, trained in the first experience at most.
        transform: Its input transform.
        train: ``first`` or ``none``.
        classifier_kind: ``linear`` (softmax, SGD) or ``svm`` (one linear support vector machine a
            class, scikit-learn's).
        head_epochs: Passes of SGD over real and pseudo-features.
        head_lr: Its learning rate; momentum 0.9, down to zero along a cosine.
        head_batch_size: Features a step.
        svm_penalty: Of errors of the support vector machines.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: An option has no such choice, is out of range, or does not fit a linear
            classifier on the embeddings.
    """

    merges = "approximate"

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        train: str = "first",
        classifier_kind: str = "linear",
        head_epochs: int = 50,
        head_lr: float = 0.05,
        head_batch_size: int = 128,
        svm_penalty: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, train=train, **{"moments": "none", **options})
        if classifier_kind not in KINDS:
            raise ConfigError(
                f"Expected learner.classifier_kind of {KINDS}, got {classifier_kind!r}."
            )
        if train == "all" or self.head.kind != "linear" or self.feature_map is not None:
            raise ConfigError(
                "fetril needs learner.train of first or none, a linear head and no feature map."
            )
        if min(head_epochs, head_batch_size) < 1 or not (head_lr > 0 and svm_penalty > 0):
            raise ConfigError(
                "Expected positive learner.head_epochs, head_batch_size, head_lr and svm_penalty, "
                f"got {head_epochs}, {head_batch_size}, {head_lr} and {svm_penalty}."
            )
        self.classifier_kind, self.svm_penalty = classifier_kind, svm_penalty
        self.head_epochs, self.head_lr = head_epochs, head_lr
        self.head_batch_size = head_batch_size

    def trains(self, experience: Experience) -> bool:
        """A network without weights has nothing to train; the classifier is fitted at the end."""
        return super().trains(experience) and any(True for _ in self.backbone.parameters())

    def observe(self, experience: Experience) -> None:
        """Remember the class means, then fit the classifier to features and pseudo-features."""
        super().observe(experience)
        if self.memory is None:
            return
        labels = self.rows(experience.train.classes)[experience.train.labels]
        known = self.rows(self.memory.classes)
        old = ~torch.isin(known, labels)
        features = translated(
            self.embed_all(experience.train.images), labels, self.memory.means()[old], known[old]
        )
        weight, bias = self.fitted(features)
        with torch.no_grad():
            rows = len(self.classes)
            self.head.column("weight")[:rows] = weight
            self.head.column("bias")[:rows] = bias

    def fitted(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return weights ``(C, D)`` and biases ``(C,)`` of the linear classifier."""
        if self.classifier_kind == "svm":
            seed = derive_seed(self.seed, "learner", self.number, "svm") % 2**32
            return support_vectors(features, len(self.classes), self.svm_penalty, seed)
        return softmax_classifier(
            features,
            len(self.classes),
            epochs=self.head_epochs,
            lr=self.head_lr,
            batch_size=self.head_batch_size,
            rng=self.rng("head"),
        )

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score embeddings of unit length, as the classifier was trained."""
        return super().scores(F.normalize(embeddings))


@dataclass(frozen=True)
class Features:
    """Features and pseudo-features, made when they are asked for.

    Attributes:
        real: ``(N, D)`` embeddings of present images.
        shifts: ``(P + 1, D)`` translations; the first one is none at all.
        source: ``(M,)`` rows of ``real``.
        shift: ``(M,)`` rows of ``shifts``.
        labels: ``(M,)`` classes.
    """

    real: Tensor
    shifts: Tensor
    source: Tensor
    shift: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor | slice) -> Tensor:
        """Features at some places of ``M``, ``(B, D)``."""
        return self.real[self.source[chosen]] + self.shifts[self.shift[chosen]]


def translated(features: Tensor, labels: Tensor, old_means: Tensor, old_labels: Tensor) -> Features:
    r"""Add to present features :math:`h - \mu_n + \mu_p` for every old class :math:`p`.

    Args:
        features: ``(N, D)`` embeddings of present images.
        labels: ``(N,)`` their classes.
        old_means: :math:`\mu_p`, ``(P, D)``.
        old_labels: ``(P,)``.

    Returns:
        The ``N`` features, then those of each old class, as many as its source has images.

    Example:
        >>> h, y = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([5, 5])
        >>> both = translated(h, y, torch.tensor([[7.0, 7.0]]), torch.tensor([2]))
        >>> both.rows(slice(2, None)).tolist(), both.labels.tolist()
        ([[6.0, 7.0], [8.0, 7.0]], [5, 5, 2, 2])
    """
    present, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), features.shape[1], dtype=torch.float64)
    means = sums.index_add_(0, places, features.double()) / counts[:, None]
    old_means = old_means.double()
    nearest = (F.normalize(old_means) @ F.normalize(means).T).argmax(1)
    which, source = (nearest[:, None] == places).nonzero().unbind(1)
    shifts = old_means - means[nearest]
    return Features(
        features,
        torch.cat([shifts.new_zeros(1, shifts.shape[1]), shifts]).to(features.dtype),
        torch.cat([torch.arange(len(features)), source]),
        torch.cat([torch.zeros_like(labels), which + 1]),
        torch.cat([labels, old_labels[which]]),
    )


def softmax_classifier(
    features: Features,
    num_classes: int,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train a linear layer from zero on features of unit length.

    Args:
        features: What it is trained on.
        num_classes: Rows of the layer.
        epochs: Passes.
        lr: Learning rate of SGD at the start, down to zero along a cosine.
        batch_size: Features a step.
        rng: Shuffles each pass.

    Returns:
        Weights ``(C, D)`` and biases ``(C,)``.
    """
    weight = torch.zeros(num_classes, features.real.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(features), generator=rng), batch_size):
                logits = F.linear(F.normalize(features.rows(chosen)), weight, bias)
                loss = F.cross_entropy(logits, features.labels[chosen])
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
            schedule.step()
    return weight.detach(), bias.detach()


def support_vectors(
    features: Features, num_classes: int, penalty: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Fit one linear support vector machine a class, on features of unit length.

    Args:
        features: What they are fitted to.
        num_classes: Rows of the result; a class without features never wins.
        penalty: Of errors, scikit-learn's ``C``.
        seed: Of scikit-learn's shuffles.

    Returns:
        Weights ``(C, D)`` and biases ``(C,)``.
    """
    from sklearn.svm import LinearSVC

    weight = torch.zeros(num_classes, features.real.shape[1])
    bias = torch.full((num_classes,), -1e4)
    present = torch.unique(features.labels)
    if len(present) == 1:
        bias[present] = 0.0
        return weight, bias
    rows = F.normalize(features.rows(slice(None))).numpy()
    machine = LinearSVC(C=penalty, dual="auto", random_state=seed).fit(
        rows, features.labels.numpy()
    )
    normals = torch.from_numpy(machine.coef_).float()
    offsets = torch.from_numpy(machine.intercept_).float()
    if len(present) == 2:  # one machine tells two classes apart
        normals, offsets = torch.cat([-normals, normals]), torch.cat([-offsets, offsets])
    weight[present], bias[present] = normals, offsets
    return weight, bias
