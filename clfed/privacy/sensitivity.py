r"""How far one example, or one client, can move the statistics of all classes.

What is released over a fixed public list of classes is the vector
:math:`(s_1, \dots, s_C, \lambda n_1, \dots, \lambda n_C)` of sums of clipped embeddings,
:math:`g(x) = f(x) \min(1, A / \|f(x)\|)`, and scaled counts. Its L2 sensitivity :math:`\Delta` is
the largest distance between the vectors of two neighbouring data sets:

=======================  =====================================================================
neighbours               :math:`\Delta`
=======================  =====================================================================
``"example"``            one example more or less: :math:`\sqrt{A^2 + \lambda^2}`
``"replaced example"``   one example exchanged, label and all:
                         :math:`\max(2A, \sqrt{2A^2 + 2\lambda^2})`
``"client"``             one client more or less, with at most :math:`m` examples of each of at
                         most :math:`k` classes: :math:`m \sqrt k \sqrt{A^2 + \lambda^2}`; or
                         :math:`B`, if its whole vector is clipped to that norm
=======================  =====================================================================

A client that sends the mean of each class with weight 1 (:func:`clipped_means`) is one with
:math:`m = 1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from clfed.errors import ConfigError, InvalidEmbedding, InvalidMessage, UnsupportedStatistics
from clfed.privacy.gaussian import check_positive
from clfed.prototypes.fixed_point import RANGE, RESOLUTION, SCALE
from clfed.prototypes.memory import PrototypeMemory

Neighbours = Literal["example", "replaced example", "client"]

_SLACK = 1 + 1e-12  # float64 rounding of the norms compared below


@dataclass(frozen=True)
class Bounds:
    r"""What one example or client contributes at most, and so the sensitivity.

    Attributes:
        neighbours: Which two data sets must be hard to tell apart.
        clip_norm: :math:`A`, largest norm of an embedding, between the resolution of the statistics
            and their range.
        count_scale: :math:`\lambda` in the unit of ``clip_norm``, see :func:`best_count_scale`.
        per_class: :math:`m`, examples of a class that a client contributes.
        classes: :math:`k`, classes that a client contributes to.
        message_norm: :math:`B`, norm to which the whole vector of a client is clipped instead.

    Example:
        >>> Bounds("example", clip_norm=3.0, count_scale=4.0).sensitivity
        5.0
        >>> Bounds("client", clip_norm=3.0, count_scale=4.0, per_class=2, classes=9).sensitivity
        30.0
    """

    neighbours: Neighbours
    clip_norm: float
    count_scale: float
    per_class: int = 1
    classes: int = 1
    message_norm: float | None = None

    def __post_init__(self) -> None:
        if self.neighbours not in get_args(Neighbours):
            raise ConfigError(
                f"expected neighbours among {get_args(Neighbours)}, got {self.neighbours!r}"
            )
        check_clip_norm(self.clip_norm)
        check_positive("count scale", self.count_scale)
        client = self.neighbours == "client"
        for name, value in (("examples per class", self.per_class), ("classes", self.classes)):
            if type(value) is not int or value < 1 or (value > 1 and not client):
                raise ConfigError(
                    f"expected a whole number of {name}, 1 or, for clients, more, got {value!r}"
                )
        if self.message_norm is not None:
            check_positive("message norm", self.message_norm)
            if not client:
                raise ConfigError("expected a message norm for clients alone, got one for examples")

    @property
    def sensitivity(self) -> float:
        r""":math:`\Delta` of the table above, in the unit of the embeddings."""
        one = math.hypot(self.clip_norm, self.count_scale)
        if self.neighbours == "example":
            return one
        if self.neighbours == "replaced example":
            return max(2 * self.clip_norm, math.sqrt(2) * one)
        if self.message_norm is not None:
            return self.message_norm
        return self.per_class * math.sqrt(self.classes) * one

    def check_clipped(self, memory: PrototypeMemory) -> None:
        r"""Refuse a memory that clipped embeddings cannot have given: :math:`\|s_c\| \le n_c A`.

        Necessary, not sufficient: the bound rests on :func:`clip` having been applied to each
        embedding before it was observed.

        Raises:
            InvalidEmbedding: A sum is too long for its count.
            InvalidMessage: A count is negative.
            UnsupportedStatistics: Second moments are kept, which these sensitivities do not cover.
        """
        if memory.moments != "none":
            raise UnsupportedStatistics(
                f"expected a memory with moments='none' for a private release, got "
                f"{memory.moments!r}",
                remedy="Drop the second moments first: with_moments('none').",
            )
        if (memory.counts < 0).any():
            raise InvalidMessage("expected counts of at least 0 for a release, got a difference")
        lengths = torch.linalg.vector_norm(memory.sums.double(), dim=1) * RESOLUTION
        longest = memory.counts.double() * (self.clip_norm * _SLACK)
        if (lengths > longest).any():
            row = int((lengths - longest).argmax())
            raise InvalidEmbedding(
                f"expected sums of embeddings clipped to norm {self.clip_norm:g}, got "
                f"{float(lengths[row]):g} for {int(memory.counts[row])} of {memory.classes[row]!r}",
                remedy="Clip every embedding before it is observed, see clfed.privacy.sensitivity.",
            )

    def check_client(self, memory: PrototypeMemory) -> None:
        """Refuse evidence of one client that is more than it may contribute.

        Raises:
            InvalidMessage: Too many classes, or too many examples of one.
        """
        remedy = "Leave examples or classes out before anything is observed, or set a message norm."
        if self.neighbours != "client" or self.message_norm is not None:
            return
        if len(memory) > self.classes:
            raise InvalidMessage(
                f"expected at most {self.classes} classes of one client, got {len(memory)}",
                remedy=remedy,
            )
        if len(memory) and int(memory.counts.amax()) > self.per_class:
            raise InvalidMessage(
                f"expected at most {self.per_class} examples of a class from one client, got "
                f"{int(memory.counts.amax())}",
                remedy=remedy,
            )


def clip(embeddings: Tensor, norm: float, centre: Tensor | None = None) -> Tensor:
    r"""Shorten embeddings to a norm: :math:`g = f \min(1, A / \|f\|)`, rounded towards zero.

    The result consists of multiples of the resolution of the statistics, so observing it rounds
    nothing, and :math:`\|g\| \le A` holds in exact arithmetic: no allowance for rounding has to be
    added to the sensitivity.

    Args:
        embeddings: :math:`f`, shape ``(B, D)``, floating point, finite.
        norm: :math:`A`, between the resolution of the statistics and their range.
        centre: A public point, shape ``(D,)``, that is the origin from here on; None: zero.

    Returns:
        Shape ``(B, D)`` float64 on the CPU.

    Raises:
        ConfigError: ``norm`` is out of range.
        InvalidEmbedding: Wrong shape or dtype, or a norm that is not finite.

    Example:
        >>> clip(torch.tensor([[3.0, 4.0], [0.25, 0.5]]), norm=2.5).tolist()
        [[1.5, 2.0], [0.25, 0.5]]
    """
    check_clip_norm(norm)
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise InvalidEmbedding(
            f"expected floating point embeddings of shape (B, D), got {embeddings.dtype} of shape "
            f"{tuple(embeddings.shape)}"
        )
    f = embeddings.detach().to(device="cpu", dtype=torch.float64)
    f = f if centre is None else f - centre.double()
    lengths = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    if not lengths.isfinite().all():
        raise InvalidEmbedding("expected embeddings of finite norm, got NaN, infinity or overflow")
    q: Tensor = (f * (norm / lengths.clamp(min=norm)) * SCALE).trunc_().long()
    # Float64 may have placed a vector on the wrong side of the sphere, by a part in 10^15. One
    # unit off its largest coordinate (at least ‖q‖/√D) takes away more than that. The squares are
    # below 2^62, so this comparison is exact.
    limit = math.floor((Fraction(norm) * Fraction(SCALE)) ** 2)
    largest = q.abs().argmax(dim=1, keepdim=True)
    outside = (q * q).sum(dim=1, keepdim=True) > limit
    q.scatter_add_(1, largest, -q.gather(1, largest).sign() * outside)
    return q.double() * RESOLUTION


def clipped_means(memory: PrototypeMemory, norm: float) -> PrototypeMemory:
    """One clipped mean of weight 1 for each class: what a client sends whose counts stay hidden.

    Args:
        memory: Evidence of one client, counts of at least 1.
        norm: Largest norm of a mean.

    Raises:
        ConfigError: ``norm`` is out of range.
        InvalidMessage: A count below 1.
    """
    means = clip(memory.means(), norm)
    return replace(
        memory.with_moments("none"),
        counts=torch.ones_like(memory.counts),
        sums=(means * SCALE).long(),
    )


def best_count_scale(norm: float, dim: int) -> float:
    r""":math:`\lambda = A D^{-1/4}`: the least noise on prototypes for one privacy budget.

    With noise :math:`\sigma \propto \sqrt{A^2 + \lambda^2}` on the sum and :math:`\sigma / \lambda`
    on the count, the mean of :math:`n` examples is off by

    .. math:: n^2 E\|\tilde\mu - \mu\|^2 \approx \sigma^2 (D + \|\mu\|^2 / \lambda^2)
              \le c\, (A^2 + \lambda^2)(D + A^2 / \lambda^2)

    which is least there, at :math:`c A^2 (\sqrt D + 1)^2`. Where counts matter more, for instance
    to tell empty classes from small ones, choose a larger one, up to :math:`A`.

    Args:
        norm: :math:`A`.
        dim: :math:`D`.

    Example:
        >>> best_count_scale(1.0, 256)
        0.25
    """
    check_clip_norm(norm)
    if type(dim) is not int or dim < 1:
        raise ConfigError(f"expected an embedding size of at least 1, got {dim!r}")
    return float(norm / dim**0.25)


def check_clip_norm(norm: float) -> None:
    """Refuse a norm outside the resolution and the range of the statistics."""
    check_positive("clip norm", norm)
    if not RESOLUTION <= norm <= RANGE:
        raise ConfigError(
            f"expected a clip norm from {RESOLUTION:g} to {RANGE:g}, got {norm:g}",
            remedy="Scale the embeddings, for instance to unit length, and clip to 1.",
        )
