r"""Sequence-aware sharded and sliced training: exact unlearning without training.

S3T is by Basu Roy Chowdhury et al. 2024 (arXiv 2406.16257).

A frozen network carries low-rank adapters, one group a slice, from the output down to the input.
Stage :math:`i` trains the :math:`i`-th group and a head on the first :math:`i` slices of an order,
starting from stage :math:`i - 1`, and touches nothing else. So whatever stage :math:`i` made is a
function of its first :math:`i` slices, and when a sample of slice :math:`j` goes, switching off
group :math:`j` and all later ones and taking the head of stage :math:`j - 1` gives the model that
never saw slice :math:`j`: no training, bit for bit. Each shard has several orders of its slices
(:mod:`clfed.unlearning.sequences`) and answers by the one that is left with most stages. When no
order of any shard is left, everything is trained again on what stays.

Limits, all of them the method's own:

* The frozen network must never have seen the data. It is the recipe's network before its first
  image: pretrained on public images where the backbone is (``backbone=torchvision
  backbone.weights=DEFAULT``), else of random weights, on which adapters reach less. If the public
  images hold some of the data, the guarantee does not cover them.
* Heads are kept for every stage, and batch norm keeps the statistics of the frozen network: a head
  or a statistic that all stages shared would remember later slices.
* Every order is one training, so a budget of :math:`B` costs :math:`B` times as much beforehand.
* A request that meets the first slices of all orders leaves nothing. A whole class does, and so do
  ten percent of all samples at random; then the cost is that of training again. The method is made
  for single samples that come one by one: see
  :func:`~clfed.unlearning.sequences.expected_deletions` for how many.
* Public code keeps the state that does best on test images; here the last one counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from clfed.errors import ConfigError, NotEnoughData
from clfed.learners.base import ContinualLearner
from clfed.learners.surroundings import threads
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context, History
from clfed.unlearning.needs import Need
from clfed.unlearning.sequences import expected_deletions
from clfed.unlearning.shards import serving, together_of
from clfed.unlearning.stages import Plan, Stages


class S3T(Unlearner):
    r"""Switch off what saw the slices of the samples that go.

    Args:
        learner: An original of :meth:`original`.
        shards: :math:`m`.
        slices: :math:`L`.
        budget: :math:`B`, orders of the slices in each shard.
        selection: ``cyclic`` (all slices are hit alike), ``bipartite`` or ``conditional``.
        risks: How likely each slice is hit, up to a factor; None: all alike.
        rank: Of the adapters.
        alpha: Scale of the adapters, see :class:`~clfed.unlearning.stages.Plan`.
        combine: ``mean`` of the shards' probabilities, or ``vote``.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`; those of the training are of
            a stage of the original.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    needs: ClassVar[Need] = Need.RETAIN | Need.HISTORY
    schedule = "none"
    exact = True
    scope = "adapters and heads; the network below them never saw any of the data"
    own_original: ClassVar[bool] = True

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        shards: int = 1,
        slices: int = 4,
        budget: int = 4,
        selection: str = "cyclic",
        risks: Sequence[float] | None = None,
        rank: int = 16,
        alpha: float = 16.0,
        combine: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        self.plan = Plan(
            shards=shards,
            slices=slices,
            budget=budget,
            selection=selection,
            risks=None if risks is None else tuple(risks),
            rank=rank,
            alpha=alpha,
            combine=combine,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer_kind,
            weight_decay=self.weight_decay,
            lr_schedule=self.lr_schedule,
        )

    @classmethod
    def original(cls, history: History, settings: Mapping[str, Any]) -> ContinualLearner:
        """Train all orders of all shards, on one thread so that the bits never depend on more.

        Raises:
            ConfigError: The network has fewer blocks than there are slices.
            NotEnoughData: No order has an image in its first slice.
        """
        return cls._trained(history, Plan.of(settings))[0]

    @classmethod
    def _trained(cls, history: History, plan: Plan) -> tuple[ContinualLearner, int]:
        """Return a new model and the steps of its training."""
        nothing = torch.zeros(0, dtype=torch.int64)
        start = history.train(history.images.subset(nothing), history.seed)
        images = history.images
        with threads(1):
            dim = start.embed_all(images.images[:1]).shape[1]
            stages = Stages(plan, history.seed, start.backbone, len(images.classes), dim)
            steps = stages.learn(start, images, history.ids)
        if not bool(stages.depths.any()):
            raise NotEnoughData(
                f"Expected images in the first slice of some order, got {len(images)} images."
            )
        return serving(stages, start, images.classes, "s3t", history.seed), steps

    def bind(self, context: Context) -> None:
        """Take a request for a model of :meth:`original`."""
        together_of(self.learner, Stages, "s3t")
        super().bind(context)

    def solve(self, context: Context) -> None:
        """Switch off; where nothing is left, train again on what stays.

        Raises:
            ConfigError: Nothing is left, and the model comes without its recipe.
        """
        stages = together_of(self.learner, Stages, "s3t")
        plan, gone, before = stages.plan, context.forget.ids, stages.depths
        hit = stages.forget(gone)
        again = not bool(stages.depths.any())
        if again:
            history = context.history
            if history is None:
                raise ConfigError("unlearner=s3t has no stage left and no recipe to train again.")
            for need in (Need.RETAIN_X, Need.RETAIN_Y):
                context.guard.touch(need, context.retain.ids)
            stays = ~torch.isin(history.ids, gone)
            kept = History(history.train, history.without(gone), history.ids[stays], history.seed)
            self.learner, self.step_number = self._trained(kept, plan)
            stages = together_of(self.learner, Stages, "s3t")
        stages.check_without(gone)
        self.lineage = {
            "slices hit": hit.nonzero().tolist(),
            "stages before": before.tolist(),
            "stages left": stages.depths.tolist(),
            "trained again": again,
            "deletions that the orders outlive on average": expected_deletions(
                plan.shards, plan.slices, plan.budget
            ),
        }
