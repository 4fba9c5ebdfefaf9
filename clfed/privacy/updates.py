r"""Networks that are averaged, with noise on what each node has changed.

Whatever the inner half trains, of its network :math:`w_k` leaves

.. math:: w_t + \Delta \min(1, B / \|\Delta\|) + N(0, \sigma^2 I), \qquad \Delta = w_k - w_t

over all weights and buffers at once (McMahan et al. 2018, arXiv 1710.06963, whose server adds the
noise; here each node adds its own). Two sets of data are neighbours if all that one node met is in
one of them and nothing of it in the other: a node that met nothing sends :math:`\Delta = 0` with
noise. So that nothing else tells one from the other, the head has a row for every class of the
public list, the number of images is 1 for everybody, and buffers that count are as they were sent.

Noise is an integer multiple of :math:`2^{-32}`, added to integers, see :mod:`clfed.privacy.noise`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from clfed.config import build
from clfed.errors import ConfigError
from clfed.federated import records
from clfed.federated.local_training import LocalTraining, Visit
from clfed.privacy.gaussian import check_positive
from clfed.privacy.mechanism import entropy
from clfed.privacy.noise import Entropy, integer_gaussian
from clfed.prototypes.tables import checked_names

UNIT = 2.0**-32
LEAVES = "weights of the whole network, their change clipped and with noise"
HEAD = ("head.weight", "head.bias")
_SENT, _ROUND = "noised-model", "noised-round"
_MARGIN = 1 + 2.0**-40  # more than the float64 rounding of a norm
Floats = NDArray[Any]


class NoisyUpdates(LocalTraining):
    r"""Clips and noises the update of another method.

    Args:
        inner: ``_target_`` and settings of that method's half at nodes, which sends a network.
        classes: The public list.
        norm: :math:`B`.
        sigma: :math:`\sigma`.
        repeatable: Whether the noise comes from the run's seed; False: from the system.

    Raises:
        ConfigError: A setting is out of range, or the inner half trains nothing.
    """

    def __init__(
        self,
        *,
        inner: Mapping[str, Any],
        classes: Sequence[str],
        norm: float,
        sigma: float,
        repeatable: bool = True,
    ) -> None:
        check_positive("update norm", norm)
        check_positive("sigma", sigma)
        self.inner = build(inner)
        if not isinstance(self.inner, LocalTraining):
            raise ConfigError(
                f"Expected privacy to wrap what trains at nodes, got {type(self.inner).__name__}."
            )
        self.classes = tuple(sorted(checked_names([*classes], "class name")))
        self.norm, self.sigma, self.repeatable = norm, sigma, repeatable

    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Train and return the noised network; a request that is repeated gets the same one.

        Raises:
            ConfigError: The inner half sends more than its network.
        """
        if _ROUND not in visit.state or (
            records.integer(records.config(visit.state, _ROUND), "round") < visit.round
        ):
            visit.state[_SENT] = self._train(visit, request)
            visit.state[_ROUND] = records.config_record(round=visit.round)
        status = records.config_record(classes=json.dumps(self.classes), examples=1)
        return RecordDict({"model": records.arrays(visit.state, _SENT), "status": status})

    def score(self, visit: Visit, request: RecordDict) -> float:
        """Refuse: a loss tells of the node's images.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "privacy=noise does not cover the loss that a curriculum asks nodes for.",
            remedy="Leave curriculum= out, or set privacy=plain.",
        )

    def _train(self, visit: Visit, request: RecordDict) -> ArrayRecord:
        before = json.loads(records.text(records.config(request, "round"), "classes"))
        sent = self._spread(records.arrays(request, "model"), before, {})
        reply = self.inner.train(visit, request)
        status = records.config(reply, "status")
        more = sorted({*reply, *status} - {"model", "status", "classes", "examples"})
        if more:
            raise ConfigError(
                f"privacy=noise covers a network alone, but {type(self.inner).__name__} sends "
                f"{', '.join(more)}.",
                remedy="Choose strategy=fedavg or strategy=fedprox, or privacy=plain.",
            )
        after = json.loads(records.text(status, "classes"))
        trained = self._spread(records.arrays(reply, "model"), after, sent)
        real = [key for key, values in sent.items() if np.issubdtype(values.dtype, np.floating)]
        noise = entropy(visit.seed if self.repeatable else None, "update", visit.node, visit.round)
        change = {key: trained[key].astype(np.float64) - sent[key] for key in real}
        moved = self._noised(change, noise)
        noised = {
            key: (values + moved[key]).astype(values.dtype) if key in moved else values
            for key, values in sent.items()
        }
        for key, values in noised.items():
            if key.endswith("running_var"):  # a network cannot run with negative ones
                noised[key] = values.clip(min=0)
        return ArrayRecord({key: Array(values) for key, values in noised.items()})

    def _spread(
        self, model: ArrayRecord, classes: Sequence[str], rest: Mapping[str, Floats]
    ) -> dict[str, Floats]:
        """Return a network whose head has the rows of the public list; others are as in ``rest``.

        Rows that are nowhere are zero, as those of a head that grows are.
        """
        place = {name: row for row, name in enumerate(self.classes)}
        rows = [place[name] for name in classes]
        found = {}
        for key, array in model.items():
            values = array.numpy()
            if key in HEAD:
                shape = (len(place), *values.shape[1:])
                whole = rest[key].copy() if key in rest else np.zeros(shape, values.dtype)
                whole[rows] = values
                values = whole
            found[key] = values
        return found

    def _noised(self, change: Mapping[str, Floats], noise: Entropy) -> dict[str, Floats]:
        """Return the clipped change with noise, by name; what is not finite counts as nothing."""
        flat = np.concatenate([part.ravel() for part in change.values()])
        flat = np.nan_to_num(flat, posinf=0, neginf=0)
        length = float(np.linalg.norm(flat)) * _MARGIN
        # Rounding towards zero keeps the vector inside the ball.
        steps = np.trunc(flat * min(1.0, self.norm / max(length, self.norm)) / UNIT)
        drawn = integer_gaussian(flat.shape, self.sigma / UNIT, noise)
        total = (torch.from_numpy(steps.astype(np.int64)) + drawn).numpy() * UNIT
        sizes = np.cumsum([part.size for part in change.values()])[:-1]
        return {
            key: part.reshape(change[key].shape)
            for key, part in zip(change, np.split(total, sizes), strict=True)
        }
