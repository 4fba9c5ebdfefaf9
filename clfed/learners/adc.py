r"""Adversarial drift compensation (Goswami et al. 2024, arXiv 2405.19074).

.. math:: x \leftarrow \mathrm{clamp}\Big(x - \alpha \frac{g}{\|g\|}\Big), \quad
    g = \nabla_x \|f^-(x) - \mu_k\|^2, \qquad
    \mu_k \leftarrow \mu_k + \frac1{|S_k|} \sum_{x \in S_k} \big(f(x) - f^-(x)\big)

Present images that lie nearest to an old class mean are changed until the older network takes them
for that class; those that succeed (:math:`S_k`, by the older class means) stand in for images of it
and show how it drifted. Nothing of them is kept.

Published: 100 images, 3 steps, :math:`\alpha = 25` on pixels less their mean, divided by their
standard deviation. The published code divides by the norm of the gradient of *all* images of a
class together (``norm="batch"``), so that an image's step shrinks with the number of images;
``norm="sample"`` gives each image a step of length :math:`\alpha`. Where no image succeeds the
published code takes those of the class before; here the class follows its neighbours as in SDC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.sdc import SemanticDriftCompensation, length
from clfed.prototypes import PrototypeMemory, read_off
from clfed.prototypes.drift import weighted_drift

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

NORMS = ("batch", "sample")
_AT_ONCE = 1024  # images that go through the networks together


class AdversarialDriftCompensation(SemanticDriftCompensation):
    """Move each old class mean by the drift of images that were made to look like the class.

    Args:
        backbone: The network.
        transform: Its input transform.
        images: Images that are attacked for each old class.
        attack_steps: Steps of the attack.
        alpha: Length of a step, in the input space of the network.
        norm: Whether ``batch`` (all images of a class together) or ``sample`` has that length.
        options: Options of :class:`~clfed.learners.sdc.SemanticDriftCompensation`.

    Raises:
        ConfigError: A number is out of range, or there is no such norm.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        images: int = 100,
        attack_steps: int = 3,
        alpha: float = 25.0,
        norm: str = "batch",
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, **options)
        if norm not in NORMS:
            raise ConfigError(f"Expected learner.norm of {NORMS}, got {norm!r}.")
        if images < 1 or attack_steps < 0 or not alpha > 0:
            raise ConfigError(
                "Expected learner.images >= 1, attack_steps >= 0 and alpha > 0, got "
                f"{images}, {attack_steps} and {alpha}."
            )
        self.images, self.attack_steps, self.alpha, self.norm = images, attack_steps, alpha, norm

    def drifted(
        self, memory: PrototypeMemory, experience: Experience, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attack the nearest images of each old class and follow those that succeed."""
        means = memory.means()
        drift = weighted_drift(means, before, after, self.sigma * length(before))
        distances = torch.cdist(means, before.double())
        nearest = distances.topk(min(self.images, len(before)), largest=False).indices
        options = dict(self.classifier or {})
        judge = read_off(options.pop("name"), memory, **options)
        pixels = experience.train.images
        for rows in torch.split(torch.arange(len(memory)), max(1, _AT_ONCE // nearest.shape[1])):
            chosen = nearest[rows]
            inputs = self.transform(pixels[chosen.flatten()].to(self.device))
            targets = means[rows].repeat_interleave(chosen.shape[1], 0)
            made = self.attacked(inputs.view(*chosen.shape, *inputs.shape[1:]), targets)
            old = self.features(made, self.teacher["backbone"])
            moved = self.features(made, self.backbone).double() - old.double()
            wanted = rows.repeat_interleave(chosen.shape[1])
            hit = (judge.predict(old) == wanted).double().view(chosen.shape)
            total = (moved.view(*chosen.shape, -1) * hit[:, :, None]).sum(1)
            succeeded = hit.sum(1, keepdim=True)
            drift[rows] = torch.where(succeeded > 0, total / succeeded.clamp(min=1), drift[rows])
        return means + drift, None

    def attacked(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Change inputs until the older network sees the targets in them.

        Args:
            inputs: ``(C, n, ...)``, what the networks take: ``n`` for each class.
            targets: ``(C * n, D)`` class means.

        Returns:
            ``(C * n, ...)``.
        """
        low, high = self.limits(inputs)
        targets = targets.to(inputs)
        for _ in range(self.attack_steps):
            with torch.enable_grad():
                inputs = inputs.detach().requires_grad_()
                embedded = self.through(inputs.flatten(0, 1), self.teacher["backbone"])
                distance = (embedded - targets).square().sum()
                (gradient,) = torch.autograd.grad(distance, inputs)
            inputs = descended(inputs.detach(), gradient, self.alpha, self.norm).clamp(low, high)
        return inputs.detach().flatten(0, 1)

    def limits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Black and white as the networks see them; ready features have no bounds."""
        if not self.transform.mean:
            return inputs.new_tensor(-torch.inf), inputs.new_tensor(torch.inf)
        pixel = inputs.new_zeros(1, inputs.shape[2], 1, 1)
        return self.transform(pixel), self.transform(pixel + 255)

    def through(self, inputs: Tensor, network: nn.Module) -> Tensor:
        """Map inputs, already transformed, to what the memory holds sums of."""
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.mapped(network(inputs))

    @torch.no_grad()
    def features(self, inputs: Tensor, network: nn.Module) -> Tensor:
        """Embed transformed inputs in eval mode, on the CPU."""
        was_training = network.training
        network.eval()
        embedded = self.through(inputs, network).cpu()
        network.train(was_training)
        return embedded


def descended(inputs: Tensor, gradient: Tensor, alpha: float, norm: str) -> Tensor:
    r"""Return :math:`x - \alpha g / \|g\|`; a gradient of zero moves nothing.

    Args:
        inputs: ``(C, n, ...)``.
        gradient: The same shape.
        alpha: Length of the step.
        norm: ``sample``: of each of the ``C * n`` inputs; ``batch``: of the ``n`` of a class
            together.

    Example:
        >>> descended(torch.zeros(1, 2, 1), torch.tensor([[[3.0], [4.0]]]), 5.0, "batch").tolist()
        [[[-3.0], [-4.0]]]
    """
    kept = 2 if norm == "sample" else 1
    size = torch.linalg.vector_norm(gradient.flatten(kept), dim=kept)
    size = size.view(*size.shape, *[1] * (inputs.dim() - kept))
    moved: Tensor = inputs - alpha * gradient / size.clamp(min=1e-12)
    return moved
