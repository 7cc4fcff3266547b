"""Leave-one-out: the completions that satisfy as many of the other claims as can hold together.

Source claims count before our own assumptions, so that an assumption is the first to give way. A claim whose
sources print several figures counts as satisfied where any of them holds. Blocks are independent but for the
claims that are tested in several of them, which are satisfied only where every such block satisfies them:
these *shared* claims are kept or dropped one after the other (branch and bound: Land and Doig 1960, An
automatic method of solving discrete programming problems), until every way as good as the best is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from harness.audit.blocks import Block, Patterns

_SOURCE = 1 << 10
"""Weight of a source claim over an assumption: more than all assumptions of a spec together."""

_Names = frozenset[str]


class Optima:
    """Best patterns of each block with one claim left out."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        homes: dict[str, list[int]] = {}
        for place, block in enumerate(blocks):
            for name in dict.fromkeys(test.claim.id for test in block.tests):
                homes.setdefault(name, []).append(place)
        self.shared = {name: places for name, places in homes.items() if len(places) > 1}
        self._sides = [
            _Side(block, frozenset(name for name in self.shared if place in self.shared[name]), place, homes)
            for place, block in enumerate(blocks)
        ]

    def admitted(self, claim: str, place: int | None = None) -> dict[int, Patterns]:
        """Block position -> the block's patterns at the optimum of all claims but this one.

        Of the blocks that test the claim only, and of `place`: no other block tells anything about it.
        """
        found: dict[int, Patterns] = {}
        for group in self._groups(claim):
            wanted = [i for i in group if claim in self._sides[i].bits or i == place]
            ways = self._ways(group, claim) if wanted else []
            for i in wanted:
                side = self._sides[i]
                best = {kept & side.coupled for kept in ways}
                patterns = [side.best(kept, side.coupled - kept, claim)[1] for kept in best]
                found[i] = np.unique(np.concatenate(patterns))
        return found

    def _groups(self, claim: str) -> Iterator[list[int]]:
        """Blocks that claims other than this one couple, directly or through other blocks."""
        left = set(range(len(self._sides)))
        while left:
            group, new = set[int](), {min(left)}
            while new:
                group |= new
                names = {name for i in new for name in self._sides[i].coupled - {claim}}
                new = {i for name in names for i in self.shared[name]} - group
            left -= group
            yield sorted(group)

    def _ways(self, group: Sequence[int], claim: str) -> list[_Names]:
        """The sets of shared claims that are kept where the blocks of a group are at their best together."""
        sides = [self._sides[i] for i in group]
        names = sorted({name for side in sides for name in side.coupled} - {claim})
        best = -1
        ways: list[_Names] = []

        def search(depth: int, kept: _Names, dropped: _Names) -> None:
            nonlocal best
            bounds = [side.best(kept & side.coupled, dropped & side.coupled, claim)[0] for side in sides]
            if min(bounds) < 0 or sum(bounds) < best:
                return
            if depth < len(names):
                search(depth + 1, kept | {names[depth]}, dropped)
                search(depth + 1, kept, dropped | {names[depth]})
                return
            if sum(bounds) > best:
                best = sum(bounds)
                ways.clear()
            ways.append(kept)

        search(0, frozenset(), frozenset())
        return ways


class _Side:
    """One block's patterns, as sets of claims."""

    def __init__(self, block: Block, coupled: _Names, place: int, homes: dict[str, list[int]]) -> None:
        self.block = block
        self.coupled = coupled
        self.bits: dict[str, int] = {}
        self._sets = np.zeros(len(block.patterns), dtype=np.int64)
        self._worth: dict[str, Patterns] = {}
        for at, test in enumerate(block.tests):
            bit = self.bits.setdefault(test.claim.id, 1 << len(self.bits))
            self._sets |= np.where(block.patterns >> at & 1, bit, 0)
            if homes[test.claim.id][0] == place:  # a shared claim counts once, in the first block that has it
                weight = 1 if test.claim.kind == "assumption" else _SOURCE
                self._worth[test.claim.id] = np.where(self._sets & bit, weight, 0)
        self._total = sum(self._worth.values(), np.zeros(len(block.patterns), dtype=np.int64))
        self._memo: dict[tuple[_Names, _Names, str], tuple[int, Patterns]] = {}

    def best(self, kept: _Names, dropped: _Names, without: str) -> tuple[int, Patterns]:
        """The largest weight where all of `kept` hold, and its patterns; what else is shared may hold or not.

        `dropped` and `without` count nothing. The weight is -1 if `kept` cannot hold together.
        """
        key = (kept, dropped, without if without in self.bits else "")
        if key not in self._memo:
            need = sum(self.bits[name] for name in kept)
            possible = np.flatnonzero(self._sets & need == need)
            weight = self._total[possible]
            for name in {*dropped, without} & self._worth.keys():
                weight = weight - self._worth[name][possible]
            most = int(weight.max(initial=-1))
            self._memo[key] = (most, self.block.patterns[possible[weight == most]])
        return self._memo[key]
