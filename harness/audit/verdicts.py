"""The audit of a spec: a verdict on every figure, and the smallest conflicts between claims.

A verdict is leave-one-out: it is over the completions of a block at which as many of the other claims hold as
can hold together (`harness.audit.optima`). Where the block takes a count of the architecture as given, only
those of them are left at which the count lies between the least and the largest that the architecture's own
block has at that optimum, so that the blocks are joined there; if that leaves none, all of them stay, and the
finding says so. A smallest conflict is one of a single block, over everything that its axes range over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.audit.assemble import Case, assemble
from harness.audit.blocks import Block, Patterns, Test, Values
from harness.audit.conflicts import members_of, minimal_conflicts
from harness.audit.deciders import Decider, Pair, Step, deciders, steps
from harness.audit.figures import Figure
from harness.audit.links import Spans, left_by, tried
from harness.audit.optima import Optima
from harness.audit.quantities import QUANTITIES
from harness.audit.units import Unit, slips
from harness.spec import Claim, Spec

Outcome = Literal["consistent", "undetermined", "contradicts", "not quantitative", "not yet judged"]


@dataclass(frozen=True)
class Finding:
    """What one block says about a figure, over the completions that all other claims admit."""

    test: Test
    block: str
    admitted: int
    """Completions at the optimum of the others."""
    holding: int
    """Those of them at which the figure holds."""
    low: float
    high: float
    """Of the quantity over them, in the figure's own unit."""
    decider: Decider | None
    """If it holds at some of them only."""
    pair: Pair | None
    """If no axis decides alone."""
    steps: tuple[Step, ...]
    """From the example, if it holds at some of them only."""
    assumed: bool | None
    """Whether it holds where every assumption has its own value; None where these leave it open, or are not
    tried at other values."""
    assumptions: Mapping[str, tuple[float, ...]]
    """The assumptions that the quantity takes, and their values at these completions."""
    slips: tuple[str, ...]
    """How else the unit may be read, so that theory admits the figure."""
    example: Mapping[str, float]
    """One of these completions: with assumptions at their own values if they can be, then one that holds."""
    holds_there: bool
    conventions: tuple[str, ...]
    """Those that the figure may be counted under to hold there, if its claim names none."""
    linked: Spans
    """The counts that the block takes from the architecture, and what the claims there leave of them."""
    apart: bool
    """Whether no completion here has what they leave, so that the finding is over all values."""


@dataclass(frozen=True)
class Verdict:
    """On one figure of one claim."""

    claim: Claim
    figure: Figure
    outcome: Outcome
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    """Of a verdict without findings, or beside them."""

    @property
    def decisive(self) -> Finding | None:
        """The finding that the outcome rests on; None before it is judged."""
        for finding in self.findings:
            wanted = {"contradicts": 0, "consistent": finding.admitted}
            if wanted.get(self.outcome, finding.holding) == finding.holding:
                return finding
        return None

    @property
    def slips(self) -> tuple[str, ...]:
        """Readings of the unit that every block admits."""
        first, *others = self.findings or (None,)
        return (
            tuple(slip for slip in first.slips if all(slip in one.slips for one in others)) if first else ()
        )


@dataclass(frozen=True)
class Member:
    """A figure as part of a conflict."""

    claim: Claim
    figure: Figure


@dataclass(frozen=True)
class Release:
    """A completion where all of a conflict holds but one member, whose quantity is `low` to `high`."""

    dropped: Member
    values: Mapping[str, float]
    low: float
    high: float


@dataclass(frozen=True)
class Conflict:
    """Claims that no completion satisfies together, while it satisfies them without any one of them."""

    block: str
    members: tuple[Member, ...]
    releases: tuple[Release, ...]
    """One for each member, in their order; empty if a single figure is in conflict with the domains alone."""


@dataclass(frozen=True)
class Judged:
    """Everything the audit found."""

    case: Case
    verdicts: tuple[Verdict, ...]
    conflicts: tuple[Conflict, ...]


def judge(spec: Spec) -> Judged:
    """Judge every figure of every claim. Raises SpecError on a spec that cannot be audited."""
    case = assemble(spec)
    optima = Optima(case.blocks)
    tested = [(place, test) for place, block in enumerate(case.blocks) for test in block.tests]
    places = {block.name: place for place, block in enumerate(case.blocks)}
    foreign = [(places[name], test) for name, test in case.foreign if name in places]
    homes = {test.claim.id: (place,) for place, test in foreign}  # where no figure that fits may be tested
    tested += foreign
    judged = list(dict.fromkeys(test.claim.id for _, test in tested))
    admitted = {claim: optima.admitted(claim, *homes.get(claim, ())) for claim in judged}
    left = left_by(case.blocks, optima, judged)
    found = {place: _selected(block, place, admitted.values()) for place, block in enumerate(case.blocks)}
    verdicts = []
    for claim in spec.claims:
        for figure in case.figures[claim.id] or (Figure((), None, Unit("")),):
            unjudged = case.unjudged.get(claim.id) or figure.unjudged
            if unjudged is not None:
                verdicts.append(Verdict(claim, figure, unjudged.outcome, reason=unjudged.reason))
                continue
            tests = [(p, t) for p, t in tested if t.claim.id == claim.id and t.readings == figure.readings]
            findings = tuple(
                _finding(case.blocks[place], test, admitted[claim.id][place], left[claim.id], *found[place])
                for place, test in tests
            )
            verdicts.append(
                Verdict(claim, figure, _outcome(findings), findings, _remark(tests[0][1], findings))
            )
    return Judged(case, tuple(verdicts), tuple(_conflicts(case)))


def _selected(
    block: Block, place: int, admitted: Iterable[Mapping[int, Patterns]]
) -> tuple[Values, Patterns]:
    wanted = [one[place] for one in admitted if place in one]
    return block.select(np.unique(np.concatenate([*wanted, np.empty(0, dtype=np.int64)])))


def _remark(test: Test, findings: Sequence[Finding]) -> str:
    """What a reader has to know beside the figures: a foreign unit, or the conventions that reproduce it."""
    if not test.fits:
        return f"printed in {test.unit.dimension}, while the quantity is counted in {test.quantity.dimension}"
    if not test.conventions:
        return ""
    names = dict.fromkeys(name for finding in findings for name in finding.conventions)
    return f"as counted under {', '.join(names)}" if names else "under no counting convention"


def _outcome(findings: Sequence[Finding]) -> Outcome:
    """Nowhere in some block: contradicts. Everywhere in some: consistent, as the others only know less."""
    if any(not finding.holding for finding in findings):
        return "contradicts"
    if any(finding.holding == finding.admitted for finding in findings):
        return "consistent"
    return "undetermined"


def _finding(
    block: Block, test: Test, admitted: Patterns, left: Spans, values: Values, patterns: Patterns
) -> Finding:
    """`values` are completions of the block that some claim needs, `patterns` theirs."""
    mask = np.isin(patterns, admitted)
    linked = {axis.name: left[axis.name] for axis in block.axes if axis.name in left}
    joined = mask
    for axis in block.axes:
        if axis.name in linked:
            least, most = tried(axis, linked[axis.name])
            joined = joined & (values.axes[axis.name] >= least) & (values.axes[axis.name] <= most)
    apart = not joined.any()
    mask = mask if apart else joined
    chosen = Values(values.spec, {name: array[mask] for name, array in values.axes.items()})
    count = int(mask.sum())
    holds = _spread(test.holds(chosen), count) if test.fits else np.zeros(count, dtype=np.bool_)
    some = 0 < holds.sum() < count
    decider, pair = deciders(chosen.axes, holds, test.quantity.axes) if some else (None, None)
    nominal = _nominal(chosen, count)
    assumed = None if nominal.all() or not nominal.any() else _all_or_none(holds[nominal])
    slipped = () if holds.any() else tuple(
        name
        for name, unit in slips(test.readings[0].unit, test.quantity.dimension, test.quantity.side == "exact")
        if test.holds(chosen, unit).any()
    )  # fmt: skip
    first = int(np.argmax(2 * nominal + holds))
    held = first if holds[first] else int(np.argmax(holds))
    example = {name: float(array[first]) for name, array in chosen.axes.items()}
    return Finding(
        test,
        block.name,
        count,
        int(holds.sum()),
        *test.span(chosen),
        decider,
        pair,
        steps(chosen.axes, holds, first) if some else (),
        assumed,
        _assumptions(test, chosen),
        slipped,
        example,
        bool(holds[first]),
        test.admitting(Values(values.spec, {name: array[[held]] for name, array in chosen.axes.items()})),
        linked,
        apart,
    )


def _nominal(values: Values, count: int) -> NDArray[np.bool_]:
    """Where every assumption has the value that the spec assumes, or the command line."""
    found = np.ones(count, dtype=np.bool_)
    for name, assumption in values.spec.assumptions.items():
        if f"assumptions.{name}" in values.axes:
            found &= values.axes[f"assumptions.{name}"] == assumption.value
    return found


def _assumptions(test: Test, values: Values) -> dict[str, tuple[float, ...]]:
    names = [axis for axis in test.quantity.axes if axis.startswith("assumptions.")]
    return {name: tuple(np.unique(values.axes[name]).tolist()) for name in names}


def _all_or_none(holds: NDArray[np.bool_]) -> bool | None:
    return True if holds.all() else None if holds.any() else False


def _spread(holds: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    return np.broadcast_to(holds, (count,))


def _conflicts(case: Case) -> list[Conflict]:
    """Every minimal conflict with at most one figure of each claim, those with the fewest members first."""
    found: list[tuple[frozenset[object], Conflict]] = []
    for block in case.blocks:
        everything = (1 << len(block.tests)) - 1
        sets = [members_of(bits) for bits in minimal_conflicts(block.patterns.tolist(), everything)]
        sets = [places for places in sets if len({block.tests[i].claim.id for i in places}) == len(places)]
        found += [
            (frozenset((block.tests[i].claim.id, block.tests[i].readings) for i in places), conflict)
            for places, conflict in zip(sets, _explained(case, block, sets), strict=True)
        ]
    least = [conflict for key, conflict in found if not any(other < key for other, _ in found)]
    return sorted(least, key=_rank)


def _rank(conflict: Conflict) -> tuple[int, int]:
    """Few members first, then those whose claims state an axis itself: they need no formula to be seen."""
    return len(conflict.members), sum(member.claim.quantity in QUANTITIES for member in conflict.members)


def _explained(case: Case, block: Block, sets: Sequence[Sequence[int]]) -> list[Conflict]:
    """Conflicts, given as positions of tests, with a completion for each member that is dropped.

    A figure that conflicts with the domains alone has none.
    """
    pattern: dict[tuple[int, int], int] = {}
    for number, places in enumerate(sets):
        for dropped in places if len(places) > 1 else ():
            rest = sum(1 << i for i in places if i != dropped)
            able = block.patterns[block.patterns & rest == rest]
            # The witness that breaks the fewest other claims says most.
            pattern[number, dropped] = int(able[np.argmax(np.bitwise_count(able))])
    witnesses = block.witnesses(np.array(sorted(set(pattern.values())), dtype=np.int64))
    conflicts = []
    for number, places in enumerate(sets):
        members = {i: Member(block.tests[i].claim, case.shown(block.tests[i])) for i in places}
        releases = []
        for i in places if len(places) > 1 else ():
            values = witnesses[pattern[number, i]]
            here = Values(case.spec, {name: np.array([value]) for name, value in values.items()})
            releases.append(Release(members[i], values, *block.tests[i].span(here)))
        conflicts.append(Conflict(block.name, tuple(members.values()), tuple(releases)))
    return conflicts
