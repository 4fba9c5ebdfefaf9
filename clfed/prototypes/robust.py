r"""Reading a ledger so that a few wrong contributors cannot move a class that several have seen.

The merged memory is the exact sum of all rows, so one row of nonsense spoils its classes. Here the
nodes that hold a class vote on its mean instead, coordinate by coordinate, each with one vote
however many examples it claims (Yin et al. 2018, arXiv 1803.01498, Definitions 1 and 2):

.. math:: \mu_{k,c} = S_{k,c} / n_{k,c}, \qquad
          \hat\mu_c = \frac{1}{K_c - 2 t} \sum_{j = t + 1}^{K_c - t} \mu_{(j),c}, \qquad
          S_c = round(N_c\, \hat\mu_c)

with :math:`K_c` holders, the :math:`j`-th smallest value :math:`\mu_{(j),c}` of a coordinate, and
:math:`t = \lfloor \beta K_c \rfloor` for the trimmed mean, :math:`\lfloor (K_c - 1) / 2 \rfloor`
for the median. With at most :math:`t` wrong holders every coordinate stays between the smallest and
the largest value of the right ones. Nodes that do not hold a class have no vote on it, unlike in
averaging of whole models, so whoever is alone with a new class keeps it as it is.

What this cannot do: two holders of a class are not protected from each other. Contributors that
one person can invent at will outvote anybody. :math:`N_c` stays what the nodes claim. And where all
are honest the result is noisier than the exact sum, the more their counts and views of a class
differ.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from clfed.errors import ConfigError, InvalidEmbedding, UnsupportedStatistics
from clfed.prototypes.fixed_point import RANGE, SCALE
from clfed.prototypes.groups import Groups
from clfed.prototypes.ledger import ContributorLedger
from clfed.prototypes.memory import PrototypeMemory

Rule = Literal["none", "median", "trimmed"]

_MAJORITY = 3  # of two holders neither can be outvoted
_BLOCK_ENTRIES = 2**21  # float64 numbers at a time, 16 MB
_OVERFLOW = 2.0**63


def robust_total(
    ledger: ContributorLedger, rule: str, *, trim: float = 1 / 3, norm: float | None = None
) -> PrototypeMemory:
    """The merged memory, with the mean of each class voted on by the nodes that hold it.

    A function of the rows alone: the order of messages does not matter, what is forgotten leaves no
    trace, and each class depends on its own holders only. The row of a class with one holder is
    that holder's, of two holders (no majority) the exact sum of theirs, bit for bit.

    Args:
        ledger: Rows by contributor and class, without second moments; it is not changed.
        rule: ``"none"`` for the exact sum, ``ledger.total``; ``"median"``, which fewer wrong ones
            than half of the holders cannot break; ``"trimmed"``, which averages more of the right
            ones.
        trim: Fraction of holders that ``"trimmed"`` leaves out on each side, rounded down, in
            ``[0, 0.5)``: so many may be wrong. Fewer holders than ``1 / trim`` lose none.
        norm: Largest Euclidean norm of a node's mean embedding; a longer one is shortened to it,
            under each rule and for each number of holders.

    Returns:
        The classes and counts of ``ledger.total``; sums are the counts times the robust means,
        rounded to the resolution.

    Raises:
        ConfigError: Unknown rule, or ``trim`` or ``norm`` out of range.
        UnsupportedStatistics: The ledger keeps second moments, which cannot be voted on coordinate
            by coordinate, and more than the exact sum is asked for.
        InvalidEmbedding: The sums would not fit into 64 bits.

    Example:
        >>> from clfed.prototypes import Contribution
        >>> ledger = ContributorLedger(1, "demo")
        >>> for name, value in [("a", 1.0), ("b", 2.0), ("liar", 9999.0)]:
        ...     rows = PrototypeMemory.empty(1, "demo").observe(torch.tensor([[value]]), ["owl"])
        ...     _ = ledger.receive(Contribution.of(name, 1, rows))
        >>> ledger.total.prototypes().tolist(), robust_total(ledger, "median").prototypes().tolist()
        ([[3334.0]], [[2.0]])
    """
    _check_options(rule, trim, norm)
    total = ledger.total
    if rule == "none" and norm is None:
        return total
    if ledger.moments != "none":
        raise UnsupportedStatistics(
            f"expected a ledger with moments='none' for a robust total, got {ledger.moments!r}",
            remedy="Use the rule none without a norm, or memory.moments=none.",
        )
    if not total:
        return total
    groups = ledger.groups()
    if norm is None:
        sums = total.sums.clone()
    else:
        groups = _shortened(groups, norm)
        # Rows that cancelled each other may no longer; no coordinate of a mean exceeds these two.
        _refuse_overflow(float(total.counts.amax()) * min(norm, RANGE) * SCALE)
        sums = torch.zeros_like(total.sums).index_add_(0, groups.class_index, groups.sums)
    if rule != "none":
        _vote(sums, total.counts, groups, None if rule == "median" else trim)
    return replace(total, sums=sums)


def _check_options(rule: str, trim: float, norm: float | None) -> None:
    if rule not in get_args(Rule):
        raise ConfigError(f"Expected one of the rules {', '.join(get_args(Rule))}, got {rule!r}.")
    if not _is_number(trim) or not 0 <= trim < 0.5:
        raise ConfigError(f"Expected a fraction trim from 0 to below 0.5, got {trim!r}.")
    if norm is not None and not (_is_number(norm) and 0 < norm < math.inf):
        raise ConfigError(f"Expected no norm or a positive number, got {norm!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shortened(groups: Groups, norm: float) -> Groups:
    """Scale the sums of groups whose mean is longer than ``norm`` down to it."""
    shortened = groups.sums.clone()
    rows = max(1, _BLOCK_ENTRIES // shortened.shape[1])
    for start in range(0, len(shortened), rows):
        sums = shortened[start : start + rows]
        sizes = groups.counts[start : start + rows].double() * SCALE
        scale = norm / _sum_in_order((sums.double() / sizes[:, None]).square_()).sqrt_()
        long = (scale < 1).nonzero().flatten()
        # Towards zero, so that rounding does not make a mean longer again.
        sums[long] = (sums[long].double() * scale[long, None]).trunc_().long()
    return groups._replace(sums=shortened)


def _vote(sums: Tensor, counts: Tensor, groups: Groups, trim: float | None) -> None:
    """Overwrite the sums of classes with enough holders; ``trim`` is None for the median."""
    holders = torch.bincount(groups.class_index, minlength=len(counts))
    order = groups.class_index.argsort()
    first = holders.cumsum(0) - holders
    # Classes of equally many holders form one dense block, so nothing is padded.
    for many in sorted(set(holders.tolist())):
        if many < _MAJORITY:
            continue
        drop = (many - 1) // 2 if trim is None else int(trim * many)
        classes = (holders == many).nonzero().flatten()
        for block in torch.split(classes, max(1, _BLOCK_ENTRIES // (many * sums.shape[1]))):
            members = order[first[block, None] + torch.arange(many)]
            means = groups.sums[members].double() / groups.counts[members].double()[:, :, None]
            means.numpy().sort(axis=1)  # in place, and some ten times faster than torch
            kept = means[:, drop : many - drop]
            centre = _sum_in_order(kept.transpose(1, 2)) / (many - 2 * drop)
            voted = centre * counts[block].double()[:, None]
            _refuse_overflow(float(voted.abs().amax()))
            sums[block] = voted.round_().long()


def _sum_in_order(values: Tensor) -> Tensor:
    # One after another: other rows, threads or machines cannot change the last bit.
    return values.cumsum(-1).select(-1, -1)


def _refuse_overflow(largest: float) -> None:
    if largest >= _OVERFLOW:
        raise InvalidEmbedding(
            "expected robust sums that fit into 64 bits, got larger ones",
            remedy="Give the ledger a smaller cap on the examples of a class.",
        )
