"""What federated methods share whose server makes training inputs of old classes without data.

After each mission the averaged network becomes the teacher of the next one, and a generator is
trained to find inputs that the teacher knows. What nodes need of both goes with the first request
of the next mission that a node gets, once; a node keeps it until the next such lesson comes.

The server makes it at the beginning of the next mission, so that nothing is made after the last
one; the time counts in the first round of that mission.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from clfed.backbones import Encoder
from clfed.errors import ConfigError, InvalidMessage
from clfed.federated import records
from clfed.federated.local_training import Visit
from clfed.federated.networks import load_network
from clfed.learners.fine_tuning import FineTuning, Loss
from clfed.strategies.base import Records
from clfed.strategies.fedavg import FedAvg, FedAvgTraining, Trained
from clfed.strategies.settings import check_whole

LESSON, TEACHER = "lesson", "teacher"


class DataFree(FedAvg):
    """FedAvg whose server also sends a lesson about old classes with each mission but the first.

    The record ``round`` of a request holds ``lesson``: the mission for which the current one was
    made, 0 without one. A node that does not have it yet finds it in the request: the record
    ``lesson`` (mission, the teacher's classes and whatever :meth:`lesson` adds), the records of
    :meth:`lesson`, and ``teacher``, the network before the mission, where ``model`` is another one.

    Args:
        encoder: The network that everybody starts from.
        weights: Of the nodes in the average: ``uniform``, or ``examples``, their numbers of images.
        options: Of :class:`~clfed.strategies.fedavg.FedAvg`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, encoder: Encoder, *, weights: str = "uniform", **options: Any) -> None:
        super().__init__(encoder, **options)
        if weights not in ("uniform", "examples"):
            raise ConfigError(f"strategy.weights must be uniform or examples, got {weights!r}.")
        self.weights = weights
        self._lesson: dict[str, ArrayRecord | ConfigRecord] = {}
        self._teacher = ArrayRecord()
        self._made_for = 0
        self._held: dict[int, int] = {}

    @abstractmethod
    def lesson(self, teacher: FineTuning, mission: int) -> tuple[ConfigRecord, Records]:
        """Return what nodes need beside the teacher: further entries of the lesson, and records.

        Args:
            teacher: The frozen network, in evaluation mode.
            mission: That it is for.
        """

    def entries(self, server_round: int) -> dict[str, Any]:
        """Return the classes of the head, and which lesson counts."""
        return {**super().entries(server_round), LESSON: self._made_for}

    def requests(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        ids: Iterable[int],
        kind: str,
    ) -> list[Message]:
        """Add the lesson for nodes that do not have it."""
        ids, training = list(ids), kind.startswith(MessageType.TRAIN)
        begins = (server_round - 1) % self.rounds_per_mission == 0
        mission = self.mission(server_round)
        if training and begins and self.classes and mission > self._made_for:
            self._prepare(mission, arrays)
        messages = super().requests(server_round, arrays, config, ids, kind)
        if not training or not self._made_for:
            return messages
        extra = self._lesson if begins else {**self._lesson, TEACHER: self._teacher}
        for message in messages:
            if self._held.get(message.metadata.dst_node_id) != self._made_for:
                message.content.update(extra)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Remember who has the lesson: a node that answered without an error kept it."""
        replies = list(replies)
        for reply in replies:
            node = reply.metadata.src_node_id
            status = reply.content.get("status") if reply.has_content() else None
            if isinstance(status, ConfigRecord) and not status.get("needs-briefing"):
                self._held[node] = self._made_for
            else:
                self._held.pop(node, None)
        return super().aggregate_train(server_round, replies)

    def merge(
        self, server_round: int, found: Mapping[str, Trained]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the networks, each one alike unless numbers of examples are to count."""
        if self.weights == "examples":
            return super().merge(server_round, found)
        alike = {name: replace(part, examples=1) for name, part in found.items()}
        arrays, _ = super().merge(server_round, alike)
        total = sum(part.examples for part in found.values())
        return arrays, MetricRecord({"classes": len(self.classes), "examples": total})

    def _prepare(self, mission: int, arrays: ArrayRecord) -> None:
        teacher = self.network(arrays).eval().requires_grad_(False)
        entries, parts = self.lesson(teacher, mission)
        about = {"mission": mission, "classes": json.dumps(teacher.classes), **entries}
        self._lesson = {LESSON: ConfigRecord(about), **parts}
        self._teacher, self._made_for = arrays, mission


class DataFreeTraining(FedAvgTraining):
    """Trains on the mission's images and on what the server's lesson gives of old classes.

    *Old* classes are the teacher's: all that the server knew before the mission. *Current* ones are
    those of the node's own images and whatever else became known during the mission. In the
    published setting every class has one task, so these are disjoint; here an old class may come
    back to a node, and is then both: it is learned from the real images among the current classes,
    and kept as the teacher knew it among the old ones. With ``logits=met``, current classes are
    those of the node's own images alone.

    Before the first lesson this is :class:`~clfed.strategies.fedavg.FedAvgTraining`.

    Args:
        synthetic_batch_size: Made-up inputs a step.
        options: Of :class:`~clfed.strategies.fedavg.FedAvgTraining`.

    Raises:
        ConfigError: A setting is out of range.
    """

    kept: ClassVar[tuple[str, ...]]

    def __init__(self, *, synthetic_batch_size: int = 64, **options: Any) -> None:
        super().__init__(**options)
        check_whole(2, **{"local.synthetic_batch_size": synthetic_batch_size})
        self.synthetic_batch_size = synthetic_batch_size

    def train(self, visit: Visit, request: RecordDict) -> RecordDict:
        """Keep the lesson that came, if any, and train."""
        if LESSON in request:
            records.config(request, LESSON)
            for name in (LESSON, *self.kept):
                visit.state[name] = request[name]
            visit.state[TEACHER] = records.arrays(
                request, TEACHER if TEACHER in request else "model"
            )
        return super().train(visit, request)

    def loss(self, network: FineTuning, visit: Visit, request: RecordDict) -> Loss:
        """Return the loss of a batch; the plain one as long as there are no old classes.

        Raises:
            InvalidMessage: The node lacks the lesson that counts.
        """
        number = records.integer(records.config(request, "round"), LESSON)
        if number == 0:
            return super().loss(network, visit, request)
        lesson = records.config(visit.state, LESSON)
        if (kept := records.integer(lesson, "mission")) != number:
            raise InvalidMessage(f"Expected the lesson for mission {number}, got that for {kept}.")
        classes = json.loads(records.text(lesson, "classes"))
        teacher = load_network(visit.encoder, records.arrays(visit.state, TEACHER), classes)
        return self.remembering(network, visit, teacher.eval().requires_grad_(False))

    @abstractmethod
    def remembering(self, network: FineTuning, visit: Visit, teacher: FineTuning) -> Loss:
        """Return the loss of a batch where there are old classes.

        Args:
            network: What is trained; its head has all classes.
            visit: Whose ``state`` holds the records of the lesson.
            teacher: The frozen network before the mission, in evaluation mode.
        """

    def current(self, network: FineTuning, visit: Visit, teacher: FineTuning) -> Tensor:
        """Return the head rows of the current classes in rising order, int64."""
        names = set(visit.labels)
        if self.logits == "all":
            names |= set(network.classes) - set(teacher.classes)
        return network.label(sorted(names)).sort().values
