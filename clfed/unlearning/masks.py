r"""Which weights an unlearner may change, as callbacks that go with any method.

Saliency (Fan et al. 2024, arXiv 2310.12508): only the weights with a large gradient on the forget
set may change,

.. math:: m = [\,|\nabla_\theta \mathrm{CE}(\theta_o; D_f)| \ge \gamma\,], \qquad
          \theta_u = m \odot (\theta_o + \Delta) + (1 - m) \odot \theta_o

where :math:`\gamma` leaves a share :math:`\rho` of all weights. Masking gradients alone would not
do, as the public code did for long: weight decay and momentum move weights too. So after each step
the weights outside the mask are put back, bit for bit, and their momentum is cleared. The paper
takes the median of all gradients for :math:`\gamma`, its code a share of the largest ones over all
tensors together; both are the same at one half. Gradients are summed over the forget set before
their size is taken, in eval mode.

The running statistics of batch norm are no weights. With a mask they stay as they are, so that
nothing outside the mask changes; with ``freeze_norm=false`` they follow the images that stay, as in
the public code, and only the weights are promised.

A proximal step reaches the same sparsity without a mask: after each step the changes
:math:`\theta - \theta_o` are soft-thresholded so that fewer and fewer of them stay. The anchor is
the original all along, as in the paper; its code takes a new one in each pass.
"""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.unlearning.base import Unlearner, named_weights
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need


class Saliency(L.Callback):
    r"""Keep all weights but the most salient ones as they were.

    Args:
        density: :math:`\rho`, the share of weights that may change, ranked over all tensors
            together; 0.5 takes the median as threshold.
        freeze_norm: Whether batch norm keeps its running statistics, too.

    Raises:
        ConfigError: Not a share.
    """

    def __init__(self, density: float = 0.5, *, freeze_norm: bool = True) -> None:
        if not 0 <= density <= 1:
            raise ConfigError(f"Expected unlearner.mask.density in [0, 1], got {density}.")
        self.density, self.freeze_norm = density, freeze_norm
        self.masks: dict[str, Tensor] = {}
        self._original: dict[str, Tensor] = {}

    def measure(self, unlearner: Unlearner, context: Context) -> None:
        """Find the salient weights of the original.

        Raises:
            ConfigError: The method promises not to look at the forget set.
        """
        if Need.FORGET not in unlearner.needs:
            raise ConfigError(
                "unlearner.mask ranks weights by their gradient on the forget set, but "
                f"unlearner={unlearner.method or type(unlearner).__name__} does without that set.",
                remedy="Leave out unlearner.mask, or choose a method that uses the forget set.",
            )
        gradients = unlearner.gradient(context.forget)
        scores = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
        count = round(self.density * len(scores))
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[scores.argsort(descending=True, stable=True)[:count]] = True
        parts = torch.split(chosen, [gradient.numel() for gradient in gradients.values()])
        for (name, gradient), part in zip(gradients.items(), parts, strict=True):
            self.masks[name] = part.view_as(gradient)
        weights = named_weights(unlearner.learner)
        self._original = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def restore(self, unlearner: Unlearner) -> None:
        """Put every weight outside the mask back to its original bits."""
        for name, weight in named_weights(unlearner.learner).items():
            if name in self.masks:
                weight.copy_(torch.where(self.masks[name], weight, self._original[name]))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore weights and clear their momentum after the optimiser's step."""
        self.restore(pl_module)
        weights = named_weights(pl_module.learner)
        for optimiser in trainer.optimizers:
            for name, weight in weights.items():
                for value in optimiser.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.mul_(self.masks[name])


class SoftThreshold(L.Callback):
    r"""Shrink the changes of the weights after each step, so that only a share of them stays.

    At step :math:`t` of :math:`T` the share :math:`1 - (1 - \rho) t / T` of the coordinates may
    differ from the original :math:`\theta_o`; the threshold is the largest change that must go.

    Args:
        share: :math:`\rho`, the share of coordinates that differ at the end.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._original: dict[str, Tensor] = {}

    def measure(self, unlearner: Unlearner) -> None:
        """Take the original as the anchor."""
        weights = named_weights(unlearner.learner)
        self._original = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Soft-threshold the changes after the optimiser's step."""
        steps = max(1, pl_module.epochs * pl_module.batches.steps)
        self.shrink(pl_module, 1 - (1 - self.share) * min(1.0, pl_module.step_number / steps))

    @torch.no_grad()
    def shrink(self, unlearner: Unlearner, share: float) -> None:
        """Let at most this share of the coordinates differ from the original."""
        weights = named_weights(unlearner.learner)
        changes = {name: weight - self._original[name] for name, weight in weights.items()}
        sizes = torch.cat([change.abs().flatten() for change in changes.values()])
        drop = len(sizes) - round(share * len(sizes))
        if drop <= 0:
            return
        threshold = sizes.kthvalue(drop).values
        for name, weight in weights.items():
            change = changes[name]
            kept = change.sign() * (change.abs() - threshold).clamp(min=0)
            weight.copy_(self._original[name] + kept)
