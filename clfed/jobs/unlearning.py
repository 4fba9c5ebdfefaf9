"""Unlearning: is it as if the model had never seen the forget set, and what did that cost?

Models are trained on everything, an unlearner makes them forget, and the result is compared with
models that were trained, by the same recipe, without what was to be forgotten. Test images choose
nothing: no stop, no step, no setting.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812
import torch
from omegaconf import OmegaConf
from torch import Tensor

from clfed.config import build
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.surrogate import surrogates
from clfed.errors import ConfigError
from clfed.evaluation.evidence import Sheet, answers, evidence
from clfed.federated.field import open_benchmark
from clfed.jobs.run import open_run
from clfed.jobs.settings import check_unlearning
from clfed.learners.base import ContinualLearner
from clfed.learners.tables import rows_of
from clfed.learners.training import BaseTraining
from clfed.reporting.progress import Track, progress
from clfed.scenarios.holdings import Holdings
from clfed.scenarios.streams import Experience
from clfed.seeding import derive_seed
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context, History, make_context
from clfed.unlearning.needs import Need
from clfed.unlearning.recipe import Recipe
from clfed.unlearning.report import Report
from clfed.unlearning.requests import Request, resolve
from clfed.unlearning.running import forget
from clfed.unlearning.statistics import Statistics

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True, eq=False)
class Outcome:
    """One request through one unlearner.

    Attributes:
        request: What was asked.
        gone: ``(M,)`` int64 ids that went with it.
        original_seed: Of the model at the start of the sequence.
        unlearning_seed: Of the unlearner.
        before: The model that it was given.
        after: The model that has forgotten.
        report: The unlearner's account, its seconds without those of looking.
        evidence: Measures by name.
        sheet: What ``after`` answered.
        trace: Accuracies along the run.
        earlier: Accuracy on what earlier requests made go, None for the first.
    """

    request: Request
    gone: Tensor
    original_seed: int
    unlearning_seed: int
    before: ContinualLearner
    after: ContinualLearner
    report: Report
    evidence: dict[str, float]
    sheet: Sheet
    trace: list[dict[str, float]]
    earlier: float | None


def run(cfg: DictConfig) -> Path:
    """Run the whole experiment and return its run folder.

    Args:
        cfg: The resolved configuration.

    Raises:
        ClfedError: Anything that the user can mend.
    """
    check_unlearning(cfg)
    # Before the run folder: what is refused here must not cost the results of an earlier run.
    with progress() as track:
        stage = Stage(cfg, track)
        stage.check()
    with open_run(cfg) as run:
        stage.track = run.track
        outcomes = stage.play()
        from clfed.jobs.unlearning_summary import report

        report(cfg, run, stage, outcomes)
        return run.folder.path


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
        self._sheets: dict[tuple[object, ...], Sheet] = {}

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
        for number in range(len(self.requests)):
            around = self._context(learner, number, 0, None)
            made = self._unlearner(learner, 0)
            if not made.own_original:
                made.bind(around.behind(made.needs))

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

    def play(self) -> list[Outcome]:
        """Train what is missing, then let every model go through all requests.

        Returns:
            Outcomes in the order: sequences one after another, requests within; the first sequence
            is that of the first seeds.
        """
        seeds = self.seeds
        with self.track.phase("originals", len(seeds["original"])) as bar:
            for index, seed in enumerate(seeds["original"], 1):
                bar.update(index, f"{self.start(seed)[1]:.1f} s of training")
        total = len(seeds["oracle"]) * len(self.requests)
        with self.track.phase("retrained oracles", total) as bar:
            for index in range(total):
                number, which = divmod(index, len(seeds["oracle"]))
                seconds = self.oracle(number, seeds["oracle"][which])[1]
                bar.update(index + 1, f"{seconds:.1f} s of training")
        first = (seeds["original"][0], seeds["unlearning"][0])
        pairs = [first]
        pairs += [(seed, first[1]) for seed in seeds["original"][1:]]
        pairs += [(first[0], seed) for seed in seeds["unlearning"][1:]]
        outcomes: list[Outcome] = []
        with self.track.phase("unlearning", len(pairs) * len(self.requests)) as bar:
            for original, unlearning in pairs:
                model = self.start(original)[0]
                for number in range(len(self.requests)):
                    outcome = self._forget(model, number, original, unlearning, not outcomes)
                    outcomes.append(outcome)
                    model = outcome.after
                    told = f"{outcome.request.id}: {outcome.report.seconds:.2f} s"
                    bar.update(len(outcomes), told)
        return outcomes

    def _forget(
        self, model: ContinualLearner, number: int, original: int, seed: int, look: bool
    ) -> Outcome:
        around = self._context(model, number, seed, original)
        trace = Trace(self, number)
        made = self._unlearner(model, seed)
        if look or len(self.requests) > 1:
            trace.look(self.reading(model), 0)
        after, account = forget(
            made, around, self.recipe.parts.trainer, callbacks=[trace] if look else []
        )
        if look or len(self.requests) > 1:
            trace.look(after, account.steps)
        sheet = self.sheet(after, number)
        earlier = None
        if number:
            past = self.part(torch.cat(self.gone[:number]))
            earlier = _accuracy(after, past)
        measures = self._evidence(sheet, self._before(model, number, original, seed), number)
        seconds = max(account.seconds - trace.seconds, 0.0) if look else account.seconds
        return Outcome(
            request=around.request,
            gone=self.gone[number],
            original_seed=original,
            unlearning_seed=seed,
            before=model,
            after=after,
            report=Report(**{**account.plain(), "seconds": seconds}),
            evidence=measures,
            sheet=sheet,
            trace=trace.points,
            earlier=earlier,
        )

    def carried_out(self, model: ContinualLearner, number: int, seed: int) -> ContinualLearner:
        """Return what a model becomes by the first ``number + 1`` requests."""
        for index in range(number + 1):
            around = self._context(model, index, seed, seed)
            model, _ = forget(self._unlearner(model, seed), around, self.recipe.parts.trainer)
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
        ids = torch.cat([gone, stays])
        samples = Request("shadow", "sample", samples=tuple(gone.tolist()))
        request = self.requests[number] if self.requests[number].kind == "class" else samples
        mine = images.subset(ids)
        statistics = None
        if Need.CLASS_STATS in self.unlearner_class.needs and model.moments is not None:
            statistics = Statistics.of(_counted(model, mine), mine, ids, ["shadow"] * len(ids))
        seed = derive_seed(model.seed, "unlearning")
        around = make_context(
            request,
            model,
            mine,
            ids,
            gone=gone,
            ood=self.ood,
            validation=self._staying_classes(self.holdings.validation, number),
            statistics=statistics,
            train=self.recipe.train,
            learner_seed=model.seed,
            seed=seed,
        )
        return forget(self._unlearner(model, seed), around, self.recipe.parts.trainer)[0]

    def _unlearner(self, learner: ContinualLearner, seed: int) -> Unlearner:
        made = build(self.settings, learner=learner, seed=seed)
        return cast(Unlearner, made)

    def _context(
        self, learner: ContinualLearner, number: int, seed: int, original: int | None
    ) -> Context:
        before = torch.cat([self.holdings.ids[:0], *self.gone[:number]])
        there = ~torch.isin(self.holdings.ids, before)
        images, ids = self.holdings.train.subset(there), self.holdings.ids[there]
        statistics = None
        trained = original is not None and learner.moments is not None
        if trained and Need.CLASS_STATS in self.unlearner_class.needs:
            names = self.holdings.contributors
            owners = [names[owner] for owner in self.holdings.owners[there].tolist()]
            statistics = Statistics.of(_counted(learner, images), images, ids, owners)
        return make_context(
            self.requests[number],
            learner,
            images,
            ids,
            gone=self.gone[number],
            ood=self.ood,
            validation=self._staying_classes(self.holdings.validation, number),
            statistics=statistics,
            train=self.recipe.train,
            learner_seed=self.cfg.seed if original is None else original,
            seed=seed,
        )

    # What models are asked ----------------------------------------------------------------------

    def reading(self, learner: ContinualLearner) -> ContinualLearner:
        """Return a model that answers the way the unlearner's result does."""
        if self.unlearner_class.reads == "head" or learner.classifier is not None:
            return learner
        reader = copy.deepcopy(learner)
        reader.classifier = {"name": "ncm"}
        return reader

    def part(self, ids: Tensor) -> ImageSet:
        """Return the training images of some ids."""
        return self.holdings.train.subset(torch.isin(self.holdings.ids, ids))

    def closed_classes(self, number: int) -> set[str]:
        """Return the classes that went as a whole with the first requests."""
        asked = self.requests[: number + 1]
        return {name for r in asked if r.kind == "class" for name in r.classes}

    def _staying_classes(self, images: ImageSet, number: int) -> ImageSet:
        return _of(images, self.closed_classes(number), inside=False)

    def others(self, number: int) -> ImageSet:
        """Return held-out images of the kind that went: what non-members of an attack are."""
        request = self.requests[number]
        if request.kind != "class":
            return self._staying_classes(self.holdings.validation, number)
        return _of(self.holdings.validation, set(request.classes), inside=True)

    def sheet(self, learner: ContinualLearner, number: int) -> Sheet:
        """Ask a model everything that evidence needs."""
        request = self.requests[number]
        went = set(request.classes) if request.kind == "class" else set()
        test = self.holdings.test
        parts = {
            "forget": self.part(self.gone[number]),
            "retain": self.staying(number),
            "validation": self._staying_classes(self.holdings.validation, number),
            "test": self._staying_classes(test, number),
            "test_forget": _of(test, went, inside=True),
        }
        return Sheet(
            **{name: answers(learner, part.images, part.labels) for name, part in parts.items()}
        )

    def before_of(self, outcome: Outcome, number: int) -> Sheet:
        """Return what the model of an outcome answered before its request."""
        return self._before(outcome.before, number, outcome.original_seed, outcome.unlearning_seed)

    def evidence_before(self, outcome: Outcome, number: int) -> dict[str, float]:
        """Return the measures of the model before a request, as if nothing were to be done."""
        before = self.before_of(outcome, number)
        return self._evidence(before, before, number)

    def judging(self, number: int) -> dict[str, Any]:
        """Return what all judgements of a request have in common."""
        request = self.requests[number]
        went = request.classes if request.kind == "class" else ()
        return {
            "untrained": self.untrained_sheet(number),
            "kind": request.kind,
            "seed": derive_seed(self.cfg.seed, "evidence", number),
            "forgotten_rows": rows_of(self.holdings.train.classes, went),
        }

    def _evidence(self, subject: Sheet, original: Sheet, number: int) -> dict[str, float]:
        return evidence(
            subject,
            original=original,
            oracles=self.oracle_sheets(number),
            **self.judging(number),
        )

    def _before(self, model: ContinualLearner, number: int, original: int, seed: int) -> Sheet:
        """Return the answers of a model before a request; the first one is the same for all."""
        key = ("before", number, original, seed if number else 0)
        return self._known(key, lambda: self.reading(model), number)

    def oracle_sheets(self, number: int) -> list[Sheet]:
        """Return the answers of all oracles of a request."""
        return [
            self._known(
                ("oracle", number, seed),
                lambda seed=seed: self.reading(self.oracle(number, seed)[0]),
                number,
            )
            for seed in self.seeds["oracle"]
        ]

    def untrained_sheet(self, number: int) -> Sheet:
        """Return the answers of a network that was never trained."""
        seed = derive_seed(self.cfg.seed, "untrained")
        classes = self.holdings.train.classes
        return self._known(
            ("untrained", number), lambda: self.recipe.fresh(classes, seed).eval(), number
        )

    def _known(self, key: tuple[object, ...], make: Any, number: int) -> Sheet:
        if key not in self._sheets:
            self._sheets[key] = self.sheet(make(), number)
        return self._sheets[key]


class Trace(L.Callback):
    """Accuracies after each pass, on at most so many images of each kind.

    They are for a picture; nothing is chosen by them.

    Args:
        stage: Whose data.
        number: Of the request.

    Attributes:
        points: ``step`` and accuracies by name.
        seconds: Time of the looks during training.
    """

    MOST = 1000

    def __init__(self, stage: Stage, number: int) -> None:
        went = stage.closed_classes(number)
        self.parts = {
            "forget": _first(stage.part(stage.gone[number]), self.MOST),
            "retain": _first(stage.staying(number), self.MOST),
            "test": _first(_of(stage.holdings.test, went, inside=False), self.MOST),
        }
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the student."""
        start = time.perf_counter()
        self.look(pl_module.learner, pl_module.step_number)
        self.seconds += time.perf_counter() - start

    def look(self, learner: ContinualLearner, step: int) -> None:
        """Note the accuracies of a model; a second look at a step replaces the first."""
        if self.points and self.points[-1]["step"] == step and step:
            self.points.pop()
        found = {name: _accuracy(learner, part) for name, part in self.parts.items()}
        self.points.append({"step": step, **found})


def _counted(learner: ContinualLearner, images: ImageSet) -> ContinualLearner:
    """Return a learner with class statistics; who holds the images counts where they are gone."""
    if learner.memory is not None:
        return learner
    counted = copy.deepcopy(learner)
    counted.length = 0
    counted.observe(Experience(learner.number, images, phase=learner.number))
    return counted


def _accuracy(learner: ContinualLearner, images: ImageSet) -> float:
    if not len(images):
        return 0.0
    said = learner.scores_of(images.images, closed=False).argmax(1)
    return float((said == images.labels).double().mean())


def _of(images: ImageSet, classes: set[str], *, inside: bool) -> ImageSet:
    mask = torch.tensor([(name in classes) is inside for name in images.classes])
    return images.subset(mask[images.labels])


def _first(images: ImageSet, most: int) -> ImageSet:
    """Return at most so many images, evenly spread over the set."""
    if len(images) <= most:
        return images
    return images.subset(torch.linspace(0, len(images) - 1, most).long())


def sequences(outcomes: Sequence[Outcome], requests: int) -> list[Sequence[Outcome]]:
    """Divide outcomes into the sequences that they came in."""
    return [outcomes[start : start + requests] for start in range(0, len(outcomes), requests)]
