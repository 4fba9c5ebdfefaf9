r"""Class statistics by contributor, from which samples are subtracted exactly.

For a frozen embedding the state of contributor :math:`k` and class :math:`c` is

.. math:: n_{kc} = \sum_i 1, \qquad S_{kc} = \sum_i q_i, \qquad
          n_c = \sum_k n_{kc}, \quad S_c = \sum_k S_{kc}

with embeddings :math:`q_i` rounded to fixed point, so that sums are integers and

.. math:: n_c' = n_c - |F_c|, \qquad S_c' = S_c - \sum_{i \in F_c} q_i

is, bit for bit, the state that never saw :math:`F`. The rounded embeddings are kept by sample id,
so that nothing has to be embedded again to be deleted; they are personal data themselves, and go
with the samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, EmbeddingMismatch, RequestError, UnsupportedStatistics
from clfed.learners.base import ContinualLearner
from clfed.learners.tables import rows_of
from clfed.prototypes import RESOLUTION, Contribution, ContributorLedger, PrototypeMemory
from clfed.prototypes.fixed_point import quantise
from clfed.unlearning.requests import Request


@dataclass(frozen=True, eq=False)
class Deletion:
    """What one request removed from class statistics.

    Attributes:
        request: Its id.
        removed: ``(M,)`` int64, ids of the samples that were subtracted.
        unknown: ``(U,)`` int64, ids of which nothing was known: never seen, or gone before.
        delta: What was subtracted.
    """

    request: str
    removed: Tensor
    unknown: Tensor
    delta: PrototypeMemory

    def __str__(self) -> str:
        told = f"Request {self.request!r} removed {len(self.removed)} samples"
        if not len(self.unknown):
            return f"{told}."
        return (
            f"{told}; of {len(self.unknown)} more nothing was known, so nothing changed for them."
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """A ledger of what each contributor gave, and the embedding of each sample behind it.

    A value: :meth:`forget` returns another one.

    Attributes:
        ledger: Evidence by contributor and class, with tombstones; not to be changed in place.
        kept: ``(N, D)``, the rounded embeddings, in a type that holds them without loss.
        labels: ``(N,)`` int64, rows of ``classes``.
        ids: ``(N,)`` int64 sample ids.
        codes: ``(N,)`` int64, who gave each sample: index into ``contributors``.
        classes: The learner's classes.
        contributors: Names, sorted.
        deletion: What the request that led here removed; None where there was none.
    """

    ledger: ContributorLedger
    kept: Tensor
    labels: Tensor
    ids: Tensor
    codes: Tensor
    classes: tuple[str, ...]
    contributors: tuple[str, ...]
    deletion: Deletion | None = None

    @classmethod
    def of(
        cls, learner: ContinualLearner, images: ImageSet, ids: Tensor, owners: Sequence[str]
    ) -> Statistics:
        """Embed training images once and sum them by contributor.

        Args:
            learner: Has the memory of exactly these images.
            images: All that the learner still knows.
            ids: ``(N,)`` int64 sample ids.
            owners: Who gave each image, ``N`` names.

        Raises:
            ConfigError: Not one id and one owner for each image.
            UnsupportedStatistics: The learner has no memory, or one that is no sum over these
                images, such as one that followed a changing network.
            EmbeddingMismatch: The memory is one of another network.
        """
        if not len(images) == len(ids) == len(owners):
            raise ConfigError(
                f"Expected an id and an owner for each of {len(images)} images, got {len(ids)} "
                f"and {len(owners)}."
            )
        memory = learner.memory
        if memory is None:
            raise UnsupportedStatistics(
                "Expected a learner with class statistics, got one without.",
                remedy="Set learner.moments=none (sums alone), shared or class.",
            )
        if memory.embedding_id != learner.version():
            raise EmbeddingMismatch(
                "Expected class statistics of the learner's own network, got those of "
                f"{memory.embedding_id[:12]!r}."
            )
        mapped = learner.mapped(learner.embed_all(images.images))
        q, _ = quantise(mapped, memory.dim)
        # Where a float type has fewer digits than fixed point, its numbers are multiples of larger
        # steps, so no digit is lost; adding zero makes one zero of two.
        kept = (q * RESOLUTION + 0.0).to(mapped.dtype)
        names = sorted(set(owners))
        place = {name: code for code, name in enumerate(names)}
        found = cls(
            ContributorLedger(memory.dim, memory.embedding_id, memory.moments),
            kept,
            learner.rows(images.classes)[images.labels],
            ids,
            torch.tensor([*map(place.__getitem__, owners)], dtype=torch.int64),
            learner.classes,
            tuple(names),
        )
        for code, name in enumerate(names):
            evidence = found.memory_of(found.codes == code)
            found.ledger.receive(Contribution.of(name, 1, evidence))
        if found.total != memory:
            raise UnsupportedStatistics(
                "Expected class statistics that are the sum over the training images, got others.",
                remedy="Statistics that followed a changing network (sdc, ldc, adc), or that are "
                "of other images too, cannot be deleted exactly: choose learner=ncm or slda.",
            )
        return found

    @property
    def total(self) -> PrototypeMemory:
        """The merged memory: what a learner answers from."""
        return self.ledger.total

    @property
    def embeddings(self) -> Tensor:
        """The rounded embeddings, ``(N, D)`` float32."""
        return self.kept.float()

    @property
    def owners(self) -> tuple[str, ...]:
        """Who gave each sample, ``N`` names."""
        return tuple(map(self.contributors.__getitem__, self.codes.tolist()))

    def __len__(self) -> int:
        return len(self.ids)

    def memory_of(self, mask: Tensor) -> PrototypeMemory:
        """Return the memory of some of the samples, ``mask`` ``(N,)`` bool."""
        zero = PrototypeMemory.empty(self.ledger.dim, self.ledger.embedding_id, self.ledger.moments)
        labels = map(self.classes.__getitem__, self.labels[mask].tolist())
        return zero.observe(self.kept[mask], [*labels])

    def forget(self, request: Request, ids: Tensor) -> Statistics:
        """Subtract what a request means, and delete the embeddings that were kept of it.

        A class and a contributor leave a tombstone in the ledger: their messages are refused from
        now on. (A ledger of shared second moments cannot retire a class; there a class goes sample
        by sample.) Samples leave rows that are newer than every message so far, so that a replay
        is stale. Samples that are not known are left out, and the account says so.

        Args:
            request: What is to be forgotten.
            ids: ``(M,)`` int64, the samples that it means; of a class or a contributor all.

        Returns:
            New statistics, with the account in ``deletion``; this one stays as it is.

        Raises:
            UnknownClass: A class is not among the learner's.
            RequestError: A class or a contributor is to be forgotten in part.
        """
        mask = torch.isin(self.ids, ids)
        unknown = ids[~torch.isin(ids, self.ids)]
        ledger = copy.deepcopy(self.ledger)
        if bool(mask.any()):
            _REMOVE[request.kind](self, ledger, request, mask)
        deletion = Deletion(request.id, self.ids[mask], unknown, self.total - ledger.total)
        return replace(
            self,
            ledger=ledger,
            kept=self.kept[~mask],
            labels=self.labels[~mask],
            ids=self.ids[~mask],
            codes=self.codes[~mask],
            deletion=deletion,
        )


def _remove_classes(
    before: Statistics, ledger: ContributorLedger, request: Request, mask: Tensor
) -> None:
    _check_whole(request, torch.isin(before.labels, rows_of(before.classes, request.classes)), mask)
    if ledger.moments == "shared":
        _remove_samples(before, ledger, request, mask)
        return
    for name in request.classes:
        ledger.forget_class(name)


def _remove_samples(
    before: Statistics, ledger: ContributorLedger, request: Request, mask: Tensor
) -> None:
    for code in torch.unique(before.codes[mask]).tolist():
        delta = before.memory_of(mask & (before.codes == code))
        ledger.forget_samples(before.contributors[code], delta)


def _remove_contributor(
    before: Statistics, ledger: ContributorLedger, request: Request, mask: Tensor
) -> None:
    names = [row for row, name in enumerate(before.contributors) if name == request.contributor]
    _check_whole(request, torch.isin(before.codes, torch.tensor(names, dtype=torch.int64)), mask)
    ledger.forget_contributor(request.contributor)


def _check_whole(request: Request, whole: Tensor, mask: Tensor) -> None:
    if not torch.equal(whole, mask):
        raise RequestError(
            f"Expected all {int(whole.sum())} samples of the {request.kind} in request "
            f"{request.id!r}, got {int((whole & mask).sum())} of them and "
            f"{int((mask & ~whole).sum())} others."
        )


_REMOVE = {
    "class": _remove_classes,
    "sample": _remove_samples,
    "contributor": _remove_contributor,
}
