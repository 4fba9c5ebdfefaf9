"""One node: what it remembers between rounds, and how it answers a round.

A node's lasting state is its own cumulative statistics and a version number; no image. That of a
simulated node, which is here, lives in Flower's ``Context.state``; that of a real one in a
directory of its own (:mod:`clfed.federated.folder_node`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from clfed.backbones import Encoder
from clfed.errors import FederationError
from clfed.federated.field import Field, open_field
from clfed.federated.records import array, arrays, blob, config, config_record, integer, text
from clfed.federated.wire import decode_memory, encode_memory
from clfed.privacy.minimum_count import held_back
from clfed.privacy.sensitivity import clip
from clfed.prototypes import Contribution, PrototypeMemory, compress, expand

_encoders: dict[str, Encoder] = {}


def briefing(
    settings: Mapping[str, Any], encoder: Encoder
) -> dict[str, ArrayRecord | ConfigRecord]:
    """Return the records that a node needs once: settings and encoder.

    Args:
        settings: ``moments``; of a simulation ``field`` (see
            :func:`clfed.federated.field.field_settings`), ``cache_dir``, ``privacy`` (see
            :meth:`clfed.federated.channels.Channel.settings`), and whatever further strategies
            need; JSON values.
        encoder: The frozen embedding.
    """
    _encoders[encoder.embedding_id] = encoder
    head = config_record(
        settings=json.dumps(settings, sort_keys=True), embedding=encoder.embedding_id
    )
    weights = np.frombuffer(encoder.to_bytes(), np.uint8)
    return {"briefing": head, "encoder": ArrayRecord({"encoder": Array(weights)})}


class Node(ABC):
    """A briefed node, ready to answer.

    Attributes:
        name: Its name as a contributor.
        encoder: The frozen embedding.
        own: Its own cumulative statistics, as far as it has told them.
        version: Number of messages that it has made so far.
    """

    name: str
    encoder: Encoder
    own: PrototypeMemory
    version: int

    @abstractmethod
    def look(self, head: ConfigRecord) -> PrototypeMemory:
        """Return what the node's own statistics are by now.

        Args:
            head: The record ``round`` of the request.
        """

    @abstractmethod
    def keep(self, memory: ArrayRecord, round_: int) -> str:
        """Keep the merged memory that the server sent in a round, and return its digest."""

    @abstractmethod
    def write(self) -> None:
        """Make the state last, before anything that builds on it is sent."""

    def status(self) -> ConfigRecord:
        """Return the record ``status`` of a reply."""
        return config_record(contributor=self.name)

    def answer(self, head: ConfigRecord) -> Contribution | None:
        """Learn what is new and return the rows that the server does not have yet, if any.

        Usually these are the rows that changed since the last message. Where the server has
        something else than this node last sent, because a message or the node's state was lost,
        they are all rows, in a complete message.

        Args:
            head: The record ``round`` of the request, with the version that the server
                ``acknowledged``, the digest of the rows that it has (``held``), in how many
                ``bits`` an entry shall travel (0: all), and, where rows wait, by how many examples
                one has to change at ``least``.
        """
        bits, held = integer(head, "bits"), blob(head, "held")
        before, seen = self.own, self.look(head)
        self.own = held_back(before, seen, integer(head, "least")) if "least" in head else seen
        was, now = sendable(before, bits), sendable(self.own, bits)
        if digest(now) == held:
            return None
        self.version = max(self.version, integer(head, "acknowledged")) + 1
        if digest(was) == held:
            return Contribution.between(self.name, self.version, was, now)
        return Contribution.of(self.name, self.version, now, complete=True)


def sendable(memory: PrototypeMemory, bits: int) -> PrototypeMemory:
    """Return what the receiver of a memory will have of it.

    Rounding is that of :mod:`clfed.prototypes.compression`.

    Args:
        memory: A node's own statistics, which stay exact.
        bits: Of an entry on the way; 0 for lossless messages.

    Raises:
        ConfigError: Another number of bits than 0, 4, 8 or 16.
        UnsupportedStatistics: Second moments cannot be rounded.
    """
    return expand(compress(memory, bits)) if bits else memory


def digest(memory: PrototypeMemory) -> bytes:
    """The SHA-256 of a memory as 32 bytes, as it travels."""
    return bytes.fromhex(memory.sha256())


@dataclass
class MissionNode(Node):
    """A simulated node.

    Attributes:
        number: Its place in the simulation, from 0.
        session: The federation that its state belongs to.
        settings: The briefing's settings.
        round: The last round whose mission was learned, so that a repeated request adds nothing.
        met: Statistics of everything that it has met; more than ``own`` where something waits.
        kept: Flower's state, in which all this lasts.
    """

    name: str
    number: int
    encoder: Encoder
    session: str
    settings: dict[str, Any]
    round: int
    version: int
    own: PrototypeMemory
    met: PrototypeMemory
    kept: RecordDict

    @property
    def field(self) -> Field:
        """The part of the world that this node's simulation opened."""
        return open_field(self.settings["field"])

    @property
    def privacy(self) -> dict[str, Any]:
        """The briefing's settings of what the node tells and how."""
        found: dict[str, Any] = self.settings.get("privacy", {})
        return found

    def look(self, head: ConfigRecord) -> PrototypeMemory:
        """Add what the node met up to this round and has not learned yet, each mission once."""
        round_ = integer(head, "round")
        missing = range(self.round + 1, round_ + 1)
        met = [self.field.evidence(self.number, number, self.encoder) for number in missing]
        self.round = max(self.round, round_)
        labels = [label for _, part in met for label in part]
        if labels:
            embeddings, norm = torch.cat([z for z, _ in met]), self.privacy.get("clip_norm")
            if norm is not None:
                centre = self.privacy.get("centre")
                embeddings = clip(
                    embeddings, norm, None if centre is None else torch.tensor(centre)
                )
            self.met = self.met + self.met.observe(embeddings, labels)
        return self.met

    def keep(self, memory: ArrayRecord, round_: int) -> str:
        """Keep the merged memory in Flower's state."""
        self.kept["merged"] = memory
        return decode_memory(memory).sha256()

    def write(self) -> None:
        """Put the state into Flower's."""
        head = {
            "session": self.session,
            "settings": self.settings,
            "embedding": self.encoder.embedding_id,
            "round": self.round,
            "version": self.version,
        }
        self.kept["node"] = config_record(json=json.dumps(head))
        self.kept["own"] = encode_memory(self.own)
        if self.met != self.own:
            self.kept["met"] = encode_memory(self.met)
        elif "met" in self.kept:
            del self.kept["met"]

    @classmethod
    def open(cls, content: RecordDict, context: Context) -> MissionNode | None:
        """Return the simulated node that a message is for, ``None`` where it must be briefed."""
        number = int(context.node_config["partition-id"])
        name = str(context.node_config.get("name", f"node-{number}"))
        session = text(config(content, "round"), "session")
        state = context.state
        head = json.loads(text(config(state, "node"), "json")) if "node" in state else None
        if head is not None and head["session"] == session:
            settings, identity = head["settings"], head["embedding"]
            round_, version, own = (
                head["round"],
                head["version"],
                decode_memory(arrays(state, "own")),
            )
        elif "briefing" in content:
            record = config(content, "briefing")
            settings, identity = json.loads(text(record, "settings")), text(record, "embedding")
            round_, version, own = 0, 0, None
        else:
            return None
        # A briefing is repeated when the reply to the first one was lost; nothing is unlearned.
        encoder = brief(content, identity, Path(settings["cache_dir"]) / "encoders")
        if encoder is None:
            return None
        if "local" in content:
            settings["local"] = json.loads(text(config(content, "local"), "json"))
        if own is None:
            own = met = PrototypeMemory.empty(encoder.dim, identity, settings["moments"])
        else:
            met = decode_memory(arrays(state, "met")) if "met" in state else own
        return cls(name, number, encoder, session, settings, round_, version, own, met, state)


def open_node(content: RecordDict, context: Context) -> Node | None:
    """Return the node that a message is for, ``None`` where it must be briefed (again).

    Raises:
        FederationError: The SuperNode's configuration does not say which node this is.
    """
    if "folder" in context.node_config:
        from clfed.federated.folder_node import FolderNode

        return FolderNode.open(content, context.node_config)
    if "partition-id" not in context.node_config:
        raise FederationError(
            "This node does not know which one it is: its configuration has no partition-id and "
            "no folder.",
            remedy="Start the SuperNode with --node-config 'partition-id=0 num-partitions=2', or "
            'for pictures with --node-config \'name="lodge" folder="PATH" state-dir="PATH"\'.',
        )
    return MissionNode.open(content, context)


def brief(content: RecordDict, identity: str, folder: Path) -> Encoder | None:
    """Return an encoder that this message, an earlier one or another process brought, if any.

    Args:
        content: The message; its record ``encoder`` is used where it is there and needed.
        identity: The encoder that is asked for.
        folder: Where encoders are kept as files.

    Raises:
        EncoderError: The message or the file holds something else.
    """
    path = folder / f"{identity}.safetensors"
    if identity not in _encoders:
        if "encoder" in content:
            brought = array(arrays(content, "encoder"), "encoder").numpy().tobytes()
            encoder = Encoder.from_bytes(brought)
            encoder.save(path)
            _encoders[encoder.embedding_id] = encoder
        elif path.is_file():
            _encoders[identity] = Encoder.load(path)
    return _encoders.get(identity)
