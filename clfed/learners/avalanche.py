"""Any strategy of Avalanche as a learner, for comparison on the same stream and network.

Avalanche 0.6 (Carta et al. 2023, arXiv 2302.01766) trains; images, backbone, first weights, exam
and table are those of every other learner. The head has an output for every class of the stream, as
Avalanche's own examples and several of its strategies have it; where nobody knows their number it
is Avalanche's ``IncrementalClassifier``.

Limits: Lightning, its loops and precisions play no part, so nothing looks at a training from inside
(``job.stability``); a run that was killed starts anew, because a strategy cannot be written down;
strategies that need a network of their own kind (prompts, latent replay, several optimisers) do not
fit.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError, InvalidEmbedding
from clfed.learners.avalanche_memory import held
from clfed.learners.base import ContinualLearner
from clfed.learners.buffer import ImageBuffer
from clfed.learners.optimisers import make_optimiser
from clfed.scenarios.avalanche_benchmarks import assembled, dataset, quiet
from clfed.seeding import derive_seed

with quiet():
    from avalanche import training
    from avalanche.core import SupervisedPlugin
    from avalanche.models import IncrementalClassifier, NCMClassifier, TrainEvalModel
    from avalanche.models.base_model import BaseModel
    from avalanche.models.dynamic_modules import avalanche_model_adaptation
    from avalanche.training.plugins import CurrentDataNCMUpdate, EvaluationPlugin
    from avalanche.training.templates import SupervisedTemplate

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

SHORT = {"SI": "SynapticIntelligence", "SLDA": "StreamingLDA", "NCM": "Naive"}
EXAM_BATCH = 256


class AvalancheLearner(ContinualLearner):
    """A supervised strategy of ``avalanche.training`` that goes through experiences.

    Args:
        backbone: The network, trained in place.
        transform: Its input transform.
        strategy: Name of the class; also ``SI``, ``SLDA``, and ``NCM``: naive training whose
            answers are nearest means of what each class's experience showed.
        options: Arguments of the class beside those that every strategy gets: network, optimiser,
            criterion, batch size, epochs, and where it asks for them the number of features and of
            classes of the whole stream.
        settings: ``name``, ``seed``, ``dim``, ``epochs``, ``batch_size``, ``lr``, ``optimizer``
            and ``weight_decay`` of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: There is no such strategy.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        strategy: str = "Naive",
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(backbone, transform, **settings)
        self.make: Any = getattr(training, SHORT.get(strategy, str(strategy)), None)
        if not (isinstance(self.make, type) and issubclass(self.make, SupervisedTemplate)):
            raise ConfigError(
                f"Avalanche has no strategy {strategy!r}.",
                remedy="Choose a strategy of avalanche.training, such as Naive, Replay, "
                "EWC, LwF, ICaRL, StreamingLDA, SI, MAS or GDumb.",
            )
        self.chosen, self.options = strategy, dict(options or {})
        self.head: Any = nn.Identity()
        # A list hides it from torch, which would save the shared weights twice.
        self._strategy: list[Any] = []
        self._new_classes: list[int] = []

    def trains(self, experience: Experience) -> bool:
        """Say no: the strategy trains when the experience ends."""
        return False

    def grow(self, names: Any) -> None:
        """Append classes; the head grows when it meets them."""
        self.classes = (*self.classes, *names)

    def begin_experience(self, experience: Experience) -> None:
        """Make the strategy before the first experience, and room for new classes.

        Raises:
            ConfigError: The options do not fit the strategy.
        """
        before = len(self.classes)
        super().begin_experience(experience)
        if not len(experience.train):
            return
        self.requires_grad_(True)
        self._new_classes.append(len(self.classes) - before)
        with self._ambient("begin", experience.number):
            if not self._strategy:
                self._strategy = [self._made(experience.upcoming)]
            # The strategy does this too, but an exam may come before it trains.
            avalanche_model_adaptation(self.head.train(), self._theirs(experience))

    def finish(self, experience: Experience) -> None:
        """Let the strategy train, then look through what it kept.

        Raises:
            ConfigError: The strategy does not work with this network, stream or installation.
            InvalidEmbedding: The training diverged.
        """
        strategy = self._strategy[0]
        before = strategy.clock.train_iterations
        with self._ambient("train", experience.number):
            theirs = self._theirs(experience)
            try:
                strategy.train(theirs, eval_streams=[])
            except Exception as error:  # whatever a strategy raises that asks for something else
                raise ConfigError(
                    f"Avalanche's {self.chosen} failed: {type(error).__name__}: {error}",
                    remedy="See what Avalanche's documentation and learner.options ask for.",
                ) from error
        self.length = strategy.clock.train_iterations - before
        if not all(bool(torch.isfinite(weights).all()) for weights in self.parameters()):
            raise InvalidEmbedding(
                "The training diverged: weights are no longer finite numbers.",
                remedy="Choose a smaller learner.lr.",
            )
        own = {tensor.data_ptr() for tensor in self.state_dict().values()}
        self.kept, images = held(strategy, tuple(experience.train.images.shape[1:]), own)
        self.buffer = ImageBuffer(None)
        if images:
            # Their labels stay with the strategy.
            self.buffer.images = torch.cat(images)
            self.buffer.labels = torch.zeros(len(self.buffer.images), dtype=torch.int64)
            self.buffer.classes = ("?",)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to scores ``(B, C)`` of all classes seen so far, as the strategy answers."""
        return self.scores_of(images)

    @torch.no_grad()
    def scores_of(self, images: Tensor, *, closed: bool = True) -> Tensor:
        """Score any number of images ``(N, C)`` through the strategy's own evaluation."""
        seen = len(self.classes)
        if not len(images):
            return torch.empty(0, seen)
        strategy = self._strategy[0]
        asked = assembled(exam=[dataset(images, torch.zeros(len(images), dtype=torch.int64))])
        (experience,) = asked.streams["exam"]
        experience.classes_in_this_experience = set(range(seen))
        listener = _Listener()
        strategy.plugins.append(listener)
        try:
            with self._ambient("exam", self.number):
                strategy.eval(experience)
        finally:
            strategy.plugins.remove(listener)
        scores = torch.cat(listener.answers)[:, :seen]
        return self.closed(scores) if closed else scores

    def load_state_dict(self, *state: Any, **options: Any) -> Any:
        """Refuse to go on: a strategy's own state cannot be written down.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "A run with learner=avalanche cannot go on where it stopped.",
            remedy="Set job.resume=false, or choose another run_dir.",
        )

    def _made(self, upcoming: int | None) -> Any:
        """Make head and strategy, with every argument that it asks for and we know."""
        name, make = self.chosen, self.make
        total = None if upcoming is None else len(self.classes) + upcoming
        self.head = IncrementalClassifier(self.dim) if total is None else nn.Linear(self.dim, total)
        features = _Features(self.backbone, self.transform)
        network: nn.Module = _Network(features, self.head)
        options = dict(self.options)
        if name == "NCM":
            network = TrainEvalModel(features, self.head, NCMClassifier(normalize=False))
            options["plugins"] = [CurrentDataNCMUpdate()]
        known = {
            "model": network,
            "slda_model": features,
            "feature_extractor": features,
            "classifier": self.head,
            "optimizer": make_optimiser(
                self.optimizer, [{"params": list(network.parameters())}], self.lr, self.weight_decay
            ),
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": self.batch_size,
            "train_epochs": self.epochs,
            "input_size": self.dim,
            "num_classes": total,
            "n_classes": total,
        }
        asked = inspect.signature(make).parameters
        given = {key: value for key, value in known.items() if key in asked} | options
        if total is None and {"num_classes", "n_classes"} & given.keys() - options.keys():
            raise ConfigError(
                f"Avalanche's {name} must be told how many classes the stream will show, and this "
                "stream does not tell.",
                remedy="Set learner.options={num_classes: 10}, or whatever their number is.",
            )
        try:
            return make(**given, eval_mb_size=EXAM_BATCH, evaluator=EvaluationPlugin())
        except TypeError as error:
            raise ConfigError(f"learner.options do not fit Avalanche's {name}: {error}.") from error

    def _theirs(self, experience: Experience) -> Any:
        """Return the experience as Avalanche knows it, with rows of our classes as labels."""
        rows = self.rows(experience.train.classes)
        made = assembled(train=[dataset(experience.train.images, rows[experience.train.labels])])
        (theirs,) = made.streams["train"]
        here, seen = set(rows.tolist()), len(self.classes)
        theirs.current_experience = experience.number
        theirs.previous_classes = set(range(seen - self._new_classes[-1]))
        theirs.classes_seen_so_far = theirs.previous_classes | here
        theirs.future_classes = set(range(seen, seen + (experience.upcoming or 0)))
        theirs.benchmark = SimpleNamespace(
            n_classes_per_exp=[*self._new_classes, experience.upcoming or 0],
            classes_order=list(range(seen)),
        )
        return theirs

    @contextlib.contextmanager
    def _ambient(self, *purpose: str | int) -> Iterator[None]:
        """Give Avalanche, which knows no other randomness, ambient generators of our seed."""
        seed = derive_seed(self.seed, "avalanche", *purpose)
        ours = random.getstate(), np.random.get_state()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            try:
                yield
            finally:
                random.setstate(ours[0])
                np.random.set_state(ours[1])  # noqa: NPY002


class _Features(nn.Module):
    """A backbone with its input transform."""

    def __init__(self, backbone: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.backbone, self.transform = backbone, transform

    def forward(self, images: Tensor) -> Tensor:
        inputs = self.transform(images)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.backbone(inputs)
        return embeddings


class _Network(nn.Module, BaseModel):  # type: ignore[misc]
    """What Avalanche trains; the names of the parts are those that its strategies look for."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def get_features(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.features(images)
        return embeddings


class _Listener(SupervisedPlugin):  # type: ignore[misc]
    """Collects the answers of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Tensor] = []

    def after_eval_forward(self, strategy: Any, **_: Any) -> None:
        self.answers.append(strategy.mb_output)
