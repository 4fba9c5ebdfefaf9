"""The server's half of every method whose nodes train networks on their missions."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from clfed.errors import ConfigError, FederationError, InvalidMessage
from clfed.federated import records
from clfed.federated.grid import exchange
from clfed.learners.curricula import NodeCurriculum, Turns
from clfed.seeding import generator
from clfed.strategies.base import Records, TrainOnly
from clfed.strategies.senders import Senders
from clfed.strategies.settings import check_whole

if TYPE_CHECKING:
    from clfed.backbones import Encoder
    from clfed.learners.fine_tuning import FineTuning

Found = TypeVar("Found")


class TrainingStrategy(TrainOnly, Generic[Found]):
    """A strategy whose nodes train networks on their missions.

    A request (``train.local``) holds ``round`` (number, mission, seed, session), whatever
    :meth:`content` adds and, for a node's first message, ``local`` (what the node shall run, as
    JSON) and the briefing. A reply holds ``status`` (contributor) and whatever the method's
    :class:`~clfed.federated.local_training.LocalTraining` returns.

    Attributes:
        personal: Whether nodes answer with models of their own (message ``query.predict``).

    Args:
        encoder: The embedding that everybody starts from.
        local: ``_target_`` and settings of the half that runs at nodes.
        briefing: Records that a node needs once.
        rounds_per_mission: Exchanges on the same images.
        participation: Share of the nodes that takes part in a round, at least one node; the sample
            depends on the seed, the round and the nodes' names.
        curriculum: Settings of a :class:`~clfed.learners.curricula.NodeCurriculum`, with which
            easy nodes, or hard ones, take part first; None: all have the same chance.
        seed: Decides everything random, at the server and at nodes.
        options: Of :class:`TrainOnly`.

    Raises:
        ConfigError: A setting is out of range.
    """

    personal: ClassVar[bool] = False

    def __init__(
        self,
        encoder: Encoder,
        *,
        local: Mapping[str, Any],
        briefing: Records | None = None,
        rounds_per_mission: int = 1,
        participation: float = 1.0,
        curriculum: Mapping[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_whole(1, rounds_per_mission=rounds_per_mission)
        if type(participation) not in (int, float) or not 0 < participation <= 1:
            raise ConfigError(
                f"strategy.participation must be above 0 and at most 1, got {participation!r}."
            )
        self.encoder, self.seed = encoder, seed
        self.rounds_per_mission, self.participation = rounds_per_mission, participation
        self._turns: Turns | None = None
        if curriculum is not None:
            self._turns = Turns(NodeCurriculum(**curriculum), rounds_per_mission, seed)
        self._first: dict[str, ArrayRecord | ConfigRecord] = {
            "local": records.config_record(json=json.dumps(dict(local)))
        }
        self._first |= dict(briefing or {})
        self._senders = Senders()

    @abstractmethod
    def arrays(self) -> ArrayRecord:
        """Return what the first round starts from."""

    @abstractmethod
    def content(self, server_round: int, arrays: ArrayRecord) -> RecordDict:
        """Return what every node of a round gets beside the record ``round``."""

    def network(self, arrays: ArrayRecord) -> FineTuning:
        """Return the network that these arrays hold, for methods with one for all.

        Raises:
            NotImplementedError: Every node has a model of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} has no network for all")

    def entries(self, server_round: int) -> dict[str, Any]:
        """Return what the record ``round`` holds beside what it always does."""
        return {}

    @abstractmethod
    def read(self, contributor: str, content: RecordDict) -> Found | None:
        """Return what a node sent, None where it had nothing to do.

        Raises:
            InvalidMessage: The reply does not fit the request.
        """

    @abstractmethod
    def merge(
        self, server_round: int, found: Mapping[str, Found]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Put together what nodes sent.

        Args:
            server_round: Number of the round.
            found: By contributor, in the order of their names; at least one.
        """

    def mission(self, server_round: int) -> int:
        """Return the mission that nodes are on in a round, from 1."""
        return (server_round - 1) // self.rounds_per_mission + 1

    def ends_mission(self, server_round: int) -> bool:
        """Whether a round is the last one on its mission."""
        return server_round % self.rounds_per_mission == 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the same to every node that takes part.

        Raises:
            FederationError: No node came within the waiting time.
        """
        ids = self.participants(server_round, self.connected(grid), arrays, config, grid)
        kind = f"{MessageType.TRAIN}.local"
        return self.requests(server_round, arrays, config, ids, kind)

    def requests(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        ids: Iterable[int],
        kind: str,
    ) -> list[Message]:
        """Address what a round is about to some nodes.

        Args:
            server_round: Its number.
            arrays: As in :meth:`content`.
            config: What the caller of the strategy adds to the record ``round``.
            ids: Of nodes.
            kind: Type of the messages.
        """
        head = self.head(
            server_round,
            config,
            mission=self.mission(server_round),
            seed=self.seed,
            **self.entries(server_round),
        )
        shared = self.content(server_round, arrays)
        messages = []
        for node in ids:
            content = RecordDict({**shared, "round": head})
            if node not in self._senders.briefed:
                content.update(self._first)
            messages.append(Message(content, dst_node_id=node, message_type=kind))
        return messages

    def participants(
        self,
        server_round: int,
        ids: Sequence[int],
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[int]:
        """Return the nodes that take part in a round; a node id says nothing, so names decide.

        Raises:
            FederationError: A curriculum needs to know how hard nodes are, and none said it.
        """
        count = max(1, math.floor(self.participation * len(ids)))
        if self._turns is not None:
            mission, asked = self.mission(server_round), (server_round, ids, arrays, config, grid)
            return self._turns.next(mission, server_round, ids, count, lambda: self._hard(*asked))
        if count == len(ids):
            return list(ids)
        named = self.introduced(server_round, ids, config, grid)
        rng = generator(self.seed, "participation", server_round)
        order = sorted(named, key=named.__getitem__)
        return [order[i] for i in torch.randperm(len(order), generator=rng)[:count].tolist()]

    def introduced(
        self, server_round: int, ids: Iterable[int], config: ConfigRecord, grid: Grid
    ) -> dict[int, str]:
        """Return the names of nodes by id; those that are not known yet are asked."""
        ids = list(ids)
        head = self.head(server_round, config)
        unknown = [node for node in ids if node not in self._senders.names]
        asked = [
            Message(
                RecordDict({**self._first, "round": head}),
                dst_node_id=node,
                message_type=f"{MessageType.QUERY}.introduce",
            )
            for node in unknown
        ]
        if asked:
            self._senders.gathered(server_round, exchange(grid, asked, timeout=self.wait), _sender)
        return {node: self._senders.names[node] for node in ids if node in self._senders.names}

    def _hard(
        self,
        server_round: int,
        ids: Sequence[int],
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> dict[str, tuple[int, float]]:
        """Return id and mean loss of nodes by name; where it does not matter nobody is asked."""
        assert self._turns is not None
        if self._turns.curriculum.scored:
            kind = f"{MessageType.QUERY}.score"
            messages = self.requests(server_round, arrays, config, ids, kind)
            replies = exchange(grid, messages, timeout=self.wait)
            found = self._senders.gathered(server_round, replies, _score)
        else:
            named = self.introduced(server_round, ids, config, grid)
            found = {name: (node, 0.0) for node, name in named.items()}
        if not found:
            raise FederationError("No node could say how hard its images are.")
        return found

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Put together what came.

        A reply that is an error or breaks a rule is logged and left out.
        """
        found = self._senders.gathered(
            server_round, replies, lambda name, reply: self.read(name, reply.content)
        )
        return self.merge(server_round, found) if found else (None, None)


def _sender(name: str, reply: Message) -> int:
    return reply.metadata.src_node_id


def _score(name: str, reply: Message) -> tuple[int, float] | None:
    """Return id and mean loss of a node, None where it has no images and so no mean."""
    score = records.config(reply.content, "status").get("score")
    if not isinstance(score, float) or score < 0 or math.isinf(score):
        raise InvalidMessage(f"expected a mean loss of at least 0, got {score!r}")
    return None if math.isnan(score) else (_sender(name, reply), score)
