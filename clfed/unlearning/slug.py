r"""SLUG: one gradient, one layer, one step (Cai, Tan and Asif 2024, arXiv 2407.11867).

The gradients of forget set and rest are taken once, at the original. A layer :math:`l` is a good
place for the edit where it matters for the forget set and pulls elsewhere for the rest:

.. math:: \mathrm{importance}_l = \frac{\lVert G_{f,l} \rVert}{\lVert \theta_l \rVert}, \qquad
          \mathrm{alignment}_l = |\cos(G_{f,l}, G_{r,l})|

For each layer that no other beats in both, the step of

.. math:: \theta_l \leftarrow \theta_l - \lambda G_{f,l}, \qquad L_f = -\mathrm{CE}(D_f)

starts at :math:`\lambda_0 = \lVert\theta_l\rVert / (10 \lVert G_{f,l}\rVert)`, is doubled until
the forget set is forgotten, and then bisected. Among the pairs of layer and step that forget, the
one that keeps most of the rest is taken: exactly one tensor of the model changes for each class.

The paper treats image-text models; for a classifier we take cross-entropies. Its text has the
cosine with its sign, its code without: so do we, for a layer that moves the rest a lot, whichever
way, is a bad place. Its code takes the gradients in training mode, where batch norm would see
forget images alone; we take them in eval mode.

Whole classes are forgotten at an accuracy of at most ``epsilon``. Samples are forgotten once the
model knows them no better than images that it never saw: an accuracy of at most that of the
original on held-out images. The rest is judged by a sample of the images that stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import generator
from clfed.unlearning.base import Unlearner, named_weights
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Pool


class Edit(NamedTuple):
    r"""A step in one layer.

    Attributes:
        layer: Name of the tensor.
        size: Its :math:`\lambda`.
        forget: Accuracy on the forget set after it.
        retain: Accuracy on a sample of the rest after it.
    """

    layer: str
    size: float
    forget: float
    retain: float


class Slug(Unlearner):
    """Edit a single layer by a single step along the gradient of the forget set.

    A request for several classes is the sum of their edits, each found on its own.

    Args:
        learner: The original.
        epsilon: Accuracy on a class at which it counts as forgotten.
        evaluations: Steps that are tried for each layer.
        probe: Images of the forget set, and of the rest, that each step is judged by.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`; ``seed`` and
            ``retain_share`` count.

    Raises:
        ConfigError: An option is out of range, or samples are to be forgotten and no images were
            held out.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN | Need.EVAL
    schedule = "none"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        epsilon: float = 0.02,
        evaluations: int = 10,
        probe: int = 500,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if not 0 <= epsilon < 1 or evaluations < 1 or probe < 1:
            raise ConfigError(
                "unlearner=slug needs 0 <= epsilon < 1, evaluations >= 1 and probe >= 1, got "
                f"{epsilon}, {evaluations} and {probe}."
            )
        self.epsilon, self.evaluations, self.probe = epsilon, evaluations, probe

    def check_request(self, context: Context) -> None:
        """Refuse samples where no images were held out to compare them with."""
        super().check_request(context)
        if context.request.kind != "class" and not len(context.validation):
            raise ConfigError(
                f"unlearner=slug forgets a {context.request.kind} until it is known no better "
                "than held-out images, got none.",
                remedy="Set scenario.validation=0.1.",
            )

    def solve(self, context: Context) -> None:
        """Add up the edits of all classes of the request, or make the one of its samples."""
        whole = context.request.kind == "class"
        target = self.epsilon if whole else self.accuracy(context.validation)
        retain = self.drawn(context.retain)
        rest = self.gradient(retain)
        probe = self.sampled(retain, "retain")
        pools = [context.forget]
        if whole:
            labels = context.forget.labels
            rows = [(labels == row).nonzero().flatten() for row in context.forgotten_rows]
            pools = [context.forget.part(found) for found in rows]
        found = [self.edit(pool, rest, probe, target) for pool in pools if len(pool)]
        weights = named_weights(self.learner)
        with torch.no_grad():
            for edit, change in found:
                weights[edit.layer].add_(change)
        self.step_number = len(found)
        self.lineage = {"edits": [edit._asdict() for edit, _ in found], "target": target}

    def edit(
        self, forget: Pool, rest: dict[str, Tensor], probe: Pool, target: float
    ) -> tuple[Edit, Tensor]:
        """Find layer and step for one forget set; the student is the original before and after.

        Args:
            forget: To be forgotten.
            rest: Gradient of the images that stay, by tensor.
            probe: Images that stay, to judge by.
            target: Accuracy on the forget set at which it counts as forgotten.

        Returns:
            The edit, and what it adds to its tensor.
        """
        # Minus the cross-entropy is the loss, so along its gradient the step is an ascent.
        ascent = {name: -part for name, part in self.gradient(forget).items()}
        weights = named_weights(self.learner)
        names = [name for name, weight in weights.items() if weight.dim() > 1]
        names = [name for name in names if float(ascent[name].norm()) > 0]
        if not names:
            raise ConfigError("unlearner=slug found no layer with a gradient of the forget set.")
        sizes = torch.stack([weights[name].detach().norm() for name in names])
        steep = torch.stack([ascent[name].norm() for name in names])
        cosines = [
            torch.cosine_similarity(ascent[n].flatten(), rest[n].flatten(), 0) for n in names
        ]
        front = pareto(steep / sizes, torch.stack(cosines).abs())
        judged = self.sampled(forget, "forget")
        found: list[Edit] = []
        for row in front.tolist():
            name, weight = names[row], weights[names[row]]
            left = functools.partial(self.stepped, weight, ascent[name], judged)
            start = float(sizes[row] / (10 * steep[row]))
            size, accuracy = search(left, target, start, self.evaluations)
            kept = self.stepped(weight, ascent[name], probe, size)
            found.append(Edit(name, size, accuracy, kept))
        best = min(found, key=lambda edit: (max(edit.forget - target, 0.0), -edit.retain))
        return best, -best.size * ascent[best.layer]

    @torch.no_grad()
    def stepped(self, weight: Tensor, way: Tensor, pool: Pool, size: float) -> float:
        """Return the accuracy on a pool if one tensor made a step; it stays as it is."""
        before = weight.clone()
        weight.sub_(size * way)
        found = self.accuracy(pool)
        weight.copy_(before)
        return found

    def sampled(self, pool: Pool, purpose: str) -> Pool:
        """Return some images of a pool, to judge by."""
        order = torch.randperm(len(pool), generator=generator(self.seed, "slug probe", purpose))
        return pool.part(order[: self.probe].sort().values)


def pareto(importance: Tensor, alignment: Tensor) -> Tensor:
    """Return the layers that no other beats in both: more important, and less aligned.

    Args:
        importance: ``(L,)``.
        alignment: ``(L,)``.

    Returns:
        Rows, int64, in ascending order.

    Example:
        >>> pareto(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.5, 0.6, 0.1])).tolist()
        [0, 2]
    """
    beaten = (importance[:, None] < importance) & (alignment[:, None] > alignment)
    return (~beaten.any(1)).nonzero().flatten()


def search(
    metric: Callable[[float], float], target: float, start: float, evaluations: int
) -> tuple[float, float]:
    """Find a small step with a small metric: double until there is one, then bisect.

    Args:
        metric: Of a step.
        target: Largest metric that counts as found.
        start: First step.
        evaluations: How many steps may be tried.

    Returns:
        The smallest step tried that reaches the target, or the one with the smallest metric where
        none does; and its metric.

    Example:
        >>> search(lambda step: float(step < 5), 0.0, 1.0, 6)  # 1, 2, 4, 8, 6, 5
        (5.0, 0.0)
    """
    tried: dict[float, float] = {}
    low, high, step = 0.0, float("inf"), start
    for _ in range(evaluations):
        tried[step] = metric(step)
        if tried[step] <= target:
            high = step
        else:
            low = step
        step = 2 * low if high == float("inf") else (low + high) / 2
    return min(tried.items(), key=lambda pair: (max(pair[1] - target, 0.0), pair[0]))
