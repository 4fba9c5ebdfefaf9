r"""Synaptic intelligence (Zenke, Poole & Ganguli 2017, arXiv 1703.04200, eq. 3 to 5).

.. math:: L = \mathrm{CE} + \frac{\lambda}{2} \sum_j \Omega_j (\theta_j - \theta^-_j)^2, \qquad
    \omega_j = -\sum_{\mathrm{steps}} \frac{\partial\, \mathrm{CE}}{\partial \theta_j}
    \Delta\theta_j, \qquad
    \Omega_j \leftarrow \Omega_j + \frac{\omega_j}{(\Delta^{\mathrm{all}}_j)^2 + \xi}

A weight is as important as its path through the training lowered the loss. :math:`\Delta\theta` is
the change of one step, :math:`\Delta^{\mathrm{all}}` that of the whole experience. The gradient is
that of the classification loss alone, as in the paper; programs that take the gradient of the whole
loss credit weights with the work of the penalty too. Where :math:`\omega_j < 0`, which noise in the
gradients can bring about, it counts as 0: a negative importance would push weights away without
bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.anchors import (
    ANCHOR,
    IMPORTANCE,
    Anchored,
    Tensors,
    accumulated,
    present_rows,
    set_anchor,
    weights_of,
)
from clfed.learners.base import Step

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class SynapticIntelligence(Anchored):
    r"""Pull weights towards old values, the more the further they brought the loss down.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda`; the paper's :math:`c` is half of it.
        damping: :math:`\xi`, which bounds the importance of weights that hardly moved.
        options: Options of :class:`~clfed.learners.anchors.Anchored`.

    Raises:
        ConfigError: The damping is not positive.
    """

    _first: Tensors
    _path: Tensors
    _before: Tensors
    _slope: Tensors

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float = 1.0,
        damping: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, weight=weight, **options)
        if not damping > 0:
            raise ConfigError(f"Expected learner.damping > 0, got {damping}.")
        self.damping = damping

    def begin_experience(self, experience: Experience) -> None:
        """Start a new path."""
        super().begin_experience(experience)
        if self.length:
            self._first = _copies(weights_of(self))
            self._path = {name: torch.zeros_like(value) for name, value in self._first.items()}

    def on_after_backward(self) -> None:
        """Note where the step starts, and the gradient of the classification loss there."""
        super().on_after_backward()
        self._before = _copies(weights_of(self))
        self._slope = {}
        for name, weights in self._before.items():
            gradient = self.get_parameter(name).grad
            slope = torch.zeros_like(weights)
            if gradient is not None:
                slope += present_rows(self, name, gradient)
            anchor = self.kept.get(ANCHOR + name)
            if anchor is not None:  # take the penalty's part out of the gradient of the sum
                rows = tuple(map(slice, anchor.shape))
                importance = self.kept[IMPORTANCE + name].to(slope.device)
                pull = importance * (weights[rows] - anchor.to(slope.device))
                slope[rows] -= 2 * self.factor * pull
            self._slope[name] = slope

    def absorb(self, step: Step) -> None:
        """Follow the path by one step."""
        for name, weights in weights_of(self).items():
            moved = weights - self._before[name]
            self._path[name] = self._path[name].to(moved.device) - self._slope[name] * moved

    def consolidate(self, experience: Experience) -> None:
        """Turn the path into importance."""
        weights = weights_of(self)
        fresh = {}
        for name, path in self._path.items():
            travelled = (weights[name].detach().cpu() - self._first[name].cpu()).square()
            fresh[name] = path.cpu().clamp(min=0) / (travelled + self.damping)
        set_anchor(self, accumulated(self, fresh))


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
