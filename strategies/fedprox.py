r"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg whose nodes stay near what they were sent.

.. math:: L_k(w) + \frac{\mu}{2} \|w - w_t\|^2

The server's half is that of :class:`~clfed.strategies.fedavg.FedAvg`. Rows of new classes start at
zero at every node, so they are drawn to zero.
"""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from clfed.federated.local_training import Visit
from clfed.learners.fine_tuning import FineTuning, Loss
from clfed.strategies.fedavg import FedAvg, FedAvgTraining
from clfed.strategies.settings import check_weights


class FedProx(FedAvg):
    """See the module; all settings of its own are those of :class:`FedProxTraining`."""


class FedProxTraining(FedAvgTraining):
    r"""Adds the proximal term.

    Args:
        mu: :math:`\mu`, at least 0; 0 is FedAvg.
        options: Of :class:`~clfed.strategies.fedavg.FedAvgTraining`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, *, mu: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        check_weights(**{"local.mu": mu})
        self.mu = mu

    def loss(self, network: FineTuning, visit: Visit, request: RecordDict) -> Loss:
        """Return the loss of a batch with the distance to the weights before the training."""
        inner = super().loss(network, visit, request)
        start = [weights.detach().clone() for weights in network.parameters()]

        def near(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
            pairs = zip(network.parameters(), start, strict=True)
            distance = torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
            return inner(network, images, labels) + 0.5 * self.mu * distance

        return near
