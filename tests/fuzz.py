"""Hostile variants of a valid contribution, as a broken or malicious node might send them.

Each kind of damage has a name and a fate, which is what a sound intake does with it:

- ``refused``: no honest node sends it. The floods of 100,000 classes fit together otherwise and need
  a limit on classes or bytes; somebody else's name needs to know who sent the message.
- ``harmless``: the rows of the valid message in another dress. It may be refused or taken as that
  message, but not as anything else.
- ``plausible``: its content does not always betray it. It may be taken, but then the ledger holds
  these rows of this contributor, and nothing else changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord
from fuzz_kinds import HEAVY, KINDS
from fuzz_message import Fate, Hostile, Valid

HEAVY_EVERY = 20  # cycles through the light kinds for one of the heavy ones


class Variant(NamedTuple):
    kind: str
    fate: Fate
    record: Hostile


def mutations(
    record: ArrayRecord, rng: np.random.Generator, *, others: Sequence[str] = ("someone else",)
) -> Iterator[Variant]:
    """Endless variants, all kinds in turn; every one differs from the valid message.

    Args:
        record: A valid contribution as ``encode_contribution`` makes it: at least two classes and
            two columns, small counts and sums, no second moments.
        rng: Decides everything; equal states give equal variants.
        others: Names of other contributors.
    """
    head = json.loads(record["head"].numpy().tobytes())
    valid = Valid(record, head, record["counts"].numpy(), record["sums"].numpy(), tuple(others))
    for cycle in count():
        for kind, (fate, damage) in KINDS.items():
            if kind not in HEAVY or cycle % HEAVY_EVERY == 0:
                yield Variant(kind, fate, damage(valid, rng))


def corpus(
    record: ArrayRecord, size: int, seed: int, *, others: Sequence[str] = ("someone else",)
) -> Iterator[Variant]:
    """The first ``size`` variants of one seed."""
    return islice(mutations(record, np.random.default_rng(seed), others=others), size)
