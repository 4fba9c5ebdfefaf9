"""Data, models and requests of an unlearning experiment."""

from __future__ import annotations

import copy
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from clfed.config import build
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.surrogate import surrogates
from clfed.errors import ConfigError
from clfed.federated.field import open_benchmark
from clfed.learners.base import ContinualLearner
from clfed.learners.training import BaseTraining
from clfed.reporting.progress import Track
from clfed.scenarios.holdings import Holdings
from clfed.scenarios.streams import Experience
from clfed.seeding import derive_seed
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context, History, make_context
from clfed.unlearning.needs import Need
from clfed.unlearning.recipe import Recipe
from clfed.unlearning.requests import Request, resolve
from clfed.unlearning.running import forget
from clfed.unlearning.statistics import Statistics

if TYPE_CHECKING:
    from omegaconf import DictConfig

FEW = 50  # images of each kind that are enough to see whether things fit


class Stage:
    """Data, models and requests of one experiment, each made when it is first needed.

    Args:
        cfg: The resolved configuration.
        track: Progress bars.
    """

    def __init__(self, cfg: DictConfig, track: Track) -> None:
        self.cfg, self.track = cfg, track
        self.config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
        self.benchmark: Benchmark = open_benchmark(self.config["data"])
        holdings = build(self.config["scenario"], benchmark=self.benchmark, seed=cfg.seed)
        if not isinstance(holdings, Holdings):
            raise ConfigError(
                "job=unlearning needs scenario=holdings, got "
                f"{self.config['scenario'].get('_target_')}."
            )
        self.holdings = holdings
        self.recipe = Recipe(
            BaseTraining.from_config(cfg),
            self.benchmark,
            cache=Path(cfg.cache_dir).expanduser() / "models",
        )
        self.settings: dict[str, Any] = self.config["unlearner"]
        self.requests, self.gone = self._requests()
        self._originals: dict[int, tuple[ContinualLearner, float]] = {}

    @cached_property
    def unlearner_class(self) -> type[Unlearner]:
        """The class of the unlearner."""
        from hydra.utils import get_class

        target = self.settings.get("_target_")
        try:
            found = get_class(str(target))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"unlearner._target_ {target!r} cannot be used: {error}.") from error
        if not issubclass(found, Unlearner):
            raise ConfigError(f"{found.__name__} is not an unlearner.")
        return found

    @cached_property
    def seeds(self) -> dict[str, list[int]]:
        """Seeds of the originals, of the oracles and of the unlearner."""
        parts = {"original": "originals", "oracle": "oracles", "unlearning": "unlearnings"}
        return {
            part: [derive_seed(self.cfg.seed, part, i) for i in range(self.cfg.job[key])]
            for part, key in parts.items()
        }

    @cached_property
    def ood(self) -> Tensor | None:
        """Images of another data set; None where the unlearner takes none."""
        if Need.OOD_X not in self.unlearner_class.needs:
            return None
        shape = tuple(self.holdings.train.images.shape[1:])
        other = open_benchmark(self.config["job"]["ood"])
        return surrogates(other, shape, self.cfg.job.ood_images, self.cfg.seed)

    def check(self) -> None:
        """Refuse an unlearner that does not fit the model or the requests, on an untrained model.

        Raises:
            ConfigError: They do not fit together.
        """
        learner = self.recipe.fresh(self.holdings.train.classes, self.cfg.seed)
        for number, gone in enumerate(self.gone):
            stays = self.holdings.ids[~torch.isin(self.holdings.ids, torch.cat(self.gone))]
            few = torch.cat([gone[:FEW], stays[:FEW]])
            around = self.context(learner, number, 0, self.cfg.seed, only=few)
            made = self.unlearner(learner, 0)
            if not made.own_original:
                made.check_request(around.behind(made.needs))

    def _requests(self) -> tuple[list[Request], list[Tensor]]:
        found = build(
            self.config["forget"],
            holdings=self.holdings,
            seed=self.cfg.seed,
            original=lambda: self.original(self.seeds["original"][0])[0],
        )
        requests = cast(list[Request], found)
        gone: list[Tensor] = []
        before = torch.empty(0, dtype=torch.int64)
        for request in requests:
            gone.append(resolve(request, self.holdings, before))
            before = torch.cat([before, gone[-1]])
        return requests, gone

    def original(self, seed: int) -> tuple[ContinualLearner, float]:
        """Return the plain model of a seed and the seconds of its training."""
        return self.recipe.timed(self.holdings.train, seed)

    def start(self, seed: int) -> tuple[ContinualLearner, float]:
        """Return the model that the unlearner starts from, and the seconds of its training."""
        if not self.unlearner_class.own_original:
            return self.original(seed)
        if seed not in self._originals:
            began = time.perf_counter()
            history = History(self.recipe.train, self.holdings.train, self.holdings.ids, seed)
            made = self.unlearner_class.original(history, self.settings)
            self._originals[seed] = (made, time.perf_counter() - began)
        return self._originals[seed]

    def staying(self, number: int) -> ImageSet:
        """Return the training images that stay after the first ``number + 1`` requests."""
        gone = torch.cat(self.gone[: number + 1])
        return self.holdings.train.subset(~torch.isin(self.holdings.ids, gone))

    def oracle(self, number: int, seed: int) -> tuple[ContinualLearner, float]:
        """Return a model trained without the data of the first requests, and its seconds."""
        return self.recipe.timed(self.staying(number), seed)

    def carried_out(self, model: ContinualLearner, number: int, seed: int) -> ContinualLearner:
        """Return what a model becomes by the first ``number + 1`` requests."""
        for index in range(number + 1):
            around = self.context(model, index, seed, seed)
            model, _ = forget(self.unlearner(model, seed), around, self.recipe.parts.trainer)
        return model

    def unlearned(
        self, model: ContinualLearner, images: ImageSet, gone: Tensor, stays: Tensor, number: int
    ) -> ContinualLearner:
        """Return what a shadow model becomes when it forgets some of its own training images.

        Args:
            model: Trained on the images at ``gone`` and at ``stays``.
            images: All images that shadow models are trained on.
            gone: ``(M,)`` int64 positions.
            stays: ``(N,)`` int64 positions.
            number: Of the request that stands for what is asked.
        """
        samples = Request("shadow", "sample", samples=tuple(gone.tolist()))
        request = self.requests[number] if self.requests[number].kind == "class" else samples
        ids = torch.cat([gone, stays])
        around = self._around(
            request,
            model,
            images.subset(ids),
            ids,
            owners=["shadow"] * len(ids),
            gone=gone,
            number=number,
            learner_seed=model.seed,
            seed=derive_seed(model.seed, "unlearning"),
        )
        return forget(self.unlearner(model, around.seed), around, self.recipe.parts.trainer)[0]

    def unlearner(self, learner: ContinualLearner, seed: int) -> Unlearner:
        """Return the unlearner with a copy of a model."""
        made = build(self.settings, learner=learner, seed=seed)
        return cast(Unlearner, made)

    def context(
        self,
        learner: ContinualLearner,
        number: int,
        seed: int,
        original: int,
        *,
        only: Tensor | None = None,
    ) -> Context:
        """Return what a request means for a model.

        Args:
            learner: The model; data of earlier requests are gone already.
            number: Of the request.
            seed: Of the unlearning.
            original: Seed of the model that the sequence began with.
            only: Ids of the training images to take; None: all that are still there.
        """
        before = torch.cat([self.holdings.ids[:0], *self.gone[:number]])
        there = ~torch.isin(self.holdings.ids, before)
        if only is not None:
            there &= torch.isin(self.holdings.ids, only)
        names = self.holdings.contributors
        return self._around(
            self.requests[number],
            learner,
            self.holdings.train.subset(there),
            self.holdings.ids[there],
            owners=[names[owner] for owner in self.holdings.owners[there].tolist()],
            gone=self.gone[number],
            number=number,
            learner_seed=original,
            seed=seed,
        )

    def _around(
        self,
        request: Request,
        learner: ContinualLearner,
        images: ImageSet,
        ids: Tensor,
        *,
        owners: list[str],
        gone: Tensor,
        number: int,
        learner_seed: int,
        seed: int,
    ) -> Context:
        statistics = None
        if learner.moments is not None and Need.CLASS_STATS in self.unlearner_class.needs:
            statistics = Statistics.of(_counted(learner, images), images, ids, owners)
        return make_context(
            request,
            learner,
            images,
            ids,
            gone=gone,
            ood=self.ood,
            validation=self.staying_classes(self.holdings.validation, number),
            statistics=statistics,
            train=self.recipe.train,
            learner_seed=learner_seed,
            seed=seed,
        )

    def reading(self, learner: ContinualLearner) -> ContinualLearner:
        """Return a model that answers the way the unlearner's result does."""
        if self.unlearner_class.reads == "head" or learner.classifier is not None:
            return learner
        reader = copy.deepcopy(learner)
        reader.classifier = {"name": "ncm"}
        return reader

    def trained(
        self, images: ImageSet, seed: int, *, start: ContinualLearner | None = None
    ) -> ContinualLearner:
        """Return a model of the recipe that answers the way the unlearner's result does."""
        return self.reading(self.recipe.train(images, seed, start=start))

    def part(self, ids: Tensor) -> ImageSet:
        """Return the training images of some ids."""
        return self.holdings.train.subset(torch.isin(self.holdings.ids, ids))

    def closed_classes(self, number: int) -> set[str]:
        """Return the classes that went as a whole with the first requests."""
        asked = self.requests[: number + 1]
        return {name for r in asked if r.kind == "class" for name in r.classes}

    def staying_classes(self, images: ImageSet, number: int) -> ImageSet:
        """Return the images of classes that the first requests did not take as a whole."""
        return of_classes(images, self.closed_classes(number), inside=False)

    def others(self, number: int) -> ImageSet:
        """Return held-out images of the kind that went: what non-members of an attack are."""
        request = self.requests[number]
        if request.kind != "class":
            return self.staying_classes(self.holdings.validation, number)
        return of_classes(self.holdings.validation, set(request.classes), inside=True)


def of_classes(images: ImageSet, classes: set[str], *, inside: bool) -> ImageSet:
    """Return the images of some classes, or those of all others; class names stay."""
    mask = torch.tensor([(name in classes) is inside for name in images.classes])
    return images.subset(mask[images.labels])


def _counted(learner: ContinualLearner, images: ImageSet) -> ContinualLearner:
    """Return a learner with class statistics; who holds the images counts where they are gone."""
    if learner.memory is not None:
        return learner
    counted = copy.deepcopy(learner)
    counted.length = 0
    counted.observe(Experience(learner.number, images, phase=learner.number))
    return counted
