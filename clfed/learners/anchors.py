r"""Quadratic anchors: what holds weights near the values that old classes need.

.. math:: L = L_{\mathrm{classification}} + \frac{\lambda}{2} \sum_j F_j (\theta_j - \theta^-_j)^2

:math:`\theta` are all weights of the backbone and the rows of the head that existed when the
anchor :math:`\theta^-` was set; rows of newer classes are free. Methods differ in the importance
:math:`F`. Papers and programs that write the penalty without the factor ½ (SI, MAS, Avalanche) get
the same loss here with ``half=False``, or with twice their :math:`\lambda`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.base import ContinualLearner, LossTerm, Step

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

ANCHOR, IMPORTANCE = "anchor.", "importance."

Tensors = dict[str, Tensor]


class Anchored(ContinualLearner):
    r"""The base of methods that pull weights towards an anchor.

    Args:
        backbone: The network.
        transform: Its input transform.
        weight: :math:`\lambda`.
        half: Whether the penalty carries the factor ½.
        options: Options of :class:`~clfed.learners.base.ContinualLearner`.

    Raises:
        ConfigError: A negative weight.
    """

    needs_boundaries = True

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        weight: float,
        half: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(backbone, transform, **options)
        if not weight >= 0:
            raise ConfigError(f"Expected learner.weight >= 0, got {weight}.")
        self.factor = weight / 2 if half else weight
        self.terms = (*self.terms, LossTerm("anchor", self.factor, ("backbone", "head")))

    def losses(self, step: Step) -> Tensors:
        """Return the classification loss and the penalty."""
        return {**super().losses(step), "anchor": penalty(self)}

    def finish(self, experience: Experience) -> None:
        """Set the anchor, once something was trained."""
        if self.length:
            self.consolidate(experience)

    @abstractmethod
    def consolidate(self, experience: Experience) -> None:
        """Set the anchor and the importance after an experience."""


def quadratic(pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    r"""Weighted squared distance of parameters from their anchors.

    .. math:: \sum_j F_j (\theta_j - \theta^-_j)^2

    Args:
        pairs: Parameter, anchor and importance, of one shape each; importance None means 1.

    Returns:
        A scalar.

    Example:
        >>> weights, importance = torch.tensor([0.1, 0.2]), torch.tensor([2.0, 0.5])
        >>> round(float(quadratic([(weights, torch.zeros(2), importance)])), 6)
        0.04
    """
    parts = []
    for parameter, anchor, importance in pairs:
        squares = (parameter - anchor).square()
        parts.append((squares if importance is None else importance * squares).sum())
    return torch.stack(parts).sum()


def penalty(learner: ContinualLearner, *, weighted: bool = True) -> Tensor:
    """Return the quadratic distance from what a learner keeps as its anchor, 0 without one.

    Args:
        learner: Its ``kept`` holds ``anchor.NAME`` and, except for plain L2, ``importance.NAME``.
        weighted: Whether importances count where there are some.
    """
    pairs = []
    for name, parameter in weights_of(learner).items():
        anchor = learner.kept.get(ANCHOR + name)
        if anchor is not None:
            importance = learner.kept.get(IMPORTANCE + name) if weighted else None
            rows, device = _overlap(anchor), parameter.device
            pairs.append(
                (
                    parameter[rows],
                    anchor.to(device),
                    None if importance is None else importance.to(device),
                )
            )
    return quadratic(pairs) if pairs else torch.zeros((), device=learner.device)


def weights_of(learner: ContinualLearner) -> Tensors:
    """Return the parameters of the backbone and of the rows of known classes, by name."""
    return {
        name: present_rows(learner, name, parameter)
        for name, parameter in learner.named_parameters()
        if name.startswith(("backbone.", "head."))
    }


def present_rows(learner: ContinualLearner, name: str, tensor: Tensor) -> Tensor:
    """Leave out the rows that a head holds ready for classes to come."""
    return tensor[: len(learner.classes)] if name.startswith("head.") else tensor


def set_anchor(
    learner: ContinualLearner,
    importances: Mapping[str, Tensor] | None = None,
    anchors: Mapping[str, Tensor] | None = None,
) -> None:
    """Keep an anchor, and importances if there are any.

    Args:
        learner: Changed in place.
        importances: By name of the parameter.
        anchors: The same; the present weights when omitted.
    """
    for name, value in (anchors or weights_of(learner)).items():
        learner.kept[ANCHOR + name] = value.detach().clone().cpu()
    for name, value in (importances or {}).items():
        learner.kept[IMPORTANCE + name] = value.detach().clone().cpu()


def accumulated(
    learner: ContinualLearner, fresh: Mapping[str, Tensor], keep: float = 1.0
) -> Tensors:
    r"""Return :math:`\gamma F^- + F`, where rows that are new have :math:`F^- = 0`.

    Args:
        learner: Keeps :math:`F^-`, if anything yet.
        fresh: :math:`F` by name of the parameter.
        keep: :math:`\gamma`.
    """
    nothing = {name: torch.zeros_like(value) for name, value in fresh.items()}
    old = grown(learner, IMPORTANCE, nothing)
    return {name: keep * old[name] + value for name, value in fresh.items()}


def grown(learner: ContinualLearner, prefix: str, like: Mapping[str, Tensor]) -> Tensors:
    """Return what was kept, with rows of ``like`` where rows were added since.

    Args:
        learner: Whose.
        prefix: ``anchor.`` or ``importance.``.
        like: Present shapes, and values of what was not there before.
    """
    result = {name: value.detach().clone() for name, value in like.items()}
    for name, value in result.items():
        old = learner.kept.get(prefix + name)
        if old is not None:
            value[_overlap(old)] = old.to(value.device)
    return result


def _overlap(old: Tensor) -> tuple[slice, ...]:
    return tuple(map(slice, old.shape))
