r"""Prototype calibration: means of a few examples lean on those of well-known classes.

Training-free calibration (TEEN; Wang et al. 2023, arXiv 2312.05229) is a function of the class
means alone, so it is done on reading: what nodes merge, send and forget are the raw sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clfed.errors import ConfigError, NotEnoughData
from clfed.prototypes.heads import LinearClassifier, unit
from clfed.prototypes.memory import PrototypeMemory


def calibrate(
    prototypes: Tensor, base: Tensor, *, delta_weight: float = 0.5, temperature: float = 16.0
) -> Tensor:
    r"""Move the prototypes of new classes towards the base prototypes that they resemble.

    .. math:: w_{nb} = \mathrm{softmax}_b(\tau \cos(p_n, b)), \qquad
              \Delta_n = \frac{\sum_b w_{nb} \hat b}{\|\sum_b w_{nb} \hat b\|}, \qquad
              p_n \leftarrow (1 - \alpha)\, \hat p_n + \alpha\, \Delta_n

    Args:
        prototypes: Class means, shape ``(C, D)``.
        base: Which of them are base classes, ``(C,)`` bool; their rows stay bit for bit.
        delta_weight: :math:`\alpha` in ``[0, 1]``, the share of :math:`\Delta`.
        temperature: :math:`\tau`, not negative; 0 pulls towards the mean of all base classes.

    Returns:
        Shape ``(C, D)``. Without a base class nothing changes.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> moved = calibrate(rows, torch.tensor([True, True, False]), delta_weight=0.1)
        >>> [round(value, 4) for value in moved[2].tolist()]
        [0.5441, 0.8199]
    """
    if not bool(base.any()):
        return prototypes
    rows = unit(prototypes)
    anchors = rows[base]
    weights = torch.softmax(temperature * rows @ anchors.T, dim=1)
    moved = torch.lerp(rows, unit(weights @ anchors), delta_weight)
    return torch.where(base[:, None], prototypes, moved)


def teen(
    memory: PrototypeMemory,
    *,
    base: Sequence[str] = (),
    delta_weight: float = 0.5,
    temperature: float = 16.0,
    classes: Sequence[str] | None = None,
) -> LinearClassifier:
    r"""Cosine to class means of which those of new classes are calibrated, see :func:`calibrate`.

    The published settings are :math:`\tau = 16` and :math:`\alpha` = 0.1 (CIFAR-100) or 0.5
    (CUB-200, miniImageNet).

    Args:
        memory: At least one class, any moments.
        base: Names of the base classes; all other classes are calibrated. Without any, this is
            the nearest class mean by cosine.
        delta_weight: :math:`\alpha` in ``[0, 1]``.
        temperature: :math:`\tau`, not negative.
        classes: Label space; all classes when omitted. Base classes count even when left out.

    Raises:
        ConfigError: An option is out of range.
        NotEnoughData: No class.
        UnknownClass: A name in ``base`` or ``classes`` is not in the memory.
    """
    if isinstance(base, str) or not 0 <= delta_weight <= 1 or not temperature >= 0:
        raise ConfigError(
            "expected a list of base classes, delta_weight in [0, 1] and temperature >= 0, got "
            f"{base!r}, {delta_weight} and {temperature}"
        )
    names = memory.classes if classes is None else tuple(classes)
    if not names:
        raise NotEnoughData(
            "expected at least one class to choose from, got none",
            remedy="Observe some labelled examples first.",
        )
    known = torch.zeros(len(memory), dtype=torch.bool)
    known[memory.rows(base)] = True
    rows = calibrate(memory.means(), known, delta_weight=delta_weight, temperature=temperature)
    weight = unit(rows[memory.rows(names)])
    return LinearClassifier(names, weight, weight.new_zeros(len(names)), normalise=True)
