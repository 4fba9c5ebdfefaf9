"""Ed25519 signatures under certificates (RFC 8032), with keys in PEM files.

A pair of keys is made by ``openssl genpkey -algorithm ed25519 -out key.pem`` and
``openssl pkey -in key.pem -pubout -out public.pem``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clfed.errors import CertificateError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# No signature of something else can be taken for one of a certificate.
_CONTEXT = b"clfed unlearning certificate\n"


class Signer:
    """Signs with a private key.

    Args:
        path: PEM file of an Ed25519 key without a passphrase.

    Raises:
        CertificateError: There is no such file, or it holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(Path(path).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise _refused(path, "private") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise _refused(path, "private")
        self._key: Ed25519PrivateKey = key

    @property
    def public_key(self) -> str:
        """The 32 bytes that verify, in hexadecimal."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, digest: str) -> str:
        """Return the signature of a digest, both in hexadecimal."""
        return self._key.sign(_CONTEXT + digest.encode()).hex()


def read_public_key(path: str | os.PathLike[str]) -> str:
    """Return a public key in hexadecimal.

    Args:
        path: PEM file of an Ed25519 public key.

    Raises:
        CertificateError: There is no such file, or it holds something else.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise _refused(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _refused(path, "public")
    return key.public_bytes_raw().hex()


def is_signed(digest: str, signature: str, public_key: str) -> bool:
    """Whether a signature is one of this digest by this key, all in hexadecimal."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), _CONTEXT + digest.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _refused(path: str | os.PathLike[str], kind: str) -> CertificateError:
    return CertificateError(
        f"Expected an Ed25519 {kind} key in PEM form at {path}, got none.",
        remedy="Make one with: openssl genpkey -algorithm ed25519 -out key.pem (and, for others to "
        "verify with: openssl pkey -in key.pem -pubout -out public.pem).",
    )
