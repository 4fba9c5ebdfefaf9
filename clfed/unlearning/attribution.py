r"""What a head would answer without some samples, in closed form.

A ridge regression on embeddings :math:`z` and one-hot labels :math:`y`,

.. math:: W(D) = (G + \lambda I)^{-1} C, \qquad G = \sum_{i \in D} z_i z_i^\top, \qquad
          C = \sum_{i \in D} z_i y_i^\top

is retrained on :math:`D_r` by taking the sums of the samples that go out of :math:`G` and
:math:`C`, exactly. What a whole set of samples contributes to an answer is the difference

.. math:: \tau_F(x) = (W(D) - W(D_r))^\top z(x)

and not a sum of what each of them contributes alone, as in a linear datamodel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True, eq=False)
class Attribution:
    """Two ridge heads: of all samples, and of those that stay.

    Attributes:
        whole: :math:`W(D)`, ``(D + 1, K)`` float64; the last row is the intercept.
        kept: :math:`W(D_r)`, likewise.
    """

    whole: Tensor
    kept: Tensor

    @classmethod
    def of(
        cls,
        forget: tuple[Tensor, Tensor],
        retain: tuple[Tensor, Tensor],
        *,
        classes: int,
        ridge: float,
    ) -> Attribution:
        r"""Solve both regressions.

        Args:
            forget: Embeddings ``(M, D)`` and labels ``(M,)`` of what goes.
            retain: The same of what stays.
            classes: :math:`K`.
            ridge: :math:`\lambda` for each sample that stays: the penalty is the same in both.
        """
        gone, stays = _sums(*forget, classes), _sums(*retain, classes)
        size = len(stays[0])
        penalty = ridge * len(retain[0]) * torch.eye(size, dtype=torch.float64)
        return cls(
            torch.linalg.solve(stays[0] + gone[0] + penalty, stays[1] + gone[1]),
            torch.linalg.solve(stays[0] + penalty, stays[1]),
        )

    def answers(self, embeddings: Tensor) -> Tensor:
        """Outputs ``(B, K)`` of the head of all samples, for embeddings ``(B, D)``."""
        return _extended(embeddings) @ self.whole

    def contribution(self, embeddings: Tensor) -> Tensor:
        r"""What the samples that go contribute to these outputs: :math:`\tau_F`, ``(B, K)``."""
        return _extended(embeddings) @ (self.whole - self.kept)


def scale(logits: Tensor, answers: Tensor) -> float:
    r"""Units of logits for a unit of a ridge head's outputs, by least squares.

    .. math:: \alpha = \frac{\langle o, a \rangle}{\langle a, a \rangle}

    with the mean of each row taken off both, because a softmax does not see it.

    Args:
        logits: :math:`o`, ``(B, K)``.
        answers: :math:`a`, ``(B, K)``.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> scale(3 * a + 7, a)
        3.0
    """
    o = logits.double() - logits.double().mean(1, keepdim=True)
    a = answers.double() - answers.double().mean(1, keepdim=True)
    return float((o * a).sum() / (a * a).sum())


def _extended(embeddings: Tensor) -> Tensor:
    return F.pad(embeddings.double(), (0, 1), value=1.0)


def _sums(embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    z = _extended(embeddings)
    return z.T @ z, z.T @ F.one_hot(labels, classes).double()
