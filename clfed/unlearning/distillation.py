"""Pieces that several methods with teachers share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed

# So low that a softmax gives it nothing, yet finite, so that no product of it is undefined.
CLOSED = -1e4


def closed(logits: Tensor, rows: Tensor) -> Tensor:
    """Return outputs ``(B, K)`` of a teacher that gives some classes no probability.

    Example:
        >>> closed(torch.zeros(1, 3), torch.tensor([1])).softmax(1).tolist()
        [[0.5, 0.0, 0.5]]
    """
    return logits.index_fill(1, rows.to(logits.device), CLOSED)


def stranger(learner: ContinualLearner, seed: int) -> ContinualLearner:
    r"""Return a learner of the same architecture that has learned nothing, in eval mode.

    Layers draw their first values again; a parameter outside of such layers, and the head, is drawn
    from :math:`N(0, 1/D)` with :math:`D` its last dimension. A head that starts at zero would give
    all classes the same.

    Args:
        learner: Whose architecture and classes.
        seed: Of the weights; nothing ambient is read or changed.
    """
    found = copy.deepcopy(learner).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "stranger"))
        for module in [*found.backbone.modules(), found.head]:
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
                continue
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if weight.dim() else 1.0)
    return found
