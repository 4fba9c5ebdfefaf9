"""The ledger's record of one contributor, and its canonical bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clfed.errors import InvalidMessage
from clfed.prototypes.contribution import VERSION_LIMIT, check_contributor, check_evidence
from clfed.prototypes.fixed_point import checked_sum
from clfed.prototypes.memory import PrototypeMemory
from clfed.prototypes.storage import pack, unpack
from clfed.prototypes.tables import checked_names

_KIND = "contributor ledger"


@dataclass(frozen=True)
class Share:
    """What is held of one contributor.

    A mark is twice the version of the message that wrote a row, or ``sealed`` where the ledger
    itself changed the row: newer than every version seen, older than the next.

    Attributes:
        evidence: Sum of the rows.
        latest: Highest version that has arrived.
        floor: Versions up to this one are void: forgotten together with the contributor, or
            replaced by a complete message.
        forgotten: Whether messages are refused.
        outer_mark: Mark of the shared second moments, which belong to the whole contributor.
        marks: Mark of each class that has a row, also of rows that say "none".
    """

    evidence: PrototypeMemory
    latest: int = 0
    floor: int = 0
    forgotten: bool = False
    outer_mark: int = 0
    marks: dict[str, int] = field(default_factory=dict)

    @property
    def sealed(self) -> int:
        """The mark of a change that the ledger makes now."""
        return 2 * self.latest + 1


def part(memory: PrototypeMemory, names: Iterable[str]) -> PrototypeMemory:
    """The rows of those names that a memory has."""
    present = [name for name in names if name in memory]
    return memory if len(present) == len(memory) else memory.select(present)


def plain(memory: PrototypeMemory) -> PrototypeMemory:
    """The rows of a memory; second moments that belong to no row are left out."""
    return memory.with_moments("none") if memory.moments == "shared" else memory


def outer_change(new: PrototypeMemory, old: PrototypeMemory) -> Tensor:
    """New minus old shared second moments, ``(D, D)`` int64."""
    if new.outer is None or old.outer is None:
        raise InvalidMessage("expected shared second moments, got none")
    return checked_sum(new.outer, old.outer, subtract=True)


def sum_of(zero: PrototypeMemory, memories: Iterable[PrototypeMemory]) -> PrototypeMemory:
    """The sum of memories, added in pairs so that large tables are copied rarely."""
    queue = [zero, *memories]
    while len(queue) > 1:
        odd = queue[-1:] if len(queue) % 2 else []
        queue = [a + b for a, b in zip(queue[::2], queue[1::2], strict=False)] + odd
    return queue[0]


def pack_shares(
    zero: PrototypeMemory, shares: Mapping[str, Share], retired: frozenset[str]
) -> bytes:
    """Canonical bytes of all shares: contributors, classes and keys sorted."""
    ordered = sorted(shares.items())
    evidence = [share.evidence for _, share in ordered]
    tensors = {
        "counts": torch.cat([zero.counts, *(memory.counts for memory in evidence)]),
        "sums": torch.cat([zero.sums, *(memory.sums for memory in evidence)]),
    }
    if zero.moments != "none":
        empty = torch.zeros(0, zero.dim, zero.dim, dtype=torch.int64)
        outers = [m.outer.view(-1, zero.dim, zero.dim) for m in evidence if m.outer is not None]
        tensors["outer"] = torch.cat([empty, *outers])
    entries = [
        {
            "contributor": name,
            "classes": share.evidence.classes,
            "latest": share.latest,
            "floor": share.floor,
            "forgotten": share.forgotten,
            "outer_mark": share.outer_mark,
            "marks": share.marks,
        }
        for name, share in ordered
    ]
    header = {
        "embedding_id": zero.embedding_id,
        "moments": zero.moments,
        "retired": sorted(retired),
        "shares": entries,
    }
    return pack(tensors, _KIND, header)


def unpack_shares(
    data: bytes, source: str
) -> tuple[PrototypeMemory, dict[str, Share], frozenset[str]]:
    """Inverse of :func:`pack_shares`, believing nothing.

    Returns:
        The zero memory of the ledger, the shares by contributor, the retired classes.

    Raises:
        InvalidMessage: Damaged, incomplete or inconsistent; names ``source``.
    """
    tensors, header = unpack(data, _KIND, source)
    try:
        zero = PrototypeMemory.empty(
            tensors["sums"].shape[1], header["embedding_id"], header["moments"]
        )
        retired = frozenset(checked_names(header["retired"], "class name"))
        shares, start = {}, 0
        for row, entry in enumerate(header["shares"]):
            stop = start + len(entry["classes"])
            outer = None
            if zero.moments != "none":
                outer = tensors["outer"][row if zero.moments == "shared" else slice(start, stop)]
            tables = replace(
                zero,
                classes=entry["classes"],
                counts=tensors["counts"][start:stop],
                sums=tensors["sums"][start:stop],
                outer=outer,
            )
            shares[entry["contributor"]] = _share(tables, entry, retired)
            start = stop
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InvalidMessage(f"expected a complete {_KIND} in {source}: {error!r}") from error
    except InvalidMessage as error:
        raise InvalidMessage(f"{source}: {error}") from error
    return zero, shares, retired


def _share(tables: PrototypeMemory, entry: Mapping[str, Any], retired: frozenset[str]) -> Share:
    check_contributor(entry["contributor"])
    evidence = PrototypeMemory.of(
        tables.classes,
        tables.counts,
        tables.sums,
        tables.embedding_id,
        moments=tables.moments,
        outer=tables.outer,
    )
    check_evidence(
        evidence.classes, evidence.counts, evidence.sums, outer=evidence.outer, together=False
    )
    numbers = ("latest", "floor", "outer_mark")
    latest, floor, outer_mark = (entry[name] for name in numbers)
    marks = {**entry["marks"]}
    forgotten = entry["forgotten"] is True
    checked_names([*marks], "class name")
    share = Share(evidence, latest, floor, forgotten, outer_mark, marks)
    integers = [latest, floor, outer_mark, *marks.values()]
    sound = (
        all(type(number) is int and number >= 0 for number in integers)
        and floor <= latest < VERSION_LIMIT
        and max(outer_mark, 0, *marks.values()) <= share.sealed
        and set(evidence.classes) <= marks.keys()
        and not retired & marks.keys()
        and not (forgotten and evidence)
    )
    if not sound:
        raise InvalidMessage(
            f"expected versions that fit the rows of {entry['contributor']!r}, got others"
        )
    return share
