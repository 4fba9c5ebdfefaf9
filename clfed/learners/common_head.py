"""Networks of any architecture under one head over named classes, which nodes share.

The head's first rows follow from a seed and the class names, so whoever meets a class first gives
it the row that everybody else would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones import Encoder
from clfed.learners.fine_tuning import FineTuning, passes
from clfed.learners.training import initialisation
from clfed.seeding import derive_seed, generator

#: From an embedding's size and the common one to what maps one to the other.
MAPPINGS: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {
        "avg": lambda dim, width: nn.AdaptiveAvgPool1d(width),
        "max": lambda dim, width: nn.AdaptiveMaxPool1d(width),
        "fc": nn.Linear,
    }
)


def initial_row(seed: int, name: str, width: int) -> Tensor:
    r"""Return the first head row of a class, ``(width + 1,)`` with the bias last.

    It is what :class:`torch.nn.Linear` starts from, uniform within :math:`\pm 1/\sqrt{width}`, but
    depends on seed and name alone: server and nodes draw the same, whenever the class comes.
    """
    drawn = torch.rand(width + 1, generator=generator(seed, "head row", name))
    return (2 * drawn - 1) / math.sqrt(width)


def train_head(
    head: Tensor,
    representations: Tensor,
    labels: Tensor,
    *,
    lr: float,
    batch_size: int,
    rng: torch.Generator,
) -> Tensor:
    """Return a head after one pass of gradient descent on mixtures.

    Args:
        head: ``(classes, width + 1)``, the bias last.
        representations: ``(nodes, width)``.
        labels: Weights of classes, ``(nodes, classes)``.
        lr: Learning rate.
        batch_size: Nodes a step, over which the loss is summed.
        rng: Decides the order of the nodes.
    """
    head = head.clone().requires_grad_()
    optimiser = torch.optim.SGD([head], lr)
    for batch in passes(len(labels), 1, batch_size, rng):
        logits = F.linear(representations[batch], head[:, :-1], head[:, -1])
        optimiser.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits, labels[batch], reduction="sum")
        torch.autograd.backward(loss)
        optimiser.step()
    return head.detach()


class MappedNetwork(FineTuning):
    """A network whose embeddings are mapped to a common size before the head.

    Args:
        encoder: Where the backbone and its input transform come from.
        mapping: One of :data:`MAPPINGS`.
        width: The common size.
        seed: Decides the rows of new classes.
        place: Purpose of the seed from which a learned mapping starts.
        options: Optimiser settings of :class:`~clfed.learners.fine_tuning.FineTuning`.
    """

    def __init__(
        self, encoder: Encoder, *, mapping: str, width: int, seed: int, place: str, **options: Any
    ) -> None:
        super().__init__(encoder, **options)
        with initialisation(derive_seed(seed, place), "mapping"):
            mapped = MAPPINGS[mapping](self.head.in_features, width)
        self.backbone = nn.Sequential(self.backbone, mapped)
        self.seed = seed
        self.replace_head(torch.zeros(0, width), torch.zeros(0), ())

    def replace_head(self, weight: Tensor, bias: Tensor, classes: Sequence[str]) -> None:
        """Take another head, ``(classes, width)`` and ``(classes,)``, over these classes."""
        self.head = nn.Linear(weight.shape[1], 1, device="meta")
        self.head.weight, self.head.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.head.out_features = len(weight)
        self.classes = tuple(classes)

    def grow(self, names: Sequence[str]) -> None:
        """Append the row of :func:`initial_row` for each name that the head does not have."""
        had = len(self.classes)
        super().grow(names)
        with torch.no_grad():
            for row, name in enumerate(self.classes[had:], had):
                first = initial_row(self.seed, name, self.head.in_features)
                self.head.weight[row], self.head.bias[row] = first[:-1], first[-1]
