"""A federation folder: everything that the server of real nodes owns.

====================  ======================================================================
federation.json       name, address, embedding and rules, fixed when the folder is made
encoder.safetensors   the frozen embedding that every node uses
ledger.db             who contributed what, rounds, refusals and requests to forget
bundle.safetensors    embedding and merged memory, for ``clfed predict``
ca.*, server.*        certificate authority and the server's certificate
nodes/NAME.pub        public key of each invited node
certificates/         one file for each request to forget that all nodes have confirmed
flower/               configuration, database and logs of Flower's SuperLink
====================  ======================================================================
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from clfed import __version__
from clfed.backbones import Encoder
from clfed.deploy.address import parse_address
from clfed.deploy.invitation import Invitation
from clfed.deploy.keys import AUTHORITY, issue_server_certificate, make_authority, node_key
from clfed.deploy.layout import (
    ENCODER,
    LEDGER,
    NODES,
    SETTINGS,
    SETTINGS_SCHEMA,
    read_settings,
)
from clfed.deploy.store import Store
from clfed.errors import InvalidMessage, RunFolderError
from clfed.federated.intake import Limits
from clfed.federated.node import sendable
from clfed.files import write_file
from clfed.prototypes import ContributorLedger, PrototypeMemory
from clfed.prototypes.contribution import DEFAULT_CAP, check_contributor
from clfed.prototypes.robust import robust_total
from clfed.prototypes.tables import Moments


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for all nodes.

    Attributes:
        moments: Second moments that every node sends, see
            :class:`~clfed.prototypes.PrototypeMemory`.
        cap: Largest number of examples of one class that a node may claim.
        limits: Of one message.
        robust: How the means of nodes that hold a class become one: ``"none"`` (the exact sum),
            ``"median"`` or ``"trimmed"``, see :func:`clfed.prototypes.robust.robust_total`.
        trim: Share that ``"trimmed"`` leaves out on each side.
        norm: Longest mean embedding that a node may send unshortened; None: any.
        message_bits: Bits of an entry of a sum on the way to the server; None: exact sums.
        threshold: Score below which a picture is of no known class; None: nothing is unknown.
    """

    moments: Moments = "none"
    cap: int = DEFAULT_CAP
    limits: Limits = field(default_factory=Limits)
    robust: str = "none"
    trim: float = 1 / 3
    norm: float | None = None
    message_bits: int | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The settings of a federation folder.

    Attributes:
        folder: Where it is.
        id: 32 hexadecimal digits, new for each federation.
        name: For people to read.
        address: ``host:port`` under which nodes reach the server.
        embedding: Identity of the encoder.
        rules: What holds for all nodes.
    """

    folder: Path
    id: str
    name: str
    address: str
    embedding: str
    rules: Rules

    @classmethod
    def create(
        cls, folder: Path, *, name: str, address: str, encoder: Encoder, rules: Rules
    ) -> Federation:
        """Make a new federation folder, with certificates.

        Raises:
            ConfigError: The name, the address or a rule does not fit.
            RunFolderError: The folder holds a federation already, or cannot be written.
        """
        host, _ = parse_address(address)
        rehearsal = ContributorLedger(1, "rehearsal", rules.moments, cap=rules.cap)
        robust_total(rehearsal, rules.robust, trim=rules.trim, norm=rules.norm)
        sendable(rehearsal.total, rules.message_bits or 0)
        cls.refuse_existing(folder)
        try:
            (folder / NODES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"Expected to write into {folder}, got: {error}.") from error
        federation = cls(
            folder=folder,
            id=uuid.uuid4().hex,
            name=name,
            address=address,
            embedding=encoder.embedding_id,
            rules=rules,
        )
        make_authority(folder, name=name)
        issue_server_certificate(folder, [host])
        encoder.save(folder / ENCODER)
        federation.store().close()
        # Last, so that a folder with settings is whole.
        write_file(folder / SETTINGS, federation._to_bytes())
        return federation

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Refuse a folder that holds a federation already.

        Raises:
            RunFolderError: It does.
        """
        if (folder / SETTINGS).exists():
            raise RunFolderError(
                f"{folder} holds a federation already.",
                remedy="Choose another folder, or go on with clfed invite and clfed serve.",
            )

    @classmethod
    def open(cls, folder: Path) -> Federation:
        """Read the settings of a folder.

        Raises:
            MissingData: It holds no federation.
            InvalidMessage: Its settings are damaged.
            VersionMismatch: Another version of clfed made it.
        """
        content = read_settings(folder)
        try:
            del content["clfed"]
            rules = content.pop("rules")
            limits = Limits(**rules.pop("limits"))
            return cls(folder=folder, rules=Rules(**rules, limits=limits), **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidMessage(
                f"Expected the rules of a federation in {folder / SETTINGS}, got something else: "
                f"{error}.",
                remedy="Restore the file from a backup.",
            ) from error

    def invite(self, name: str, path: Path) -> Invitation:
        """Make a key for a new node, note its public half, and write the invitation.

        Args:
            name: What the node is called as a contributor.
            path: A new file, for its owner's eyes alone.

        Raises:
            InvalidMessage: The name cannot be a contributor's or a file's.
            RunFolderError: A node of this name was invited already, or the file exists.
        """
        check_contributor(name)
        public = self.folder / NODES / f"{name}.pub"
        if public.parent != self.folder / NODES or name.startswith("."):
            raise InvalidMessage(f"Expected a node name that can be a file name, got {name!r}.")
        if public.exists():
            raise RunFolderError(
                f"A node {name!r} was invited already.",
                remedy=f"Choose another name, or delete {public} to invite it anew.",
            )
        private_key, public_key = node_key()
        invitation = Invitation(
            federation=self.id,
            name=name,
            address=self.address,
            authority=(self.folder / AUTHORITY).read_text(),
            key=private_key.decode(),
            embedding=self.embedding,
        )
        invitation.save(path)
        write_file(public, public_key)
        return invitation

    def public_keys(self) -> dict[str, Path]:
        """Return the public key file of each invited node."""
        return {path.stem: path for path in sorted((self.folder / NODES).glob("*.pub"))}

    def encoder(self) -> Encoder:
        """Read the embedding.

        Raises:
            EncoderError: The file is damaged or another one's.
        """
        return Encoder.load(self.folder / ENCODER)

    def store(self) -> Store:
        """Open the file that must not be lost."""
        return Store(self.folder / LEDGER)

    def empty(self, encoder: Encoder) -> PrototypeMemory:
        """Return the memory without a class that all statistics of this federation add to."""
        return PrototypeMemory.empty(encoder.dim, encoder.embedding_id, self.rules.moments)

    def _to_bytes(self) -> bytes:
        content: dict[str, Any] = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in ("folder", "rules")
        }
        content |= {"schema": SETTINGS_SCHEMA, "clfed": __version__, "rules": asdict(self.rules)}
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
