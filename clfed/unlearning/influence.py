r"""Influence unlearning: one Newton step away from the forget set (Izzo et al. 2021).

.. math:: \theta_u = \theta_o + \alpha F^{-1} v, \qquad
          v = \frac{g_f}{n} - \frac{n_f}{n\, n_r} g_r

with :math:`n = n_f + n_r` and the gradients :math:`g` summed over forget and retain set at
:math:`\theta_o`, in eval mode. For :math:`F^{-1} v` there are two ways, from the gradients
:math:`g_1, \dots, g_N` of single images that stay:

* ``woodbury``: the damped empirical Fisher matrix, which is what WoodFisher (Singh & Alistarh 2020,
  arXiv 2004.14340) computes one image after another, solved as one system of size :math:`N`,

  .. math:: F = \lambda I + \tfrac{1}{N} \sum_i g_i g_i^\top, \qquad
            F^{-1} v = \tfrac{1}{\lambda} (v - G^\top (N \lambda I + G G^\top)^{-1} G v);

* ``recursion``: that of the public code of Jia et al. 2023 (arXiv 2304.04934), :math:`k = v` and
  :math:`o = g_1`, then for each later :math:`g`

  .. math:: k \leftarrow k - \frac{k^\top g}{N + o^\top g}\, o, \qquad
            o \leftarrow o - \frac{o^\top g}{N + o^\top g}\, o .

  It never takes in another image's direction than the first one's, so that :math:`k - v` stays a
  multiple of :math:`g_1`: hardly an inverse, but what published tables were made with. It needs
  memory for a few gradients only, the other way for all :math:`N`.

The branch of that code for ImageNet sums the gradient of "what stays" over the *forget* loader, and
sets :math:`N = 300\,000` whatever is summed; we take the retain set and the true number.

With a mask the change is multiplied by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import generator
from clfed.unlearning.base import Unlearner, named_weights
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Pool

INVERSES = ("recursion", "woodbury")
CHUNK = 50


class Influence(Unlearner):
    r"""Move the weights by what the forget set contributed to them, to first order.

    Args:
        learner: The original.
        alpha: :math:`\alpha`, length of the step; 1 is Newton's.
        samples: :math:`N`, single images that stay, at most all of them.
        inverse: ``recursion`` or ``woodbury``.
        damping: :math:`\lambda` of ``woodbury``.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN
    schedule = "none"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        alpha: float = 1.0,
        samples: int = 1000,
        inverse: str = "recursion",
        damping: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if inverse not in INVERSES:
            raise ConfigError(f"Expected unlearner.inverse of {INVERSES}, got {inverse!r}.")
        if alpha < 0 or samples < 1 or damping <= 0:
            raise ConfigError(
                "Expected unlearner.alpha >= 0, unlearner.samples >= 1 and unlearner.damping > 0, "
                f"got {alpha}, {samples} and {damping}."
            )
        self.alpha, self.samples, self.inverse, self.damping = alpha, samples, inverse, damping

    @torch.no_grad()
    def solve(self, context: Context) -> None:
        """Take the step."""
        retain = self.drawn(context.retain)
        removed, kept = len(context.forget), len(retain)
        total = removed + kept
        forgotten, stays = (flat(self.gradient(pool)) for pool in (context.forget, retain))
        direction = forgotten / total - stays * (removed / (total * kept))
        rng = generator(self.seed, "unlearner", "influence")
        rows = torch.randperm(kept, generator=rng)[: self.samples]
        gradients = single_gradients(self.learner, retain.part(rows))
        if self.inverse == "recursion":
            step = recursion(direction, gradients, len(rows))
        else:
            step = woodbury(direction, torch.cat([*gradients]), self.damping)
        weights = named_weights(self.learner)
        parts = torch.split(step, [weight.numel() for weight in weights.values()])
        for weight, part in zip(weights.values(), parts, strict=True):
            weight.add_(part.view_as(weight), alpha=self.alpha)
        self.lineage = {"images": len(rows), "step": self.alpha * float(step.norm())}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """Return gradients of all weights as one vector ``(P,)``."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def recursion(vector: Tensor, gradients: Iterator[Tensor], count: int) -> Tensor:
    """Apply the public code's recursion.

    Args:
        vector: ``(P,)``.
        gradients: Chunks ``(B, P)`` of single images' gradients.
        count: How many there are in all.
    """
    rows = (row for chunk in gradients for row in chunk)
    result, other = vector.clone(), next(rows).clone()
    for row in rows:
        along = other @ row
        result -= (result @ row) / (count + along) * other
        other -= along / (count + along) * other
    return result


def woodbury(vector: Tensor, gradients: Tensor, damping: float) -> Tensor:
    """Solve with the damped mean of outer products.

    Args:
        vector: ``(P,)``.
        gradients: ``(N, P)``.
        damping: Added to the diagonal.
    """
    gram = (gradients @ gradients.T).double()
    gram.diagonal().add_(len(gradients) * damping)
    inner = torch.linalg.solve(gram, (gradients @ vector).double())
    solved: Tensor = (vector - gradients.T @ inner.to(vector.dtype)) / damping
    return solved


def single_gradients(learner: ContinualLearner, pool: Pool) -> Iterator[Tensor]:
    """Yield the gradients of single images' cross-entropy, ``(B, P)`` a chunk, in eval mode."""
    learner.eval()
    model = _Answers(learner)
    weights = {f"learner.{name}": value.detach() for name, value in named_weights(learner).items()}

    def loss(at: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, at, (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for rows in torch.split(torch.arange(len(pool)), CHUNK):
        images, labels, _ = pool.batch(rows)
        assert labels is not None
        found = each(weights, learner.transform(images), labels)
        yield torch.cat([part.flatten(1) for part in found.values()], 1)


class _Answers(nn.Module):
    # Open outputs for inputs that are already transformed, as a module to be called functionally.
    def __init__(self, learner: ContinualLearner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.learner.scores(self.learner.backbone(inputs))
