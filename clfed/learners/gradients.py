"""Gradients of single examples, for importances that are means over them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from clfed.data.benchmark import ImageSet
from clfed.learners.anchors import Tensors, present_rows
from clfed.learners.base import ContinualLearner

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

#: Numbers that the gradients of one chunk of examples may hold at once: 64 MiB.
CHUNK = 2**24

Objective = Callable[[Tensor, Tensor], Tensor]


def mean_over_gradients(
    learner: ContinualLearner,
    data: ImageSet,
    objective: Objective,
    measure: Callable[[Tensor], Tensor],
    group: int = 1,
) -> Tensors:
    r"""Mean of a function of the gradients of single examples, or of means over few of them.

    .. math:: \frac1G \sum_g \phi\Big(\frac1b \sum_{i \in g}
        \frac{\partial\, \ell(o_i, y_i)}{\partial \theta}\Big)

    As many groups at once as their gradients fit into the memory of a chunk.

    Args:
        learner: Is looked at in eval mode, so that examples do not depend on one another.
        data: Images and rows of the learner's classes.
        objective: Maps logits ``(B, K)`` and labels ``(B,)`` to the sum of :math:`\ell` over the
            examples.
        measure: :math:`\phi`, elementwise.
        group: Examples :math:`b` of a mean; a remainder smaller than this is left out, unless
            there is nothing else.

    Returns:
        By name of the parameter, in the shape of :func:`weights_of`.
    """
    network = nn.Sequential(OrderedDict(backbone=learner.backbone, head=learner.head))
    parameters = dict(network.named_parameters())
    group = min(group, len(data))
    fitting = max(1, CHUNK // max(sum(value.numel() for value in parameters.values()), 1))
    used = len(data) // group * group
    totals = {name: torch.zeros_like(value.detach()) for name, value in parameters.items()}
    # Where the gradients of two groups do not fit, a plain backward pass a group is faster.
    gradients = _gradients_at_once if fitting > 1 else _gradient_of_one
    was_training = learner.training
    learner.eval()
    for start in range(0, used, group * fitting):
        part = slice(start, min(start + group * fitting, used))
        inputs = learner.transform(data.images[part].to(learner.device))
        labels = data.labels[part].to(learner.device)
        with torch.enable_grad():
            found = gradients(network, inputs, labels, objective, group)
        for name, values in found.items():
            totals[name] += measure(values).sum(0)
    learner.train(was_training)
    return {
        name: present_rows(learner, name, total) / (used // group) for name, total in totals.items()
    }


def some_of(learner: ContinualLearner, experience: Experience, samples: int | None) -> ImageSet:
    """Return at most so many images of an experience, with rows of the learner's classes.

    Args:
        learner: Its generator draws them.
        experience: Where they come from.
        samples: How many; None for all.
    """
    data = learner.training_data(experience)
    if samples is None or samples >= len(data):
        return data
    return data.subset(torch.randperm(len(data), generator=learner.rng("importance"))[:samples])


def _gradients_at_once(
    network: nn.Module, inputs: Tensor, labels: Tensor, objective: Objective, group: int
) -> Tensors:
    """Return the gradients ``(G, *shape)`` of each group, by name of the parameter."""
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def signalled(parameters: Tensors, inputs: Tensor, signal: Tensor) -> Tensor:
        outputs: Tensor = functional_call(network, parameters, (inputs,))
        return (outputs * signal).sum()

    logits = functional_call(network, parameters, (inputs,)).requires_grad_()
    (signal,) = torch.autograd.grad(objective(logits, labels) / group, logits)
    found: Tensors = vmap(grad(signalled), in_dims=(None, 0, 0))(
        parameters,
        inputs.reshape(-1, group, *inputs.shape[1:]),
        signal.reshape(-1, group, signal.shape[1]),
    )
    return found


def _gradient_of_one(
    network: nn.Module, inputs: Tensor, labels: Tensor, objective: Objective, group: int
) -> Tensors:
    """The same of a single group."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(
        objective(network(inputs), labels) / group,
        parameters,
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: value[None] for name, value in zip(names, found, strict=True)}
