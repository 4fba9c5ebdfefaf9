"""The cryptography under secure aggregation: agreed keys, sealed messages, masks.

All of it is the ``cryptography`` package's: X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305
(RFC 7748, 5869 and 8439). Keys come from the operating system and not from the run's seed: who
knows a seed must not know a mask. No result depends on them, since all masks cancel exactly.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from clfed.errors import InvalidMessage
from clfed.privacy.terms import Words

KEY = 32  # bytes of every key, seed and digest
_NONCE = 12
SEAL = _NONCE + 16  # bytes that sealing adds: nonce and tag
_WORD = np.dtype("<u8")  # the same masks on machines of either byte order


def new_key() -> bytes:
    """Return 32 secret bytes, good as a private key and as a seed."""
    return os.urandom(KEY)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key, 32 bytes, of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def digest(*parts: bytes) -> bytes:
    """Return the SHA-256 of parts, each with its length: other cuts give another digest."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.digest()


def derive(secret: bytes, purpose: str, context: bytes) -> bytes:
    """Return a key, 32 bytes, for one purpose in one context.

    Args:
        secret: Input key material.
        purpose: What the key is for; two purposes never share a key.
        context: What both sides must agree on.
    """
    info = digest(purpose.encode(), context)
    return HKDF(algorithm=hashes.SHA256(), length=KEY, salt=None, info=info).derive(secret)


def agree(private: bytes, public: bytes, purpose: str, context: bytes) -> bytes:
    """Return the key that two parties share, the same from either side.

    Args:
        private: One's own X25519 key.
        public: The other's.
        purpose: As for :func:`derive`.
        context: As for :func:`derive`.

    Raises:
        InvalidMessage: The public key would give the same secret to everybody.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise InvalidMessage("Expected a public key on the curve, got a weak one.") from error
    return derive(secret, purpose, context)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypt so that the text can neither be read nor changed nor moved to another context."""
    nonce = os.urandom(_NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes, sender: str) -> bytes:
    """Inverse of :func:`seal`.

    Raises:
        InvalidMessage: The text was changed, or sealed for another recipient or round.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], context)
    except (InvalidTag, ValueError) as error:  # ValueError: shorter than nonce and tag
        raise InvalidMessage(
            f"Expected a sealed share of {sender!r} for this node and round, got one that was "
            "changed, moved or replayed.",
            remedy="Nothing was used of it. Look at the server: it carries the shares.",
        ) from error


def expand(key: bytes, words: int) -> Words:
    """Return the mask of a key: ChaCha20 key stream, shape ``(words,)`` uint64.

    A key must serve for one mask only. The nonce is zero for that reason.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    masks = np.frombuffer(stream.update(bytes(words * _WORD.itemsize)), _WORD)
    return masks.astype(np.uint64, copy=False)
