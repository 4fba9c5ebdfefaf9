"""The one file that a machine needs to become a node of a federation."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from clfed import __version__
from clfed.deploy.address import parse_address
from clfed.deploy.certificates import check_authority
from clfed.deploy.keys import public_key_of, write_secret
from clfed.errors import ClfedError, InvalidMessage, MissingData, VersionMismatch

SCHEMA = 1
_LIMIT = 2**16  # bytes; a real one has some 2,000
_NEW = "Ask the operator for a new invitation: clfed invite DIR NAME."


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """Whom to trust, where to connect and who one is; whoever holds it is that node.

    Attributes:
        federation: Identity of the federation, 32 hexadecimal digits.
        name: Of the node, as the ledger will know it.
        address: Of the server, ``host:port``.
        authority: Certificate of the federation's authority, PEM.
        key: Private key of the node in OpenSSH's form; not shown when the object is printed.
        embedding: Identity of the embedding that all nodes share.
        clfed: Version of the program that made it.
        schema: Version of this form.

    Raises:
        InvalidMessage: A value is of another type or does not fit.
        ConfigError: The address is none.
    """

    federation: str
    name: str
    address: str
    authority: str
    key: str = field(repr=False)
    embedding: str
    clfed: str = __version__
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        from clfed.prototypes.contribution import check_contributor
        from clfed.prototypes.tables import checked_names

        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise _unfit(name, "text", value)
        if type(self.schema) is not int or self.schema != SCHEMA:
            raise _unfit("schema", str(SCHEMA), self.schema)
        if len(self.federation) != 32 or not set(self.federation) <= set("0123456789abcdef"):
            raise _unfit("federation", "32 hexadecimal digits", self.federation)
        check_contributor(self.name)
        parse_address(self.address)
        check_authority(_bytes("authority", self.authority))
        public_key_of(_bytes("key", self.key))
        checked_names([self.embedding], "embedding identity")
        checked_names([self.clfed], "version")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new file that only its owner can read, all or none.

        Raises:
            RunFolderError: The file exists or cannot be written.
        """
        content = asdict(self)
        write_secret(Path(path), _canonical(content | {"digest": _digest(content)}))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Invitation:
        """Read what :meth:`save` wrote, believing nothing.

        Raises:
            MissingData: There is no file, or it may not be read.
            InvalidMessage: The file is no invitation, or was changed.
            VersionMismatch: It has a newer schema.
        """
        content = _parsed(path)
        schema = content.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise VersionMismatch(
                f"Expected an invitation of schema {SCHEMA} in {path}, got one of schema {schema}, "
                f"which a newer clfed than {__version__} made.",
                remedy="Install the version of clfed that the server has.",
            )
        digest = content.pop("digest", None)
        if content.keys() != {entry.name for entry in fields(cls)} or digest != _digest(content):
            raise _damaged(path, "one with entries that were changed, added or left out")
        try:
            return cls(**content)
        except ClfedError as error:
            raise _damaged(path, f"one with a flaw: {error}") from error

    def check_version(self) -> None:
        """Refuse to go on with another version than the one that made the invitation.

        Raises:
            VersionMismatch: Names both versions.
        """
        if self.clfed != __version__:
            raise VersionMismatch(
                f"Expected clfed {self.clfed}, which the server had when it invited this node, got "
                f"{__version__} on this machine."
            )


_TEXTS = [entry.name for entry in fields(Invitation) if entry.name != "schema"]


def _parsed(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise MissingData(
            f"Expected an invitation at {path}, got: {error.strerror}.",
            remedy="Give the path of the file that clfed invite has made.",
        ) from error
    if len(data) > _LIMIT:
        raise _damaged(path, f"more than {_LIMIT} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{len(data)} bytes of something else") from error
    if not isinstance(content, dict):
        raise _damaged(path, reprlib.repr(content))
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    # Escapes keep the file ASCII, which mail and old editors leave alone.
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii")


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 in hexadecimal: a flipped bit of the key would look like a node nobody invited."""
    return hashlib.sha256(_canonical(content)).hexdigest()


def _bytes(name: str, text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as error:
        raise _unfit(name, "ASCII", text) from error


def _unfit(name: str, expected: str, got: object) -> InvalidMessage:
    shown = "something else" if name == "key" else reprlib.repr(got)  # keys stay out of logs
    return InvalidMessage(
        f"Expected {expected} as {name} of an invitation, got {shown}.", remedy=_NEW
    )


def _damaged(path: str | os.PathLike[str], got: str) -> InvalidMessage:
    return InvalidMessage(f"Expected an undamaged invitation at {path}, got {got}.", remedy=_NEW)
