r"""Discrete key-value bottleneck (Träuble et al. 2023, arXiv 2207.11240): fetched values learn.

A frozen network's embedding is projected at random for each of :math:`C` codebooks; each projection
fetches the value of its nearest key, and the mean of the values is the answer:

.. math:: j_c(x) = \arg\min_j \|f(x) R_c - k_{cj}\|^2, \qquad
    o(x) = \frac1C \sum_c v_{c, j_c(x)}, \qquad L = \mathrm{CE}(o(x), y)

Keys are laid over the first images without their labels, by the running means of vector
quantisation, and never move again. Values start at zero and learn by plain gradient descent, so a
step leaves every cell alone that it did not fetch. Published: 256 codebooks of 4096 keys of length
14 on pretrained networks, values with a rate of 0.3, gradients cut at 1, smoothing 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError, EmbeddingMismatch
from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.codebooks import lay_keys, merged, nearest_keys, project, voted
from clfed.learners.tables import ClassTable, Column
from clfed.seeding import generator

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class KeyValueBottleneck(ContinualLearner):
    """Fetch values by nearest keys in many codebooks; learn the values alone.

    Args:
        backbone: The network; frozen once the keys lie.
        transform: Its input transform.
        codebooks: :math:`C`.
        keys: Keys of a codebook.
        key_dim: Length of a key.
        decay: How much the running means of the keys keep at every batch.
        key_epochs: Passes over the first images that lay the keys.
        smoothing: Share of the target spread over all trained classes.
        optimizer: ``sgd``, without momentum for the values.
        lr: Learning rate of the values.
        encoder_lr: Learning rate of the network where it trains at all (Nesterov momentum 0.9).
        logits: ``current``, which leaves the values of absent classes alone, or ``seen``, which
            pushes them down in every cell that is fetched; ``current`` learns nothing from an
            experience of a single class.
        train: ``none``; or ``first``: the first experience trains the network, with a head that
            nothing else uses, for as many steps as the values learn afterwards.
        clip: Largest norm of the gradient.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    merges = "approximate"
    projections: Tensor
    keys: Tensor
    laid: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        codebooks: int = 64,
        keys: int = 512,
        key_dim: int = 8,
        decay: float = 0.95,
        key_epochs: int = 10,
        smoothing: float = 0.1,
        optimizer: str = "sgd",
        lr: float = 0.3,
        encoder_lr: float = 0.05,
        logits: str = "current",
        train: str = "none",
        clip: float | None = 1.0,
        **options: Any,
    ) -> None:
        if optimizer != "sgd":
            raise ConfigError(
                f"Expected learner.optimizer sgd, got {optimizer!r}: any other moves values that "
                "were not fetched."
            )
        for option in ("classifier", "feature_map", "weight_decay", "loss", "head"):
            if options.get(option):
                raise ConfigError(
                    f"dkvb takes no learner.{option}: values in fetched cells answer."
                )
        super().__init__(
            backbone,
            transform,
            optimizer=optimizer,
            lr=lr,
            logits=logits,
            train=train,
            clip=clip,
            **options,
        )
        if min(codebooks, keys, key_dim, key_epochs) < 1 or train == "all":
            raise ConfigError(
                "Expected codebooks, keys, key_dim and key_epochs of at least 1 and learner.train "
                f"first or none, got {codebooks}, {keys}, {key_dim}, {key_epochs} and {train!r}."
            )
        if self.trained_logits == "all":
            raise ConfigError("Expected learner.logits current or seen, got 'all'.")
        if not 0 <= decay < 1 or not 0 <= smoothing < 1 or encoder_lr <= 0:
            raise ConfigError(
                "Expected 0 <= decay < 1, 0 <= smoothing < 1 and encoder_lr > 0, got "
                f"{decay}, {smoothing} and {encoder_lr}."
            )
        self.decay, self.key_epochs, self.smoothing = decay, key_epochs, smoothing
        self.encoder_lr = encoder_lr
        rng = generator(self.seed, "dkvb", "projections")
        projections = F.normalize(torch.randn(codebooks, self.dim, key_dim, generator=rng), dim=1)
        self.register_buffer("projections", projections, persistent=False)
        self.register_buffer("keys", torch.zeros(codebooks, keys, key_dim))
        self.register_buffer("laid", torch.tensor(False))
        shape = (codebooks, keys)
        # A fetch is counted for the class of the image, so that a class can be taken out again.
        self.cells = ClassTable(
            {"values": Column(shape), "fetches": Column(shape, rule="add")},
            seed=self.seed,
            purpose="dkvb",
        )
        self.terms = (LossTerm("classification", 1.0, ("cells",)),)
        self._encoder_steps = 0
        self._images: Tensor | None = None
        self._codes: Tensor | None = None

    def trains(self, experience: Experience) -> bool:
        """Values learn in every experience."""
        return len(experience.train) > 0

    def begin_experience(self, experience: Experience) -> None:
        """Train the network first where it is to be, else lay the keys if they do not lie yet."""
        super().begin_experience(experience)
        self._encoder_steps = 0
        if not self.length:
            return
        self._images = experience.train.images
        weights = any(True for _ in self.backbone.parameters())
        if self.train_on == "first" and weights and not self.laid:
            self._encoder_steps = self.length
            self.length *= 2
        else:
            self._freeze()

    def grow(self, names: Sequence[str]) -> None:
        """Append classes, whose values are zero."""
        super().grow(names)
        self.cells.grow(names)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Momentum would move cells that were fetched before; the network may have it."""
        values = {"params": [self.cells.column("values")], "momentum": 0.0, "nesterov": False}
        if not self._encoder_steps:
            return [values]
        encoder = [*self.backbone.parameters(), *self.head.parameters()]
        return [values, {"params": encoder, "lr": self.encoder_lr}]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy of the values, or of the head while the network is trained."""
        if self.step_number < self._encoder_steps:
            return {"classification": self.loss(step.h, step.labels)}
        if self._encoder_steps:
            self._encoder_steps = 0
            self._freeze()
        self._codes = self.codes(step.h)
        logits = voted(self.cells.column("values"), self._codes)
        logits, labels = self.restrict(logits, step.labels)
        return {"classification": F.cross_entropy(logits, labels, label_smoothing=self.smoothing)}

    def absorb(self, step: Step) -> None:
        """Count what was fetched, each image for its class."""
        if self._codes is not None:
            codebooks, keys, _ = self.keys.shape
            cells = self._codes + keys * torch.arange(codebooks, device=step.h.device)
            places = (step.labels[:, None] * (codebooks * keys) + cells).flatten()
            fetches = self.cells.column("fetches").view(-1)
            fetches.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))

    def finish(self, experience: Experience) -> None:
        """Let go of the images."""
        self._images = self._codes = None

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; the network stays in eval mode once the keys lie."""
        super().train(mode)
        if self.laid:
            self.backbone.eval()
        return self

    def scores(self, embeddings: Tensor) -> Tensor:
        """Map embeddings ``(B, D)`` to ``(B, C)`` by the nearest keys that were ever fetched."""
        codes = self.codes(embeddings, self.cells.column("fetches").sum(0) > 0)
        return voted(self.cells.column("values"), codes)

    def codes(self, embeddings: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return each codebook's nearest key, ``(B, C)`` int64, optionally of some keys alone."""
        return nearest_keys(project(embeddings.detach(), self.projections), self.keys, allowed)

    def _freeze(self) -> None:
        """Freeze the network and lay the keys over the present images."""
        self.backbone.requires_grad_(False).eval()
        if self.laid or self._images is None:
            return
        points = project(self.embed_all(self._images).to(self.keys.device), self.projections)
        rng = generator(self.seed, "dkvb", "keys")
        self.keys = lay_keys(
            points,
            self.keys.shape[1],
            decay=self.decay,
            epochs=self.key_epochs,
            batch_size=self.batch_size,
            rng=rng,
        )
        self.laid = torch.tensor(True)

    # What is kept

    @torch.no_grad()
    def merge(self, others: Sequence[KeyValueBottleneck]) -> None:
        """Become what several learners with the same network and keys learned, see :func:`merged`.

        Raises:
            EmbeddingMismatch: Networks or keys differ.
        """
        same = (self.version(), self.keys)
        if any(o.version() != same[0] or not torch.equal(o.keys, same[1]) for o in others):
            raise EmbeddingMismatch(
                "Expected key-value bottlenecks of one network and one set of keys, got several.",
                remedy="Give every node the same encoder and the keys of one node.",
            )
        names = tuple(dict.fromkeys(name for o in others for name in o.classes))
        values, fetches = merged([(o.classes, o.cells.payload()) for o in others], names)
        self.grow([name for name in names if name not in set(self.classes)])
        rows = self.rows(names)
        self.cells.column("values")[rows] = values
        self.cells.column("fetches")[rows] = fetches

    @torch.no_grad()
    def disable(self, names: Sequence[str], share: float = 0.5) -> int:
        """Zero the cells that some classes had for themselves, as if never fetched.

        Args:
            names: Classes to be forgotten.
            share: A cell goes if more than this share of its fetches was theirs.

        Returns:
            How many cells went.

        Raises:
            UnknownClass: A name was never seen.
        """
        fetches = self.cells.column("fetches")
        total = fetches.sum(0)
        gone = (total > 0) & (fetches[self.rows(names)].sum(0) > share * total)
        self.cells.column("values")[:, gone] = 0
        fetches[:, gone] = 0
        return int(gone.sum())
