"""Leave-one-out: the completions that satisfy as many of the other claims as can hold together.

Source claims count before our own assumptions, so that an assumption is the first to give way. A claim whose
sources print several figures counts as satisfied where any of them holds. Blocks are independent but for the
claims that are tested in several of them, which are satisfied only where every such block satisfies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from harness.audit.blocks import Block, Patterns

_SOURCE = 1 << 10
"""Weight of a source claim over an assumption: more than all assumptions of a spec together."""


class Optima:
    """Best patterns of each block with one claim left out."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        homes: dict[str, int] = {}
        for block in blocks:
            for name in {test.claim.id for test in block.tests}:
                homes[name] = homes.get(name, 0) + 1
        self.shared = frozenset(name for name, count in homes.items() if count > 1)
        self._sides = [_Side(block, self.shared) for block in blocks]
        self._weights = {name: side.weights[name] for side in self._sides for name in side.bits}

    def admitted(self, claim: str, place: int | None = None) -> dict[int, Patterns]:
        """Block position -> the block's patterns at the optimum of all claims but this one.

        Of the blocks that test the claim only, and of `place`: no other block tells anything about it.
        """
        sides = [side for side in self._sides if claim in side.bits or side.coupled]
        ceiling = sum(side.best(frozenset(), claim)[0] for side in sides)
        best = -1
        chosen: list[frozenset[str]] = []
        for kept, weight in self._subsets(self.shared - {claim}):
            if weight + ceiling < best:
                break  # subsets come by falling weight: none of the rest can do better
            solved = [side.best(kept, claim)[0] for side in sides]
            score = -1 if min(solved, default=0) < 0 else weight + sum(solved)
            if score > best:
                best = score
                chosen.clear()
            if score == best:
                chosen.append(kept)
        return {
            i: np.unique(np.concatenate([side.best(kept, claim)[1] for kept in chosen]))
            for i, side in enumerate(self._sides)
            if claim in side.bits or i == place
        }

    def _subsets(self, names: frozenset[str]) -> Iterator[tuple[frozenset[str], int]]:
        """Subsets of claims and their weights, the heaviest first."""
        every = [
            (frozenset(kept), sum(self._weights[name] for name in kept))
            for n in range(len(names) + 1)
            for kept in combinations(sorted(names), n)
        ]
        return iter(sorted(every, key=lambda one: -one[1]))


class _Side:
    """One block's patterns, as sets of claims."""

    def __init__(self, block: Block, shared: frozenset[str]) -> None:
        self.block = block
        self.bits: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.sets = np.zeros(len(block.patterns), dtype=np.int64)
        for place, test in enumerate(block.tests):
            bit = self.bits.setdefault(test.claim.id, 1 << len(self.bits))
            self.weights[test.claim.id] = 1 if test.claim.kind == "assumption" else _SOURCE
            self.sets |= np.where(block.patterns >> place & 1, bit, 0)
        self.coupled = shared & self.bits.keys()
        self._own = [name for name in self.bits if name not in shared]
        self._memo: dict[tuple[frozenset[str], str], tuple[int, Patterns]] = {}

    def best(self, kept: frozenset[str], without: str) -> tuple[int, Patterns]:
        """The largest weight of this block's own claims but one, where all of `kept` hold, and its patterns.

        The weight is -1 if they cannot all hold.
        """
        key = (kept & self.coupled, without if without in self.bits else "")
        if key not in self._memo:
            need = sum(self.bits[name] for name in key[0])
            possible = np.flatnonzero(self.sets & need == need)
            weight = np.zeros(len(possible), dtype=np.int64)
            for name in self._own:
                if name != without:
                    weight += self.weights[name] * (self.sets[possible] & self.bits[name] > 0)
            most = int(weight.max(initial=-1))
            self._memo[key] = (most, self.block.patterns[possible[weight == most]])
        return self._memo[key]
