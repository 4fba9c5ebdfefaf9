"""Who sends a request to the server: headers signed with a node's key, as Flower signs them.

A SuperNode sends its public key, the time, and that time signed with its private key. The SuperLink
takes such a signature for about five minutes, and so do we.
"""

from __future__ import annotations

import logging
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import (
    public_key_to_bytes,
    sign_message,
    verify_signature,
)

logger = logging.getLogger(__name__)

# File systems note times in steps of up to a few milliseconds.
_TICK = 100_000_000  # ns


class Refused(Exception):
    """A request that is not carried out.

    Args:
        status: Of the answer in HTTP.
        reason: For a person at the node.
        known: Whether the key is that of an invited node.
    """

    def __init__(self, status: int, reason: str, *, known: bool = True) -> None:
        super().__init__(reason)
        self.status, self.known = status, known


class Claim(NamedTuple):
    """Who somebody says to be: a public key in PEM form, a time in ISO form, and its signature."""

    key: bytes
    time: str
    signature: bytes


class Keys:
    """The public keys of a folder, one ``NAME.pub`` a node, as it is at the moment.

    Args:
        folder: Files may come and go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed: int | None = None
        self._nodes: dict[bytes, tuple[str, ec.EllipticCurvePublicKey]] = {}

    def check(self, claim: Claim) -> str:
        """Return the name of the node that has signed.

        Raises:
            Refused: The key is none of the folder's (403), or the signature is not its own or not
                of about now (401); 503 where the folder cannot be read.
        """
        self._refresh()
        found = self._nodes.get(claim.key)
        if found is None:
            raise Refused(403, "Expected the key of an invited node, got another one.", known=False)
        name, key = found
        age = _age(claim.time)
        if age is None or not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE:
            raise Refused(
                401,
                f"Expected a request signed within {SYSTEM_TIME_TOLERANCE} s after and "
                f"{TIMESTAMP_TOLERANCE} s before the time of the server, {_clock()}, got one "
                f"signed at {claim.time[:40]!r}: set the clock of {name!r}.",
            )
        if not verify_signature(key, claim.time.encode(), claim.signature):
            raise Refused(401, "Expected the time signed with the key, got another signature.")
        return name

    def _refresh(self) -> None:
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed == self._changed:
                return
            settled = time.time_ns() - changed > _TICK
            self._nodes = {
                public_key_to_bytes(key): (path.stem, key)
                for path in self._folder.glob("*.pub")
                if (key := _read(path)) is not None
            }
        except OSError as error:
            raise Refused(503, f"The server cannot read its keys: {error.strerror}.") from error
        # A change within the same step would not show, so that is looked at again.
        self._changed = changed if settled else None


def claim(headers: Sequence[tuple[bytes, bytes]]) -> Claim:
    """Take the claim out of a request's headers, whose names are in lower case.

    Raises:
        Refused: One is missing, repeated or malformed.
    """
    try:
        return Claim(
            b64decode(_only(headers, FLEET_HTTP_PUBLIC_KEY_HEADER), validate=True),
            _only(headers, TIMESTAMP_HEADER).decode("ascii"),
            b64decode(_only(headers, FLEET_HTTP_SIGNATURE_HEADER), validate=True),
        )
    except ValueError:
        raise Refused(
            401, "Expected a request signed with the key of a node, got another one.", known=False
        ) from None


def signed(private: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Return headers that hold a claim made now."""
    moment = now().isoformat()
    signature = sign_message(private, moment.encode("ascii"))
    public = public_key_to_bytes(private.public_key())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode("ascii"),
        TIMESTAMP_HEADER: moment,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
    }


def _only(headers: Sequence[tuple[bytes, bytes]], name: str) -> bytes:
    # One that is repeated could mean one thing here and another at the SuperLink.
    (value,) = (value for key, value in headers if key == name.encode("ascii"))
    return value


def _age(moment: str) -> float | None:
    """Seconds since a time in ISO form; None where it is none or has no time zone."""
    try:
        return (now() - datetime.fromisoformat(moment)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def _clock() -> str:
    return f"{now():%Y-%m-%d %H:%M:%S} UTC"


def _read(path: Path) -> ec.EllipticCurvePublicKey | None:
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except FileNotFoundError:  # deleted just now
        return None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        logger.warning("%s is no public key of a node; nobody enters with it.", path)
        return None
    return key
