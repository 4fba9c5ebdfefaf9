r"""What nodes that still have images tell of how a network changed, for those that have none left.

The sums of :func:`clfed.prototypes.drift.linear_map` over all images of all nodes give one map,
which moves the classes of contributors whose images are gone (Gomez-Villa et al. 2024, arXiv
2407.08536, in closed form).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clfed.errors import (
    EmbeddingMismatch,
    InvalidEmbedding,
    NotEnoughData,
    UnsupportedStatistics,
)
from clfed.prototypes.contribution import Contribution
from clfed.prototypes.drift import linear_map, moved, through
from clfed.prototypes.ledger import ContributorLedger
from clfed.prototypes.memory import PrototypeMemory
from clfed.prototypes.moments import gram


@dataclass(frozen=True, eq=False)
class DriftStatistics:
    r"""How some images moved from one embedding to the next, as exact sums that add up.

    .. math:: \sum_i h_i h_i^{-\top} \quad\text{and}\quad \sum_i h_i^- h_i^{-\top}

    Both are blocks of the second moments of the pairs :math:`(h_i^-, h_i)`, so they are kept as a
    memory of pairs: integers, for which order and grouping of the sums change no bit. A pair costs
    one more block, :math:`\sum_i h_i h_i^\top`, which tells how well a map fits.

    Fewer images than an embedding has dimensions are no secret: their span can be read off.

    Attributes:
        before: Identity of the older embedding.
        after: Identity of the present one.
        pairs: Memory of the pairs, ``2 D`` columns, shared second moments.

    Example:
        >>> old = torch.eye(2)
        >>> new = old @ torch.tensor([[2.0, 0.0], [1.0, 1.0]]).T
        >>> one, two = (DriftStatistics.of(old[i:i+1], new[i:i+1], "old", "new") for i in (0, 1))
        >>> (two + one).matrix(0.0).tolist()
        [[2.0, 0.0], [1.0, 1.0]]
    """

    before: str
    after: str
    pairs: PrototypeMemory

    @classmethod
    def empty(cls, dim: int, before: str, after: str) -> DriftStatistics:
        """The zero of the group, for embeddings of ``dim`` columns."""
        # Two identities do not fit into the length of one.
        both = hashlib.sha256(f"{before}\n{after}".encode()).hexdigest()
        return cls(before, after, PrototypeMemory.empty(2 * dim, both, "shared"))

    @classmethod
    def of(cls, old: Tensor, new: Tensor, before: str, after: str) -> DriftStatistics:
        """The statistics of some images.

        Args:
            old: :math:`h^-`, ``(N, D)``, by the older network.
            new: :math:`h`, ``(N, D)``, the same images by the present one.
            before: Identity of the older embedding.
            after: Identity of the present one.

        Raises:
            InvalidEmbedding: Of different shapes, not finite or out of range.
        """
        if old.ndim != 2 or old.shape != new.shape:
            raise InvalidEmbedding(
                f"expected embeddings of the same images, got {tuple(old.shape)} and "
                f"{tuple(new.shape)}"
            )
        zero = cls.empty(old.shape[1], before, after)
        pairs = zero.pairs.observe(torch.cat([old, new], dim=1), ["pair"] * len(old))
        return replace(zero, pairs=pairs)

    @property
    def dim(self) -> int:
        """Embedding size :math:`D`."""
        return self.pairs.dim // 2

    @property
    def count(self) -> int:
        """Number of images."""
        return self.pairs.total_count

    def __add__(self, other: DriftStatistics) -> DriftStatistics:
        return replace(self, pairs=self.pairs + other.pairs)

    def __sub__(self, other: DriftStatistics) -> DriftStatistics:
        return replace(self, pairs=self.pairs - other.pairs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DriftStatistics):
            return NotImplemented
        return (self.before, self.after, self.pairs) == (other.before, other.after, other.pairs)

    def __hash__(self) -> int:
        return hash((self.before, self.after, self.pairs))

    def matrix(self, penalty: float = 1e-3) -> Tensor:
        r"""The map :math:`A = C (G + \lambda I)^{-1}`, see :func:`linear_map`.

        Args:
            penalty: :math:`\lambda` as a fraction of the mean diagonal entry of :math:`G`, >= 0.

        Returns:
            ``(D, D)`` float64.

        Raises:
            NotEnoughData: There were no images.
        """
        if self.count < 1:
            raise NotEnoughData(
                "No images tell how the embedding changed.",
                remedy="Let a node that still has images send drift statistics.",
            )
        whole = gram(self.pairs)
        old, new = slice(None, self.dim), slice(self.dim, None)
        return linear_map(whole[new, old], whole[old, old], penalty, identity=False)

    def misfit(self, matrix: Tensor) -> float:
        r"""Share of the present embeddings that a map misses.

        .. math:: \sum_i \|A h_i^- - h_i\|^2 \Big/ \sum_i \|h_i\|^2

        Args:
            matrix: :math:`A`, ``(D, D)`` float64.

        Returns:
            From 0, a perfect map; 1 is what a map to zero misses. 0 without images.
        """
        whole = gram(self.pairs)
        total = float(whole[self.dim :, self.dim :].trace())
        both = torch.cat([matrix, -torch.eye(self.dim, dtype=matrix.dtype)], dim=1)
        missed = float((both @ whole @ both.T).trace())
        return max(missed, 0.0) / total if total else 0.0


def carried(
    memory: PrototypeMemory, statistics: DriftStatistics, penalty: float = 1e-3
) -> PrototypeMemory:
    r"""Return statistics of an older embedding as a guess of those of the present one.

    .. math:: \mu_c \leftarrow A \mu_c

    Args:
        memory: Of the older embedding; second moments ``none`` or ``class``.
        statistics: How other images moved.
        penalty: As in :meth:`DriftStatistics.matrix`.

    Raises:
        EmbeddingMismatch: The memory is of another embedding than the statistics begin with.
        UnsupportedStatistics: The memory holds one matrix for all classes.
        NotEnoughData: There were no other images.
        InvalidEmbedding: A mean leaves the range.
    """
    if (memory.embedding_id, memory.dim) != (statistics.before, statistics.dim):
        raise EmbeddingMismatch(
            f"Expected a memory of embedding {statistics.before[:12]} with {statistics.dim} "
            f"columns, got {memory.embedding_id[:12]} with {memory.dim}."
        )
    if memory.moments == "shared":
        raise UnsupportedStatistics("Expected second moments by class or none, got shared ones.")
    means, covariances = through(memory, statistics.matrix(penalty))
    return moved(memory, means, statistics.after, covariances)


def carry_over(
    old: ContributorLedger,
    new: ContributorLedger,
    statistics: DriftStatistics,
    penalty: float = 1e-3,
) -> tuple[str, ...]:
    """Take into a new ledger what only an older embedding's one knows.

    Contributors of the new ledger have recomputed their rows from their images, and nothing of
    theirs is touched. The others get complete rows, moved by :func:`carried`, under the version
    that they had, so that whatever they may send later replaces them.

    Args:
        old: Of the older embedding, without second moments.
        new: Of the present one; changed in place.
        statistics: How the images of those who still have some moved.
        penalty: As in :meth:`DriftStatistics.matrix`.

    Returns:
        Names of the contributors that were carried over.

    Raises:
        EmbeddingMismatch: The ledgers are not of the embeddings that the statistics join.
        UnsupportedStatistics: They keep second moments, which moved rows have none to compare with.
        NotEnoughData: Nobody still has images.
        InvalidEmbedding: A mean leaves the range.
    """
    if new.embedding_id != statistics.after:
        raise EmbeddingMismatch(
            f"Expected a ledger of embedding {statistics.after[:12]}, got {new.embedding_id[:12]}."
        )
    if old.moments != "none" or new.moments != "none":
        raise UnsupportedStatistics(
            f"Expected ledgers without second moments, got {old.moments} and {new.moments}.",
            remedy="Start with memory.moments=none, or let every contributor recompute its rows.",
        )
    gone = [name for name in old.contributors if name not in set(new.contributors)]
    moved_shares = [carried(old.share(name), statistics, penalty) for name in gone]
    for name, share in zip(gone, moved_shares, strict=True):
        new.receive(Contribution.of(name, max(old.version_of(name), 1), share, complete=True))
    return tuple(gone)
