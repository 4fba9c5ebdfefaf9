r"""What class statistics reveal: the newest example, and which class a nameless row is of.

A cumulative row :math:`(n, s)` of one contributor is sent whenever it changes. Its last change is
the sum of the examples that came or went, so that one new example lies open, to the last bit:

.. math:: \hat z = \frac{s_{after} - s_{before}}{n_{after} - n_{before}}

This holds for forgetting too: exact deletion tells whoever kept the older row what was deleted.
:func:`difference` takes this guess and :func:`differencing` judges it;
:func:`~clfed.privacy.minimum_count.held_back` is the weakest defence, to wait until enough examples
have come. Of pixels speaks :mod:`clfed.evaluation.leakage_images`, of gradients
:mod:`clfed.evaluation.leakage_gradients`.

An attack that fails is no proof: a stronger one may exist. Only noise with a stated
:math:`\varepsilon` bounds what any of them learns of one example. What a class looks like is what
statistics are sent for: no defence that leaves them useful hides it from :func:`label_recovery`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clfed.errors import EmbeddingMismatch, InvalidMessage, NotEnoughData
from clfed.prototypes import PrototypeMemory, read_off
from clfed.prototypes.fixed_point import RESOLUTION, quantise


@dataclass(frozen=True)
class Differencing:
    """How near guesses came to the embeddings that were to stay private.

    Attributes:
        max_error: Largest magnitude of the error of any entry of any guess; 0 is an exact copy.
        cosine: Mean cosine of a guess and its embedding. Embeddings behind a ReLU have a high
            cosine with anything, so compare it with that of a guess without the message.
        identified: Share of guesses to which their own embedding is nearer than all the others
            that it might have been.
        chance: What guessing at random identifies.
    """

    max_error: float
    cosine: float
    identified: float
    chance: float


def difference(before: Tensor, after: Tensor, examples: int = 1) -> Tensor:
    r"""Guess the mean of the examples between two releases of a row.

    .. math:: \hat z = \frac{2^{-16}}{R\,m} \sum_r (s_r^{after} - s_r^{before})

    The mean over :math:`R` releases of unchanged data removes independent noise: its standard
    deviation falls with :math:`\sqrt R`, which is why every release has to be paid for.

    Args:
        before: Sums :math:`s` of ``V`` rows, ``(V, D)`` or, for :math:`R` releases each,
            ``(R, V, D)``, int64.
        after: The same rows later, of the same shape. Differences are taken modulo :math:`2^{64}`,
            as additive masks are.
        examples: :math:`m`, what the counts differ by; negative where examples were removed.

    Returns:
        Guesses ``(V, D)`` float64.

    Raises:
        InvalidMessage: The shapes or types differ, or no example lies between the releases.

    Example:
        >>> sums = torch.tensor([[0, 65536]]), torch.tensor([[131072, 65536]])
        >>> difference(*sums).tolist()
        [[2.0, 0.0]]
    """
    if before.dtype != torch.int64 or after.dtype != torch.int64 or before.shape != after.shape:
        raise InvalidMessage(
            f"Expected int64 sums of one shape before and after, got {before.dtype} "
            f"{tuple(before.shape)} and {after.dtype} {tuple(after.shape)}.",
            remedy="Compare as many releases before the change as after it.",
        )
    if not examples:
        raise InvalidMessage(
            "Expected at least one example between two releases, got equal counts.",
            remedy="Compare releases between which the count changed.",
        )
    steps = (after - before).double()
    return (steps.mean(0) if steps.ndim == 3 else steps) * RESOLUTION / examples


def differencing(guesses: Tensor, embeddings: Tensor, others: Tensor) -> Differencing:
    """Judge guesses against the quantised embeddings of the victims.

    Args:
        guesses: ``(V, D)`` float64, see :func:`difference`.
        embeddings: What each guess is after, ``(V, D)`` floating point.
        others: For each guess ``K`` embeddings that it might as well have been after, of the same
            class where the class is known, ``(V, K, D)`` floating point.

    Raises:
        InvalidEmbedding: The embeddings are not finite, or of another size than the guesses.
        NotEnoughData: No guess, or not an embedding and others for each.
    """
    dim = guesses.shape[-1]
    truth = quantise(embeddings, dim)[0] * RESOLUTION
    count, rivals = len(guesses), others.shape[1] if others.ndim == 3 else 0
    if not count or not rivals or len(truth) != count or len(others) != count:
        raise NotEnoughData(
            f"Expected an embedding and others for each of {count} guesses, got {len(truth)} "
            f"embeddings and others of shape {tuple(others.shape)}.",
            remedy="Attack at least one victim, and give others that it might have been.",
        )
    rest = quantise(others.flatten(0, 1), dim)[0].view(count, rivals, dim) * RESOLUTION
    own = (guesses - truth).norm(dim=1)
    return Differencing(
        max_error=float((guesses - truth).abs().amax()),
        cosine=float(torch.cosine_similarity(guesses, truth).mean()),
        identified=float((own < (guesses[:, None] - rest).norm(dim=2).amin(1)).double().mean()),
        chance=1 / (rivals + 1),
    )


@dataclass(frozen=True)
class LabelRecovery:
    """How well rows without names were named.

    Attributes:
        accuracy: Share of rows whose most likely class is the right one.
        assigned: The same where the attacker uses that no two rows are of one class.
        chance: What guessing at random reaches.
    """

    accuracy: float
    assigned: float
    chance: float


def label_recovery(
    sent: PrototypeMemory, public: PrototypeMemory, classifier: str = "ncm"
) -> LabelRecovery:
    """Name the rows of a memory from their means alone, with a classifier of public examples.

    The attacker knows other examples of the same classes and never looks at the names that came
    along. So a code in place of a class's name hides nothing from whoever can guess what classes
    there may be.

    Args:
        sent: The rows that came, counts at least 1; their names serve to judge alone.
        public: What the attacker knows of the classes that the rows may be of.
        classifier: See :func:`clfed.prototypes.read_off`.

    Raises:
        NotEnoughData: No row came.
        UnknownClass: A row is of a class of which the attacker knows no example.
        EmbeddingMismatch: The attacker's examples are of another embedding.
        InvalidMessage: A row counts fewer examples than one.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    if not len(sent):
        raise NotEnoughData("Expected rows to name, got none.", remedy="Send at least one class.")
    truth = public.rows(sent.classes)
    if sent.embedding_id != public.embedding_id:
        raise EmbeddingMismatch(
            f"Expected examples of embedding {sent.embedding_id[:12]!r}, got "
            f"{public.embedding_id[:12]!r}."
        )
    scores = read_off(classifier, public).scores(sent.means())
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    assigned = truth[torch.from_numpy(rows)] == torch.from_numpy(columns)
    return LabelRecovery(
        accuracy=float((scores.argmax(1) == truth).double().mean()),
        assigned=float(assigned.double().mean()),
        chance=1 / len(public),
    )
