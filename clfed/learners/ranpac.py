r"""RanPAC: ridge regression on random features (McDonnell et al. 2023, arXiv 2307.02251).

.. math:: \phi = \max(W f(x), 0), \qquad G = \sum_i \phi_i \phi_i^\top, \quad
          Q = \sum_i \phi_i y_i^\top, \qquad W_o = (G + \lambda I)^{-1} Q

:math:`W` is drawn once and never trained; the paper takes :math:`M = 10000` random features of a
transformer that was adapted on the first experience, and chooses :math:`\lambda` anew in every
experience by the squared error on a fifth of its images. :math:`G` and :math:`Q` are exact sums.
At :math:`M` features they take :math:`8 M^2` bytes: 32 MB at 2000, 800 MB at 10000. Features are
scaled by 1/16, which :math:`\lambda` makes up for, so that the sums fit where embeddings are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.frozen import FrozenLearner
from clfed.prototypes import Moments, PrototypeMemory

if TYPE_CHECKING:
    from clfed.scenarios.streams import Experience

PENALTIES = tuple(10.0**power for power in range(-8, 9))
HELD_OUT = 5  # one image in five
PROJECTION: Mapping[str, Any] = MappingProxyType(
    {
        "_target_": "clfed.prototypes.features.RandomProjection",
        "dim_out": 2000,
        "seed": 0,
        "scale": 2.0**-4,
    }
)


class RanPAC(FrozenLearner):
    r"""Sums of random features on a frozen network; the ridge regression is solved on reading.

    Args:
        backbone: The network.
        transform: Its input transform.
        penalty: :math:`\lambda`; None chooses it in every experience of at least five images.
        classifier: What is read off the memory.
        moments: Second moments.
        feature_map: The random layer; the same on all nodes.
        options: Options of :class:`~clfed.learners.frozen.FrozenLearner`.

    Raises:
        ConfigError: The penalty is not positive.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        penalty: float | None = None,
        classifier: Mapping[str, Any] | None = None,
        moments: Moments = "shared",
        feature_map: Mapping[str, Any] | None = PROJECTION,
        **options: Any,
    ) -> None:
        if penalty is not None and not penalty > 0:
            raise ConfigError(f"Expected a positive learner.penalty, got {penalty}.")
        super().__init__(
            backbone,
            transform,
            classifier={"name": "ridge"} if classifier is None else classifier,
            moments=moments,
            feature_map=feature_map,
            **options,
        )
        self.fixed_penalty = penalty

    @property
    def penalty(self) -> float:
        r""":math:`\lambda`: the fixed one, or the best on held-out images; 1 before any were.

        The errors are kept rather than the choice, since those of several nodes can be added.
        """
        if self.fixed_penalty is not None:
            return self.fixed_penalty
        errors = self.kept.get("held_out_errors")
        return 1.0 if errors is None else PENALTIES[int(errors.argmin())]

    def study(self, mapped: Tensor, labels: Tensor, experience: Experience) -> None:
        """Try all penalties on a part of the images of this experience."""
        if self.fixed_penalty is None and len(mapped) >= HELD_OUT:
            order = torch.randperm(len(mapped), generator=self.rng("held out"))
            held, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
            targets = F.one_hot(labels, len(experience.classes)).double()
            z = mapped.double()
            self.kept["held_out_errors"] = ridge_errors(
                z[rest], targets[rest], z[held], targets[held], PENALTIES
            )

    def reading(self, memory: PrototypeMemory) -> dict[str, Any]:
        """Return name and options of the classifier, the penalty among them."""
        options = super().reading(memory)
        if options["name"] == "ridge":
            options.setdefault("penalty", self.penalty)
        return options


def ridge_errors(
    inputs: Tensor, targets: Tensor, held: Tensor, answers: Tensor, penalties: tuple[float, ...]
) -> Tensor:
    r"""Squared errors of ridge regression on held-out rows, for many penalties at once.

    One eigendecomposition serves all penalties: of :math:`X^\top X`, or of :math:`X X^\top` where
    there are fewer rows than columns.

    Args:
        inputs: :math:`X`, shape ``(N, D)`` float64.
        targets: :math:`Y`, shape ``(N, C)``.
        held: Shape ``(H, D)``.
        answers: Shape ``(H, C)``.
        penalties: :math:`\lambda`, each positive.

    Returns:
        :math:`\|H (X^\top X + \lambda I)^{-1} X^\top Y - A\|^2`, shape ``(len(penalties),)``.
    """
    if len(inputs) > inputs.shape[1]:
        matrix, left, right = inputs.T @ inputs, held, inputs.T @ targets
    else:
        matrix, left, right = inputs @ inputs.T, held @ inputs.T, targets
    values, vectors = torch.linalg.eigh(matrix)
    scale = values.clamp(min=0) + torch.tensor(penalties, dtype=torch.float64)[:, None]
    solutions = (vectors.T @ right) / scale[:, :, None]
    errors: Tensor = ((left @ vectors) @ solutions - answers).square().sum((1, 2))
    return errors
