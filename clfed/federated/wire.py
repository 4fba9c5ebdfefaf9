"""Statistics as Flower records: lossless, self-describing, and distrusted when they arrive.

One memory or contribution is one :class:`flwr.app.ArrayRecord` with the arrays ``head`` (JSON in
UTF-8: embedding, classes, and for a contribution its sender and version), ``counts``, ``sums``
and, where second moments are kept, ``outer``. Integers travel in the narrowest signed type that
holds them all, so a few-shot message needs no more bytes than float32 would; of the symmetric
second moments only the upper triangle travels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from clfed.errors import InvalidMessage
from clfed.prototypes import Contribution, PrototypeMemory
from clfed.prototypes.compression import restore_rows, round_rows

WIRE_VERSION = 1
#: Record of a reply that holds what the work took, where a server asks; no part of the message.
COST = "cost"
_INTEGERS = (np.int8, np.int16, np.int32, np.int64)
_BEFORE_HEADER = 10  # bytes: magic, version, length of the header
_FIELDS = {"head", "counts", "sums"}
_ROUNDED = {"head", "counts", "ends", "codes"}
# The one header that numpy writes for integers of the usual order. Its own reader evaluates what
# the header says, allocates what it asks for and opens archives, with many kinds of exceptions.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)"
    rb"\{'descr': '([<|][iu][1248])', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,15}, ?){0,3}\d{0,15})\), \} *\n",
    re.DOTALL,
)


def narrow(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same integers in the narrowest signed type that holds all of them.

    Example:
        >>> narrow(np.array([3, -129])).dtype
        dtype('int16')
    """
    if values.size == 0:
        return values.astype(np.int8)
    low, high = int(values.min()), int(values.max())
    kind = next(t for t in _INTEGERS if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return values.astype(kind)


def record_bytes(content: RecordDict) -> int:
    """Return the payload bytes of a message's content, over all of its records but :data:`COST`."""
    return sum(_size(record) for name, record in content.items() if name != COST)


def _size(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    if not isinstance(record, ConfigRecord):
        return record.count_bytes()
    # As Flower counts, which refuses to count empty texts and lists; any node can send them.
    entries = ((v if isinstance(v, list) else [v]) for v in record.values())
    return sum(map(len, record)) + sum(_entry_size(value) for found in entries for value in found)


def _entry_size(value: str | bytes | bool | float) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 1 if isinstance(value, bool) else 8


def encode_memory(memory: PrototypeMemory) -> ArrayRecord:
    """Pack a memory for the wire."""
    return _encode(memory, {})


def encode_contribution(contribution: Contribution, *, bits: int = 0) -> ArrayRecord:
    """Pack a node's own rows for the wire.

    Args:
        contribution: The rows.
        bits: 0 for all of them; 4, 8 or 16 for rounded sums, which must be points of their grid
            already (:func:`clfed.prototypes.expand` returns such), so that nothing is lost here.

    Raises:
        ConfigError: Another number of bits.
    """
    return _encode(
        contribution,
        {
            "contributor": contribution.contributor,
            "version": contribution.version,
            **({"complete": True} if contribution.complete else {}),
            **({"bits": bits} if bits else {}),
        },
        bits=bits,
    )


def decode_memory(record: ArrayRecord) -> PrototypeMemory:
    """Unpack a memory.

    Raises:
        InvalidMessage: The record is not a memory of this wire version.
    """
    fields, _ = _decode(record)
    return PrototypeMemory.of(**fields)


def decode_contribution(record: ArrayRecord) -> Contribution:
    """Unpack a contribution; whether its values are plausible is for the ledger to judge.

    Raises:
        InvalidMessage: The record is not a contribution of this wire version.
    """
    fields, head = _decode(record)
    contributor, version = head.get("contributor"), head.get("version")
    complete = head.get("complete", False)
    if not isinstance(contributor, str) or not isinstance(version, int) or version is True:
        raise InvalidMessage(
            "A contribution must name its contributor (text) and version (integer), got "
            f"{contributor!r} and {version!r}."
        )
    return Contribution(contributor=contributor, version=version, complete=complete, **fields)


def _encode(
    rows: PrototypeMemory | Contribution, extra: Mapping[str, str | int], *, bits: int = 0
) -> ArrayRecord:
    head = {
        "wire": WIRE_VERSION,
        "embedding": rows.embedding_id,
        "moments": rows.moments,
        "dim": rows.sums.shape[1],
        "classes": list(rows.classes),
        **extra,
    }
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    arrays = {
        "head": np.frombuffer(text, np.uint8),
        "counts": narrow(rows.counts.numpy()),
    }
    if bits:
        ends, codes = round_rows(rows.sums, bits)
        arrays |= {"ends": narrow(ends.numpy()), "codes": codes.numpy()}
    else:
        arrays["sums"] = narrow(rows.sums.numpy())
    if rows.outer is not None:
        arrays["outer"] = narrow(_triangle(rows.outer).numpy())
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})


def _decode(record: ArrayRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    if set(record) not in (_FIELDS, _FIELDS | {"outer"}, _ROUNDED):
        raise InvalidMessage(
            "A record of statistics needs the arrays head, counts and sums (or ends and codes), "
            f"got {sorted(record)}."
        )
    try:
        head = json.loads(_read(record, "head").tobytes().decode())
        classes, dim = head["classes"], head["dim"]
        version, moments, embedding = head["wire"], head["moments"], head["embedding"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidMessage(
            f"The head of a record of statistics is unreadable: {error}."
        ) from error
    if type(version) is not int or version != WIRE_VERSION:
        raise InvalidMessage(
            f"The record has wire version {version!r}, this program speaks {WIRE_VERSION}.",
            remedy="Install the same clfed on every node.",
        )
    if not isinstance(classes, list) or type(dim) is not int or dim < 1:
        raise InvalidMessage(
            "The head of a record of statistics must list its classes and say the size of its "
            f"embeddings, got {type(classes).__name__} and {dim!r}."
        )
    rows = len(classes)
    outer = None
    if moments != "none":
        shape = (dim, dim) if moments == "shared" else (rows, dim, dim)
        flat = (*shape[:-2], dim * (dim + 1) // 2)
        outer = _square(_integers(record, "outer", flat), dim)
    elif "outer" in record:
        raise InvalidMessage("The record of statistics brings second moments and denies them.")
    fields = {
        "classes": tuple(classes),
        "counts": _integers(record, "counts", (rows,)),
        "sums": _sums(record, head.get("bits", 0), rows, dim),
        "embedding_id": embedding,
        "moments": moments,
        "outer": outer,
    }
    return fields, head


def _read(record: ArrayRecord, name: str) -> np.ndarray[Any, Any]:
    """The array as it was written, without a copy; nothing is allocated or evaluated for it."""
    if name not in record:
        raise InvalidMessage(f"The record of statistics lacks the array {name!r}.")
    array = record[name]
    found = _HEADER.match(array.data) if array.stype == "numpy.ndarray" else None
    if found is None or int.from_bytes(found[1], "little") != found.end() - _BEFORE_HEADER:
        raise InvalidMessage(f"The array {name!r} is no plain file of integers.")
    kind = np.dtype(found[2].decode())
    shape = tuple(int(length) for length in found[3].split(b",") if length.strip())
    if len(array.data) - found.end() != math.prod(shape) * kind.itemsize:
        raise InvalidMessage(f"The array {name!r} is shorter or longer than it says.")
    return np.frombuffer(array.data, kind, offset=found.end()).reshape(shape)


def _sums(record: ArrayRecord, bits: Any, rows: int, dim: int) -> Tensor:
    if "sums" in record:
        if bits != 0:
            raise InvalidMessage(f"The record brings whole sums and speaks of {bits!r} bits.")
        return _integers(record, "sums", (rows, dim))
    codes = torch.from_numpy(_read(record, "codes").copy())
    return restore_rows(_integers(record, "ends", (rows, 2)), codes, bits, dim)


def _integers(record: ArrayRecord, name: str, shape: tuple[int, ...]) -> Tensor:
    values = _read(record, name)
    if values.dtype not in _INTEGERS or values.shape != shape:
        raise InvalidMessage(
            f"The array {name!r} must hold signed integers of shape {shape}, got {values.dtype} of "
            f"shape {values.shape}."
        )
    return torch.from_numpy(values.astype(np.int64))


def _triangle(outer: Tensor) -> Tensor:
    row, column = torch.triu_indices(outer.shape[-1], outer.shape[-1])
    return outer[..., row, column]


def _square(flat: Tensor, dim: int) -> Tensor:
    row, column = torch.triu_indices(dim, dim)
    outer = flat.new_zeros(*flat.shape[:-1], dim, dim)
    outer[..., row, column] = flat
    outer[..., column, row] = flat
    return outer
