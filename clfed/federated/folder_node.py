"""A real node: a folder of pictures that grows and shrinks, and a small directory of state.

At each round the node learns what is new in ``FOLDER/CLASS/*.png`` and takes back what has gone.
Its statistics are a function of what the folder holds now, less what was forgotten on request. So
the state directory may be deleted (everything is embedded again) or restored from an older copy:
the server sees that the rows it holds are not those of the state, briefs the node anew with all
requests to forget, and gets one complete message. The directory holds

==================  =========================================================================
node.safetensors    version, content hashes, embeddings by hash, requests carried out
encoders/           the frozen embedding
bundle.safetensors  embedding and merged memory, for ``clfed predict``
certificates/       one file for each request to forget that was carried out here
outbox/             requests to forget that wait for the next round
==================  =========================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError, safe_open

from clfed.backbones import Encoder
from clfed.errors import EmbeddingMismatch, FederationError
from clfed.federated.bundle import BUNDLE, Bundle
from clfed.federated.certificates import certify_node
from clfed.federated.folder_state import STATE, FolderState, read_state
from clfed.federated.forgetting import CarriedOut, carried_out, is_done, sendable
from clfed.federated.node import Node, brief
from clfed.federated.outbox import settle, waiting
from clfed.federated.pictures import Album
from clfed.federated.records import config, config_record, integer, text
from clfed.federated.wire import decode_memory
from clfed.files import write_file
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.contribution import check_contributor
from clfed.unlearning.requests import Request


class FolderNode(Node):
    """A node with a folder of pictures.

    Args:
        name: Its name as a contributor.
        folder: ``FOLDER/CLASS/*.png``.
        directory: Its state directory.
        encoder: The frozen embedding.
        state: What lasted.
    """

    def __init__(
        self, name: str, folder: Path, directory: Path, encoder: Encoder, state: FolderState
    ) -> None:
        self.name, self.folder, self.directory = name, folder, directory
        self.encoder, self.state = encoder, replace(state, name=name)
        self.own, self.version = state.own, state.version
        self._album = state.album
        self._asked: list[Request] = []
        self._carried: list[CarriedOut] = []

    @classmethod
    def open(cls, content: RecordDict, node_config: Mapping[str, Any]) -> FolderNode | None:
        """Return the node that a message is for, ``None`` where it must be briefed (again).

        Raises:
            FederationError: The configuration lacks a name or a state directory.
            EmbeddingMismatch: The server uses another encoder than the node was invited for.
            InvalidMessage: The state file is damaged.
        """
        name, folder, directory = _places(node_config)
        check_contributor(name)
        head = config(content, "round")
        session = text(head, "session")
        state = read_state(directory)
        if state is not None and state.session != session:
            raise EmbeddingMismatch(
                f"{directory} holds the state of another federation than the one that calls.",
                remedy="Give every federation that a machine takes part in a state directory of "
                "its own: clfed join --state DIR.",
            )
        briefed = "briefing" in content
        # A state that is older than what the server has seen of it may lack requests to forget,
        # which come again with a briefing.
        behind = state is None or (
            state.version < integer(head, "acknowledged")
            or len(state.confirmed) < integer(head, "confirmed")
        )
        if behind and not briefed:
            return None
        identity = (
            text(config(content, "briefing"), "embedding") if state is None else state.embedding_id
        )
        pinned = str(node_config.get("embedding", identity))
        if identity != pinned:
            raise EmbeddingMismatch(
                f"This node was invited for the embedding {pinned[:12]!r}, but the server uses "
                f"{identity[:12]!r}.",
                remedy="Ask the operator of the server for a new invitation.",
            )
        encoder = brief(content, identity, directory / "encoders")
        if encoder is None:
            if "encoder" in content:
                raise EmbeddingMismatch(
                    f"The server announced the embedding {identity[:12]!r} and sent another one."
                )
            return None
        if state is None:
            state = _fresh(content, name, session, encoder)
        return cls(name, folder, directory, encoder, state)

    def look(self, head: ConfigRecord) -> PrototypeMemory:
        """Carry out requests to forget, learn new pictures, take back those that have gone."""
        self._asked = [Request.parse(part) for part in json.loads(text(head, "forget"))]
        state = self.state
        new = [request for request in self._asked if not is_done(state, request)]
        nothing = Album(state.album.embeddings[:0])
        # Who is forgotten as a whole need not have the folder any more.
        leaves = state.forgotten or self.name in {request.contributor for request in new}
        seen = nothing if leaves else state.album.scan(self.folder)
        for request in new:
            state, carried = carried_out(state, request, seen)
            self._carried.append(carried)
        zero = PrototypeMemory.empty(self.encoder.dim, self.encoder.embedding_id, state.moments)
        if state.forgotten:
            self.state = replace(state, album=nothing)
            return zero
        album = seen.without(state.retired, state.erased)
        for known in album.embed(self.folder, self.encoder):
            album = known
            if len(known.hashes) != len(state.album.hashes):  # a kill must not cost all of it
                self._save(replace(self.state, album=known))
        self.state = replace(state, album=album)
        embeddings, labels = album.live()
        return zero.observe(embeddings, labels)

    def keep(self, memory: ArrayRecord, round_: int) -> str:
        """Write the bundle of encoder and merged memory, where it is another one."""
        merged = decode_memory(memory)
        state = self.state
        bundle = Bundle(self.encoder, merged, state.threshold, state.federation, round_)
        path = self.directory / BUNDLE
        data = bundle.to_bytes()
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data)
        return merged.sha256()

    def write(self) -> None:
        """Write certificates of what was carried out, then the state file, each all or none."""
        before = self.state.own
        self.state = replace(self.state, own=self.own, version=self.version)
        for carried in self._carried:
            certify_node(
                self.directory,
                carried,
                federation=self.state.session,
                rows=(before, self.own),
                folder=(self._album, self.state.album),
            )
        self._save(self.state)
        settle(self.directory, self._asked, self.state.confirmed)

    def status(self) -> ConfigRecord:
        """Return who this is, what was forgotten, and what else the server may want to know."""
        outbox = sendable(request for _, request in waiting(self.directory))
        return config_record(
            contributor=self.name,
            confirmed=json.dumps({r.id: self.state.confirmed[r.id] for r in self._asked}),
            requests=json.dumps([request.plain() for request in outbox]),
            pictures=len(self.state.album.files),
            unreadable=len(self.state.album.unreadable),
            holds=held_memory(self.directory),
        )

    def _save(self, state: FolderState) -> None:
        write_file(self.directory / STATE, state.to_bytes())


def held_memory(directory: Path) -> str:
    """Return the digest of the merged memory in a node's bundle, "none" where there is no bundle.

    A bundle may be older than the state beside it, or damaged; then the server sends another one.
    """
    try:
        with safe_open(directory / BUNDLE, "pt") as bundle:
            return hashlib.sha256(bundle.get_tensor("memory").numpy().tobytes()).hexdigest()
    except (FileNotFoundError, SafetensorError):
        return "none"  # Flower cannot measure an empty text


def _places(node_config: Mapping[str, Any]) -> tuple[str, Path, Path]:
    try:
        name, folder, directory = (node_config[key] for key in ("name", "folder", "state-dir"))
    except KeyError as error:
        raise FederationError(
            f"Expected name, folder and state-dir in the node's configuration, got none for "
            f"{error}.",
            remedy='Use clfed join, or --node-config \'name="lodge" folder="PATH" '
            'state-dir="PATH"\'.',
        ) from None
    directory = Path(str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    return str(name), Path(str(folder)), directory


def _fresh(content: RecordDict, name: str, session: str, encoder: Encoder) -> FolderState:
    settings = json.loads(text(config(content, "briefing"), "settings"))
    own = PrototypeMemory.empty(encoder.dim, encoder.embedding_id, settings["moments"])
    return FolderState(
        name=name,
        session=session,
        federation=settings["federation"],
        embedding_id=encoder.embedding_id,
        moments=settings["moments"],
        threshold=settings.get("threshold"),
        version=0,
        own=own,
        album=Album(torch.zeros(0, encoder.dim)),
    )
