r"""The one base of all unlearners: what a method adds is its loss, or its closed-form edit.

A model is an encoder and a head, :math:`o = \Gamma(\Psi(x))`, here a learner of
:mod:`clfed.learners`. It was trained on :math:`D = D_f \cup D_r`; an unlearner makes of it one that
should answer as if :math:`D_f` had never been there.

Life of a request::

    check_request   refuse what cannot be served, before anything is trained
    bind            the student is a copy of the original, the teacher a frozen one
    prepare         statistics, masks, centroids, scores; no weight changes
    loss            of one batch of the declared pools, or solve() once
    should_stop     after every pass (or step), where the method has a rule
    finalize        outputs of classes that went are closed, statistics follow
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.learners.optimisers import OPTIMISERS, SCHEDULES, make_optimiser, rate_at
from clfed.seeding import generator
from clfed.unlearning import schedules
from clfed.unlearning.context import Context, History
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Pool
from clfed.unlearning.schedules import Batches, Schedule


class Unlearner(L.LightningModule):
    """A trained model, what may be looked at, and how it forgets.

    A method declares ``needs`` and ``schedule`` and overrides :meth:`loss`; a closed form declares
    ``schedule = "none"`` and overrides :meth:`solve`.

    Args:
        learner: The original. It is copied: ``self.learner`` is the student.
        name: What tables call the method.
        seed: Of everything random in the unlearning.
        epochs: Passes over the schedule.
        batch_size: Images a batch.
        lr: Largest learning rate.
        optimizer: ``adam`` or ``sgd`` (Nesterov momentum 0.9).
        weight_decay: Decay of the weights.
        lr_schedule: ``constant``, or ``cosine`` down to nearly zero at the last step.
        schedule: Another schedule than the method's own.
        ratio: Batches of the companion for each forget batch of a ``nested`` schedule, less one.
        retain_share: Share of the images that stay which the method may draw on.
        mask: Options of :class:`~clfed.unlearning.masks.Saliency`: change only the weights that
            matter for the forget set. None: all weights.
        proximal: Share of the coordinates that may differ at the end, see
            :class:`~clfed.unlearning.masks.SoftThreshold`. None: all.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    #: What the method may touch.
    needs: ClassVar[Need] = Need.FORGET
    #: Its schedule over the declared pools; ``none``: :meth:`solve`.
    schedule: str = "sequential"
    #: Whether an algorithm guarantees the result, see :attr:`scope` for of what.
    exact: bool = False
    #: What is as if the forget set had never been seen.
    scope: str = "outputs, approximately"
    #: Who answers afterwards: the ``head``, or the ``memory`` of class statistics.
    reads: ClassVar[str] = "head"
    #: When :meth:`should_stop` is asked: after each ``pass`` or each ``step``.
    stops_after: str = "pass"
    #: Whether the original must be of the method's own making, see :meth:`original`.
    own_original: ClassVar[bool] = False

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        name: str = "",
        seed: int = 0,
        epochs: int = 1,
        batch_size: int = 256,
        lr: float = 0.01,
        optimizer: str = "sgd",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        schedule: str | None = None,
        ratio: int = 0,
        retain_share: float = 1.0,
        mask: Mapping[str, Any] | None = None,
        proximal: float | None = None,
    ) -> None:
        super().__init__()
        if schedule is not None:
            self.schedule = schedule
        for option, value, known in (
            ("schedule", self.schedule, schedules.SCHEDULES),
            ("optimizer", optimizer, OPTIMISERS),
            ("lr_schedule", lr_schedule, SCHEDULES),
        ):
            if value not in known:
                raise ConfigError(f"Expected unlearner.{option} of {known}, got {value!r}.")
        if epochs < 0 or batch_size < 1 or ratio < 0 or lr <= 0 or weight_decay < 0:
            raise ConfigError(
                "An unlearner needs epochs >= 0, batch_size >= 1, ratio >= 0, lr > 0 and "
                f"weight_decay >= 0, got {epochs}, {batch_size}, {ratio}, {lr} and {weight_decay}."
            )
        if not 0 < retain_share <= 1 or not (proximal is None or 0 < proximal <= 1):
            raise ConfigError(
                "Expected unlearner.retain_share and unlearner.proximal in (0, 1], got "
                f"{retain_share} and {proximal}."
            )
        self.method, self.seed, self.epochs, self.batch_size = name, seed, epochs, batch_size
        self.lr, self.optimizer_kind, self.weight_decay = lr, optimizer, weight_decay
        self.lr_schedule, self.ratio, self.retain_share = lr_schedule, ratio, retain_share
        self.mask_options = None if mask is None else dict(mask)
        self.proximal = proximal
        self.learner = copy.deepcopy(learner)
        # Neither a module nor a parameter: no optimiser, no mode and no checkpoint reaches it.
        object.__setattr__(self, "_teacher", copy.deepcopy(learner).eval().requires_grad_(False))
        self.batches: Schedule | None = None
        self.step_number = 0
        #: What the report says of where the result comes from.
        self.lineage: dict[str, Any] = {}

    # What a method overrides ------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """Compute what the training needs; no weight changes."""

    def loss(self, batch: Batches) -> Tensor:
        """Return the loss of one batch, whose keys are the names of the pools in it."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def solve(self, context: Context) -> None:
        """Change ``self.learner`` in closed form."""
        raise NotImplementedError(f"{type(self).__name__} has no closed form.")

    def should_stop(self, context: Context) -> bool:
        """Whether to stop now."""
        return False

    def finalize(self, context: Context) -> None:
        """Close the outputs of classes that went as a whole, and drop what else knows of them.

        Class statistics, importances, frozen copies, images for replay and the state of an
        optimiser were all made with the forget set; of a learner with a head none of them is
        needed for an answer.
        """
        self.learner.retire(context.request.classes if context.request.kind == "class" else ())
        self.learner.memory, self.learner.buffer = None, None
        self.learner.kept, self.learner.optimiser_state = {}, {}
        self.learner.teacher = nn.ModuleDict()
        self.learner.drop_last()

    @classmethod
    def original(cls, history: History, settings: Mapping[str, Any]) -> ContinualLearner:
        """Train the original that the method starts from, where ``own_original`` is set.

        Args:
            history: Recipe, images and seed.
            settings: The unlearner's settings.
        """
        raise NotImplementedError(f"{cls.__name__} starts from any model.")

    # Pieces for methods -----------------------------------------------------------------------

    @property
    def teacher(self) -> ContinualLearner:
        """The original, frozen and in eval mode."""
        found: ContinualLearner = self.__dict__["_teacher"]
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Outputs ``(B, K)`` of the student before any of them is closed, in the present mode."""
        return self.outputs(self.learner.embed(images).float())

    def outputs(self, embeddings: Tensor) -> Tensor:
        """Outputs ``(B, K)`` of the student's head for embeddings ``(B, D)``."""
        return self.learner.scores(embeddings)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """Outputs ``(B, K)`` of the original."""
        return self.teacher.scores(self.teacher.embed(images).float())

    @torch.no_grad()
    def accuracy(self, pool: Pool) -> float:
        """Share of a pool's images that the student's open outputs get right; 0 of none."""
        if not len(pool):
            return 0.0
        answers = self.learner.scores_of(pool.images, closed=False).argmax(1)
        return float((answers == pool.labels).double().mean())

    def gradient(self, pool: Pool, *, learner: ContinualLearner | None = None) -> dict[str, Tensor]:
        r"""Gradient of the cross-entropy summed over a pool, in eval mode, by parameter name.

        .. math:: g = \nabla_\theta \sum_i \mathrm{CE}(\Gamma(\Psi(x_i)), y_i)

        Args:
            pool: Images and labels.
            learner: Of which model; the student when omitted.
        """
        model = self.learner if learner is None else learner
        was_training = model.training
        model.eval()
        weights = named_weights(model)
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for rows in torch.split(torch.arange(len(pool)), 256):
            images, labels, _ = pool.batch(rows)
            assert labels is not None
            with torch.enable_grad():
                logits = model.scores(model.embed(images).float())
                loss = F.cross_entropy(logits, labels, reduction="sum")
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, part in zip(weights, found, strict=True):
                if part is not None:
                    sums[name] += part
        model.train(was_training)
        return sums

    def rng(self, *purpose: str | int) -> torch.Generator:
        """Return a generator for one purpose in the present step."""
        return generator(self.seed, "unlearner", self.step_number, *purpose)

    # Life of a request ------------------------------------------------------------------------

    def bind(self, context: Context) -> None:
        """Take a request, and make the schedule.

        Raises:
            ConfigError: As :meth:`check_request`.
        """
        self.check_request(context)
        self.learner.requires_grad_(True)
        self.learner.teacher.requires_grad_(False)
        if self.schedule != "none":
            self.batches = Schedule(
                self.pools(context),
                self.schedule,
                batch_size=self.batch_size,
                ratio=self.ratio,
                seed=self.seed,
            )

    def check_request(self, context: Context) -> None:
        """Refuse a model, data or a request that the method cannot serve; nothing is computed.

        The model need not be trained yet.

        Raises:
            ConfigError: The model answers in a way that this method cannot change, or a declared
                pool is empty.
        """
        plain = type(self.learner).scores is ContinualLearner.scores
        if self.reads == "head" and not (plain and self.learner.classifier is None):
            raise ConfigError(
                f"unlearner={self.method or type(self).__name__} changes the outputs of a head, "
                f"but learner={self.learner.method or type(self.learner).__name__} answers from "
                "something else.",
                remedy="Choose unlearner=exact, or a learner with a head such as learner=naive.",
            )
        for need, pool, what in (
            (Need.RETAIN_X, context.retain, "images that stay"),
            (Need.OOD_X, context.ood, "images of another data set (job.ood)"),
        ):
            if need in self.needs and not len(pool):
                raise ConfigError(
                    f"unlearner={self.method or type(self).__name__} needs {what}, got none."
                )

    def pools(self, context: Context) -> dict[str, Pool]:
        """Return the pools of the schedule by name: ``forget``, then its companion."""
        found: dict[str, Pool] = {}
        if Need.FORGET_X in self.needs:
            found["forget"] = context.forget
        if Need.RETAIN_X in self.needs:
            found["retain"] = self.drawn(context.retain)
        elif Need.OOD_X in self.needs:
            found["ood"] = context.ood
        return found

    def drawn(self, pool: Pool) -> Pool:
        """Return the share of the images that stay which the method may draw on."""
        if self.retain_share >= 1:
            return pool
        size = max(1, round(self.retain_share * len(pool)))
        rows = torch.randperm(len(pool), generator=generator(self.seed, "retain share"))[:size]
        return pool.part(rows.sort().values)

    def training_step(self, batch: Batches, batch_idx: int) -> Tensor:
        """Loss of one batch, in float32 whatever the precision.

        Batch norm learns from batches with images that stay, or of another data set; forget
        images alone would shift its statistics and damage all classes.
        """
        self.learner.train(self.adapts(batch))
        self.step_number += 1
        return self.loss(batch)

    def adapts(self, batch: Batches) -> bool:
        """Whether batch norm follows this batch; where weights are masked only if they say so."""
        frozen = self.mask_options is not None and self.mask_options.get("freeze_norm", True)
        return not frozen and ("retain" in batch or "ood" in batch)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the student, with its schedule."""
        weights = list(named_weights(self.learner).values())
        optimiser = make_optimiser(
            self.optimizer_kind, [{"params": weights}], self.lr, self.weight_decay
        )
        if self.lr_schedule == "constant" or self.batches is None:
            return optimiser
        length = self.epochs * self.batches.steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: rate_at(step, self.lr_schedule, warmup=0, halve_every=2000, length=length),
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; that of the student follows each batch instead."""
        super().train(mode)
        self.learner.eval()
        return self


def named_weights(learner: ContinualLearner) -> dict[str, nn.Parameter]:
    """Return the parameters that make a learner's outputs, by name."""
    return {
        name: weight
        for name, weight in learner.named_parameters()
        if name.partition(".")[0] in ("backbone", "head")
    }


def other_labels(labels: Tensor, allowed: Tensor | Sequence[int], rng: torch.Generator) -> Tensor:
    """Draw for each label another one, uniformly among the allowed ones.

    Args:
        labels: ``(B,)`` int64.
        allowed: Rows to draw from; a label's own is left out.
        rng: Of the draws.

    Raises:
        ConfigError: Nothing else is allowed for some label.

    Example:
        >>> other_labels(torch.tensor([0, 1]), [0, 1], torch.Generator()).tolist()
        [1, 0]
    """
    choices = torch.as_tensor(allowed, dtype=torch.int64)
    weights = (choices != labels[:, None]).double()
    if len(labels) and float(weights.sum(1).min()) == 0:
        raise ConfigError("Expected at least one other class to relabel images with, got none.")
    if not len(labels):
        return labels
    return choices[torch.multinomial(weights, 1, generator=rng).squeeze(1)]
