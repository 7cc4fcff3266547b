"""The best rows of many, those that nothing beats in two ways at once, and what rules the others out.

Letters: N rows of one batch. Batches are looked at one after another, so that a search of millions of layouts
keeps a few hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.theory.layout import Layout

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Limit:
    """Something that a layout has to keep."""

    name: str
    kept: npt.NDArray[np.bool_] | bool
    """[N], or one answer for all."""
    sentence: Callable[[Mapping[str, Any]], str]
    """What is wrong with a row that does not keep it, from its facts."""


@dataclass(frozen=True)
class Batch:
    """Layouts with what follows from them."""

    layout: Layout
    """Its numbers are [N] arrays."""
    columns: Mapping[str, Any]
    """Layout's fields and everything computed: [N] arrays, or one value for all rows."""
    limits: Sequence[Limit]

    def __len__(self) -> int:
        return len(self.layout.tensor_parallel)

    @property
    def fits(self) -> npt.NDArray[np.bool_]:
        """[N]: which rows keep every limit."""
        kept = np.ones(len(self), dtype=bool)
        for limit in self.limits:
            kept &= limit.kept
        return kept

    def found(self, row: int) -> Found:
        """One row as plain values."""
        facts = {name: _plain(column, row) for name, column in self.columns.items()}
        numbers = {one.name: _plain(getattr(self.layout, one.name), row) for one in fields(Layout)}
        broken = [limit for limit in self.limits if not _plain(limit.kept, row)]
        why = tuple(limit.sentence(facts) for limit in broken)
        return Found(replace(self.layout, **numbers), facts, why, tuple(limit.name for limit in broken))


@dataclass(frozen=True)
class Found:
    """One layout of plain values, what follows from it, and why it is ruled out (nothing where it is not)."""

    layout: Layout
    facts: Mapping[str, Any]
    why: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    """Names of the limits that it breaks."""


def _plain(column: Any, row: int) -> Any:
    if isinstance(column, np.ndarray):
        return column[row].item() if column.ndim else column.item()
    return column.item() if isinstance(column, np.generic) else column


def pareto(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Rows:
    """Rows that no other row beats: [M] indices into two [N] arrays of which less is better, by the first.

    A row is beaten where another is at most as large in both and smaller in one; of equal rows the first is
    kept. Rows that are not finite never are.
    """
    order = np.lexsort((second, first))
    values = np.where(np.isfinite(first[order]), second[order], np.inf)
    before = np.concatenate(([np.inf], np.minimum.accumulate(values)[:-1])) if len(values) else values
    return order[values < before]


@dataclass
class Best:
    """The best rows so far by `key` and then `tie` (less is better), one for each value of `shape`."""

    key: str
    tie: str
    shape: tuple[str, ...]
    limit: int
    sign: int = 1
    """-1 where more of `key` is better."""
    _held: dict[tuple[Any, ...], tuple[tuple[float, float], Found]] = field(default_factory=dict)

    def add(self, batch: Batch, rows: Rows) -> None:
        """Look at some rows of a batch."""
        if not len(rows) or not self.limit:
            return
        key, tie = (self.sign * _column(batch, self.key)[rows], _column(batch, self.tie)[rows])
        worst = max(held[0] for held in self._held.values()) if len(self._held) >= self.limit else None
        if worst is not None:
            near = key <= worst[0]
            rows, key, tie = rows[near], key[near], tie[near]
            if not len(rows):
                return
        order = np.lexsort((tie, key))
        if self.shape:
            codes = _codes([_column(batch, name)[rows][order] for name in self.shape])
            _, first = np.unique(codes, return_index=True)
            order = order[np.sort(first)]
        for place in order[: self.limit]:
            found = batch.found(int(rows[place]))
            name = (
                tuple(found.facts[one] for one in self.shape) if self.shape else (len(self._held), id(found))
            )
            value = (float(key[place]), float(tie[place]))
            if name not in self._held or value < self._held[name][0]:
                self._held[name] = (value, found)
        if len(self._held) > self.limit:
            kept = sorted(self._held.items(), key=lambda item: item[1][0])[: self.limit]
            self._held = dict(kept)

    @property
    def found(self) -> tuple[Found, ...]:
        """Best first."""
        return tuple(one for _, one in sorted(self._held.values(), key=lambda item: item[0]))


@dataclass
class Front:
    """The rows so far that none beats in two columns, of which less is better."""

    first: str
    second: str
    _held: list[Found] = field(default_factory=list)

    def add(self, batch: Batch, rows: Rows) -> None:
        """Look at some rows of a batch."""
        if not len(rows):
            return
        first, second = _column(batch, self.first)[rows], _column(batch, self.second)[rows]
        mine = pareto(first, second)
        xs = np.concatenate(([one.facts[self.first] for one in self._held], first[mine]))
        ys = np.concatenate(([one.facts[self.second] for one in self._held], second[mine]))
        old = len(self._held)
        self._held = [
            self._held[place] if place < old else batch.found(int(rows[mine[place - old]]))
            for place in pareto(xs, ys)
        ]

    @property
    def found(self) -> tuple[Found, ...]:
        """By the first column, least first."""
        return tuple(self._held)


def _column(batch: Batch, name: str) -> npt.NDArray[Any]:
    return np.broadcast_to(np.asarray(batch.columns[name]), (len(batch),))


def _codes(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """[N]: a number for each combination of what [N] columns hold; words are the same in all rows."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        if column.dtype.kind in "iu":
            code = code * (int(column.max()) + 1) + column
    return code


def breaking(batch: Batch) -> Iterator[tuple[Limit, Rows, Rows]]:
    """Each limit with the rows that break it, and those that break it alone."""
    broken = np.stack([np.broadcast_to(~np.asarray(one.kept), (len(batch),)) for one in batch.limits])
    once = broken.sum(0) == 1
    for limit, some in zip(batch.limits, broken, strict=True):
        yield limit, np.flatnonzero(some), np.flatnonzero(some & once)
