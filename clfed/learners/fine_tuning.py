r"""Fine-tuning of a whole network with a growing softmax head, without any protection.

.. math:: L = \\mathrm{CE}(W \\phi(x) + b,\\; y)

The lower bound of every continual learning comparison: stochastic gradient descent on what is
there now (settings after iCaRL, Rebuffi et al. 2017, arXiv 1611.07725). Trained on everything at
once it becomes the upper bound, ``joint``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones import Encoder
from clfed.errors import InvalidEmbedding, UnknownClass

#: Loss of a network on a batch of images and head rows.
Loss = Callable[["FineTuning", Tensor, Tensor], Tensor]
#: Yields the positions of each batch: number of images, passes, images a batch, and what is random.
Order = Callable[[int, int, int, torch.Generator], Iterable[Tensor]]


def passes(count: int, epochs: int, batch_size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled batches of whole passes, the customary order.

    Args:
        count: Number of images.
        epochs: Number of passes.
        batch_size: Images a batch; the last one of a pass may be smaller.
        rng: Decides the order.
    """
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count, generator=rng), batch_size)


class FineTuning(L.LightningModule):
    """A copy of an encoder's backbone that goes on learning, with a head over named classes.

    Args:
        encoder: Where the backbone and its input transform come from; it is not changed.
        classes: Classes of the head, in the order of its rows.
        lr: Learning rate.
        momentum: Momentum of the gradient descent.
        weight_decay: L2 penalty.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str] = (),
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        self._transform = encoder.transform
        self.backbone = copy.deepcopy(encoder.backbone).requires_grad_(True)
        self.head = _head(self._width(encoder), 0)
        self.classes: tuple[str, ...] = ()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.grow(classes)

    def grow(self, names: Sequence[str]) -> None:
        """Append a zero row to the head for each name that it does not have."""
        new = [name for name in dict.fromkeys(names) if name not in set(self.classes)]
        grown = _head(self.head.in_features, len(self.classes) + len(new))
        with torch.no_grad():
            grown.weight[: len(self.classes)] = self.head.weight
            grown.bias[: len(self.classes)] = self.head.bias
        self.head = grown
        self.classes = (*self.classes, *new)

    def label(self, names: Sequence[str]) -> Tensor:
        """Return the head's row of each name, ``(B,)`` int64.

        Raises:
            UnknownClass: The head has no row for a name.
        """
        place = {name: row for row, name in enumerate(self.classes)}
        try:
            return torch.tensor([*map(place.__getitem__, names)], dtype=torch.int64)
        except KeyError as error:
            raise UnknownClass(
                f"The head knows {len(place)} classes, not {error.args[0]!r}."
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` uint8 to logits ``(B, classes)``."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` uint8 to embeddings ``(B, D)``, in the present mode."""
        inputs = self._transform(images)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone(inputs)
        return features

    @torch.no_grad()
    def _width(self, encoder: Encoder) -> int:
        """Size of the backbone's output, which a feature map of the encoder may have changed."""
        return self.features(torch.zeros(1, *encoder.input_shape)).shape[1]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of images and head rows."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )

    def fit(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        epochs: int,
        batch_size: int,
        rng: torch.Generator,
        loss: Loss | None = None,
        order: Order | None = None,
    ) -> None:
        """Train on images with a plain loop, over :meth:`training_step` unless told otherwise.

        A ``Trainer`` costs 15 to 23 ms a fit, more than a small mission itself.

        Args:
            images: ``(N, C, H, W)`` uint8.
            labels: ``(N,)`` int64, rows of the head.
            epochs: Passes over the images.
            batch_size: Images a step; a last batch of one image is left out, as batch
                normalisation cannot train on it.
            rng: Decides the order of the images.
            loss: Of a batch; cross-entropy if omitted.
            order: Divides the images into batches; :func:`passes` if omitted.

        Raises:
            InvalidEmbedding: The training diverged.
        """
        optimiser = self.configure_optimizers()
        for batch in (order or passes)(len(images), epochs, batch_size, rng):
            if len(batch) < 2:
                continue
            self.train()  # an order may look at the network between two batches
            optimiser.zero_grad(set_to_none=True)
            of_batch = images[batch], labels[batch]
            torch.autograd.backward(
                self.training_step(of_batch, 0) if loss is None else loss(self, *of_batch)
            )
            optimiser.step()
        if not all(bool(torch.isfinite(weights).all()) for weights in self.parameters()):
            raise InvalidEmbedding(
                "The training diverged: weights are no longer finite numbers.",
                remedy="Choose a smaller learning rate, and look for images that are not finite.",
            )

    @torch.no_grad()
    def embed(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Return the embeddings of images in eval mode, ``(N, D)``."""
        self.eval()
        parts = [self.features(batch) for batch in torch.split(images, batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.head.in_features)

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Return the head row with the largest logit for each image, ``(N,)`` int64."""
        self.eval()
        parts = [self(batch).argmax(1) for batch in torch.split(images, batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _head(dim: int, classes: int) -> nn.Linear:
    """Return a head of zeros; random rows would make new classes depend on when they came."""
    head = nn.Linear(dim, 1, device="meta")
    head.weight = nn.Parameter(torch.zeros(classes, dim))
    head.bias = nn.Parameter(torch.zeros(classes))
    head.out_features = classes
    return head
