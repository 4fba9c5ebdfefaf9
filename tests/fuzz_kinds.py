"""The kinds of damage: name, fate, and how it is done to a valid message."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any
from zipfile import ZipFile, ZipInfo

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from fuzz_message import FORMATS, HEADERS, Fate, Hostile, Valid, npy

Damage = Callable[[Valid, np.random.Generator], Hostile]
FLOOD = 100_000
FILES = ("head", "counts", "sums")
TABLES = ("counts", "sums")
KEYS = ("wire", "embedding", "moments", "dim", "classes", "contributor", "version")

OTHER_DTYPES = [f"{kind}{size}" for kind in "fu" for size in (2, 4, 8)]
OTHER_DTYPES += ["u1", "c8", "bool", "S3", "U3", "M8[s]", "m8[s]"]
NUMBERS = ("1" * 5000, "-" + "9" * 400, "1e400", "-1e400", "1e308", "NaN", "Infinity", "-Infinity")
BOMBS = ("[" * 100_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000)
ODD = (None, [], {}, [[]], "", [1], {"a": 1}, -1, 1.5, "\x00")
TEXTS = ("", "[]", "null", "1", '"head"', "[1]", "true", "{}", "{", "\ufeff{}", "NaN", "{}{}")
NO_NAMES = ("", None, 1, ["a"], {"a": 1}, 1.5, "x" * 129, "x" * 100_000)
CONTROLS = ("\x00", "\n", "\x1b[2J", "\u202e", "\u200b", "\ufeff", "\ud800", "\ue000", "\x7f")
UNUSUAL = ("e\u0301", "\u212b", "\ufb01", " ant", "ant ", "\u0430nt", "../ant", "<b>", "%s", "{0}")


def one_of(rng: np.random.Generator, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def converted(table: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinities are welcome here
        return table.astype(dtype)


def flips(name: str) -> Damage:
    def damage(valid: Valid, rng: np.random.Generator) -> Hostile:
        data = np.frombuffer(valid.record[name].data, np.uint8).copy()
        places = rng.choice(len(data), rng.integers(1, 5), replace=False)
        data[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
        return valid.file(name, data.tobytes())

    return damage


def truncated(valid: Valid, rng: np.random.Generator) -> Hostile:
    name = one_of(rng, *FILES)
    return valid.file(name, (data := valid.record[name].data)[: rng.integers(len(data))])


def followed(valid: Valid, rng: np.random.Generator) -> Hostile:
    name = one_of(rng, *FILES)
    return valid.file(name, valid.record[name].data + rng.bytes(int(rng.integers(1, 300))))


def archive(valid: Valid, rng: np.random.Generator) -> Hostile:
    with ZipFile(buffer := BytesIO(), "w") as several:
        for name in TABLES:
            several.writestr(ZipInfo(f"{name}.npy"), valid.record[name].data)
    return valid.file(one_of(rng, *FILES), buffer.getvalue())


def relabelled(**values: tuple[Any, ...]) -> Damage:
    def damage(valid: Valid, rng: np.random.Generator) -> Hostile:
        name = one_of(rng, *FILES)
        labels = {label: one_of(rng, *choice) for label, choice in values.items()}
        return valid.file(name, valid.record[name].data, **labels)

    return damage


def retyped(*dtypes: str) -> Damage:
    def damage(valid: Valid, rng: np.random.Generator) -> Hostile:
        name = one_of(rng, *TABLES)
        return valid.arrays(**{name: converted(valid.table(name), one_of(rng, *dtypes))})

    return damage


def not_finite(valid: Valid, rng: np.random.Generator) -> Hostile:
    name = one_of(rng, *TABLES)
    table = converted(valid.table(name), one_of(rng, "f2", "f4", "f8"))
    table.reshape(-1)[rng.integers(table.size)] = one_of(rng, np.nan, np.inf, -np.inf)
    return valid.arrays(**{name: table})


def reshaped(valid: Valid, rng: np.random.Generator) -> Hostile:
    name = one_of(rng, *TABLES)
    table = valid.counts if name == "counts" else valid.sums
    shapes = [table[:-1], table[None], table[..., None], table[:0], table[..., :-1], table[..., 0]]
    shapes += [np.concatenate([table, table]), np.repeat(table, 2, -1), table.reshape(-1, 1, 1)]
    return valid.arrays(**{name: np.asarray(one_of(rng, *shapes))})


def key(name: str, *values: Any) -> Damage:
    return lambda valid, rng: valid.headed(**{name: one_of(rng, *values)})


def key_twice(valid: Valid, rng: np.random.Generator) -> Hostile:
    text = json.dumps(valid.head)
    return valid.text(f'{text[:-1]},"version":{valid.head["version"] + rng.integers(1, 99)}}}')


def class_named(*names: Any) -> Damage:
    return lambda valid, rng: valid.named(rng.integers(len(valid.counts)), one_of(rng, *names))


def class_twice(valid: Valid, rng: np.random.Generator) -> Hostile:
    one, other = rng.choice(len(valid.counts), 2, replace=False)
    return valid.named(one, valid.classes[other])


def classes_of(*change: Callable[[list[str]], Any]) -> Damage:
    return lambda valid, rng: valid.headed(classes=one_of(rng, *change)(valid.classes))


@cache
def flood(dim: int) -> tuple[str, dict[str, Array]]:
    """JSON of very many names, and rows that fit them."""
    names = json.dumps([f"class {c}" for c in range(FLOOD)])
    rows = {"counts": np.ones(FLOOD, np.int8), "sums": np.zeros((FLOOD, dim), np.int8)}
    return names, {name: Array(table) for name, table in rows.items()}


def flooded(valid: Valid, rng: np.random.Generator) -> Hostile:
    names, rows = flood(valid.sums.shape[1])
    return ArrayRecord({**valid.spliced("classes", names), **rows})


def count(*values: int) -> Damage:
    return lambda valid, rng: valid.entry(
        "counts", rng.integers(len(valid.counts)), one_of(rng, *values)
    )


def too_far(valid: Valid, rng: np.random.Generator) -> Hostile:
    place = rng.integers(valid.sums.size)
    beyond = int(valid.counts[place // valid.sums.shape[1]]) * 2**31 + 1
    return valid.entry("sums", place, one_of(rng, beyond, -beyond, 2**62, 2**63 - 1, -(2**63)))


def farthest(valid: Valid, rng: np.random.Generator) -> Hostile:
    return valid.arrays(
        sums=valid.table("sums") * 0 + valid.table("counts")[:, None] * one_of(rng, 2**31, -(2**31))
    )


def exchanged(valid: Valid, rng: np.random.Generator) -> Hostile:
    one, other = rng.choice(FILES, 2, replace=False).tolist()
    return valid.arrays(**{one: valid.record[other], other: valid.record[one]})


HEAVY = ("class: 100,000 of them", "class: 100,000 of them without rows")
KINDS: dict[str, tuple[Fate, Damage]] = {
    "head: byte flips": ("plausible", flips("head")),
    "counts: byte flips": ("plausible", flips("counts")),
    "sums: byte flips": ("plausible", flips("sums")),
    "file: truncated": ("refused", truncated),
    "file: random bytes": (
        "refused",
        lambda v, r: v.file(one_of(r, *FILES), r.bytes(int(r.integers(1, 300)))),
    ),
    "file: bytes behind the end": ("harmless", followed),
    "file: header of another kind": (
        "refused",
        lambda v, r: v.file(one_of(r, *FILES), npy(one_of(r, *HEADERS))),
    ),
    "file: another format": (
        "refused",
        lambda v, r: v.file(one_of(r, *FILES), one_of(r, *FORMATS)),
    ),
    "file: an archive of several arrays": ("refused", archive),
    "label: unknown serialisation": (
        "refused",
        relabelled(stype=("", "pickle", "torch", "numpy.ndarray ", "\x00")),
    ),
    "label: not what is inside": (
        "harmless",
        relabelled(dtype=("float32", "object", ""), shape=((), (-1,), (2**62, 2**62))),
    ),
    "dtype: no signed integers": ("refused", retyped(*OTHER_DTYPES)),
    "dtype: NaN and infinities": ("refused", not_finite),
    "dtype: wider or of another byte order": ("harmless", retyped("<i8", ">i8", ">i4")),
    "shape: another one": ("refused", reshaped),
    "shape: sums in Fortran order": (
        "harmless",
        lambda v, r: v.arrays(sums=np.asfortranarray(v.sums)),
    ),
    "head: a key is missing": ("refused", lambda v, r: v.headed(**{one_of(r, *KEYS): ...})),
    "head: a value of another type": (
        "refused",
        lambda v, r: v.headed(**{one_of(r, *KEYS): one_of(r, *ODD)}),
    ),
    "head: huge or no numbers": (
        "refused",
        lambda v, r: v.spliced(one_of(r, *KEYS), one_of(r, *NUMBERS)),
    ),
    "head: a value nested without end": (
        "refused",
        lambda v, r: v.spliced(one_of(r, *KEYS), one_of(r, *BOMBS)),
    ),
    "head: nested without end": ("refused", lambda v, r: v.text(one_of(r, *BOMBS))),
    "head: not an object": ("refused", lambda v, r: v.text(one_of(r, *TEXTS))),
    "head: not UTF-8": (
        "refused",
        lambda v, r: v.text(json.dumps(v.head).encode(one_of(r, "utf-16", "utf-32", "cp037"))),
    ),
    "head: an unknown key": (
        "harmless",
        lambda v, r: v.headed(**{one_of(r, "admin", "__class__", "Version", "", "outer"): True}),
    ),
    "head: a key twice": ("plausible", key_twice),
    "wire: another version": ("refused", key("wire", 0, -1, 2, 99, 2**64, "1", None, [1])),
    "wire: one, written otherwise": ("harmless", key("wire", True, 1.0)),
    "version: out of range": ("refused", key("version", 0, -1, -(2**63), 2**53, 2**60, 10**30)),
    "version: no integer": ("refused", key("version", 1.0, 1.5, True, "1", None, [1], {"v": 1})),
    "version: far ahead": ("plausible", key("version", 2**40, 2**53 - 1)),
    "dim: another one": ("refused", key("dim", 0, -1, 1, True, 2**31, 2**62, 10**30, 1e300, None)),
    "dim: written otherwise": (
        "harmless",
        lambda v, r: v.headed(dim=one_of(r, str, float, lambda d: d + 0.5)(v.head["dim"])),
    ),
    "moments: not sent": ("refused", key("moments", "shared", "class")),
    "moments: unknown": ("refused", key("moments", "", "all", "None", None, 0, [], {}, ["none"])),
    "embedding: unknown": ("refused", key("embedding", "", "other", "\x00", "e" * 10_000, 7, None)),
    "complete: no truth value": ("refused", key("complete", 0, 1, 1.0, "true", None, [], {})),
    "contributor: no name": ("refused", key("contributor", "", "\n", "a\x00", "x" * 129, 5, ["n"])),
    "contributor: somebody else": (
        "refused",
        lambda v, r: v.headed(contributor=one_of(r, *v.others)),
    ),
    "class: twice": ("refused", class_twice),
    "class: no name": ("refused", class_named(*NO_NAMES)),
    "class: control characters": ("refused", class_named(*(f"ant{c}" for c in CONTROLS))),
    "class: an unusual name": ("plausible", class_named(*UNUSUAL)),
    "class: not a list of names": (
        "refused",
        classes_of(
            "".join,
            len,
            lambda c: None,
            lambda c: "abcdefghijklm"[: len(c)],
            lambda c: [c] * len(c),
        ),
    ),
    "class: names as keys": ("harmless", classes_of(dict.fromkeys)),
    "class: more or fewer than rows": (
        "refused",
        classes_of(lambda c: c[1:], lambda c: [*c, "one more"], lambda c: [], lambda c: c * 2),
    ),
    "class: 100,000 of them": ("refused", flooded),
    "class: 100,000 of them without rows": (
        "refused",
        lambda v, r: v.spliced("classes", flood(v.sums.shape[1])[0]),
    ),
    "counts: negative": ("refused", count(-1, -128, -(2**31), -(2**63))),
    "counts: huge": ("refused", count(2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1)),
    "counts: more than true": ("plausible", count(1_000, 999_999)),
    "counts: zero with a sum": (
        "refused",
        lambda v, r: v.arrays(counts=v.counts * 0, sums=v.sums * 0 + one_of(r, -1, 1)),
    ),
    "counts: zero, no longer held": (
        "plausible",
        lambda v, r: v.arrays(counts=v.counts * 0, sums=v.sums * 0),
    ),
    "sums: out of range": ("refused", too_far),
    "sums: at the limit of the range": ("plausible", farthest),
    "record: an array is missing": ("refused", lambda v, r: v.arrays(**{one_of(r, *FILES): None})),
    "record: an array more": (
        "harmless",
        lambda v, r: v.arrays(**{one_of(r, "outer", "", "Head", "../head", "x" * 999): v.counts}),
    ),
    "record: arrays in each other's place": ("refused", exchanged),
    "record: empty": ("refused", lambda v, r: ArrayRecord()),
    "record: of settings": (
        "refused",
        lambda v, r: ConfigRecord({name: array.data for name, array in v.record.items()}),
    ),
    "record: of metrics": (
        "refused",
        lambda v, r: MetricRecord({"counts": v.counts.tolist(), "sums": float("nan")}),
    ),
}
