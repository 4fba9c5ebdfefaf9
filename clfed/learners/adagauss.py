r"""Adaptation of Gaussians, AdaGauss (Rypeść et al. 2024, arXiv 2409.18265).

.. math:: L = \mathrm{CE}(o, y) - \frac{\gamma}{S} \sum_j \min(R_{jj}, 1)
    + \alpha \|\varphi(h) - h^-\|^2, \qquad R R^\top = \mathrm{cov}(h)

A linear bottleneck of :math:`S` entries ends the network; the second term, with the Cholesky
factor :math:`R` of a batch's covariance, keeps it from collapsing, and the third one asks that the
older embedding can still be told from the present one by a small network :math:`\varphi`. After an
experience another one, :math:`\psi: h^- \to h`, is fitted to the present images, samples of each
old class's Gaussian go through it, and their mean and covariance become the class's. The classifier
is Bayes' with full covariances.

Published: ResNet-18, :math:`S = 64`, hidden layers of :math:`32 S`, :math:`\alpha = 10`,
:math:`\gamma = 1`; :math:`\psi`: SGD 0.01, 100 epochs, divided by 10 at 45 and 90; 10,000 samples.

Two things differ here, because an experience may be a few hundred steps. Both small networks are
residual and start as the identity: a random :math:`\varphi` sends random gradients into the network
until it has learned something (``residual=false`` is the published form). And both work in units
of the older embedding's root mean square entry, so that weights and learning rates do not depend on
its scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import LossTerm, Step
from clfed.learners.drifting import Drifting
from clfed.learners.sdc import length
from clfed.prototypes import Moments, PrototypeMemory
from clfed.prototypes.moments import class_scatter

if TYPE_CHECKING:
    from clfed.data.benchmark import ImageSet
    from clfed.scenarios.streams import Experience

_JITTER = 1e-4  # beside the unit variance that the anti-collapse term asks for


class AdaGauss(Drifting):
    r"""Keep a Gaussian of each class and send it through a learned map when the network changes.

    Args:
        backbone: The network without the bottleneck.
        transform: Its input transform.
        dim: Length of the backbone's output.
        bottleneck: Length :math:`S` of the embedding.
        hidden: Hidden units of both small networks, in multiples of :math:`S`.
        residual: Whether both small networks add their input and so start as the identity.
        distillation: Weight :math:`\alpha`.
        anti_collapse: Weight :math:`\gamma`.
        adapt_epochs: Passes over the present embeddings that fit :math:`\psi`.
        adapt_lr: Learning rate of its SGD with momentum 0.9.
        adapt_batch_size: Embeddings a step.
        samples: Drawn from each old Gaussian.
        classifier: What is read off the memory.
        moments: ``class``; ``none`` goes with a classifier that uses means alone.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        dim: int,
        bottleneck: int = 64,
        hidden: int = 32,
        residual: bool = True,
        distillation: float = 10.0,
        anti_collapse: float = 1.0,
        adapt_epochs: int = 100,
        adapt_lr: float = 0.01,
        adapt_batch_size: int = 128,
        samples: int = 10_000,
        classifier: Mapping[str, Any] | None = None,
        moments: Moments = "class",
        **options: Any,
    ) -> None:
        if min(bottleneck, hidden, adapt_epochs, adapt_batch_size) < 1 or samples < 2:
            raise ConfigError(
                "Expected learner.bottleneck, hidden, adapt_epochs and adapt_batch_size >= 1 and "
                f"samples >= 2, got {bottleneck}, {hidden}, {adapt_epochs}, {adapt_batch_size} "
                f"and {samples}."
            )
        if not (distillation >= 0 and anti_collapse >= 0 and adapt_lr > 0):
            raise ConfigError(
                "Expected learner.distillation >= 0, anti_collapse >= 0 and adapt_lr > 0, got "
                f"{distillation}, {anti_collapse} and {adapt_lr}."
            )
        super().__init__(
            nn.Sequential(backbone, nn.Linear(dim, bottleneck)),
            transform,
            dim=bottleneck,
            classifier=classifier or {"name": "gaussian"},
            moments=moments,
            **options,
        )
        self.hidden, self.residual = hidden * bottleneck, residual
        self.samples = samples
        self.adapt_epochs, self.adapt_lr = adapt_epochs, adapt_lr
        self.adapt_batch_size = adapt_batch_size
        self.projector = self.network("projector")
        self.terms = (
            LossTerm("classification", 1.0, ("backbone", "head")),
            LossTerm("anti_collapse", float(anti_collapse), ("backbone",)),
            LossTerm("distillation", float(distillation), ("backbone", "projector")),
        )

    def check_base(self, base: ImageSet) -> None:
        """Refuse to train an encoder for others.

        Raises:
            ConfigError: Always: the bottleneck belongs to the learner, and an encoder that travels
                is a backbone and nothing else.
        """
        raise ConfigError(
            "adagauss puts a layer of its own on the network, so it cannot make an encoder that "
            "nodes share.",
            remedy="Choose another learner for job=reconnaissance, such as slda or fecam.",
        )

    def begin_experience(self, experience: Experience) -> None:
        """Start with a new projector: it belongs to one pair of networks."""
        super().begin_experience(experience)
        if len(experience.train):
            self.projector = self.network("projector").requires_grad_(self.length > 0)

    def network(self, purpose: str) -> Perceptron:
        """Return a new small network, its weights drawn for one purpose in this experience."""
        return Perceptron(self.dim, self.hidden, residual=self.residual, rng=self.rng(purpose))

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Classification, anti-collapse, and distillation through the projector."""
        distilled = step.h.new_zeros(())
        if self.teacher:
            with torch.no_grad():
                before = self.embed(step.images, self.teacher["backbone"]).float()
            scale = before.square().mean().sqrt().clamp(min=1e-6)
            apart = self.projector(step.h / scale) - before / scale
            distilled = apart.square().sum(1).mean()
        return {
            "classification": self.loss(step.h, step.labels),
            "anti_collapse": anti_collapse(step.h),
            "distillation": distilled,
        }

    def drifted(
        self, memory: PrototypeMemory, experience: Experience, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Fit the adapter, then send samples of each old Gaussian through it."""
        # One unit for both spaces, so that a learning rate fits embeddings of any scale.
        scale = length(before) / self.dim**0.5
        adapter = self.network("adapter")
        fit_adapter(
            adapter,
            before / scale,
            after / scale,
            epochs=self.adapt_epochs,
            lr=self.adapt_lr,
            batch_size=self.adapt_batch_size,
            rng=self.rng("order"),
        )
        means = memory.means() / scale
        if memory.outer is None:
            with torch.no_grad():
                return scale * adapter(means.float()), None
        spread = class_scatter(memory) / (memory.counts.double() * scale**2)[:, None, None]
        # The same draws for every class: its place among the others must not matter.
        draws = torch.randn(self.samples, self.dim, generator=self.rng("samples"))
        pairs = [
            adapted(adapter, mean, covariance, draws)
            for mean, covariance in zip(means, spread, strict=True)
        ]
        new_means, covariances = zip(*pairs, strict=True)
        return scale * torch.stack(new_means), scale**2 * torch.stack(covariances)


def anti_collapse(embeddings: Tensor) -> Tensor:
    r"""Return :math:`-\frac1S \sum_j \min(R_{jj}, 1)`, :math:`R` the batch covariance's factor.

    Args:
        embeddings: ``(B, S)``; the covariance is the biased one, so one row is enough.

    Example:
        >>> h = torch.tensor([[2.0, 0.5], [-2.0, 0.5], [2.0, -0.5], [-2.0, -0.5]])
        >>> round(anti_collapse(h).item(), 3)
        -0.75
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    covariance = centred.T @ centred / len(embeddings)
    # The second part outgrows the rounding of a singular matrix of any scale.
    jitter = _JITTER + 1e-9 * float(covariance.detach().trace())
    eye = torch.eye(len(covariance), dtype=torch.float64, device=embeddings.device)
    factor = torch.linalg.cholesky(covariance + jitter * eye)
    loss: Tensor = -factor.diagonal().clamp(max=1.0).mean().float()
    return loss


class Perceptron(nn.Module):
    r"""Map :math:`\varphi(h) = [h +] W_2 \max(W_1 h + b_1, 0) + b_2`.

    Args:
        dim: Inputs and outputs.
        hidden: Units between them.
        residual: Whether the input is added; then the map starts as the identity.
        rng: Draws the weights, uniform as torch's default.
    """

    def __init__(self, dim: int, hidden: int, *, residual: bool, rng: torch.Generator) -> None:
        super().__init__()
        self.residual = residual
        self.first = _linear(dim, hidden, dim**-0.5, rng)
        self.last = _linear(hidden, dim, 0.0 if residual else hidden**-0.5, rng)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, S)`` to ``(B, S)``."""
        mapped: Tensor = self.last(self.first(embeddings).relu())
        return embeddings + mapped if self.residual else mapped


def _linear(dim: int, outputs: int, bound: float, rng: torch.Generator) -> nn.Linear:
    with torch.device("meta"):  # torch's own start would draw from the ambient generator
        layer = nn.Linear(dim, outputs)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for weights in layer.parameters():
            weights.uniform_(-bound, bound, generator=rng)
    return layer


def fit_adapter(
    adapter: nn.Module,
    before: Tensor,
    after: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    rng: torch.Generator,
) -> None:
    """Fit a map of older embeddings to present ones: SGD on the mean squared error.

    Args:
        adapter: Changed in place.
        before: ``(N, S)`` by the older network.
        after: ``(N, S)``, the same images by the present one.
        epochs: Passes; the rate is divided by 10 after 45 and after 90 % of them.
        lr: Learning rate at the start.
        batch_size: Rows a step.
        rng: Shuffles each pass.
    """
    optimiser = torch.optim.SGD(adapter.parameters(), lr, momentum=0.9)
    milestones = [math.ceil(0.45 * epochs), math.ceil(0.9 * epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(before), generator=rng), batch_size):
                loss = F.mse_loss(adapter(before[rows]), after[rows])
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
            schedule.step()


@torch.no_grad()
def adapted(
    adapter: nn.Module, mean: Tensor, covariance: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of :math:`\psi(\mu + R \varepsilon)`, :math:`R R^\top = \Sigma`.

    Args:
        adapter: :math:`\psi`.
        mean: :math:`\mu`, ``(S,)`` float64.
        covariance: :math:`\Sigma`, ``(S, S)`` float64, may be singular.
        draws: :math:`\varepsilon`, ``(M, S)`` standard normal.

    Returns:
        ``(S,)`` and biased ``(S, S)``, float64.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    mapped = adapter((mean + draws.double() @ root.T).float()).double()
    centre = mapped.mean(0)
    centred = mapped - centre
    return centre, centred.T @ centred / len(mapped)
