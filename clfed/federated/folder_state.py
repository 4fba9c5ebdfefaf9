"""What lasts of a real node: one small file, read as a whole and written all or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from clfed.errors import FederationError, InvalidMessage, MissingData
from clfed.federated.pictures import Album
from clfed.files import read_file
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.storage import pack, unpack

STATE = "node.safetensors"
_KIND = "node state"


@dataclass(frozen=True)
class FolderState:
    """What lasts between rounds.

    Attributes:
        name: The node's name as a contributor.
        session: Identity of the federation that this state belongs to.
        federation: Its name.
        embedding_id: Identity of its encoder.
        moments: Which second moments the federation keeps.
        threshold: Least score of a known picture, for the bundle; None: nothing is unknown.
        version: Number of the last message made.
        own: The rows of the last message.
        album: What the folder held.
        retired: Classes that were forgotten on request.
        erased: Contents that were forgotten on request.
        forgotten: Whether the whole contributor was.
        confirmed: Ids of all requests that were carried out here, with the examples that each
            removed.
    """

    name: str
    session: str
    federation: str
    embedding_id: str
    moments: Any
    threshold: float | None
    version: int
    own: PrototypeMemory
    album: Album
    retired: frozenset[str] = frozenset()
    erased: frozenset[str] = frozenset()
    forgotten: bool = False
    confirmed: Mapping[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes of the state file."""
        own = torch.frombuffer(bytearray(self.own.to_bytes()), dtype=torch.uint8)
        header = {
            "name": self.name,
            "session": self.session,
            "federation": self.federation,
            "embedding_id": self.embedding_id,
            "moments": self.moments,
            "threshold": self.threshold,
            "version": self.version,
            "hashes": self.album.hashes,
            "files": self.album.files,
            "labels": self.album.labels,
            "unreadable": sorted(self.album.unreadable),
            "retired": sorted(self.retired),
            "erased": sorted(self.erased),
            "forgotten": self.forgotten,
            "confirmed": self.confirmed,
        }
        return pack({"embeddings": self.album.embeddings, "own": own}, _KIND, header)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> FolderState:
        """Inverse of :meth:`to_bytes`.

        Raises:
            InvalidMessage: Damaged, or of another schema; names ``source``.
        """
        tensors, head = unpack(data, _KIND, source)
        try:
            files = {place: (int(s), int(t), str(h)) for place, (s, t, h) in head["files"].items()}
            album = Album(
                tensors["embeddings"],
                tuple(head["hashes"]),
                files,
                head["labels"],
                frozenset(head["unreadable"]),
            )
            if len(album.hashes) != len(album.embeddings) or files.keys() != album.labels.keys():
                raise InvalidMessage(f"expected one embedding for each content in {source}")
            return cls(
                name=head["name"],
                session=head["session"],
                federation=head["federation"],
                embedding_id=head["embedding_id"],
                moments=head["moments"],
                threshold=head["threshold"],
                version=int(head["version"]),
                own=PrototypeMemory.from_bytes(tensors["own"].numpy().tobytes(), source),
                album=album,
                retired=frozenset(head["retired"]),
                erased=frozenset(head["erased"]),
                forgotten=bool(head["forgotten"]),
                confirmed=dict(head["confirmed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidMessage(f"expected a complete {_KIND} in {source}: {error!r}") from error


def read_state(directory: Path) -> FolderState | None:
    """Return what lasted in a state directory, ``None`` where nothing did.

    Raises:
        InvalidMessage: The file is damaged.
    """
    try:
        return FolderState.from_bytes(read_file(directory / STATE), str(directory / STATE))
    except MissingData:
        return None


def hold(directory: Path) -> FileLock:
    """Take hold of a state directory, as at most one process may.

    Raises:
        FederationError: Another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FederationError(
            f"Expected {directory} for this node alone, but another process uses it.",
            remedy="Stop the other clfed join, or give this one a --state of its own.",
        ) from None
    return lock
