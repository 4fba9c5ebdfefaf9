r"""Poison a class with wrong labels, where its concepts lie (Chang et al. 2024, arXiv 2405.15662).

.. math:: L = \mathbb{E}_{D_r}\, \mathrm{CE}(o(x), y)
          + \mathbb{E}_{D_f}\, \mathrm{CE}(o(\tilde x), y')

over a mixture of both. Wrong labels :math:`y'` are drawn at random among the other classes, or
targeted: the class that the original confuses the image with. The released code freezes the
network and trains the head alone, and so do we by default (``backbone=frozen``; the embeddings are
then computed once, and a pass costs next to nothing). A head's edit leaves the class in the
embedding, from which a few images restore it.

With ``concepts`` the images :math:`\tilde x` are poisoned copies. Concepts are directions of the
embedding (:mod:`clfed.unlearning.concepts`); integrated gradients of the class's probability, by a
sparse linear classifier on them, rank them; the patch that adds most to the best few is
replaced by the same patch of an image of another class, and targeted labels name the class that
shares most of these concepts. That is a refinement, and off by default: the authors' ablation
forgets completely by targeted labels alone, not at all by patches alone, and worse with more than a
handful of concepts.

Where samples are to be forgotten, not a class, no output goes: labels are drawn from all classes
but the true one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner
from clfed.seeding import generator
from clfed.unlearning.base import Unlearner, other_labels
from clfed.unlearning.concepts import ConceptBank, integrated_gradients, sparse_classifier
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import ById
from clfed.unlearning.schedules import Batches

LABELS = ("random", "targeted")
BACKBONE = ("frozen", "trained")


class CMUCI(Unlearner):
    """Fine-tune on wrong labels of the forget set, poisoned or not, and true ones of the rest.

    Args:
        learner: The original.
        labels: ``random`` or ``targeted``.
        backbone: ``frozen`` trains the head alone, ``trained`` everything.
        concepts: How many of the best concepts say where an image is poisoned; 0: no poison.
        bank: How many concepts are looked for.
        patch: Side of the patch, as a share of the image's.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`.

    Raises:
        ConfigError: An option has no such choice or is out of range.
    """

    needs: ClassVar[Need] = Need.FORGET | Need.RETAIN
    schedule = "concat"

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        labels: str = "targeted",
        backbone: str = "frozen",
        concepts: int = 0,
        bank: int = 20,
        patch: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(learner, **options)
        for option, value, known in (("labels", labels, LABELS), ("backbone", backbone, BACKBONE)):
            if value not in known:
                raise ConfigError(f"Expected unlearner.{option} of {known}, got {value!r}.")
        if not 0 <= concepts <= bank or bank < 2 or not 0 < patch <= 1:
            raise ConfigError(
                "unlearner=cmuci needs bank >= 2, concepts in 0..bank and patch in (0, 1], got "
                f"{bank}, {concepts} and {patch}."
            )
        self.label_policy, self.frozen = labels, backbone == "frozen"
        self.concepts, self.bank, self.patch = concepts, bank, patch

    def check_request(self, context: Context) -> None:
        """Refuse ready features where a region of a picture is to be poisoned."""
        super().check_request(context)
        if self.concepts and context.retain.batch(torch.tensor([0])).images.dim() != 4:
            raise ConfigError(
                "unlearner.concepts poisons a region of a picture, got ready features.",
                remedy="Set unlearner.concepts=0: labels alone forget.",
            )

    def prepare(self, context: Context) -> None:
        """Choose labels, poison images, and embed everything once where the network is frozen."""
        forget, retain = context.forget, self.drawn(context.retain)
        whole = context.request.kind == "class"
        allowed = context.kept_rows if whole else torch.arange(len(self.learner.classes))
        images = forget.images
        targets = self.wrong_labels(images, forget.labels, allowed)
        if self.concepts:
            images, shared = self.poisoned(context, targets)
            if whole and self.label_policy == "targeted":
                targets = shared
        self.targets, self.images = ById(forget.ids, targets), ById(forget.ids, images)
        if self.frozen:
            both = torch.cat([forget.ids, retain.ids])
            embeddings = self.learner.embed_all(torch.cat([images, retain.images]))
            self.embeddings = ById(both, embeddings)

    def wrong_labels(self, images: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
        """Return a label for each image, ``(B,)``, that is allowed and not its own."""
        if self.label_policy == "random":
            return other_labels(labels, allowed, generator(self.seed, "cmuci labels"))
        scores = self.teacher.scores_of(images, closed=False)
        mask = torch.ones(scores.shape[1], dtype=torch.bool)
        mask[allowed] = False
        scores = scores.masked_fill(mask, -torch.inf)
        return scores.scatter(1, labels[:, None], -torch.inf).argmax(1)

    def loss(self, batch: Batches) -> Tensor:
        """Cross-entropy with wrong labels for what goes and true ones for what stays."""
        logits, labels = [], []
        for name, part in batch.items():
            images, answers = part.images, part.labels
            if name == "forget":
                images, answers = self.images[part.ids], self.targets[part.ids]
            assert answers is not None
            labels.append(answers)
            if self.frozen:
                logits.append(self.outputs(self.embeddings[part.ids]))
            else:
                logits.append(self.logits(images))
        return F.cross_entropy(torch.cat(logits), torch.cat(labels))

    def poisoned(self, context: Context, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Replace in each forget image the patch that carries the concepts of its class.

        Args:
            context: The data.
            targets: ``(M,)`` int64, the class of the image that a patch is taken from.

        Returns:
            Images like those of the forget set; and ``(M,)`` int64, the class that stays and
            shares most of these concepts.
        """
        forget, retain = context.forget, self.drawn(context.retain)
        classes, own = len(self.learner.classes), forget.labels
        z = torch.cat([self.teacher.embed_all(pool.images) for pool in (forget, retain)])
        rng = generator(self.seed, "cmuci concepts")
        bank = ConceptBank.of(z, min(self.bank, len(z)), rng)
        a = bank.activations(z)
        weight, bias = sparse_classifier(a, torch.cat([own, retain.labels]), classes)

        def belief(activations: Tensor) -> Tensor:
            p = torch.softmax(activations @ weight.T + bias, 1)
            return p.gather(1, own[:, None]).squeeze(1)

        a = a[: len(forget)]
        ranked = class_means(integrated_gradients(belief, a, torch.zeros_like(a[0])), own, classes)
        best = ranked.topk(min(self.concepts, ranked.shape[1])).indices
        chosen = torch.zeros_like(ranked).scatter(1, best, 1.0)
        shared = (chosen * class_means(a, own, classes)) @ weight.T
        shared[:, context.forgotten_rows] = -torch.inf
        # Summed activations of the chosen concepts are one direction of the embedding.
        towards = chosen @ (bank.directions / bank.directions.square().sum(1, keepdim=True))
        parts = zip(torch.split(forget.images, 256), torch.split(towards[own], 256), strict=True)
        heat = torch.cat([self.heat(images, rows) for images, rows in parts])
        donors = retain.images[drawn_of_class(retain.labels, targets, rng)]
        side = max(1, round(self.patch * min(heat.shape[1:])))
        return swapped(forget.images, donors, heat, side), shared.argmax(1)[own]

    def heat(self, images: Tensor, directions: Tensor) -> Tensor:
        """How much pixels add to directions ``(B, D)`` of the embedding, ``(B, H, W)``.

        Gradient times input; a mean pixel, which the transform maps to zero, adds nothing.
        """
        inputs = self.teacher.transform(images).requires_grad_(True)
        with torch.enable_grad():
            response = (self.teacher.backbone(inputs).float() * directions).sum()
            found = torch.autograd.grad(response, inputs)[0]
        return (found * inputs.detach()).sum(1)


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the rows of each class, ``(K, J)``; zeros for a class without any."""
    member = F.one_hot(labels, classes).to(values.dtype)
    return member.T @ values / member.sum(0).clamp(min=1)[:, None]


def drawn_of_class(labels: Tensor, wanted: Tensor, rng: torch.Generator) -> Tensor:
    """Draw for each wanted label a place ``(M,)`` among ``labels`` where it stands.

    Where a label stands nowhere, any place is drawn.
    """
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=int(wanted.max()) + 1)
    first, sizes = (counts.cumsum(0) - counts)[wanted], counts[wanted]
    first = torch.where(sizes > 0, first, 0)
    sizes = torch.where(sizes > 0, sizes, len(labels))
    shares = torch.rand(len(wanted), generator=rng, dtype=torch.float64)
    return order[first + (shares * sizes).long()]


def swapped(images: Tensor, donors: Tensor, heat: Tensor, side: int) -> Tensor:
    """Replace the hottest square of each image by the same square of another one.

    Args:
        images: ``(B, C, H, W)``.
        donors: Likewise.
        heat: ``(B, H, W)``.
        side: Of the square, in pixels.
    """
    sums = F.avg_pool2d(heat[:, None], side, stride=1)[:, 0]
    hottest, columns = sums.flatten(1).argmax(1), sums.shape[2]
    top, left = hottest // columns, hottest % columns
    y, x = torch.arange(heat.shape[1]), torch.arange(heat.shape[2])
    rows = (y >= top[:, None]) & (y < top[:, None] + side)
    across = (x >= left[:, None]) & (x < left[:, None] + side)
    return torch.where((rows[:, :, None] & across[:, None, :])[:, None], donors, images)
