r"""From an embedding back to the picture: an inversion network (Dosovitskiy & Brox 2016).

.. math:: h = \arg\min_h \sum_i \|h(m_i) - x_i\|^2

over public pairs of a message :math:`m_i` and an image :math:`x_i` behind it (arXiv 1506.02753).
Then :math:`h` looks at messages of others. A mean of :math:`n` embeddings gives something like the
mean of :math:`n` images: less of each of them, and as much as before of what they have in common.
A low PSNR therefore protects no class from being recognised, and a better decoder may exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clfed.errors import InvalidEmbedding, NotEnoughData
from clfed.learners.training import initialisation
from clfed.seeding import generator

#: Below this mean squared error, 100 dB, images count as equal.
LEAST_ERROR = 1e-10

#: Names the classes of images ``(M, C, H, W)``: ``(M,)`` int64.
Judge = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reconstruction:
    r"""How much reconstructions look like the images behind them.

    Attributes:
        mse: Mean squared error of a pixel in 0..1.
        psnr: Peak signal-to-noise ratio in dB, mean over images of :math:`-10 \log_{10} mse`.
        floor: PSNR of the guess that needs no message, the mean of public images.
        recognised: Share of images whose class a judge reads off the reconstruction; None without
            a judge.
    """

    mse: float
    psnr: float
    floor: float
    recognised: float | None = None


class Decoder(nn.Module):
    """From an embedding to an image: standardise, two hidden layers, sigmoid.

    Args:
        embeddings: Public ones, ``(N, D)``, for mean and spread of each entry.
        shape: ``(C, H, W)`` of the images.
        width: Of the hidden layers.
        seed: Of the first weights; nothing ambient is read or changed.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, embeddings: Tensor, shape: tuple[int, ...], width: int, *, seed: int
    ) -> None:
        super().__init__()
        self.register_buffer("mean", embeddings.mean(0))
        # A dead entry says nothing; divided by its spread, rounding would shout.
        self.register_buffer("std", embeddings.std(0).clamp(min=1e-3))
        pixels = torch.Size(shape).numel()
        with initialisation(seed, "decoder"):
            self.layers = nn.Sequential(
                nn.Linear(embeddings.shape[1], width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, pixels),
                nn.Sigmoid(),
                nn.Unflatten(1, shape),
            )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to images ``(B, C, H, W)`` in 0..1."""
        images: Tensor = self.layers((embeddings - self.mean) / self.std)
        return images


def train_decoder(
    embeddings: Tensor,
    images: Tensor,
    *,
    width: int = 256,
    epochs: int = 30,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int,
) -> Decoder:
    """Train an inversion network on public pairs, with Adam on squared errors, and freeze it.

    An attacker who expects means or noise trains on public means or noised embeddings.

    Args:
        embeddings: Messages, ``(N, D)`` float32.
        images: An image behind each, ``(N, C, H, W)`` float32 in 0..1.
        width: Of the hidden layers.
        epochs: Passes.
        lr: Learning rate.
        batch_size: Pairs a batch.
        seed: Of the first weights and the order.

    Raises:
        NotEnoughData: Not one image for each of at least two embeddings.
    """
    if len(embeddings) != len(images) or len(images) < 2:
        raise NotEnoughData(
            f"Expected one image for each of two or more embeddings, got {len(images)} images "
            f"and {len(embeddings)} embeddings.",
            remedy="Embed the public images that the decoder is to learn from.",
        )
    decoder = Decoder(embeddings, tuple(images.shape[1:]), width, seed=seed)
    optimiser = torch.optim.Adam(decoder.parameters(), lr)
    rng = generator(seed, "decoder", "order")
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images), generator=rng), batch_size):
            optimiser.zero_grad()
            loss = (decoder(embeddings[rows]) - images[rows]).square().mean()
            loss.backward()
            optimiser.step()
    return decoder.eval().requires_grad_(False)


def psnr(guesses: Tensor, images: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of each image, :math:`-10 \log_{10} mse`, at most 100 dB.

    Args:
        guesses: ``(N, C, H, W)``, or anything that broadcasts to the images.
        images: ``(N, C, H, W)`` in 0..1.

    Returns:
        ``(N,)`` in dB.

    Example:
        >>> psnr(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)).round().tolist()
        [20.0]
    """
    return -10 * (guesses - images).square().flatten(1).mean(1).clamp(min=LEAST_ERROR).log10()


def inversion(
    guesses: Tensor,
    images: Tensor,
    owner: Tensor,
    *,
    public: Tensor,
    judge: Judge | None = None,
    labels: Tensor | None = None,
) -> Reconstruction:
    """Judge reconstructions against every image that went into their message.

    Args:
        guesses: One reconstruction a message, ``(M, C, H, W)``.
        images: Those behind the messages, ``(N, C, H, W)`` in 0..1.
        owner: Message that each image went into, ``(N,)`` int64.
        public: Images that the attacker has anyway, ``(P, C, H, W)``; their mean is the floor.
        judge: A classifier of images that the decoder was not trained with.
        labels: Class of each image, ``(N,)`` int64, for the judge.

    Raises:
        NotEnoughData: No image.
        InvalidEmbedding: A judge without labels or labels without a judge, or not one owner and
            label an image.
    """
    if not len(images) or not len(public):
        raise NotEnoughData(
            f"Expected images behind the messages and public ones, got {len(images)} and "
            f"{len(public)}.",
            remedy="Attack at least one image.",
        )
    fits = owner.shape == images.shape[:1] and (labels is None or labels.shape == owner.shape)
    if not fits or (judge is None) != (labels is None):
        raise InvalidEmbedding(
            f"Expected a message and, with a judge, a label for each of {len(images)} images.",
            remedy="Give judge and labels together, or neither.",
        )
    seen = guesses[owner]
    known = None
    if judge is not None and labels is not None:
        known = float((judge(guesses)[owner] == labels).double().mean())
    return Reconstruction(
        mse=float((seen - images).square().mean()),
        psnr=float(psnr(seen, images).mean()),
        floor=float(psnr(public.mean(0, keepdim=True), images).mean()),
        recognised=known,
    )
