r"""TEEN: calibrated prototypes of few-shot classes (Wang et al. 2023, arXiv 2312.05229).

Base classes train the network with a cosine head; a few images of a new class give a mean that is
too far off, so it leans on the means of the base classes that it resembles:

.. math:: p_n \leftarrow (1 - \alpha)\, \hat p_n + \alpha\,
          \mathrm{norm}\Big(\sum_b \mathrm{softmax}_b(\tau \cos(p_n, b))\, \hat b\Big)

Raw sums are stored and calibrated on reading (:func:`clfed.prototypes.calibration.calibrate`), so
what several nodes saw of a class is pooled first. The paper trains for 400 to 1000 epochs with
:math:`\tau = 16` and :math:`\alpha = 0.5` (CUB-200, miniImageNet) or 0.1 (CIFAR-100).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from clfed.backbones.encoder import Transform
from clfed.learners.ncm import NearestClassMean
from clfed.learners.tables import ClassTable, Column
from clfed.prototypes import PrototypeMemory

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience


class TEEN(NearestClassMean):
    r"""Cosines with class means of which all but those of the first experience are calibrated.

    Args:
        backbone: The network.
        transform: Its input transform.
        classifier: What is read off the memory; ``base`` need not be named, it is what the first
            experience with any image showed.
        loss: Of the base training, on the head.
        temperature: :math:`\tau_c` of the cosine head; 16 or 32 in the paper.
        options: Options of :class:`~clfed.learners.ncm.NearestClassMean`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: Mapping[str, Any] | None = None,
        loss: str = "cosine",
        temperature: float = 16.0,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            transform,
            classifier={"name": "teen"} if classifier is None else classifier,
            loss=loss,
            temperature=temperature,
            **options,
        )
        #: 1 for a base class, 0 for another.
        self.roles = ClassTable({"base": Column(rule="add")}, seed=0, purpose="roles")

    @property
    def base(self) -> tuple[str, ...]:
        """Names of the base classes."""
        rows = (self.roles.column("base") > 0).nonzero().flatten()
        return tuple(self.roles.classes[row] for row in rows.tolist())

    def begin_experience(self, experience: Experience) -> None:
        """Note which classes are there from the beginning."""
        first = not self.classes
        super().begin_experience(experience)
        self.roles.grow(self.classes)
        if first:
            self.roles.column("base").fill_(1.0)

    def reading(self, memory: PrototypeMemory) -> dict[str, Any]:
        """Return name and options of the classifier, the base classes among them."""
        options = super().reading(memory)
        if options["name"] == "teen":
            base = options.get("base", self.base)
            options["base"] = [name for name in base if name in memory]
        return options
