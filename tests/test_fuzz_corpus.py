"""The hostile variants themselves: reproducible, each another message, of the fate they claim."""

import json
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from fuzz import HEAVY_EVERY, corpus
from fuzz_kinds import FLOOD, HEAVY, KINDS
from fuzz_message import npy

from clfed.federated.wire import encode_contribution
from clfed.prototypes import Contribution, PrototypeMemory

CYCLES = 25


@pytest.fixture(scope="module")
def valid():
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    memory = PrototypeMemory.empty(6, "e" * 64).observe(z, [f"Ω{i % 4}" for i in range(20)])
    return encode_contribution(Contribution.of("north", 3, memory))


@pytest.fixture(scope="module")
def variants(valid):
    return list(corpus(valid, CYCLES * len(KINDS), seed=0, others=("south",)))


def content(record):
    """All that a record says, as something that can be compared."""
    if isinstance(record, ArrayRecord):
        return tuple((name, a.dtype, a.shape, a.stype, a.data) for name, a in record.items())
    return repr([type(record), *record.items()])


def test_the_same_seed_gives_the_same_variants(valid, variants):
    again = corpus(valid, len(variants), seed=0, others=("south",))
    other = list(corpus(valid, len(variants), seed=1, others=("south",)))
    for one, two in zip(variants, again, strict=True):
        assert one[:2] == two[:2] and content(one.record) == content(two.record)
    same = sum(content(a.record) == content(b.record) for a, b in zip(variants, other, strict=True))
    assert same < len(variants) // 4


def test_every_variant_differs_from_the_valid_message(valid, variants):
    before = content(valid)
    for variant in variants:
        assert content(variant.record) != before, variant.kind
    assert content(valid) == before


def test_all_kinds_come_in_turn(variants):
    seen = Counter(variant.kind for variant in variants)
    assert set(seen) == set(KINDS) and len(KINDS) >= 30
    assert {seen[kind] for kind in KINDS if kind not in HEAVY} <= {CYCLES, CYCLES + 1}
    assert {seen[kind] for kind in HEAVY} == {CYCLES // HEAVY_EVERY + 1}
    assert {variant.fate for variant in variants} == {"refused", "harmless", "plausible"}
    assert all(KINDS[variant.kind][0] == variant.fate for variant in variants)


def test_kinds_are_told_apart_by_what_they_say(variants):
    different = {
        kind: len({content(v.record) for v in variants if v.kind == kind}) for kind in KINDS
    }
    constant = {kind for kind, many in different.items() if many == 1}
    assert constant == {
        *HEAVY,
        "shape: sums in Fortran order",
        "class: names as keys",
        "contributor: somebody else",
        "counts: zero, no longer held",
        "record: empty",
        "record: of settings",
        "record: of metrics",
    }


def rows(record):
    """What a lenient reader finds: classes, counts, sums, and who says so."""
    head = json.loads(np.load(BytesIO(record["head"].data)).tobytes())
    tables = [np.load(BytesIO(record[name].data)) for name in ("counts", "sums")]
    who = head["contributor"], head["version"], head["embedding"], head["moments"]
    return [*head["classes"]], [table.tolist() for table in tables], who, int(float(head["dim"]))


def test_harmless_variants_hold_the_same_rows(valid, variants):
    harmless = [variant for variant in variants if variant.fate == "harmless"]
    assert len({variant.kind for variant in harmless}) >= 5
    for variant in harmless:
        assert rows(variant.record) == rows(valid), variant.kind


def test_plausible_variants_hold_other_rows_or_names(valid, variants):
    for variant in variants:
        if variant.fate == "plausible" and "flips" not in variant.kind:
            assert rows(variant.record) != rows(valid), variant.kind


def test_floods_fit_together(variants):
    floods = [variant.record for variant in variants if variant.kind in HEAVY]
    heads = [json.loads(record["head"].numpy().tobytes()) for record in floods]
    assert {len(set(head["classes"])) for head in heads} == {FLOOD}
    lengths = {len(record["counts"].numpy()) for record in floods}
    assert lengths == {FLOOD, 4}
    assert {record["sums"].numpy().shape for record in floods} == {(FLOOD, 6), (4, 6)}


def test_records_of_every_type_come(variants):
    types = Counter(type(variant.record) for variant in variants)
    assert set(types) == {ArrayRecord, ConfigRecord, MetricRecord}


def test_files_with_a_sound_header_are_sound():
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (8,), }"
    assert np.load(BytesIO(npy(header))).tolist() == [0] * 8
