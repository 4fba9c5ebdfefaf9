"""The wire: lossless, narrow, and distrustful."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.errors import InvalidMessage
from clfed.federated.wire import (
    decode_contribution,
    decode_memory,
    encode_contribution,
    encode_memory,
    narrow,
)
from clfed.prototypes import Contribution, PrototypeMemory, compress, expand


def memory(moments="none", seed=0, count=25, dim=64, classes=5, size=1.0):
    rng = torch.Generator().manual_seed(seed)
    z = size * torch.randn(count, dim, generator=rng)
    labels = [f"Ω{i % classes}" for i in range(count)]
    return PrototypeMemory.empty(dim, "e" * 64, moments).observe(z, labels)


@given(
    seed=st.integers(0, 9),
    moments=st.sampled_from(["none", "shared", "class"]),
    size=st.sampled_from([1e-5, 1.0, 1e3]),
    dim=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_what_is_sent_arrives(seed, moments, size, dim):
    sent = memory(moments, seed, 7, dim, 3, size)
    assert decode_memory(encode_memory(sent)) == sent
    assert decode_memory(encode_memory(sent - sent)) == sent - sent
    rows = Contribution.of("north", 3, sent, gone=("gone",))
    back = decode_contribution(encode_contribution(rows))
    assert (back.contributor, back.version, back.classes) == ("north", 3, rows.classes)
    assert back.counts.tolist() == rows.counts.tolist() and torch.equal(back.sums, rows.sums)
    assert (back.outer is None) == (moments == "none")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "int8"),
        ([-128, 127], "int8"),
        ([128], "int16"),
        ([-(2**31)], "int32"),
        ([2**31], "int64"),
    ],
)
def test_integers_travel_in_the_narrowest_type(values, kind):
    array = np.array(values, np.int64)
    assert narrow(array).dtype == kind
    assert narrow(array).tolist() == values


def test_a_few_shot_message_is_no_larger_than_float32():
    record = encode_memory(memory(size=10.0))
    assert len(record["sums"].data) <= len(Array(np.zeros((5, 64), np.float32)).data)
    assert record["counts"].dtype == "int8"


def with_head(record, **changes):
    head = json.loads(record["head"].numpy().tobytes()) | changes
    head = {k: v for k, v in head.items() if v is not ...}
    record["head"] = Array(np.frombuffer(json.dumps(head).encode(), np.uint8))


def replace(name, value):
    def change(record):
        record[name] = Array(value)

    return change


def remove(name):
    def change(record):
        del record[name]

    return change


BROKEN = {
    "no sums": remove("sums"),
    "no head": remove("head"),
    "float counts": replace("counts", np.ones(5, np.float32)),
    "wrong rows": replace("counts", np.ones(4, np.int8)),
    "wrong columns": replace("sums", np.ones((5, 63), np.int8)),
    "unsigned": replace("sums", np.ones((5, 64), np.uint64)),
    "head is no text": replace("head", np.full(9, 255, np.uint8)),
    "head is no object": replace("head", np.frombuffer(b"[1]", np.uint8)),
    "no classes": lambda r: with_head(r, classes=...),
    "other wire": lambda r: with_head(r, wire=99),
    "class twice": lambda r: with_head(r, classes=["a"] * 5),
    "class is no text": lambda r: with_head(r, classes=[1, 2, 3, 4, 5]),
    "class with newline": lambda r: with_head(r, classes=["a\n", "b", "c", "d", "e"]),
    "class too long": lambda r: with_head(r, classes=["a" * 200, "b", "c", "d", "e"]),
    "negative size": lambda r: with_head(r, dim=-1),
    "moments unknown": lambda r: with_head(r, moments="all"),
    "moments not sent": lambda r: with_head(r, moments="shared"),
    "embedding is no text": lambda r: with_head(r, embedding=7),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_refused(name):
    record = encode_memory(memory())
    BROKEN[name](record)
    with pytest.raises(InvalidMessage):
        decode_memory(record)


@pytest.mark.parametrize(
    "changes", [{"version": ...}, {"version": "1"}, {"version": True}, {"contributor": 5}]
)
def test_a_contribution_says_who_and_which_version(changes):
    record = encode_contribution(Contribution.of("north", 1, memory()))
    with_head(record, **changes)
    with pytest.raises(InvalidMessage, match="contributor"):
        decode_contribution(record)


def test_pickled_arrays_are_never_opened():
    record = encode_memory(memory())
    record["sums"] = Array("object", (1,), "numpy.ndarray", b"\x80\x04N.")
    with pytest.raises(InvalidMessage):
        decode_memory(record)


def test_records_keep_their_arrays_apart():
    assert isinstance(encode_memory(memory()), ArrayRecord)
    assert set(encode_memory(memory("class"))) == {"head", "counts", "sums", "outer"}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_of_rounded_rows_never_crash(data):
    exact = PrototypeMemory.empty(5, "e").observe(torch.randn(6, 5), ["a", "b", "c"] * 2)
    rounded = expand(compress(exact, 4))
    record = encode_contribution(Contribution.of("n", 3, rounded), bits=4)
    assert decode_contribution(record).memory() == rounded
    name = data.draw(st.sampled_from(sorted(record)))
    raw = bytearray(record[name].data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    whole = record[name]
    arrays = dict(record) | {name: Array(whole.dtype, whole.shape, whole.stype, bytes(raw))}
    try:
        decode_contribution(ArrayRecord(arrays)).validate()
    except InvalidMessage:
        return


@pytest.mark.parametrize("bits", [0, 3, "4", None, True])
def test_rounded_rows_say_how_many_bits(bits):
    exact = PrototypeMemory.empty(5, "e").observe(torch.ones(1, 5), ["a"])
    record = encode_contribution(Contribution.of("n", 3, expand(compress(exact, 4))), bits=4)
    head = json.loads(record["head"].numpy().tobytes()) | {"bits": bits}
    text = np.frombuffer(json.dumps(head).encode(), np.uint8)
    with pytest.raises(InvalidMessage):
        decode_contribution(ArrayRecord(dict(record) | {"head": Array(text)}))
