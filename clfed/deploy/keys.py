"""Certificates of a federation and keys of its nodes, as files.

A federation is its own certificate authority: nobody else is asked, and nodes trust nobody else.
All keys are on the curve P-384, one of the NIST curves that Flower accepts of nodes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clfed.deploy.address import parse_host
from clfed.deploy.certificates import authority_certificate, read_certificate, server_certificate
from clfed.errors import (
    ConfigError,
    ExpiredCertificate,
    InvalidMessage,
    MissingData,
    RunFolderError,
)
from clfed.files import write_file

AUTHORITY_KEY, AUTHORITY = "ca.key", "ca.pem"
SERVER_KEY, SERVER = "server.key", "server.pem"
_LOCAL = ("localhost", "127.0.0.1")
_LONGEST = 36_500  # days
_RESTORE = "Restore the federation folder from a backup, or create a new federation."


def make_authority(
    folder: Path, *, name: str, days: int = 3650, now: datetime | None = None
) -> None:
    """Write the key ``ca.key`` and the self-signed certificate ``ca.pem`` of a new authority.

    Args:
        folder: Exists; whoever can read ``ca.key`` there can pass for the server.
        name: Of the federation, for people to read: printable, 1 to 64 bytes in UTF-8.
        days: How long the authority is good for, from 1 to 36,500.
        now: Time of the issue with its time zone; the clock's when omitted.

    Raises:
        ConfigError: The name or the days do not fit.
        RunFolderError: One of the files exists or cannot be written.
    """
    if not name.isprintable() or not 1 <= len(name.encode()) <= 64:
        raise ConfigError(
            f"Expected a federation name of 1 to 64 bytes of printable text, got {name[:80]!r}.",
            remedy="Choose a shorter, plain name.",
        )
    start, end = _period(days, now)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = authority_certificate(key, name, start, end)
    _refuse_existing(folder / AUTHORITY_KEY, folder / AUTHORITY)
    write_file(folder / AUTHORITY_KEY, _private_pem(key), mode=0o600)
    write_file(folder / AUTHORITY, certificate)


def issue_server_certificate(
    folder: Path,
    hosts: Sequence[str],
    *,
    days: int = 825,
    now: datetime | None = None,
    renew: bool = False,
) -> None:
    """Write ``server.key`` and ``server.pem``, signed by the authority in the same folder.

    The certificate never outlives its authority.

    Args:
        folder: Where :func:`make_authority` wrote.
        hosts: Names and IP addresses under which nodes reach the server; this machine itself
            (``localhost``, ``127.0.0.1``) is always added.
        days: How long the certificate is good for, from 1 to 36,500.
        now: Time of the issue with its time zone; the clock's when omitted.
        renew: Keep the key that is there and replace the certificate.

    Raises:
        ConfigError: A host or the days do not fit.
        MissingData: A file of the authority, or the key to keep, is not there.
        InvalidMessage: One of them is damaged, or they do not belong together.
        ExpiredCertificate: The authority itself is not valid at that time.
        RunFolderError: One of the files exists (without ``renew``) or cannot be written.
    """
    if isinstance(hosts, str):
        raise ConfigError(
            f"Expected a sequence of hosts, got the text {hosts!r}.",
            remedy="Put the host into a list.",
        )
    names = [*dict.fromkeys([*map(parse_host, hosts), *_LOCAL])]
    start, end = _period(days, now)
    authority_key = _private_key(folder / AUTHORITY_KEY)
    authority = read_certificate(_read(folder / AUTHORITY), str(folder / AUTHORITY))
    if authority.public_key() != authority_key.public_key():
        raise InvalidMessage(
            f"Expected {AUTHORITY} in {folder} to certify {AUTHORITY_KEY}, got files of two "
            "different authorities.",
            remedy=_RESTORE,
        )
    first, last = authority.not_valid_before_utc, authority.not_valid_after_utc
    if not first <= start < last:
        raise ExpiredCertificate(
            f"Expected an authority in {folder} that is valid on {start:%Y-%m-%d}, got one for "
            f"{first:%Y-%m-%d} to {last:%Y-%m-%d}.",
            remedy="Set this machine's clock; if it is right, create a new federation.",
        )
    if renew:
        key = _private_key(folder / SERVER_KEY)
    else:
        _refuse_existing(folder / SERVER_KEY, folder / SERVER)
        key = ec.generate_private_key(ec.SECP384R1())
        write_file(folder / SERVER_KEY, _private_pem(key), mode=0o600)
    certificate = server_certificate(key.public_key(), names, authority, authority_key, start, end)
    write_file(folder / SERVER, certificate)


def node_key() -> tuple[bytes, bytes]:
    """Make a key pair for a node.

    Returns:
        The private key for ``flower-supernode --auth-supernode-private-key`` and the public key
        for ``flwr supernode register``, both in OpenSSH's form.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return private, _public_bytes(key)


def public_key_of(private: bytes) -> bytes:
    """Return the public key of a node's private key, both as :func:`node_key` makes them.

    Raises:
        InvalidMessage: No private key of an elliptic curve in OpenSSH's form without a passphrase.
    """
    try:
        key = serialization.load_ssh_private_key(private, password=None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise _no_node_key("one that cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no_node_key("one of another kind")
    return _public_bytes(key)


def days_left(pem: bytes) -> float:
    """Days until a certificate expires; negative when it has.

    Raises:
        InvalidMessage: Not exactly one certificate in PEM form.
    """
    end = read_certificate(pem, "the given text").not_valid_after_utc
    return (end - datetime.now(UTC)) / timedelta(days=1)


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that nobody but its owner can read, all or none.

    Raises:
        RunFolderError: The file exists or cannot be written.
    """
    _refuse_existing(path)
    write_file(path, data, mode=0o600)


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise RunFolderError(
                f"Expected no file at {path}, got one that exists; it is not overwritten.",
                remedy="Choose another place, or move the file away if nobody needs it.",
            )


def _period(days: int, now: datetime | None) -> tuple[datetime, datetime]:
    if type(days) is not int or not 1 <= days <= _LONGEST:
        raise ConfigError(
            f"Expected a validity of 1 to {_LONGEST} days, got {days!r}.",
            remedy="Give a number of days in that range.",
        )
    start = now or datetime.now(UTC)
    return start, start + timedelta(days=days)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _public_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingData(
            f"Expected to read {path}, got: {error.strerror}.",
            remedy="Give a federation folder that clfed create has made and that you may read.",
        ) from error


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no_key(path)
    return key


def _no_key(path: Path) -> InvalidMessage:
    return InvalidMessage(
        f"Expected an elliptic curve key in PEM form in {path}, got something else.",
        remedy=_RESTORE,
    )


def _no_node_key(got: str) -> InvalidMessage:
    return InvalidMessage(
        f"Expected a node's private key in OpenSSH's form, got {got}.",
        remedy="Ask the operator for a new invitation.",
    )
