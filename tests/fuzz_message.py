"""A valid contribution taken apart, and ways to put it together wrongly."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

Fate = Literal["refused", "harmless", "plausible"]
Hostile = ArrayRecord | ConfigRecord | MetricRecord
HEADERS = [
    f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    for descr, shape in (
        ("'|O'", "(2,)"),
        ("'<i8'", "(1099511627776,)"),
        ("'|i1'", "(9223372036854775807, 9)"),
        ("'<i8'", "(-2,)"),
        ("'<i8'", "(True,)"),
        ("'<i8'", "2"),
        ("[('a', '<i8'), ('b', '<f8')]", "(2,)"),
        ("'<U4'", "(2,)"),
        ("'no type'", "(2,)"),
        ("'<i8'", "(2,), 'more': 1"),
    )
]
HEADERS += ["__import__('os').getcwd()", "(" * 5000, "-" * 9000 + "1", "{'descr': '<i8'", "\x00"]
HEADERS += ["", " " * 60_000]
FORMATS = [b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00v\x00", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"]
FORMATS += [b"PK\x03\x04" + bytes(40), b"\x80\x04N.", b"cos\ngetcwd\n(tR."]
_BEFORE_HEADER = 10  # bytes of a .npy file: magic, version, length of the header


class Valid(NamedTuple):
    record: ArrayRecord
    head: dict[str, Any]
    counts: np.ndarray  # (C,)
    sums: np.ndarray  # (C, D)
    others: tuple[str, ...]

    @property
    def classes(self) -> list[str]:
        return list(self.head["classes"])

    def table(self, name: str) -> np.ndarray:
        return (self.counts if name == "counts" else self.sums).astype(np.int64)

    def arrays(self, **changes: Array | np.ndarray | None) -> ArrayRecord:
        """The record with some arrays replaced, added or, for None, left out."""
        arrays = dict(self.record)
        for name, value in changes.items():
            if value is None:
                del arrays[name]
            else:
                arrays[name] = Array(value) if isinstance(value, np.ndarray) else value
        return ArrayRecord(arrays)

    def text(self, head: str | bytes) -> ArrayRecord:
        """The record with another head, whatever that says."""
        data = head if isinstance(head, bytes) else head.encode()
        return self.arrays(head=np.frombuffer(data, np.uint8))

    def headed(self, **changes: Any) -> ArrayRecord:
        """The record with some keys of its head replaced or, for ``...``, left out."""
        return self.text(
            json.dumps({k: v for k, v in (self.head | changes).items() if v is not ...})
        )

    def spliced(self, key: str, value: str) -> ArrayRecord:
        """The record with raw text, JSON or not, as one value of its head."""
        rest = json.dumps({k: v for k, v in self.head.items() if k != key})
        return self.text(f"{rest[:-1]},{json.dumps(key)}:{value}}}")

    def named(self, row: int, name: object) -> ArrayRecord:
        """The record with another name for one of its classes."""
        return self.headed(classes=[*self.classes[:row], name, *self.classes[row + 1 :]])

    def entry(self, name: str, place: int, value: int) -> ArrayRecord:
        """The record with another value in one of its tables."""
        table = self.table(name)
        table.reshape(-1)[place] = value
        return self.arrays(**{name: table})

    def file(self, name: str, data: bytes, **labels: Any) -> ArrayRecord:
        """The record with other bytes, or other labels on them, in the place of one array."""
        old = self.record[name]
        fields = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype} | labels
        return self.arrays(**{name: Array(data=data, **fields)})


def npy(header: str) -> bytes:
    """A ``.npy`` file with any header and 64 bytes of data."""
    padded = header.encode()
    padded += b" " * (-(_BEFORE_HEADER + len(padded) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(64)
