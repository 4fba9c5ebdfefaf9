r"""The one base of all learners: what a method adds is its loss and, at most, a few hooks.

Four parts make a method: an encoder :math:`h = f(x)`, what is kept of the past (a head, a prototype
memory, a frozen copy of the network), a predictor :math:`scores = g(h)` over all classes seen so
far, and a loss

.. math:: L = \sum_j \lambda_j L_j

whose terms have names, weights and a list of the parts that their gradient may reach.

Life of an experience::

    begin_experience   rows for new classes, what is trained, the length of the training
    training_step      losses() of one batch; absorb() after the optimiser's step
    end_experience     finish(), compensate() old statistics, observe() new ones, snapshot()
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import IterableDataset

from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.learners import state
from clfed.learners.buffer import ImageBuffer
from clfed.learners.embedding import EmbeddingModule
from clfed.learners.episodes import Augmentation, Epochs, Shuffled
from clfed.learners.tables import Head, rows_of
from clfed.prototypes import Classifier, Moments, PrototypeMemory, read_off
from clfed.prototypes.drift import readdressed
from clfed.prototypes.rehearsal import check_classifier
from clfed.seeding import derive_seed, generator

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

TRAINED_LOGITS = ("current", "seen", "all")
CLASSIFICATION = ("softmax", "bce", "cosine")
TRAINS = ("all", "first", "none")

Batch = tuple[Tensor, Tensor]
Merge = Literal["exact", "approximate", "none"]


@dataclass(frozen=True)
class LossTerm:
    """A term of a loss.

    Attributes:
        name: Under which it is logged, as ``loss/NAME``.
        weight: Its factor.
        reaches: Names of the learner's parts (modules or parameters) that its gradient reaches;
            every other part is behind a stop-gradient.
    """

    name: str
    weight: float
    reaches: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One batch of a training.

    Attributes:
        images: ``(V * B, ...)``, the views one after another.
        labels: ``(V * B,)`` int64, rows of the learner's classes.
        h: ``(V * B, D)`` float32 embeddings, with gradient while training.
        views: :math:`V`.
    """

    images: Tensor
    labels: Tensor
    h: Tensor
    views: int


class ContinualLearner(EmbeddingModule):
    """A backbone, a growing head, and what a method keeps between experiences.

    A method overrides :meth:`losses` (or the simpler :meth:`loss`) and declares its
    :class:`LossTerm` s in ``self.terms``; all other hooks have a default.

    Args:
        backbone: Maps float32 ``(B, C, H, W)`` or ``(B, D)`` to ``(B, dim)``; trained in place.
        transform: Turns images of 0..255 into the backbone's input.
        name: What tables call it.
        seed: Of everything random in the learner.
        dim: Length of an embedding.
        train: Experiences in which the network learns: ``all``, ``first`` (frozen afterwards) or
            ``none``.
        steps: Batches an experience, drawn with replacement; None: ``epochs`` passes instead.
        epochs: Passes over the images of an experience.
        batch_size: Images a step.
        head: ``linear`` or ``cosine``.
        temperature: Factor of the cosines of a cosine head.
        logits: Which outputs the classification loss trains: those of the ``current`` classes, of
            all ``seen`` ones, or of ``all`` that the stream will ever show.
        loss: ``softmax`` or ``bce`` (one logistic loss an output) on the head's logits, or
            ``cosine`` (softmax on scaled cosines, implies ``head="cosine"``).
        classifier: Name and options of a classifier of :mod:`clfed.prototypes.classifiers`, read
            off the memory; None: the head answers.
        moments: Second moments of the memory; None: no memory is kept (unless there is a
            classifier, which needs one).
        augmentation: Options of :class:`~clfed.learners.episodes.Augmentation`, or None.
        feature_noise: Standard deviation of the noise that makes views of ready features.
        rotations: Whether rotated classes count as further classes (base training).
        embedding: Options of :class:`~clfed.learners.embedding.EmbeddingModule`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    #: How what several nodes learned can become one: see the table of learners.
    merges: Merge = "none"
    #: Whether the method cannot do without being told where an experience ends.
    needs_boundaries: ClassVar[bool] = False
    #: Differently augmented copies of each image in a batch.
    views: ClassVar[int] = 1
    #: Parts of which a frozen copy is kept after each experience.
    snapshot_parts: ClassVar[tuple[str, ...]] = ()
    #: Whether predictions depend on the other images that are asked about.
    transductive: bool = False
    #: Neighbours of the retrieval metrics that belong to the method's evaluation.
    recall_at: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        name: str = "",
        seed: int = 0,
        dim: int = 0,
        train: str = "all",
        steps: int | None = None,
        epochs: int = 10,
        batch_size: int = 128,
        head: str = "linear",
        temperature: float = 16.0,
        logits: str = "seen",
        loss: str = "softmax",
        classifier: Mapping[str, Any] | None = None,
        moments: Moments | None = None,
        augmentation: Mapping[str, Any] | None = None,
        feature_noise: float = 0.1,
        rotations: bool = False,
        **embedding: Any,
    ) -> None:
        super().__init__(backbone, transform, dim=dim, **embedding)
        for option, value, known in (
            ("logits", logits, TRAINED_LOGITS),
            ("loss", loss, CLASSIFICATION),
            ("train", train, TRAINS),
        ):
            if value not in known:
                raise ConfigError(f"Expected learner.{option} of {known}, got {value!r}.")
        if (steps is not None and steps < 1) or epochs < 0 or batch_size < 1:
            raise ConfigError(
                "A learner needs steps >= 1 (or null), epochs >= 0 and batch_size >= 1, got "
                f"{steps}, {epochs} and {batch_size}."
            )
        self.method, self.seed, self.train_on = name, seed, train
        self.steps, self.epochs, self.batch_size = steps, epochs, batch_size
        self.trained_logits, self.loss_kind, self.rotations = logits, loss, rotations
        self.augmentation = None if augmentation is None else Augmentation(**augmentation)
        self.feature_noise = feature_noise
        self.head = Head(
            dim,
            "cosine" if loss == "cosine" else head,
            temperature=temperature,
            seed=derive_seed(seed, "learner"),
        )
        self.terms: tuple[LossTerm, ...] = (LossTerm("classification", 1.0, ("backbone", "head")),)
        self.classifier = None if classifier is None else dict(classifier)
        self.moments: Moments | None = moments or (None if classifier is None else "none")
        if classifier is not None:
            check_classifier(classifier, self.moments or "none")
        self.memory: PrototypeMemory | None = None
        self.teacher = nn.ModuleDict()
        #: Named tensors that are kept between experiences besides modules and memory.
        self.kept: dict[str, Tensor] = {}
        self.buffer: ImageBuffer | None = None
        self.classes: tuple[str, ...] = ()
        #: Classes that were forgotten on request; their outputs stay closed.
        self.retired: tuple[str, ...] = ()
        self.length = steps or 0
        self.step_number = 0
        self._current = torch.empty(0, dtype=torch.int64)
        self._loss_sums: dict[str, Tensor] = {}
        self._last: Step | None = None
        self._reader: tuple[PrototypeMemory, dict[str, Any] | None, Classifier] | None = None

    # What a method overrides ------------------------------------------------------------------

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the value of every term of ``self.terms``, by name, as scalars."""
        return {"classification": self.loss(step.h, step.labels)}

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the classification loss of embeddings ``(B, D)`` with rows ``labels`` ``(B,)``."""
        return self.classification(self.head(embeddings), labels)

    def absorb(self, step: Step) -> None:
        """Take in a batch after the optimiser's step (running averages, posteriors)."""

    def finish(self, experience: Experience) -> None:
        """Do what is due at the end of the training, before statistics are touched."""

    def compensate(
        self, memory: PrototypeMemory, version: str, experience: Experience, after: Tensor
    ) -> PrototypeMemory:
        """Move the statistics of old classes into the space of the changed network.

        The default leaves every number where it is: the price of a method without compensation.

        Args:
            memory: What is known of old classes, of an older network.
            version: Identity of the present embedding, which the result must carry.
            experience: The present experience; ``self.teacher`` still holds the older network.
            after: ``(N, D)``, embeddings of its images by the present network.
        """
        return readdressed(memory, version)

    def study(self, mapped: Tensor, labels: Tensor, experience: Experience) -> None:
        """Learn what plain sums do not tell, while ``self.memory`` is still without these images.

        Args:
            mapped: Embeddings after the feature map, ``(N, D)``.
            labels: ``(N,)`` int64, index into ``experience.classes``.
            experience: Where they come from.
        """

    def reading(self, memory: PrototypeMemory) -> dict[str, Any]:
        """Return name and options of the classifier that is read off a memory."""
        return dict(self.classifier or {"name": "ncm"})

    def data(self, experience: Experience) -> ImageSet:
        """Return what an experience is learned from; methods with a buffer add theirs."""
        return experience.train

    def batches(self, images: ImageSet, *, seed: int, start: int = 0) -> IterableDataset[Batch]:
        """Return what the steps ``start..length`` learn from: images and rows of classes.

        A step's batch depends on the seed and the step alone, so a resumed training sees what an
        uninterrupted one would.

        Args:
            images: Labels are rows of the learner's classes.
            seed: Decides the draws.
            start: First step.

        Raises:
            NotEnoughData: Fewer classes or images than the method needs.
            ConfigError: Rotated classes were asked for where whole passes are made.
        """
        if self.steps is not None and self.views == 1:
            return Shuffled(
                images,
                batch_size=self.batch_size,
                steps=range(start, self.length),
                seed=seed,
                rotations=self.rotations,
                augmentation=self.augmentation,
            )
        if self.rotations:
            raise ConfigError(
                "learner.rotations=true takes batches that are drawn, not passes over the images.",
                remedy="Set learner.steps, or learner.rotations=false.",
            )
        return Epochs(
            images,
            batch_size=self.batch_size,
            steps=range(start, self.length),
            seed=seed,
            views=self.views,
            augmentation=self.augmentation,
            noise=self.feature_noise if self.views > 1 else 0.0,
        )

    def scores(self, embeddings: Tensor) -> Tensor:
        """Map embeddings ``(B, D)`` to scores ``(B, C)`` of all classes seen; the largest wins."""
        if self.classifier is None:
            logits: Tensor = self.head(embeddings)
            return logits[:, : len(self.classes)]
        columns = self.memory.index if self.memory is not None else {}
        known = [row for row, name in enumerate(self.classes) if name in columns]
        scores = torch.full((len(embeddings), len(self.classes)), -torch.inf, dtype=torch.float64)
        if known:  # a class that is still being learned has no statistics yet
            scores[:, known] = self.reader().scores(self.mapped(embeddings))
        return scores

    def check_base(self, base: ImageSet) -> None:
        """Refuse base classes that the settings do not fit; a stream takes what comes instead.

        Raises:
            NotEnoughData: Fewer classes or images than the settings ask for.
        """

    # Life of an experience ----------------------------------------------------------------------

    def trains(self, experience: Experience) -> bool:
        """Whether an experience has anything to train."""
        allowed = self.train_on == "all" or (self.train_on == "first" and experience.number == 0)
        useful = self.classifier is None or any(True for _ in self.backbone.parameters())
        return allowed and useful and len(experience.train) > 0

    def begin_experience(self, experience: Experience) -> None:
        """Make room for new classes and set what the training needs.

        Raises:
            ConfigError: The method needs a boundary that the stream does not announce, or must
                train outputs of classes of which nobody knows how many will come.
        """
        if self.needs_boundaries and not experience.announced:
            raise ConfigError(
                f"learner={self.method or type(self).__name__} must be told where an experience "
                "ends, and this stream does not tell.",
                remedy="Choose a learner that needs no boundaries (ncm, slda, ranpac, onpro0, "
                "naive), or another scenario.",
            )
        if self.trained_logits == "all" and experience.upcoming is None:
            raise ConfigError("learner.logits=all needs a stream that says how many classes come.")
        if not len(experience.train):
            self.length = 0
            return
        known = set(self.classes)
        new = [name for name in experience.train.classes if name not in known]
        self.grow(new)
        if self.trained_logits == "all":
            self.head.reserve(experience.upcoming or 0)
        self.number, self.announced, self.step_number = experience.number, experience.announced, 0
        self._current = self.rows(experience.train.classes)
        self._loss_sums = {}
        if not self.trains(experience):
            self.length = 0
        elif self.steps is not None:
            self.length = self.steps
        else:
            self.length = self.epochs * math.ceil(len(self.data(experience)) / self.batch_size)
        self.requires_grad_(self.length > 0)
        self.teacher.requires_grad_(False)

    def grow(self, names: Sequence[str]) -> None:
        """Append classes; a method with tables of its own grows them too."""
        self.classes = (*self.classes, *names)
        self.head.adopt(names)

    def rows(self, names: Iterable[str]) -> Tensor:
        """Row of each class name, int64.

        Raises:
            UnknownClass: A name was never seen.
        """
        return rows_of(self.classes, names)

    def training_data(self, experience: Experience) -> ImageSet:
        """Return the images of :meth:`data` with rows of the learner's classes as labels."""
        data = self.data(experience)
        rows = self.rows(data.classes)
        return ImageSet(data.images, rows[data.labels], self.classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch; distances and softmax in float32 whatever the precision."""
        step = self.make_step(*batch)
        self._last = Step(step.images, step.labels, step.h.detach(), self.views)
        with torch.autocast(step.h.device.type, enabled=False):
            values = self.losses(step)
            parts = []
            for term in self.terms:
                value = values[term.name]
                parts.append(value if term.weight == 1 else term.weight * value)
                before = self._loss_sums.get(term.name)
                now = value.detach()
                self._loss_sums[term.name] = now if before is None else before + now
        self.step_number += 1
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def make_step(self, images: Tensor, labels: Tensor) -> Step:
        """Embed a batch."""
        return Step(images, labels, self.embed(images).float(), self.views)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Let the method take in the batch."""
        if self._last is not None:
            with torch.no_grad():
                self.absorb(self._last)

    def end_experience(self, experience: Experience) -> None:
        """Keep what the method keeps of an experience that was trained."""
        if not len(experience.train):
            return
        self.finish(experience)
        if self.moments is not None:
            self.observe(experience)
        if experience.announced:
            self.snapshot()

    def observe(self, experience: Experience) -> None:
        """Move old statistics into the present space, then add those of an experience."""
        # Without a training the network is the one that the memory is of.
        known = None if self.memory is None or self.length else self.memory.embedding_id
        version = known or self.version()
        embeddings = self.embed_all(experience.train.images)
        mapped = self.mapped(embeddings)
        if self.memory is None:
            self.memory = PrototypeMemory.empty(mapped.shape[1], version, self.moments or "none")
        elif self.memory.embedding_id != version:
            self.memory = self.compensate(self.memory, version, experience, embeddings)
        self.study(mapped, experience.train.labels, experience)
        names = [*map(experience.train.classes.__getitem__, experience.train.labels.tolist())]
        self.memory = self.memory + self.memory.observe(mapped, names)

    def snapshot(self) -> None:
        """Keep a frozen copy of the parts that the method compares itself with."""
        parts = {part: copy.deepcopy(getattr(self, part)) for part in self.snapshot_parts}
        self.teacher = nn.ModuleDict(parts).eval().requires_grad_(False)

    # Pieces for methods -------------------------------------------------------------------------

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        r"""Return the mean loss over the outputs that ``logits`` and ``loss`` choose.

        Softmax: cross-entropy over the trained outputs. Logistic:
        :math:`\frac1B \sum_i \sum_k \mathrm{BCE}(\sigma(o_{ik}), [y_i = k])`.

        Args:
            logits: ``(B, rows of the head)``.
            labels: ``(B,)`` int64, rows; each among the trained outputs.
        """
        logits, labels = self.restrict(logits, labels)
        if self.loss_kind != "bce":
            return F.cross_entropy(logits, labels)
        targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(labels)

    def restrict(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the trained columns of some logits, and the labels' places among them."""
        if self.trained_logits == "all":
            return logits, labels
        if self.trained_logits == "seen":
            return logits[:, : len(self.classes)], labels
        # Where nobody announces experiences, the classes of the batch are the current ones.
        columns = self._current if self.announced else torch.unique(labels)
        place = torch.full((logits.shape[1],), -1, dtype=torch.int64, device=labels.device)
        place[columns] = torch.arange(len(columns), device=labels.device)
        return logits[:, columns], place[labels]

    @property
    def current(self) -> Tensor:
        """Rows of the classes of the present experience, int64."""
        return self._current

    @property
    def old(self) -> Tensor:
        """Rows of the classes that are not in the present experience, int64."""
        mask = torch.ones(len(self.classes), dtype=torch.bool)
        mask[self._current] = False
        return mask.nonzero().flatten()

    def rng(self, *purpose: str | int) -> torch.Generator:
        """Return a generator for one purpose in the present step of the present experience."""
        return generator(self.seed, "learner", self.number, self.step_number, *purpose)

    def reader(self) -> Classifier:
        """Return the classifier that is read off the memory, made once for each of both.

        Raises:
            NotEnoughData: Nothing was learned yet.
        """
        if self.memory is None:
            raise NotEnoughData("Expected a memory of at least one class, got none.")
        made = self._reader
        if made is None or made[0] is not self.memory or made[1] is not self.classifier:
            self._reader = made = (self.memory, self.classifier, self.read(self.memory))
        return made[2]

    def read(self, memory: PrototypeMemory) -> Classifier:
        """Make the classifier over the classes of a memory, in the order of ``self.classes``."""
        options = self.reading(memory)
        return read_off(options.pop("name"), memory, classes=self.remembered(memory), **options)

    def remembered(self, memory: PrototypeMemory) -> list[str]:
        """Return the classes of a memory in the order of ``self.classes``."""
        return [name for name in self.classes if name in memory]

    def forward(self, images: Tensor) -> Tensor:
        """Map images to scores ``(B, C)`` of all classes seen so far, in their order."""
        return self.closed(self.scores(self.embed(images)))

    def retire(self, names: Iterable[str]) -> None:
        """Close the outputs of some classes for good: nothing is ever taken for one of them.

        Raises:
            UnknownClass: A class was never seen.
        """
        self.rows(names := [*names])
        self.retired = tuple(dict.fromkeys((*self.retired, *names)))

    def drop_last(self) -> None:
        """Let go of the last batch, and of the classifier that was read off the memory."""
        self._last, self._reader = None, None

    def closed(self, scores: Tensor) -> Tensor:
        """Set the scores of retired classes to minus infinity."""
        if not self.retired:
            return scores
        return scores.index_fill(1, self.rows(self.retired).to(scores.device), -torch.inf)

    @torch.no_grad()
    def scores_of(self, images: Tensor, *, closed: bool = True) -> Tensor:
        """Score any number of images in eval mode, ``(N, C)`` on the CPU.

        Args:
            images: What the transform takes.
            closed: Whether retired classes are out; False shows what the network still says.
        """
        embeddings = self.embed_all(images)
        if not len(images):
            return torch.empty(0, len(self.classes))
        was_training = self.training
        self.eval()
        scores = self.scores(embeddings.to(self.device)).cpu()
        self.train(was_training)
        return self.closed(scores) if closed else scores

    # What is kept -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; the teacher, and a network that is frozen, stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        if self.train_on == "none" or (self.train_on == "first" and self.number > 0):
            self.backbone.eval()
        return self

    @property
    def images_kept(self) -> int:
        """Images that are kept for replay."""
        return 0 if self.buffer is None else len(self.buffer)

    def mean_losses(self) -> dict[str, float]:
        """Return the mean of every loss term over the steps of the present experience."""
        return {name: float(v) / max(self.step_number, 1) for name, v in self._loss_sums.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what a state dict leaves out into a checkpoint of Lightning's."""
        checkpoint["clfed"] = state.beside_weights(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it over again."""
        state.restore_beside_weights(self, checkpoint["clfed"])
