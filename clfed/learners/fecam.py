r"""FeCAM: Mahalanobis distance with a covariance a class (Goswami et al. 2023, arXiv 2309.14062).

.. math:: score_c = -(u - v_c)^\top R_c^{-1} (u - v_c), \qquad \tilde h = f(x)^\beta

with :math:`u, v_c` the unit vectors of :math:`\tilde h` and of its class mean and :math:`R_c` the
class's covariance, shrunk twice and scaled to correlations; see
:func:`clfed.prototypes.classifiers.mahalanobis`. The power :math:`\beta = 0.5` makes features after
a ReLU rounder; where embeddings can be negative, leave it out (``learner.feature_map=null``), as
the paper does for transformers, with ``shrinkage: [10, 10]`` and ``rounds: 1``.

All classes are scored by the distance, those of the first experience too. Second moments by class
take :math:`8 D^2` bytes a class, 2 MB at :math:`D = 512`; ``learner.classifier.common=true
learner.moments=shared`` takes one matrix for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from clfed.backbones.encoder import Transform
from clfed.learners.frozen import FrozenLearner
from clfed.prototypes import Moments

TUKEY: Mapping[str, Any] = MappingProxyType(
    {"_target_": "clfed.prototypes.features.tukey", "beta": 0.5}
)


class FeCAM(FrozenLearner):
    """Remember mean and covariance of every class on a network frozen after the first experience.

    Args:
        backbone: The network, whose embeddings are nowhere negative.
        transform: Its input transform.
        classifier: What is read off the memory; ``common: true`` pools the covariances.
        moments: ``class``, or ``shared`` for a common covariance; None takes what is needed.
        feature_map: Map of the embeddings, Tukey's power unless given; None leaves it out.
        options: Options of :class:`~clfed.learners.frozen.FrozenLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: Mapping[str, Any] | None = None,
        moments: Moments | None = None,
        feature_map: Mapping[str, Any] | None = TUKEY,
        **options: Any,
    ) -> None:
        chosen = {"name": "fecam"} if classifier is None else classifier
        needed: Moments = "shared" if chosen.get("common") else "class"
        super().__init__(
            backbone,
            transform,
            classifier=chosen,
            moments=moments or needed,
            feature_map=feature_map,
            **options,
        )
