r"""FedProto (Tan et al. 2022, arXiv 2105.00243): nodes agree on class prototypes, not on weights.

Node :math:`i` trains a network of its own, whose embeddings :math:`f_i` are drawn to the global
prototypes :math:`\bar C` of their classes, and sends the mean embedding :math:`C_i` of each class:

.. math:: L_i = \mathrm{CE} + \lambda\, \mathrm{MSE}(f_i(x), \bar C_y), \qquad
          \bar C_c = \sum_i \frac{n_{ic}}{\sum_j n_{jc}}\, C_{ic}, \qquad
          \hat y = \arg\min_c \|f_i(x) - \bar C_c\|_2

There are three averages: the main text divides this weighted one by the number of nodes once more,
its appendix does not, and the public code takes the unweighted mean over nodes. The public code
collects embeddings while it trains, each under other weights; here they are taken afterwards, of
all images of the mission in eval mode. Its squared distance is a mean over the embedding and the
batch, to which images whose class has no global prototype yet contribute zero; so it is here.

Embeddings of one mission and of a later one are those of different networks. So a prototype is made
of what nodes sent on the last mission on which its class was met, of each node the newest; until a
class is met again it stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from clfed.backbones import Encoder
from clfed.errors import ConfigError, InvalidMessage
from clfed.federated import records
from clfed.federated.checked import class_names, table
from clfed.federated.local_training import Visit
from clfed.learners.fine_tuning import FineTuning, Loss
from clfed.learners.training import initial_backbone
from clfed.prototypes.contribution import DEFAULT_CAP
from clfed.strategies.personal import PersonalTraining, check_backbones
from clfed.strategies.settings import check_weights
from clfed.strategies.training import TrainingStrategy

AGGREGATIONS = ("exact", "paper", "code")


@dataclass(frozen=True)
class Prototypes:
    """Mean embeddings of the classes that one node met on a mission.

    Attributes:
        classes: Their names.
        counts: Images of each, ``(C,)`` int64.
        means: ``(C, D)`` float32.
    """

    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    means: NDArray[np.float32]


class FedProto(TrainingStrategy[Prototypes]):
    """Averages class prototypes; every node answers with its own network.

    A request holds ``prototypes`` (the global ones) beside ``round``, which names their classes as
    JSON. A reply holds ``prototypes`` (``counts`` and ``means``) and, in ``status``, class names.

    Args:
        encoder: The network that nodes start from, unless they have architectures of their own.
        local: ``_target_`` and settings of the half that runs at nodes.
        aggregation: ``exact``: weighted by numbers of images, the mean of all images where all
            networks are equal; ``paper``: that divided by the number of nodes that met the class;
            ``code``: the mean over these nodes.
        options: Of :class:`~clfed.strategies.training.TrainingStrategy`.

    Attributes:
        classes: Names of the global prototypes, sorted.

    Raises:
        ConfigError: A setting is out of range, or the nodes' embeddings differ in size.
    """

    leaves: ClassVar[str] = "class names, counts and mean embeddings"
    personal: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        local: Mapping[str, Any],
        aggregation: str = "exact",
        **options: Any,
    ) -> None:
        if aggregation not in AGGREGATIONS:
            raise ConfigError(
                f"strategy.aggregation must be one of {', '.join(AGGREGATIONS)}, "
                f"got {aggregation!r}."
            )
        super().__init__(encoder, local=local, **options)
        self.aggregation = aggregation
        self.width = _width(encoder, check_backbones(local.get("backbones")))
        self.classes: tuple[str, ...] = ()
        self._prototypes: dict[str, NDArray[np.float32]] = {}
        self._mission = 0
        self._reports: dict[str, dict[str, tuple[int, NDArray[np.float32]]]] = {}

    def arrays(self) -> ArrayRecord:
        """Return the global prototypes, ``(C, D)`` float32 in the order of their classes."""
        rows = [self._prototypes[name] for name in self.classes]
        means = np.array(rows, np.float32).reshape(-1, self.width)
        return ArrayRecord({"means": Array(means)})

    def content(self, server_round: int, arrays: ArrayRecord) -> RecordDict:
        """Return the global prototypes."""
        return RecordDict({"prototypes": arrays})

    def entries(self, server_round: int) -> dict[str, Any]:
        """Return the classes of the global prototypes."""
        return {"classes": json.dumps(self.classes)}

    def read(self, contributor: str, content: RecordDict) -> Prototypes | None:
        """Return a node's prototypes, None where it met no image.

        Raises:
            InvalidMessage: The reply is not made of finite means of named classes.
        """
        classes = class_names(records.text(records.config(content, "status"), "classes"))
        sent = records.arrays(content, "prototypes")
        counts = table(sent, "counts", np.dtype(np.int64), (len(classes),))
        means = table(sent, "means", np.dtype(np.float32), (len(classes), self.width))
        if not classes:
            return None
        if not 0 < counts.min() <= counts.max() <= DEFAULT_CAP:
            raise InvalidMessage(
                f"expected 1 to {DEFAULT_CAP} images of a class, got {counts.min()} "
                f"to {counts.max()}"
            )
        if not np.isfinite(means).all():
            raise InvalidMessage("expected finite numbers in 'means'")
        return Prototypes(classes, counts, means)

    def merge(
        self, server_round: int, found: Mapping[str, Prototypes]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the prototypes of the classes that were met; the others stay as they are."""
        mission = self.mission(server_round)
        if mission != self._mission:
            self._mission, self._reports = mission, {}
        for contributor, sent in found.items():
            rows = zip(sent.classes, sent.counts.tolist(), sent.means, strict=True)
            for name, count, mean in rows:
                self._reports.setdefault(name, {})[contributor] = (count, mean)
        for name in sorted(set().union(*(sent.classes for sent in found.values()))):
            # Floating point sums depend on their order, and nodes may have come in any.
            reports = [report for _, report in sorted(self._reports[name].items())]
            self._prototypes[name] = self._average(reports)
        self.classes = tuple(sorted(self._prototypes))
        metrics = {
            "classes": len(self.classes),
            "examples": sum(int(sent.counts.sum()) for sent in found.values()),
        }
        return self.arrays(), MetricRecord(dict(metrics))

    def _average(self, reports: Sequence[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
        weights = np.array([count for count, _ in reports], np.float64)
        if self.aggregation == "code":
            weights = np.ones_like(weights)
        mean = weights @ np.stack([mean for _, mean in reports]) / weights.sum()
        if self.aggregation == "paper":
            mean = mean / len(reports)
        averaged: NDArray[np.float32] = mean.astype(np.float32)
        return averaged


class FedProtoTraining(PersonalTraining):
    r"""Trains the node's own network towards the global prototypes and sends its own ones.

    Args:
        weight: :math:`\lambda`, at least 0. The paper takes 1 for MNIST and FEMNIST and 0.1 for
            CIFAR-10.
        options: Of :class:`~clfed.strategies.personal.PersonalTraining`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, *, weight: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        check_weights(**{"local.weight": weight})
        self.weight = weight

    def loss(self, network: FineTuning, visit: Visit, request: RecordDict) -> Loss:
        """Return the loss of a batch with the distance to the global prototypes."""
        names, means = _received(request)
        place = {name: row for row, name in enumerate(names)}
        rows = torch.tensor([place.get(name, -1) for name in network.classes])
        scored = torch.arange(len(network.classes))
        if self.logits == "met":
            scored = torch.unique(network.label(visit.labels))

        def drawn(network: FineTuning, images: Tensor, labels: Tensor) -> Tensor:
            embeddings = network.features(images)
            logits = network.head(embeddings)[:, scored]
            loss = F.cross_entropy(logits, torch.searchsorted(scored, labels))
            target = embeddings.detach().clone()
            there = rows[labels] >= 0
            target[there] = means[rows[labels[there]]]
            return loss + self.weight * F.mse_loss(embeddings, target)

        return drawn

    def message(self, network: FineTuning, visit: Visit, request: RecordDict) -> RecordDict:
        """Return the class means of the mission's images under the network as it is now."""
        classes = sorted(set(visit.labels))
        place = {name: row for row, name in enumerate(classes)}
        labels = torch.tensor([place[name] for name in visit.labels], dtype=torch.int64)
        counts = torch.bincount(labels, minlength=len(classes))
        embeddings = network.embed(visit.images).double()
        sums = embeddings.new_zeros(len(classes), embeddings.shape[1])
        means = sums.index_add_(0, labels, embeddings) / counts[:, None]
        prototypes = {"counts": Array(counts.numpy()), "means": Array(means.float().numpy())}
        status = records.config_record(classes=json.dumps(classes))
        return RecordDict({"prototypes": ArrayRecord(prototypes), "status": status})

    def predict(
        self, visit: Visit, request: RecordDict, images: Tensor
    ) -> tuple[Sequence[str], Tensor]:
        """Answer with the nearest global prototype; before there is one, nothing rightly."""
        names, means = _received(request)
        if not names:
            return ("",), torch.zeros(len(images), dtype=torch.int64)
        embeddings = self.network(visit, request).embed(images).double()
        centres = means.double()
        return names, (2 * embeddings @ centres.T - centres.square().sum(1)).argmax(1)


def _received(request: RecordDict) -> tuple[list[str], Tensor]:
    """Return the classes of the global prototypes that came, and these, ``(C, D)`` float32."""
    names = json.loads(records.text(records.config(request, "round"), "classes"))
    means = records.array(records.arrays(request, "prototypes"), "means").numpy()
    return names, torch.from_numpy(np.array(means))


def _width(encoder: Encoder, backbones: Sequence[Mapping[str, Any]]) -> int:
    """Return the size that all networks of a federation give their embeddings.

    Raises:
        ConfigError: They differ.
    """
    if not backbones:
        return FineTuning(encoder).head.in_features
    norm, shape = encoder.transform, encoder.input_shape
    sizes = [
        Encoder(network, config, input_shape=shape, mean=norm.mean, std=norm.std).dim
        for config in backbones
        for network in [initial_backbone(config, shape, 0)]
    ]
    if len(set(sizes)) > 1:
        raise ConfigError(
            "strategy.local.backbones must give embeddings of one size, which prototypes share, "
            f"got {', '.join(map(str, sizes))}.",
            remedy="Choose widths that end alike, or strategy=fedre, which maps to a common size.",
        )
    return sizes[0]
