"""Classifiers that are read off a prototype memory: functions of statistics, without training.

Every one is a pure function of the memory, so it does not depend on the order of classes, on batch
sizes or on who contributed what, and forgetting in the memory is forgetting here. All arithmetic
is float64. ``classes=`` restricts the label space that is scored, in the order given; covariances
are still those of all classes in the memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from clfed.errors import (
    ConfigError,
    InvalidMessage,
    NotEnoughData,
    UnsupportedStatistics,
)
from clfed.prototypes.bayesian import bayes
from clfed.prototypes.calibration import teen
from clfed.prototypes.covariance import apply, correlation, solve, whitening
from clfed.prototypes.fixed_point import RESOLUTION
from clfed.prototypes.groups import Groups
from clfed.prototypes.heads import Classifier, LinearClassifier, QuadraticClassifier, unit
from clfed.prototypes.memory import PrototypeMemory
from clfed.prototypes.moments import class_scatter, gram, scatter

__all__ = [
    "CLASSIFIERS",
    "Classifier",
    "LinearClassifier",
    "QuadraticClassifier",
    "gaussian",
    "mahalanobis",
    "message_mean_covariance",
    "nearest_mean",
    "read_off",
    "ridge",
    "shared_covariance",
]

Priors = Literal["uniform", "empirical"]


def nearest_mean(
    memory: PrototypeMemory,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    classes: Sequence[str] | None = None,
) -> LinearClassifier:
    r"""Nearest class mean (prototypical networks, Snell et al. 2017, arXiv 1703.05175).

    .. math:: \arg\min_c \|z - \mu_c\|^2 = \arg\max_c\ 2 \mu_c^T z - \|\mu_c\|^2

    Args:
        memory: At least one class, any moments.
        metric: ``"euclidean"``: scores are minus the squared distance plus :math:`\|z\|^2`;
            ``"cosine"``: scores are cosines with the means.
        classes: Label space; all classes when omitted.

    Raises:
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
    """
    names, means, _ = _label_space(memory, classes)
    if metric == "cosine":
        return LinearClassifier(names, unit(means), means.new_zeros(len(names)), normalise=True)
    if metric != "euclidean":
        raise ConfigError(f"expected metric 'euclidean' or 'cosine', got {metric!r}")
    return LinearClassifier(names, 2 * means, -means.square().sum(dim=1))


def shared_covariance(
    memory: PrototypeMemory,
    *,
    shrinkage: float = 1e-4,
    target: Literal["identity", "trace"] = "identity",
    priors: Priors = "uniform",
    pooling: Priors = "empirical",
    classes: Sequence[str] | None = None,
) -> LinearClassifier:
    r"""Linear discriminant analysis with the exact pooled within-class covariance.

    .. math:: \Sigma = \tfrac1N \Big(\sum_i z_i z_i^T - \sum_c s_c s_c^T / n_c\Big), \qquad
              \Lambda = ((1 - \varepsilon) \Sigma + \varepsilon T)^{-1}, \qquad
              w_c = \Lambda \mu_c, \quad b_c = -\tfrac12 \mu_c^T \Lambda \mu_c + \log \pi_c

    With the defaults this is streaming LDA (Hayes & Kanan 2020, arXiv 1909.01520) with the exact
    covariance in place of its recursion. ``target="trace", priors="empirical"`` is
    scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...)``.

    Args:
        memory: With shared or class second moments.
        shrinkage: :math:`\varepsilon` in ``[0, 1]``.
        target: :math:`T`: the identity, or the identity times the mean variance.
        priors: :math:`\pi_c`: all equal (left out), or the share of examples.
        pooling: Weight of a class in :math:`\Sigma`: its share of examples, or ``"uniform"``
            (needs ``moments="class"``), as scikit-learn does with equal priors.
        classes: Label space; all classes when omitted.

    Raises:
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
        UnsupportedStatistics: The second moments that it needs are not kept.
    """
    names, means, counts = _label_space(memory, classes)
    if not 0 <= shrinkage <= 1:
        raise ConfigError(f"expected shrinkage in [0, 1], got {shrinkage}")
    if pooling == "uniform":
        per_class = class_scatter(memory) / memory.counts.double()[:, None, None]
        covariance = per_class.mean(dim=0)
    else:
        covariance = scatter(memory) / memory.total_count
    scale = covariance.trace() / memory.dim if target == "trace" else 1.0
    eye = torch.eye(memory.dim, dtype=torch.float64)
    weight = solve((1 - shrinkage) * covariance + shrinkage * scale * eye, means.T).T
    return LinearClassifier(names, weight, -0.5 * (weight * means).sum(1) + _log(priors, counts))


def mahalanobis(
    memory: PrototypeMemory,
    *,
    common: bool = False,
    shrinkage: tuple[float, float] = (1.0, 1.0),
    rounds: int = 2,
    classes: Sequence[str] | None = None,
) -> LinearClassifier | QuadraticClassifier:
    r"""FeCAM (Goswami et al. 2023, arXiv 2309.14062): Mahalanobis distance of unit vectors.

    .. math:: \Sigma \leftarrow \Sigma + \gamma_1 V_1 I + \gamma_2 V_2 (1 1^T - I), \qquad
              R_{ij} = \Sigma_{ij} / \sqrt{\Sigma_{ii} \Sigma_{jj}}, \qquad
              score_c = -(u - v_c)^T R_c^{-1} (u - v_c)

    with :math:`V_1, V_2` the mean diagonal and off-diagonal entry, the shrinkage applied
    ``rounds`` times, :math:`u, v_c` the unit vectors of the embedding and of the class mean, and
    unbiased class covariances. The paper sums *Tukey-transformed* features: give both
    ``observe`` and ``scores`` the output of :func:`clfed.prototypes.features.tukey`. A class of a
    single example has no covariance and takes the common one (own choice).

    Args:
        memory: With class second moments; shared ones do for ``common=True``.
        common: One pooled covariance for all classes, which makes the classifier linear.
        shrinkage: :math:`\gamma_1, \gamma_2`.
        rounds: How often to shrink.
        classes: Label space; all classes when omitted.

    Raises:
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
        UnsupportedStatistics: The second moments that it needs are not kept.
    """
    names, means, counts = _label_space(memory, classes)
    spare = max(memory.total_count - len(memory), 1)
    pooled = scatter(memory) / spare
    centres = unit(means)
    if common:
        weight = 2 * solve(correlation(pooled, shrinkage, rounds), centres.T).T
        bias = -0.5 * (weight * centres).sum(1)
        return LinearClassifier(names, weight, bias, normalise=True)
    unbiased = class_scatter(memory, names) / (counts - 1).clamp(min=1)[:, None, None]
    covariance = torch.where((counts > 1)[:, None, None], unbiased, pooled)
    white, _ = whitening(correlation(covariance, shrinkage, rounds))
    return QuadraticClassifier(
        names, white, apply(white, centres), counts.new_zeros(len(names)), normalise=True
    )


def gaussian(
    memory: PrototypeMemory,
    *,
    jitter: float = 0.01,
    priors: Priors = "empirical",
    classes: Sequence[str] | None = None,
) -> QuadraticClassifier:
    r"""One Gaussian per class (quadratic discriminant analysis).

    .. math:: score_c = -\tfrac12 (z - \mu_c)^T \Sigma_c^{-1} (z - \mu_c)
              - \tfrac12 \log\det \Sigma_c + \log \pi_c, \qquad
              \Sigma_c = \tfrac1{n_c} S_c + \lambda I

    Args:
        memory: With class second moments.
        jitter: :math:`\lambda`, positive.
        priors: :math:`\pi_c`: all equal, or the share of examples.
        classes: Label space; all classes when omitted.

    Raises:
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
        UnsupportedStatistics: Second moments are not kept by class.
    """
    names, means, counts = _label_space(memory, classes)
    if not jitter > 0:
        raise ConfigError(f"expected a positive jitter, got {jitter}")
    covariance = class_scatter(memory, names) / counts[:, None, None]
    covariance.diagonal(dim1=-2, dim2=-1).add_(jitter)
    white, log_determinant = whitening(covariance)
    white = white * 0.5**0.5
    bias = _log(priors, counts) - 0.5 * log_determinant
    return QuadraticClassifier(names, white, apply(white, means), bias)


def ridge(
    memory: PrototypeMemory,
    *,
    penalty: float = 1.0,
    normalise: bool = False,
    classes: Sequence[str] | None = None,
) -> LinearClassifier:
    r"""Ridge regression onto one-hot labels, without intercept.

    .. math:: W = (\sum_i z_i z_i^T + \lambda I)^{-1} [s_1 \dots s_C]

    The same solution as on the pooled data: Fed3R (Fanì et al. 2024) with ``normalise=True``,
    RanPAC (McDonnell et al. 2023, arXiv 2307.02251) on
    :class:`clfed.prototypes.features.RandomProjection` features.

    Args:
        memory: With shared or class second moments.
        penalty: :math:`\lambda`, positive.
        normalise: Scale every class's weights to unit length.
        classes: Label space; all classes when omitted.

    Raises:
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
        UnsupportedStatistics: No second moments are kept.
    """
    names, means, counts = _label_space(memory, classes)
    if not penalty > 0:
        raise ConfigError(f"expected a positive penalty, got {penalty}")
    matrix = gram(memory)
    matrix.diagonal().add_(penalty)
    weight = solve(matrix, (means * counts[:, None]).T).T
    return LinearClassifier(
        names, unit(weight) if normalise else weight, counts.new_zeros(len(names))
    )


def message_mean_covariance(
    memory: PrototypeMemory,
    groups: Groups | None,
    *,
    shrinkage: float = 1.0,
    relative: bool = False,
    classes: Sequence[str] | None = None,
) -> LinearClassifier:
    r"""FedCOF (Goswami et al. 2025, arXiv 2412.14326): covariance from the spread of group means.

    .. math:: \hat\Sigma_c = \tfrac1{K_c - 1} \sum_k n_{kc} (\mu_{kc} - \mu_c)(\mu_{kc} - \mu_c)^T
              + \gamma I, \qquad
              W = \Big[\sum_c (N_c - 1) \hat\Sigma_c + N \mu_g \mu_g^T\Big]^{-1} [N_c \mu_c]

    with columns of unit length. Unbiased (before :math:`\gamma`) if the examples of a class are
    drawn alike for all groups; costs no byte beyond counts and sums. Classes of one group add
    nothing to the scatter; if there is no other, the answer is :func:`nearest_mean`.

    Args:
        memory: Sum of the groups, any moments.
        groups: Disjoint evidence, for instance ``ContributorLedger.groups()``.
        shrinkage: :math:`\gamma`, positive, in squared units of the embedding.
        relative: Whether the shrinkage is in units of the mean variance that the groups show, so
            that it does not depend on the scale of the embedding (own choice).
        classes: Label space; all classes when omitted.

    Raises:
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
        UnsupportedStatistics: No groups were given.
        InvalidMessage: The groups do not add up to the memory.
    """
    names, means, counts = _label_space(memory, classes)
    if groups is None:
        raise UnsupportedStatistics(
            "expected the groups that the memory is the sum of, got none",
            remedy="Pass groups=ledger.groups(), or choose ncm or lda.",
        )
    if not shrinkage > 0:
        raise ConfigError(f"expected a positive shrinkage, got {shrinkage}")
    _check_sum(memory, groups)
    members = torch.bincount(groups.class_index, minlength=len(memory)).double()
    if not bool((members > 1).any()):
        return nearest_mean(memory, classes=classes)
    # A class of one group gets weight zero: its deviation is zero as well.
    spread = torch.where(members > 1, memory.counts.double() - 1, 0.0)
    weight = spread / (members - 1).clamp(min=1)
    size = groups.counts.double()[:, None]
    deviation = groups.sums.double() / size * RESOLUTION - memory.means()[groups.class_index]
    matrix = (deviation * size * weight[groups.class_index][:, None]).T @ deviation
    penalty = shrinkage * (matrix.trace() / memory.dim if relative else spread.sum())
    mean = memory.sums.double().sum(0) * RESOLUTION / memory.total_count
    matrix += memory.total_count * torch.outer(mean, mean)
    matrix.diagonal().add_(penalty)
    rows = unit(solve(matrix, (means * counts[:, None]).T).T)
    return LinearClassifier(names, rows, counts.new_zeros(len(names)))


CLASSIFIERS: Mapping[str, Callable[..., Classifier]] = MappingProxyType(
    {
        "ncm": nearest_mean,
        "ncm_cosine": partial(nearest_mean, metric="cosine"),
        "lda": shared_covariance,
        "fecam": mahalanobis,
        "gaussian": gaussian,
        "ridge": ridge,
        "fedcof": message_mean_covariance,
        "teen": teen,
        "bayes": bayes,
    }
)


def read_off(
    name: str,
    memory: PrototypeMemory,
    *,
    groups: Groups | None = None,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> Classifier:
    """The classifier of that name, from :data:`CLASSIFIERS`.

    Args:
        name: ``ncm``, ``ncm_cosine``, ``lda``, ``fecam``, ``gaussian``, ``ridge``, ``fedcof``,
            ``teen`` or ``bayes``.
        memory: What is known.
        groups: The same before pooling; used by ``fedcof`` alone.
        classes: Label space, in this order; all classes of the memory when omitted.
        options: Of the classifier's own function.

    Raises:
        ConfigError: No classifier of that name, or it has no such option.
        NotEnoughData: No class.
        UnknownClass: A name in ``classes`` is not in the memory.
        UnsupportedStatistics: The memory does not keep what this classifier needs.
    """
    build = CLASSIFIERS.get(name)
    if build is None:
        raise ConfigError(f"expected a classifier among {', '.join(CLASSIFIERS)}, got {name!r}")
    known = [p for p in inspect.signature(build).parameters if p not in {"memory", "groups"}]
    unknown = sorted(options.keys() - {*known})
    if unknown:
        raise ConfigError(f"expected options of {name} among {', '.join(known)}, got {unknown[0]}")
    if name == "fedcof":
        options["groups"] = groups
    return build(memory, classes=classes, **options)


def _label_space(
    memory: PrototypeMemory, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names, means ``(C, D)`` and counts ``(C,)`` in float64 of the classes to score."""
    if not len(memory) or (classes is not None and not len(classes)):
        raise NotEnoughData(
            "expected at least one class to choose from, got none",
            remedy="Observe some labelled examples first.",
        )
    means, counts = memory.means(), memory.counts.double()
    if classes is None:
        return memory.classes, means, counts
    rows = memory.rows(classes)
    return tuple(classes), means[rows], counts[rows]


def _log(priors: Priors, counts: Tensor) -> Tensor:
    if priors == "uniform":
        return torch.zeros_like(counts)
    if priors != "empirical":
        raise ConfigError(f"expected priors 'uniform' or 'empirical', got {priors!r}")
    return (counts / counts.sum()).log()


def _check_sum(memory: PrototypeMemory, groups: Groups) -> None:
    counts = torch.zeros_like(memory.counts).index_add_(0, groups.class_index, groups.counts)
    sums = torch.zeros_like(memory.sums).index_add_(0, groups.class_index, groups.sums)
    if not (torch.equal(counts, memory.counts) and torch.equal(sums, memory.sums)):
        raise InvalidMessage(
            f"expected groups of {memory.total_count} examples that add up to the memory, "
            f"got {int(groups.counts.sum())}",
            remedy="Take groups and memory from the same ledger at the same time.",
        )
