r"""Sketched statistics: a random projection in integers, under which every law stays exact.

A count sketch (Charikar, Chen & Farach-Colton 2002, doi:10.1007/3-540-45465-9_59) with buckets of
equal size: coordinate :math:`d` is added to bucket :math:`h(d)` with the sign :math:`\sigma(d)`,

.. math:: (T z)_j = \sum_{d:\ h(d) = j} \sigma(d)\, z_d, \qquad
          E \langle T x, T y \rangle = \langle x, y \rangle, \qquad
          \mathrm{Var}\, \|T z\|^2 = 2 p \sum_{i \ne j} z_i^2 z_j^2, \quad
          p = \frac{\sum_b n_b (n_b - 1)}{D (D - 1)}

with :math:`n_b` coordinates in bucket :math:`b`. For :math:`m` buckets that divide :math:`D`,
:math:`p = (D - m) / (m (D - 1))`: below the :math:`1/m` of independent buckets and of dense signs
(Achlioptas 2003, doi:10.1016/S0022-0000(03)00025-4), and zero for :math:`m = D`, where nothing but
the order and signs of the coordinates changes.

:math:`T` has entries 0, 1 and -1 and is linear, so integers stay integers: sums, merges, deletions
and second moments of sketches are exact, bit for bit, as those of embeddings are. What is lost is
the angle between directions that fall into one bucket. Who knows the seed knows :math:`T`: a sketch
is smaller, not private.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clfed.errors import ConfigError, EmbeddingMismatch, InvalidEmbedding
from clfed.prototypes.algebra import without_zeros
from clfed.prototypes.fixed_point import RESOLUTION, quantise
from clfed.prototypes.memory import PrototypeMemory
from clfed.seeding import generator

_LIMIT = 2.0**62


@dataclass(frozen=True)
class Sketch:
    """A fixed map from embeddings of ``dim_in`` columns to ``dim_out``, before or after summing.

    ``sketch.memory(memory.observe(z, y)) == sketch.memory(memory).observe(sketch(z), y)``, bit for
    bit, and ``sketch.memory(a + b) == sketch.memory(a) + sketch.memory(b)``.

    Args:
        dim_in: Embedding size :math:`D`.
        dim_out: Size of the sketch :math:`m`, from 1 to :math:`D`.
        seed: All nodes must use the same.

    Raises:
        ConfigError: The size of the sketch is not one of those.
    """

    dim_in: int
    dim_out: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.dim_out <= self.dim_in:
            raise ConfigError(
                f"expected a sketch of 1 to {self.dim_in} columns, got {self.dim_out}"
            )

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """Bucket and sign (1 or -1) of each coordinate, both of shape ``(dim_in,)`` int64."""
        rng = generator(self.seed, "sketch", self.dim_in, self.dim_out)
        order = torch.randperm(self.dim_in, generator=rng)
        sign = torch.randint(2, (self.dim_in,), generator=rng) * 2 - 1
        return order % self.dim_out, sign

    def embedding_id(self, original: str) -> str:
        """Identity of the sketched embedding: of the original one and the map's own tables."""
        digest = hashlib.sha256(original.encode())
        for tensor in self.table:
            digest.update(tensor.numpy().astype("<i8").tobytes())
        return f"sketch{self.dim_out}:{digest.hexdigest()}"

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Sketch embeddings, which are rounded to multiples of ``RESOLUTION`` first.

        Args:
            embeddings: Shape ``(B, dim_in)``, floating point, magnitudes at most 2**15.

        Returns:
            Shape ``(B, dim_out)`` float64, exact.

        Raises:
            InvalidEmbedding: Wrong shape or dtype, NaN, infinite or out of range.
        """
        bucket, sign = self.table
        q, _ = quantise(embeddings, self.dim_in)
        return q.new_zeros(len(q), self.dim_out).index_add_(1, bucket, q * sign) * RESOLUTION

    def memory(self, memory: PrototypeMemory) -> PrototypeMemory:
        """The memory of the sketched embeddings, with the same classes, counts and moments.

        Raises:
            EmbeddingMismatch: The memory's embeddings are of another size.
            InvalidEmbedding: A sum does not fit into 64 bits.
        """
        if memory.dim != self.dim_in:
            raise EmbeddingMismatch(
                f"expected embeddings of {self.dim_in} columns to sketch, got {memory.dim}"
            )
        outer = memory.outer
        if outer is not None:
            outer = self._folded(self._folded(outer).mT.contiguous())
        return without_zeros(
            replace(
                memory,
                sums=self._folded(memory.sums),
                outer=outer,
                embedding_id=self.embedding_id(memory.embedding_id),
            )
        )

    def _folded(self, table: Tensor) -> Tensor:
        """Apply the map to the last dimension: ``(..., dim_in)`` to ``(..., dim_out)`` int64."""
        bucket, sign = self.table
        shape = (*table.shape[:-1], self.dim_out)
        bound = torch.zeros(shape, dtype=torch.float64)
        bound.index_add_(-1, bucket, table.double().abs())
        if bound.numel() and float(bound.amax()) >= _LIMIT:
            raise InvalidEmbedding(
                "expected sketched statistics that fit into 64 bits, got larger ones",
                remedy="Scale the embeddings down, for instance to unit length.",
            )
        return torch.zeros(shape, dtype=torch.int64).index_add_(-1, bucket, table * sign)
