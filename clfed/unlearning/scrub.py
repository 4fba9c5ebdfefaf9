r"""SCRUB (Kurmanji et al. 2023, arXiv 2302.09880): disobey the original on what goes.

.. math:: L_{max} = -T^2\, \mathrm{KL}(p_o^T \,\|\, p^T) \text{ on } D_f, \qquad
          L_{min} = \gamma\, \mathrm{CE}(p, y) + \alpha T^2\, \mathrm{KL}(p_o^T \,\|\, p^T)
          \text{ on } D_r

Each of the first ``max_passes`` passes goes through the images that go and then through the rest;
later ones go through the rest alone. Two settings are published, for large and small data sets:

* large: SGD 5e-4, :math:`\gamma = 0.99, \alpha = 0.001, T = 4`, 2 of 3 passes;
* small: Adam 5e-4, decay 0.1, :math:`\gamma = 1, \alpha = 0.5, T = 2`, 3 of 10 passes, batches of
  32 images that stay and of 64 that go.

With ``rewind`` (SCRUB+R) the model of that pass is returned whose accuracy on what goes is nearest
to the final model's on held-out images of the same classes: images that are known no better than
unseen ones give nobody away. A class that goes as a whole should not be recognised at all, so
there the last model is returned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.losses import soft_divergence
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.schedules import Batches, Schedule


class Scrub(Unlearner):
    r"""Move away from the original on what goes, stay near it on the rest.

    Args:
        learner: The original.
        max_passes: Passes that begin with the images that go.
        forget_batch_size: Of these images; None: as of the others.
        gamma: :math:`\gamma`.
        alpha: :math:`\alpha`.
        temperature: :math:`T`.
        rewind: Whether to return the model of an earlier pass, see above.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN | Need.EVAL
    schedule = "sequential"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        max_passes: int = 2,
        forget_batch_size: int | None = None,
        gamma: float = 0.99,
        alpha: float = 0.001,
        temperature: float = 4.0,
        rewind: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if gamma < 0 or alpha < 0 or temperature <= 0:
            raise ConfigError(
                "Expected unlearner.gamma and alpha >= 0 and temperature > 0, got "
                f"{gamma}, {alpha} and {temperature}."
            )
        if max_passes < 0 or (forget_batch_size is not None and forget_batch_size < 1):
            raise ConfigError(
                "Expected unlearner.max_passes >= 0 and forget_batch_size >= 1 (or null), got "
                f"{max_passes} and {forget_batch_size}."
            )
        self.max_passes, self.forget_batch_size = max_passes, forget_batch_size
        self.gamma, self.alpha, self.temperature = gamma, alpha, temperature
        self.rewind = rewind
        #: Accuracy on what goes after each pass, and the model that has it.
        self.checkpoints: list[tuple[float, dict[str, Any]]] = []

    def bind(self, context: Context) -> None:
        """Take a request, with passes of the two kinds."""
        super().bind(context)
        self.batches = MaxFirst(
            self.pools(context),
            batch_size=self.batch_size,
            forget_batch_size=self.forget_batch_size or self.batch_size,
            max_passes=self.max_passes,
            seed=self.seed,
        )

    def loss(self, batch: Batches) -> Tensor:
        """Flee from the original's answers, or follow labels and answers."""
        part = batch["forget" if "forget" in batch else "retain"]
        logits = self.logits(part.images)
        distance = self.temperature**2 * soft_divergence(
            self.teacher_logits(part.images), logits, self.temperature
        )
        if "forget" in batch:
            return -distance
        assert part.labels is not None
        return self.gamma * F.cross_entropy(logits, part.labels) + self.alpha * distance

    def should_stop(self, context: Context) -> bool:
        """Keep the model of this pass; never stop."""
        if self.rewind and context.request.kind != "class":
            weights = copy.deepcopy(self.learner.state_dict())
            self.checkpoints.append((self.accuracy(context.forget), weights))
        return False

    def finalize(self, context: Context) -> None:
        """Rewind, where asked for."""
        if self.checkpoints:
            wanted = self.unseen(context)
            gaps = torch.tensor([abs(found - wanted) for found, _ in self.checkpoints])
            best = int(gaps.argmin())
            self.learner.load_state_dict(self.checkpoints[best][1])
            self.lineage = {"pass": best + 1, "held-out accuracy": wanted}
        super().finalize(context)

    def unseen(self, context: Context) -> float:
        """Accuracy on held-out images, weighted to the classes of those that go.

        Raises:
            ConfigError: None of these classes has a held-out image.
        """
        rows, held = len(self.learner.classes), context.validation
        shares = torch.bincount(context.forget.labels, minlength=rows).double()
        weights = (shares / torch.bincount(held.labels, minlength=rows).clamp(min=1))[held.labels]
        if not float(weights.sum()):
            raise ConfigError(
                "unlearner.rewind=true needs held-out images of the classes that go, got none."
            )
        right = self.learner.scores_of(held.images, closed=False).argmax(1) == held.labels
        return float((weights * right).sum() / weights.sum())


class MaxFirst(Schedule):
    """All of ``forget`` and then all of ``retain`` in the first passes, ``retain`` alone later.

    Args:
        pools: ``forget`` and ``retain``.
        batch_size: Retain images a batch.
        forget_batch_size: Forget images a batch.
        max_passes: Passes of the first kind.
        seed: Decides every order.
    """

    def __init__(
        self,
        pools: dict[str, Any],
        *,
        batch_size: int,
        forget_batch_size: int,
        max_passes: int,
        seed: int,
    ) -> None:
        super().__init__(pools, "sequential", batch_size=batch_size, seed=seed)
        self.forget_batch_size, self.max_passes = forget_batch_size, max_passes

    def __iter__(self) -> Iterator[Batches]:
        number, self.passes = self.passes, self.passes + 1
        forget, retain = self.pools["forget"], self.pools["retain"]
        if number < self.max_passes:
            order = torch.cat(self._orders("forget", number))
            for rows in torch.split(order, self.forget_batch_size):
                yield {"forget": forget.batch(rows)}
        for rows in self._orders("retain", number):
            yield {"retain": retain.batch(rows)}
