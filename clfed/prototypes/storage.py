"""Tensors as bytes: the same bytes for the same content, and nothing believed when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from clfed.errors import InvalidMessage

SCHEMA = 1
_KEY = "clfed"


def pack(tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> bytes:
    """Safetensors bytes, the same for the same content.

    All metadata sits in one JSON string: safetensors does not promise an order of its keys.
    """
    text = json.dumps(
        {"schema": SCHEMA, "kind": kind, **header}, sort_keys=True, separators=(",", ":")
    )
    flat = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(flat, metadata={_KEY: text})


def unpack(data: bytes, kind: str, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`pack`.

    Args:
        data: What :func:`pack` returned.
        kind: The kind that is expected.
        source: Where the bytes came from, for the message.

    Returns:
        Tensors by name, and the header.

    Raises:
        InvalidMessage: Truncated, damaged, of another kind or of a newer schema.
    """
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        found, schema = header["kind"], header["schema"]
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise InvalidMessage(
            f"expected a clfed {kind} in {source}, got {len(data)} bytes that cannot be read "
            f"as one ({type(error).__name__}: {error})"
        ) from error
    if found != kind or schema != SCHEMA:
        raise InvalidMessage(
            f"expected a clfed {kind} of schema {SCHEMA} in {source}, got {found!r} of {schema!r}"
        )
    return tensors, header
