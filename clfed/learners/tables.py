"""Tables with one row a class that grow, travel and merge by declared rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from clfed.errors import ConfigError, UnknownClass
from clfed.seeding import generator

MergeRule = Literal["add", "mean", "param", "local"]
LOGITS = ("linear", "cosine")
RESERVED = "\x00"  # no class name may hold it


@dataclass(frozen=True)
class Column:
    """One column of a :class:`ClassTable`.

    Args:
        shape: Shape of a row, ``()`` for one number.
        rule: How tables of several owners become one. ``add``: rows are summed. ``mean``: averaged
            with the owners' counts of the class as weights. ``param``: like ``mean``, and trained
            by gradient descent. ``local``: never leaves its owner.
        initial: Standard deviation of the first values, drawn for each class by its name; 0 for
            zeros.
    """

    shape: tuple[int, ...] = ()
    rule: MergeRule = "param"
    initial: float = 0.0


def rows_of(classes: Sequence[str], names: Iterable[str]) -> Tensor:
    """Return the place of each name among some classes, ``(len(names),)`` int64.

    Raises:
        UnknownClass: A name is not among them.
    """
    place = {name: row for row, name in enumerate(classes)}
    try:
        return torch.tensor([*map(place.__getitem__, names)], dtype=torch.int64)
    except KeyError as error:
        raise UnknownClass(f"Expected a class among {len(place)}, got {error.args[0]!r}.") from None


class ClassTable(nn.Module):
    """Rows for named classes, kept as parameters (rule ``param``) or buffers (other rules).

    A row's first values depend on the seed and the class's name alone, not on when it came.

    Args:
        columns: What a row holds.
        seed: Of the first values.
        purpose: Tells this table's draws from those of others.
    """

    def __init__(self, columns: Mapping[str, Column], *, seed: int, purpose: str) -> None:
        super().__init__()
        self.columns, self.seed, self.purpose = dict(columns), seed, purpose
        self.classes: tuple[str, ...] = ()
        for name, column in self.columns.items():
            self._set(name, torch.zeros(0, *column.shape))

    def column(self, name: str) -> Tensor:
        """The tensor of a column, ``(C, *shape)``."""
        tensor: Tensor = getattr(self, name)
        return tensor

    def grow(self, names: Sequence[str]) -> None:
        """Append a row for each name that has none yet."""
        known = set(self.classes)
        new = [name for name in dict.fromkeys(names) if name not in known]
        if not new:
            return
        for key, column in self.columns.items():
            old = self.column(key).detach()
            rows = [self._first(key, column, name) for name in new]
            self._set(key, torch.cat([old, torch.stack(rows).to(old.device)]))
        self.classes = (*self.classes, *new)

    def rows(self, names: Sequence[str]) -> Tensor:
        """Row of each name, ``(len(names),)`` int64.

        Raises:
            UnknownClass: A name has no row.
        """
        return rows_of(self.classes, names)

    def without(self, names: Sequence[str]) -> None:
        """Remove the rows of some classes.

        Raises:
            UnknownClass: A name has no row.
        """
        gone = set(self.rows(names).tolist())
        kept = [row for row in range(len(self.classes)) if row not in gone]
        for key in self.columns:
            self._set(key, self.column(key).detach()[kept].clone())
        self.classes = tuple(self.classes[row] for row in kept)

    @torch.no_grad()
    def merge(self, others: Sequence[Self], counts: Sequence[Mapping[str, int]]) -> None:
        r"""Become the merged table of some owners, each row by its column's rule.

        .. math:: r_c = \sum_k n_{kc} r_{kc} / \sum_k n_{kc}

        for ``mean`` and ``param``; an owner that never saw a class has no say in its row.

        Args:
            others: One table an owner, of the same columns; this table's own rows are dropped.
            counts: Examples of each class that each owner saw.

        Raises:
            ConfigError: Not one mapping of counts for each table.
        """
        if len(others) != len(counts):
            raise ConfigError(f"Expected counts for {len(others)} tables, got {len(counts)}.")
        names = tuple(dict.fromkeys(name for table in others for name in table.classes))
        place = {name: row for row, name in enumerate(names)}
        weights = torch.zeros(len(others), len(names), dtype=torch.float64)
        for owner, (table, seen) in enumerate(zip(others, counts, strict=True)):
            for name in table.classes:
                weights[owner, place[name]] = seen.get(name, 0)
        shares = weights / weights.sum(0).clamp(min=1)
        for key, column in self.columns.items():
            if column.rule == "local":
                self._set(key, torch.stack([self._first(key, column, name) for name in names]))
                continue
            total = torch.zeros(len(names), *column.shape, dtype=torch.float64)
            for owner, table in enumerate(others):
                rows = torch.tensor([place[name] for name in table.classes], dtype=torch.int64)
                values = table.column(key).double()
                if column.rule != "add":
                    values = values * shares[owner, rows].view(-1, *[1] * len(column.shape))
                total.index_add_(0, rows, values)
            self._set(key, total.to(self.column(key).dtype))
        self.classes = names

    def payload(self) -> dict[str, Tensor]:
        """Return what may leave the owner: every column but the local ones."""
        return {
            key: self.column(key).detach()
            for key, column in self.columns.items()
            if column.rule != "local"
        }

    def _first(self, key: str, column: Column, name: str) -> Tensor:
        if not column.initial:
            return torch.zeros(column.shape)
        rng = generator(self.seed, self.purpose, key, name)
        return column.initial * torch.randn(column.shape, generator=rng)

    def _set(self, key: str, values: Tensor) -> None:
        if self.columns[key].rule == "param":
            setattr(self, key, nn.Parameter(values))
        elif key in self._buffers:
            setattr(self, key, values)
        else:
            self.register_buffer(key, values)

    def get_extra_state(self) -> dict[str, Any]:
        """The names of the rows."""
        return {"classes": list(self.classes)}

    def set_extra_state(self, state: Any) -> None:
        """Take over the names of the rows."""
        self.classes = tuple(state["classes"])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # A table may have grown since this one was built; tensors get the size of the saved ones.
        for key in self.columns:
            saved = state_dict.get(f"{prefix}{key}")
            if saved is not None and saved.shape != self.column(key).shape:
                self._set(key, torch.empty_like(saved, device=self.column(key).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Head(ClassTable):
    r"""A classifier over a growing number of classes.

    .. math:: o_k = w_k^\top h + b_k \quad\text{or}\quad o_k = \tau \cos(w_k, h)

    Args:
        dim: Length :math:`D` of an embedding.
        kind: ``linear`` (rows start at zero, so that new classes start alike) or ``cosine``.
        temperature: :math:`\tau` of the cosine head.
        seed: Of the first values of the cosine head.

    Raises:
        ConfigError: No such kind.
    """

    def __init__(self, dim: int, kind: str, *, temperature: float = 16.0, seed: int = 0) -> None:
        if kind not in LOGITS:
            raise ConfigError(f"Expected learner.head of {LOGITS}, got {kind!r}.")
        columns = {"weight": Column((dim,), initial=0.0 if kind == "linear" else dim**-0.5)}
        if kind == "linear":
            columns["bias"] = Column()
        super().__init__(columns, seed=seed, purpose="head")
        self.kind, self.temperature = kind, temperature

    def reserve(self, rows: int) -> None:
        """Have exactly this many rows for classes that are still to come."""
        taken = sum(name.startswith(RESERVED) for name in self.classes)
        self.grow([f"{RESERVED}{len(self.classes) + row}" for row in range(rows - taken)])

    def adopt(self, names: Sequence[str]) -> None:
        """Give new classes the reserved rows, and new ones where there are too few."""
        known = set(self.classes)
        new = [name for name in dict.fromkeys(names) if name not in known]
        free = [row for row, name in enumerate(self.classes) if name.startswith(RESERVED)]
        renamed = dict(zip(free, new, strict=False))
        self.classes = tuple(renamed.get(row, name) for row, name in enumerate(self.classes))
        self.grow(new[len(renamed) :])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``(B, D)`` to one logit for each row."""
        weight = self.column("weight")
        if self.kind == "linear":
            return F.linear(embeddings, weight, self.column("bias"))
        return self.temperature * F.linear(F.normalize(embeddings), F.normalize(weight))
