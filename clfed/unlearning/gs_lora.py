r"""Forgetting with group-sparse low-rank adapters (GS-LoRA, Zhao et al. 2024, arXiv 2403.11530).

The network is frozen; low-rank adapters of its layers learn

.. math:: L = \beta\, \mathrm{ReLU}(\mathrm{BND} - \mathrm{CE}(D_f)) + \mathrm{CE}(D_r')
          + \alpha \sum_g \lVert (A_g, B_g) \rVert_F

where :math:`D_r'` is a small share of the images that stay and a group :math:`g` is what one block
of the network has in adapters. Afterwards the adapters are folded into the weights, so that
requests can follow one another.

Where we take a side:

* The paper adapts the two linear layers in the blocks of a transformer. Here every linear layer
  and every convolution has an adapter, so that any network will do.
* Public code adds the group lasso to the loss, and a gradient never reaches zero. Here each step
  ends with its proximal map, :math:`v_g \leftarrow (1 - \eta \alpha / \lVert v_g \rVert)_+ v_g`,
  which makes whole groups exactly zero; such a block is as it was, and stays so.
* The paper's BND fits cosine outputs times 64. For a plain softmax over :math:`K` classes
  :math:`2 \ln K` is as wrong as twice a guess, which suits a class that goes. Where samples of
  classes go that stay, the aim is not to be wrong but to be as for unseen images: there BND is the
  original's cross-entropy on held-out images, and the training ends once the forget set is
  answered no better than these.
* The head is frozen with the rest, and batch norm keeps its statistics.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import generator
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.lora import LowRank, attach, blocks, fold
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Pool
from clfed.unlearning.schedules import Batches


class GroupSparseLora(Unlearner):
    r"""Train low-rank adapters to forget, as few of them as will do.

    Args:
        learner: The original.
        rank: Of the adapters.
        beta: :math:`\beta`, weight of the forgetting.
        bound: BND; None: :math:`2 \ln K` for classes, the held-out cross-entropy otherwise.
        alpha: :math:`\alpha`, weight of the group lasso.
        warmup: Share of the steps without the group lasso.
        ema: Decay of the running average of the adapters that is taken at the end; 0: none.
        ema_start: Share of the steps after which the average begins.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option is out of range, or weights are masked as well.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN | Need.EVAL
    schedule = "zip"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        rank: int = 8,
        beta: float = 0.15,
        bound: float | None = None,
        alpha: float = 1e-4,
        warmup: float = 0.25,
        ema: float = 0.9,
        ema_start: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        if rank < 1 or beta < 0 or alpha < 0 or (bound is not None and bound < 0):
            raise ConfigError(
                "Expected unlearner.rank >= 1 and beta, alpha and bound >= 0, got "
                f"{rank}, {beta}, {alpha} and {bound}."
            )
        if not (0 <= warmup <= 1 and 0 <= ema < 1 and 0 <= ema_start <= 1):
            raise ConfigError(
                "Expected unlearner.warmup and ema_start in [0, 1] and ema in [0, 1), got "
                f"{warmup}, {ema_start} and {ema}."
            )
        if self.schedule not in ("zip", "nested"):
            raise ConfigError(
                "Expected unlearner.schedule of zip and nested, where every batch has both images "
                f"that go and images that stay, got {self.schedule!r}."
            )
        if self.mask_options is not None or self.proximal is not None:
            raise ConfigError(
                "Low-rank adapters change a weight as a whole, which unlearner.mask and "
                "unlearner.proximal would undo.",
                remedy="Leave both out, or choose unlearner=salun.",
            )
        self.rank, self.beta, self.alpha, self.warmup = rank, beta, alpha, warmup
        self.given_bound, self.bound, self.held_out = bound, 0.0, 0.0
        self.ema, self.ema_start = ema, ema_start
        #: Adapters by block.
        self.groups: list[list[LowRank]] = []
        self._average: list[Tensor] = []

    def prepare(self, context: Context) -> None:
        """Set the bound, freeze the model and attach adapters."""
        self.whole_class = context.request.kind == "class"
        if self.whole_class:
            self.bound = 2 * math.log(len(self.learner.classes))
        else:
            self.bound = self.look_at_held_out(context.validation)
        if self.given_bound is not None:
            self.bound = self.given_bound
        network = self.learner.backbone
        names = blocks(network)
        self.learner.requires_grad_(False)
        adapters = attach(network, self.rank, generator(self.seed, "unlearner", "adapters"))
        self.groups = [[adapters[name] for name in group] for group in names]

    def loss(self, batch: Batches) -> Tensor:
        """Bounded ascent on what goes, cross-entropy of what stays."""
        forget, retain = batch["forget"], batch["retain"]
        assert forget.labels is not None and retain.labels is not None
        here, there = self.logits(forget.images), self.logits(retain.images)
        return self.of_outputs(here, forget.labels, there, retain.labels)

    def of_outputs(self, here: Tensor, goes: Tensor, there: Tensor, stays: Tensor) -> Tensor:
        """Loss of outputs ``(B, K)`` and labels ``(B,)``: of what goes, then of what stays."""
        wrong = F.cross_entropy(here, goes)
        return self.beta * F.relu(self.bound - wrong) + F.cross_entropy(there, stays)

    def adapts(self, batch: Batches) -> bool:
        """Never: the network is frozen, its statistics too."""
        return False

    def on_train_batch_end(self, outputs: Any, batch: Batches, batch_idx: int) -> None:
        """Shrink the groups, and take the running average."""
        if self.progress > self.warmup:
            self.shrink(self.alpha * float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        if self.ema and self.progress > self.ema_start:
            self.average()

    @property
    def progress(self) -> float:
        """Share of the steps that are done."""
        return self.step_number / max(1, self.epochs * (self.batches.steps if self.batches else 0))

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        r"""Apply the proximal map of ``amount`` times the sum of the groups' norms."""
        for group, norm in zip(self.groups, self.norms(), strict=True):
            factor = F.relu(norm - amount) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            for adapter in group:
                adapter.a.mul_(factor)
                adapter.b.mul_(factor)

    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        """Frobenius norm of each group's matrices together."""
        values = [[p.flatten() for a in group for p in a.parameters()] for group in self.groups]
        return [torch.cat(parts).norm() for parts in values]

    @torch.no_grad()
    def average(self) -> None:
        """Let the running average take in the present adapters."""
        values = self._values()
        if not self._average:
            self._average = [value.clone() for value in values]
        for mean, value in zip(self._average, values, strict=True):
            mean.lerp_(value, 1 - self.ema)

    def look_at_held_out(self, pool: Pool) -> float:
        """Return the original's mean cross-entropy on held-out images; keep its accuracy.

        Raises:
            ConfigError: There are none.
        """
        if not len(pool):
            raise ConfigError(
                f"unlearner={self.method} needs held-out images to know how samples are answered "
                "that were never seen, got none.",
                remedy="Choose a scenario that holds images out of the training.",
            )
        self.held_out = self.accuracy(pool)
        scores = self.teacher.scores_of(pool.images, closed=False)
        return float(F.cross_entropy(scores, pool.labels))

    def should_stop(self, context: Context) -> bool:
        """Whether samples that go are answered no better than held-out images."""
        stops = not self.whole_class and self.accuracy(context.forget) <= self.held_out
        if stops:  # on what was judged, not on an average that lags behind
            self._average = []
        return stops

    def finalize(self, context: Context) -> None:
        """Take the average, fold the adapters into the weights, and thaw the model."""
        with torch.no_grad():
            for value, mean in zip(self._values(), self._average, strict=False):
                # A group that the lasso has closed stays closed: its average would not be zero.
                value.copy_(mean * bool(value.any()))
        alive = sum(bool(norm) for norm in self.norms())
        self.lineage = {"bound": self.bound, "groups": len(self.groups), "groups changed": alive}
        fold(self.learner.backbone)
        self.groups, self._average = [], []
        self.learner.requires_grad_(True)
        super().finalize(context)

    def _values(self) -> list[Tensor]:
        return [value.data for group in self.groups for a in group for value in a.parameters()]
