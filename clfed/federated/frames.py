"""Flower records as bytes and back: JSON for what is small, raw buffers for arrays.

For the way from a node's short-lived message process to its long-lived one, on one machine.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from clfed.errors import InvalidMessage

_LENGTH = struct.Struct(">Q")


def pack_records(content: RecordDict) -> bytes:
    """Return the bytes of array and config records; entries are text, numbers, truths or bytes."""
    head: dict[str, Any] = {}
    buffers: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            head[name] = [
                [key, value.dtype, list(value.shape), value.stype, len(value.data)]
                for key, value in record.items()
            ]
            buffers += [value.data for value in record.values()]
        else:
            head[name] = {
                key: {"hex": value.hex()} if isinstance(value, bytes) else value
                for key, value in record.items()
            }
    text = json.dumps(head).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *buffers])


def unpack_records(data: bytes) -> RecordDict:
    """Inverse of :func:`pack_records`.

    Raises:
        InvalidMessage: The bytes are something else.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        start = _LENGTH.size + length
        content = RecordDict()
        for name, entries in json.loads(data[_LENGTH.size : start]).items():
            if isinstance(entries, dict):
                values = {k: _plain(v) for k, v in entries.items()}
                content[name] = ConfigRecord(values)
                continue
            arrays = {}
            for key, dtype, shape, stype, size in entries:
                if start + size > len(data):
                    raise ValueError("the last array is cut off")
                arrays[key] = Array(dtype, tuple(shape), stype, data[start : start + size])
                start += size
            content[name] = ArrayRecord(arrays)
    except (struct.error, ValueError, TypeError, AttributeError) as error:
        raise InvalidMessage(f"Expected records, got {len(data)} other bytes: {error}.") from error
    return content


def _plain(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
