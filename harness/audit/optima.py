"""Leave-one-out: the completions that satisfy as many of the other claims as can hold together.

Source claims count before our own assumptions, so that an assumption is the first to give way. A claim whose
sources print several figures counts as satisfied where any of them holds. Blocks are independent but for the
claims that are tested in several of them, which are satisfied only where every such block satisfies them.
Whether to keep each of these *shared* claims is a problem of sums of functions of few variables each, which
dynamic programming solves, one variable after the other (Bertele and Brioschi 1972, Nonserial dynamic
programming).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.audit.blocks import Block, Patterns

_SOURCE = 1 << 10
"""Weight of a source claim over an assumption: more than all assumptions of a spec together."""

_NEVER = -(1 << 40)
"""Weight of what cannot hold: below every sum of weights."""


@dataclass(frozen=True)
class _Table:
    """A weight for each way to drop (0) or keep (1) the claims `names`, one dimension for each."""

    names: tuple[str, ...]
    weights: Patterns

    def over(self, names: Sequence[str]) -> Patterns:
        """The weights with dimensions in the order of `names`, of length 1 for those it does not have."""
        own = [name for name in names if name in self.names]
        turned = self.weights.transpose([self.names.index(name) for name in own])
        return turned.reshape([2 if name in self.names else 1 for name in names])


class Optima:
    """Best patterns of each block with one claim left out."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        homes: dict[str, set[int]] = {}
        self._weights: dict[str, int] = {}
        for place, block in enumerate(blocks):
            for test in block.tests:
                homes.setdefault(test.claim.id, set()).add(place)
                self._weights[test.claim.id] = 1 if test.claim.kind == "assumption" else _SOURCE
        self.shared = frozenset(name for name, places in homes.items() if len(places) > 1)
        self._sides = [_Side(block, self.shared, self._weights) for block in blocks]

    def admitted(self, claim: str, *places: int) -> dict[int, Patterns]:
        """Block position -> the block's patterns at the optimum of all claims but this one.

        Of the blocks that test the claim only, and of `places`: no other block tells anything about it.
        """
        tables = [side.table(claim) for side in self._sides]
        names = self.shared - {claim}
        tables += [_Table((name,), np.array([0, self._weights[name]])) for name in sorted(names)]
        return {
            i: side.patterns(_without(tables, names - side.coupled), claim)
            for i, side in enumerate(self._sides)
            if claim in side.bits or i in places
        }


def _without(tables: Iterable[_Table], names: Iterable[str]) -> list[_Table]:
    """Tables of the other claims, in which each of `names` is kept or dropped, whichever weighs more."""
    found, left = list(tables), set(names)
    while left:
        # The claim that couples the fewest others first: its table is the smallest.
        near = {name: {n for table in found if name in table.names for n in table.names} for name in left}
        name = min(sorted(left), key=lambda one: len(near[one]))
        met = [table for table in found if name in table.names]
        order = (name, *sorted(near[name] - {name}))
        merged = sum((table.over(order) for table in met), np.zeros((2,) * len(order), dtype=np.int64))
        found = [table for table in found if name not in table.names]
        found.append(_Table(order[1:], merged.max(axis=0)))
        left.remove(name)
    return found


class _Side:
    """One block's patterns, as sets of claims."""

    def __init__(self, block: Block, shared: frozenset[str], weights: dict[str, int]) -> None:
        self._patterns = block.patterns
        self.bits: dict[str, int] = {}
        sets = np.zeros(len(block.patterns), dtype=np.int64)
        for at, test in enumerate(block.tests):
            sets |= np.where(
                block.patterns >> at & 1, self.bits.setdefault(test.claim.id, 1 << len(self.bits)), 0
            )
        self._holds = {name: sets & bit > 0 for name, bit in self.bits.items()}
        self._weights = weights
        self.coupled = shared & self.bits.keys()
        own = [weights[name] * self._holds[name] for name in self.bits if name not in shared]
        self._own: Patterns = sum(own, np.zeros(len(sets), dtype=np.int64))
        self._memo: dict[str, _Table] = {}

    def _worth(self, without: str) -> Patterns:
        """Weight of each pattern's own claims but one."""
        if without in self.coupled or without not in self.bits:
            return self._own
        return self._own - self._weights[without] * self._holds[without]

    def _places(self, names: Sequence[str]) -> Patterns:
        """Which of the coupled claims each pattern holds, as a flat index into a table of them."""
        place = np.zeros(len(self._patterns), dtype=np.int64)
        for name in names:
            place = 2 * place + self._holds[name]
        return place

    def table(self, without: str) -> _Table:
        """The largest weight of this block's own claims where the shared ones that are kept all hold."""
        key = without if without in self.bits else ""
        if key not in self._memo:
            names = tuple(sorted(self.coupled - {key}))
            flat = np.full(1 << len(names), _NEVER, dtype=np.int64)
            np.maximum.at(flat, self._places(names), self._worth(key))
            weights = flat.reshape((2,) * len(names))
            for axis in range(len(names)):  # a pattern that holds a claim serves where it is dropped, too
                dropped, kept = np.take(weights, 0, axis), np.take(weights, 1, axis)
                weights = np.stack([np.maximum(dropped, kept), kept], axis)
            self._memo[key] = _Table(names, weights)
        return self._memo[key]

    def patterns(self, tables: Sequence[_Table], without: str) -> Patterns:
        """The patterns at the best ways to keep this block's shared claims, by tables of nothing else."""
        names = tuple(sorted(self.coupled - {without}))
        total = sum((table.over(names) for table in tables), np.zeros((2,) * len(names), dtype=np.int64))
        flat, worth, place = (
            self.table(without).weights.reshape(-1),
            self._worth(without),
            self._places(names),
        )
        found = np.zeros(len(self._patterns), dtype=np.bool_)
        for kept in np.flatnonzero(total.reshape(-1) == total.max()).tolist():
            found |= (place & kept == kept) & (worth == flat[kept])
        return self._patterns[found]
