"""One node: what it remembers between rounds, and how it answers a round.

A node's lasting state is its own cumulative statistics, the version at which each class last
changed, and the settings of its briefing; no image. It lives in Flower's ``Context.state``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from clfed.backbones import Encoder
from clfed.errors import FederationError
from clfed.federated.field import Field, open_field
from clfed.federated.records import array, arrays, config, config_record, text
from clfed.federated.wire import decode_memory, encode_memory
from clfed.prototypes import Contribution, PrototypeMemory

_encoders: dict[str, Encoder] = {}


def briefing(
    settings: Mapping[str, Any], encoder: Encoder
) -> dict[str, ArrayRecord | ConfigRecord]:
    """Return the records that a node needs once: settings and encoder.

    Args:
        settings: ``field`` (see :func:`clfed.federated.field.field_settings`), ``moments`` and
            ``cache_dir``, and whatever further strategies need; JSON values.
        encoder: The frozen embedding.
    """
    _encoders[encoder.embedding_id] = encoder
    head = config_record(
        settings=json.dumps(settings, sort_keys=True), embedding=encoder.embedding_id
    )
    weights = np.frombuffer(encoder.to_bytes(), np.uint8)
    return {"briefing": head, "encoder": ArrayRecord({"encoder": Array(weights)})}


@dataclass
class NodeState:
    """What a node keeps between rounds.

    Attributes:
        session: The federation that this state belongs to.
        settings: The briefing's settings.
        embedding_id: Identity of the encoder.
        round: The last round whose mission was learned, so that a repeated request adds nothing.
        version: Number of changes of the own statistics so far.
        own: The node's own cumulative statistics.
        changed: The version at which each class last changed.
    """

    session: str
    settings: dict[str, Any]
    embedding_id: str
    round: int
    version: int
    own: PrototypeMemory
    changed: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, state: RecordDict) -> NodeState | None:
        """Return the state kept in a context, ``None`` at the first message."""
        if "node" not in state:
            return None
        head = json.loads(text(config(state, "node"), "json"))
        return cls(own=decode_memory(arrays(state, "own")), **head)

    def write(self, state: RecordDict) -> None:
        """Keep this state in a context."""
        head = {k: v for k, v in vars(self).items() if k != "own"}
        state["node"] = config_record(json=json.dumps(head))
        state["own"] = encode_memory(self.own)


@dataclass
class Node:
    """A briefed node, ready to answer.

    Attributes:
        name: Its name as a contributor.
        number: Its place in a simulation, from 0.
        state: What it keeps.
        encoder: The frozen embedding.
    """

    name: str
    number: int
    state: NodeState
    encoder: Encoder

    @property
    def field(self) -> Field:
        """The part of the world that this node's simulation opened."""
        return open_field(self.state.settings["field"])

    def learn(self, round_: int, acknowledged: int) -> None:
        """Add what the node met up to this round and has not learned yet, each mission once.

        A node that lost its state learns everything again; its versions then go on from the one
        that the server acknowledged, so that its rows replace the old ones.
        """
        state = self.state
        missing = range(state.round + 1, round_ + 1)
        met = [self.field.evidence(self.number, number, self.encoder) for number in missing]
        state.round = max(state.round, round_)
        labels = [label for _, part in met for label in part]
        if not labels:
            return
        delta = state.own.observe(torch.cat([embeddings for embeddings, _ in met]), labels)
        state.version = max(state.version, acknowledged) + 1
        state.own = state.own + delta
        state.changed.update(dict.fromkeys(delta.classes, state.version))

    def contribution(self, acknowledged: int) -> Contribution | None:
        """Return the own rows that changed since the acknowledged version, if any."""
        fresh = [name for name, at in self.state.changed.items() if at > acknowledged]
        if not fresh:
            return None
        own = self.state.own
        index = own.rows(fresh)
        # Shared second moments are those of all of a node's examples, whichever rows travel.
        outer = own.outer
        return Contribution(
            contributor=self.name,
            version=self.state.version,
            embedding_id=own.embedding_id,
            classes=tuple(fresh),
            counts=own.counts[index],
            sums=own.sums[index],
            moments=own.moments,
            outer=outer[index] if outer is not None and outer.ndim == 3 else outer,
        )


def open_node(content: RecordDict, context: Context) -> Node | None:
    """Return the node that a message is for, ``None`` where it must be briefed (again).

    Raises:
        FederationError: The SuperNode's configuration does not say which node this is.
    """
    if "partition-id" not in context.node_config:
        raise FederationError(
            "This node does not know which one it is: its configuration has no partition-id.",
            remedy="Start the SuperNode with --node-config 'partition-id=0 num-partitions=2'.",
        )
    number = int(context.node_config["partition-id"])
    session = text(config(content, "round"), "session")
    state = NodeState.read(context.state)
    if state is not None and state.session != session:
        state = None
    if "briefing" in content:
        fresh = _briefed(content, session)
        # A briefing is repeated when the reply to the first one was lost; nothing is unlearned.
        state = fresh if state is None else state
    if state is None:
        return None
    encoder = _encoder(state.embedding_id, Path(state.settings["cache_dir"]))
    if encoder is None:
        return None
    name = str(context.node_config.get("name", f"node-{number}"))
    return Node(name, number, state, encoder)


def _briefed(content: RecordDict, session: str) -> NodeState:
    head = config(content, "briefing")
    settings, identity = json.loads(text(head, "settings")), text(head, "embedding")
    if identity not in _encoders:
        encoder = Encoder.from_bytes(array(arrays(content, "encoder"), "encoder").numpy().tobytes())
        encoder.save(_path(identity, Path(settings["cache_dir"])))
        _encoders[identity] = encoder
    own = PrototypeMemory.empty(_encoders[identity].dim, identity, settings["moments"])
    return NodeState(session, settings, identity, 0, 0, own)


def _encoder(identity: str, cache_dir: Path) -> Encoder | None:
    """Return an encoder that an earlier message of this or another process brought."""
    if identity not in _encoders and (path := _path(identity, cache_dir)).is_file():
        _encoders[identity] = Encoder.load(path)
    return _encoders.get(identity)


def _path(identity: str, cache_dir: Path) -> Path:
    return cache_dir / "encoders" / f"{identity}.safetensors"
