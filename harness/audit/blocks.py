"""Every claim put to every completion: which of them hold where, as bit patterns.

A *test* is one figure that sources print, put to one quantity over one block of axes. At each completion
the block has a pattern, bit i of which says whether test i holds there. What an audit needs is in the set of
patterns that occur, which is small however many completions there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.audit.axes import Axis, Grid, Numbers, chunks
from harness.audit.formula import one_line
from harness.audit.quantities import ARCHITECTURE, LINKS, QUANTITIES, argument
from harness.audit.quantity import Quantity, Range
from harness.audit.units import Unit
from harness.spec import Architecture, Claim, Reading, Spec, SpecError
from harness.spec.errors import sentence
from harness.spec.printed import Interval
from harness.theory import parameters

Patterns = NDArray[np.int64]
Codes = NDArray[np.uint16] | NDArray[np.uint32]

MAX_TESTS = 20
"""Of one block: its patterns are counted in a table of 2**tests."""

MAX_COMPLETIONS = 100_000_000
"""Of one block: some seconds, and 4 bytes for each."""


@dataclass(frozen=True)
class Test:
    """One figure of a claim: the readings that print it, and between which values it lies."""

    claim: Claim
    readings: tuple[Reading, ...]
    quantity: Quantity
    interval: Interval
    """As printed, in the readings' own unit."""
    unit: Unit

    @property
    def conventions(self) -> tuple[str, ...]:
        """Those that the figure may be counted under, where that is the claim's to say and it does not."""
        if "convention" not in self.quantity.optional or self.quantity.name not in LINKS:
            return ()
        if "convention" in self.claim.given:
            return ()
        return tuple(
            name for name in parameters.CONVENTIONS if name != "experts"
        )  # a part, and no model's size

    def ranges(self, values: Values) -> tuple[Range, ...]:
        """The quantity at every completion in its own dimension, under each convention that it may have."""
        given = self.claim.given
        variants = [{**given, "convention": name} for name in self.conventions] or [dict(given)]
        try:
            with np.errstate(divide="raise", invalid="raise", over="raise"):
                return tuple(values.of(self.quantity, one) for one in variants)
        except (ArithmeticError, ValueError) as error:
            wrong, _, right = str(error).partition("; ")
            if "truth value of an array" in wrong:  # numpy's words for a choice that theory makes once
                wrong, right = "it takes one value of a switch at a time", "give each switch one value"
            raise SpecError(
                sentence(
                    values.spec.path,
                    self.claim.line,
                    f"{self.claim.id}.given",
                    f"{self.quantity.name} cannot be computed: {wrong}",
                    right
                    or f"give constants and facts at which {one_line(self.quantity.formula)} is a number",
                )
            ) from None

    def admitting(self, values: Values) -> tuple[str, ...]:
        """The conventions under which the figure holds at some completion."""
        ranges = zip(self.conventions, self.ranges(values), strict=False)
        return tuple(name for name, one in ranges if self._holds(one, self.unit).any())

    def span(self, values: Values) -> tuple[float, float]:
        """The least and the largest value over all completions, in the figure's own unit."""
        ranges = self.ranges(values)
        low, high = min(float(r.low.min()) for r in ranges), max(float(r.high.max()) for r in ranges)
        return low / self.unit.factor, high / self.unit.factor

    @property
    def fits(self) -> bool:
        """Whether the figure is of the quantity's dimension: a rate is no amount."""
        return self.quantity.dimension in ("", self.unit.dimension) or not self.unit.dimension

    def holds(self, values: Values, unit: Unit | None = None) -> NDArray[np.bool_]:
        """Where theory admits the figure, read in its own unit or in another one of the same dimension."""
        found = [self._holds(one, unit or self.unit) for one in self.ranges(values)]
        return found[0] if len(found) == 1 else np.logical_or.reduce(np.broadcast_arrays(*found))

    def _holds(self, range_: Range, unit: Unit) -> NDArray[np.bool_]:
        low, high = range_
        span = self.interval
        fits = np.array(True)
        if span.low > -np.inf:
            least = span.low * unit.factor
            fits = high > least if span.low_open else high >= least
        if span.high < np.inf:
            most = span.high * unit.factor
            fits = fits & (low < most if span.high_open else low <= most)
        return fits


class Values:
    """Values of a block's axes at many completions, and what quantities are there (each computed once)."""

    def __init__(self, spec: Spec, axes: Mapping[str, Numbers]) -> None:
        self.spec = spec
        self.axes = axes
        self._known: dict[tuple[str, str], Range] = {}

    @cached_property
    def architecture(self) -> Architecture:
        """The spec's architecture with arrays for its axes."""
        prefix = "architecture."
        given = {
            name.removeprefix(prefix): array for name, array in self.axes.items() if name.startswith(prefix)
        }
        return self.spec.vectorised(given)

    def of(self, quantity: Quantity, given: Mapping[str, Any]) -> Range:
        """Bounds of a quantity under a claim's constants."""
        key = (quantity.name, repr(sorted(item for item in given.items() if item != ("convention", "all"))))
        if key not in self._known:
            arguments = {argument(axis): self[axis] for axis in quantity.axes}
            self._known[key] = quantity.range(arguments, given)
        return self._known[key]

    def __getitem__(self, axis: str) -> Any:
        if axis == ARCHITECTURE:
            return self.architecture
        if axis in self.axes:
            return self.axes[axis]
        return self.of(QUANTITIES[axis], {}).low  # a link, in the block that computes it


@dataclass(frozen=True)
class Block:
    """Completions over some axes, the tests on them, and the patterns that occur."""

    name: str
    spec: Spec = field(repr=False)
    axes: tuple[Axis, ...]
    tests: tuple[Test, ...]
    patterns: Patterns
    """Distinct, ascending."""
    counts: Patterns
    """Completions of each pattern."""
    _slices: tuple[tuple[Grid, Codes], ...] = field(repr=False)
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Least and largest value of each link that this block computes."""

    @property
    def completions(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    def select(self, wanted: Patterns) -> tuple[Values, Patterns]:
        """All completions of these patterns, and the pattern of each of them."""
        table = self._table(wanted)
        found: list[dict[str, Numbers]] = []
        patterns: list[Patterns] = []
        for grid, codes in self._slices:
            index = np.flatnonzero(table[codes])
            found.append(grid.at(index))
            patterns.append(codes[index].astype(np.int64))
        values = {axis.name: np.concatenate([one[axis.name] for one in found]) for axis in self.axes}
        return Values(self.spec, values), np.concatenate(patterns)

    def witnesses(self, wanted: Patterns) -> dict[int, dict[str, float]]:
        """The first completion of each of these patterns: the values of its axes."""
        table = self._table(wanted)
        found: dict[int, dict[str, float]] = {}
        for grid, codes in self._slices:
            index = np.flatnonzero(table[codes])
            if not len(index):
                continue
            patterns, first = np.unique(codes[index], return_index=True)
            values = grid.at(index[first])
            for place, pattern in enumerate(patterns.tolist()):
                found[pattern] = {name: float(array[place]) for name, array in values.items()}
            table[patterns] = False
        return found

    def _table(self, wanted: Patterns) -> NDArray[np.bool_]:
        table = np.zeros(1 << (len(self.tests) + 1), dtype=np.bool_)
        table[wanted] = True
        return table


def evaluate(
    name: str, spec: Spec, axes: tuple[Axis, ...], tests: Sequence[Test], links: Sequence[str]
) -> Block:
    """Run every test at every completion; `links` are those whose span the block is asked for.

    Raises ValueError if there are more than MAX_TESTS tests or MAX_COMPLETIONS, or none is feasible.
    """
    size = prod(len(axis) for axis in axes)
    if size > MAX_COMPLETIONS:
        longest = max(axes, key=len).name
        raise ValueError(
            f"the domains span {size:,} completions; at most {MAX_COMPLETIONS:,} are searched: "
            f"give {longest} fewer values"
        )
    if len(tests) > MAX_TESTS:
        raise ValueError(f"block {name!r} has {len(tests)} figures to judge; at most {MAX_TESTS} fit")
    bad = 1 << len(tests)
    counts = np.zeros(bad, dtype=np.int64)
    kept: list[tuple[Grid, Codes]] = []
    spans: dict[str, tuple[float, float]] = {}
    for grid in chunks(axes):
        values = Values(spec, grid.values)
        codes = _codes(grid, tests, values, bad)
        kept.append((grid, codes))
        counts += np.bincount(codes, minlength=2 * bad)[:bad]
        for link in links:
            array = values[link]
            least, most = spans.get(link, (np.inf, -np.inf))
            spans[link] = (min(least, float(np.min(array))), max(most, float(np.max(array))))
    patterns = np.flatnonzero(counts)
    if not len(patterns):
        raise ValueError("no completion of the unknowns makes a model; widen their domains")
    return Block(name, spec, axes, tuple(tests), patterns, counts[patterns], tuple(kept), spans)


def _codes(grid: Grid, tests: Sequence[Test], values: Values, bad: int) -> Codes:
    """Patterns of a grid, flat; completions that make no model have bit `bad`, and no other."""
    kind = np.uint16 if bad < 1 << 16 else np.uint32
    by_shape: dict[tuple[int, ...], Codes] = {}
    for bit, test in enumerate(tests):
        holds = np.asarray(test.holds(values))
        part: Codes = np.multiply(holds, 1 << bit, dtype=kind)
        by_shape[holds.shape] = by_shape[holds.shape] | part if holds.shape in by_shape else part
    total: Codes = np.zeros((), dtype=kind)
    for part in sorted(by_shape.values(), key=np.size):
        total = total | part
    if not grid.feasible.all():
        total = np.where(grid.feasible, total, kind(bad))
    return np.ascontiguousarray(np.broadcast_to(total, grid.shape)).reshape(-1)


def link_axis(
    name: str,
    span: tuple[float, float],
    stated: Sequence[tuple[float, float]],
    left: Sequence[float] = (),
) -> Axis:
    """A link as an axis: its whole span in geometric steps, more finely through the intervals `stated`, and
    the values `left` by the architecture's own claims.

    Each stated interval is tried at both ends, so that no bound of a claim falls between two steps.
    """
    low, high = span
    if low == high:
        return Axis(name, (low,))
    fine = [value for ends in stated for value in np.linspace(*ends, 9).tolist()]
    within = [value for value in (*fine, *left) if low <= value <= high]
    return Axis(name, tuple(sorted({low, high, *np.geomspace(low, high, 60).tolist()[1:-1], *within})))
