r"""FedRE (Yao et al. 2025, arXiv 2511.22265): nodes send one random mixture of what they embed.

Node :math:`k` trains an extractor :math:`g_k` of any architecture under the common head
:math:`\omega`, maps its embeddings to a common size and mixes them and their labels alike:

.. math:: \tilde r_k = \sum_i w_i\, \mathrm{RM}(g_k(x_i)), \quad
          \tilde y_k = \sum_i w_i\, e_{y_i}, \quad w_i \ge 0, \; \sum_i w_i = 1

The server trains the head on these pairs, one a node, and sends it to all:

.. math:: \min_\omega \sum_k \mathrm{CE}(\omega \tilde r_k, \tilde y_k)
          = \min_\omega -\sum_k \sum_c \tilde y_{k,c} \log p_c(\tilde r_k)

Weights are uniform draws, divided by their sum, anew in each round. A message is
:math:`512 + |C_k|` numbers; the paper's count of 512 leaves the labels out. The weights of a node
follow from seed, name and round, and the server gets those of the classes anyway.

Where the public code differs from the paper this follows the paper: one of its versions for
different networks never sends the head back, another does. Its loaders drop the last images of a
pass, so rare classes have no prototype; here all images count, in eval mode. Where the head is
trained, the softmax is over the classes of the round, so that nobody's absence teaches anything;
with all nodes in a round these are all.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from clfed.backbones import Encoder
from clfed.errors import ConfigError, InvalidEmbedding, InvalidMessage
from clfed.federated import checked, records
from clfed.federated.local_training import Visit
from clfed.learners.common_head import MAPPINGS, MappedNetwork, initial_row, train_head
from clfed.learners.fine_tuning import FineTuning
from clfed.prototypes.entangling import MECHANISMS, Entangled, entangle
from clfed.prototypes.fixed_point import RANGE
from clfed.seeding import generator
from clfed.strategies.personal import MODEL, PersonalTraining
from clfed.strategies.training import TrainingStrategy

logger = logging.getLogger(__name__)

# Float32 changes each label weight by at most 2**-25 of itself.
SLACK = 1e-6


class FedRE(TrainingStrategy[Entangled]):
    """Trains the head that all nodes share; every node answers with its own extractor under it.

    A request holds ``head`` (``weight`` and ``bias``) beside ``round``, which names its classes as
    JSON. A reply holds ``entangled`` (``representation`` and ``weights``) and, in ``status``, class
    names as JSON; that of a node without images holds neither.

    Args:
        encoder: The network that nodes start from, unless they have architectures of their own.
        width: Common size of embeddings.
        lr: Learning rate of the head's gradient descent, one pass over the nodes a round. A step
            moves outputs in proportion to the squared length of embeddings, so long ones need a
            small rate.
        batch_size: Nodes a step; the loss is summed over them, not averaged.
        options: Of :class:`~clfed.strategies.training.TrainingStrategy`.

    Attributes:
        classes: Of the head's rows, sorted.

    Raises:
        ConfigError: A setting is out of range.
    """

    leaves: ClassVar[str] = "one random mixture of embeddings, its label weights, class names"
    personal: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        width: int = 512,
        lr: float = 0.001,
        batch_size: int = 32,
        **options: Any,
    ) -> None:
        for key, value in (("width", width), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"strategy.{key} must be a whole number of at least 1, got {value!r}."
                )
        if not (type(lr) in (int, float) and 0 < lr < math.inf):
            raise ConfigError(f"strategy.lr must be a number above 0, got {lr!r}.")
        super().__init__(encoder, **options)
        self.width, self.lr, self.batch_size = width, lr, batch_size
        self.classes: tuple[str, ...] = ()
        self._head = torch.zeros(0, width + 1)

    def arrays(self) -> ArrayRecord:
        """Return the head, ``weight`` ``(classes, width)`` and ``bias`` ``(classes,)``."""
        head = self._head.numpy()
        return ArrayRecord(
            {"weight": Array(head[:, :-1].copy()), "bias": Array(head[:, -1].copy())}
        )

    def content(self, server_round: int, arrays: ArrayRecord) -> RecordDict:
        """Return the current head."""
        return RecordDict({"head": arrays})

    def entries(self, server_round: int) -> dict[str, Any]:
        """Return the classes of the head."""
        return {"classes": json.dumps(self.classes)}

    def read(self, contributor: str, content: RecordDict) -> Entangled | None:
        """Return a node's mixture, None where it had no images.

        Raises:
            InvalidMessage: It is no mixture of embeddings of the common size.
        """
        if "entangled" not in content:
            return None
        status, sent = records.config(content, "status"), records.arrays(content, "entangled")
        classes = checked.class_names(records.text(status, "classes"))
        kind = np.dtype(np.float32)
        representation = checked.table(sent, "representation", kind, (self.width,))
        weights = checked.table(sent, "weights", kind, (len(classes),))
        if not np.abs(representation).max() <= RANGE:  # written so that NaN fails too
            raise InvalidMessage(f"expected a finite representation within ±{RANGE:g}")
        total = float(weights.sum(dtype=np.float64))
        if not ((weights >= 0).all() and abs(total - 1) <= SLACK):
            raise InvalidMessage(f"expected label weights of at least 0 and sum 1, got {total:.7g}")
        return Entangled(classes, torch.tensor(representation), torch.tensor(weights))

    def merge(
        self, server_round: int, found: Mapping[str, Entangled]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train the head's rows of the classes that nodes have.

        Raises:
            InvalidEmbedding: The head diverged.
        """
        met = sorted(set().union(*(part.classes for part in found.values())))
        self._grow(met)
        place = {name: row for row, name in enumerate(self.classes)}
        rows = torch.tensor([place[name] for name in met])
        column = {name: number for number, name in enumerate(met)}
        labels = torch.zeros(len(found), len(met))
        for of_node, part in zip(labels, found.values(), strict=True):
            of_node[[column[name] for name in part.classes]] = part.weights
        trained = train_head(
            self._head[rows],
            torch.stack([part.representation for part in found.values()]),
            labels,
            lr=self.lr,
            batch_size=self.batch_size,
            rng=generator(self.seed, "fedre", "head", server_round),
        )
        if not bool(torch.isfinite(trained).all()):
            raise InvalidEmbedding(
                "The head diverged: its weights are no longer finite numbers.",
                remedy="Choose a smaller strategy.lr.",
            )
        self._head[rows] = trained
        return self.arrays(), MetricRecord({"classes": len(self.classes), "nodes": len(found)})

    def _grow(self, met: Sequence[str]) -> None:
        old = dict(zip(self.classes, self._head, strict=True))
        self.classes = tuple(sorted({*self.classes, *met}))
        rows = [
            old[name] if name in old else initial_row(self.seed, name, self.width)
            for name in self.classes
        ]
        self._head = torch.stack(rows)


class FedRETraining(PersonalTraining):
    """Trains the node's own extractor under the common head and sends one mixture.

    Args:
        mapping: To the common size: ``avg`` or ``max``, adaptive pooling over the embedding's
            numbers in their order (a shorter embedding is stretched); ``fc``, a linear layer that
            is trained with the extractor, stays at the node and starts as
            :class:`torch.nn.Linear` does. That the layer stays is a reconstruction of ours.
        mechanism: What is mixed and how, see :func:`~clfed.prototypes.entangling.entangle`.
        options: Of :class:`~clfed.strategies.personal.PersonalTraining`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, *, mapping: str = "avg", mechanism: str = "rap", **options: Any) -> None:
        for key, value, known in (
            ("mapping", mapping, (*MAPPINGS,)),
            ("mechanism", mechanism, MECHANISMS),
        ):
            if value not in known:
                raise ConfigError(
                    f"strategy.local.{key} must be one of {', '.join(known)}, got {value!r}."
                )
        super().__init__(**options)
        self.mapping, self.mechanism = mapping, mechanism

    def network(self, visit: Visit, request: RecordDict) -> MappedNetwork:
        """Return the node's extractor as it was kept last under the head that the server sent."""
        head = records.arrays(request, "head").to_torch_state_dict()
        network = MappedNetwork(
            self.encoder(visit),
            mapping=self.mapping,
            width=head["weight"].shape[1],
            seed=visit.seed,
            place=visit.node,
            **self.optimiser,
        )
        if MODEL in visit.state:
            kept = records.arrays(visit.state, MODEL).to_torch_state_dict()
            prefix = "backbone."
            network.backbone.load_state_dict(
                {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}
            )
        classes = json.loads(records.text(records.config(request, "round"), "classes"))
        network.replace_head(head["weight"], head["bias"], classes)
        return network

    def message(self, network: FineTuning, visit: Visit, request: RecordDict) -> RecordDict:
        """Return the mixture of all images of the mission, or nothing where there are none."""
        assert isinstance(network, MappedNetwork)
        if not visit.labels:
            return RecordDict()
        features = network.embed(visit.images)
        mixture = entangle(features, visit.labels, self.mechanism, visit.rng("entangle"))
        self._warn(mixture, visit)
        sent = {
            "representation": Array(mixture.representation.numpy()),
            "weights": Array(mixture.weights.numpy()),
        }
        status = records.config_record(classes=json.dumps(mixture.classes))
        return RecordDict({"entangled": ArrayRecord(sent), "status": status})

    def _warn(self, mixture: Entangled, visit: Visit) -> None:
        """Say once a mission that what leaves the node is of one class alone."""
        unmixed = int((mixture.weights > 0).sum()) == 1
        warned = records.config_record(mission=visit.mission)
        if unmixed and visit.state.get("fedre-warned") != warned:
            logger.warning(
                "Privacy: the message of %s holds one class alone, so it is an embedding of that "
                "class that nothing hides.",
                visit.node,
            )
            visit.state["fedre-warned"] = warned
