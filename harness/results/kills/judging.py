"""What the runs of mutants prove: which property killed which, by what, and whether for the right reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Literal

from harness.conformance.property import Property
from harness.mutants import Mutant
from harness.mutants.defects import Defect
from harness.results.gate import FAILED, OK, VOID
from harness.results.kills.stages import shown_as, sparing
from harness.results.record import Record

Ending = Literal["killed", "crashed", "passed", "unsupported", "void"]
Status = Literal["killed", "stage not named", "survived", "not measured"]


@dataclass(frozen=True)
class Cell:
    """One property on one mutant."""

    property: str
    mutant: str
    spec: str
    outcome: Ending
    """killed: by a counterexample; crashed: by an exception, a malformed answer or taking too long."""
    stage: str
    """The stage that the counterexample names."""
    reason: str
    seconds: float
    claimed: bool
    """The property says that it must kill this mutant."""
    right: bool
    """Killed by a property that claims it (by any, where none does), at the stage that it breaks."""


@dataclass(frozen=True)
class Hunted:
    """All that was measured on one mutant, in the order of the run."""

    mutant: Mutant
    claimants: tuple[str, ...]
    """Slugs of the properties that were to run and claim it."""
    cells: tuple[Cell, ...]
    ending: str = ""
    """Why there is no result; empty where there is one."""
    canary: str = ""
    """Why no outcome of the run can be believed; empty where its canary was caught."""

    @property
    def kills(self) -> tuple[Cell, ...]:
        """Cells with a counterexample."""
        return tuple(cell for cell in self.cells if cell.outcome == "killed")

    @property
    def first(self) -> Cell | None:
        """The first counterexample."""
        return next(iter(self.kills), None)

    @property
    def seconds(self) -> float | None:
        """Of properties run until there was a counterexample, that one's own included."""
        return self._until(self.first)

    @property
    def right_seconds(self) -> float | None:
        """Likewise, until the first kill for the right reason."""
        return self._until(next((cell for cell in self.kills if cell.right), None))

    def _until(self, found: Cell | None) -> float | None:
        if found is None:
            return None
        return sum(cell.seconds for cell in self.cells[: self.cells.index(found) + 1])

    @property
    def status(self) -> Status:
        """What became of the mutant."""
        if self.ending:
            return "not measured"
        if not self.kills:
            return "survived"
        return "killed" if any(cell.right for cell in self.cells) else "stage not named"

    def broken(self) -> tuple[str, ...]:
        """A sentence for each claim that does not hold, and each stage that is blamed wrongly."""
        if self.ending:
            return ()
        name, found = self.mutant.name, {cell.property: cell for cell in self.cells}
        wrong = []
        for slug in self.claimants:
            cell = found.get(slug)
            if cell is None:
                wrong.append(f"{slug} claims {name}, and does not apply to {self.mutant.spec}")
            elif cell.outcome != "killed":
                wrong.append(f"{slug} claims {name}: {cell.outcome} {cell.reason}".rstrip())
        for slug in sparing(self.mutant.stage):
            cell = found.get(slug)
            if cell is not None and cell.outcome != "passed" and cell.stage != self.mutant.stage:
                wrong.append(
                    f"{slug} is before the defect of {name}: {cell.outcome} {cell.stage} {cell.reason}"
                )
        return tuple(wrong)


def judge(
    mutant: Mutant, records: Iterable[Record], claimants: Sequence[str], *, ending: str = "", canary: str = ""
) -> Hunted:
    """What the records of one mutant's run prove."""
    cells = tuple(_cell(mutant, record, frozenset(claimants)) for record in records)
    return Hunted(mutant, tuple(claimants), cells, ending, canary)


def _cell(mutant: Mutant, record: Record, claimants: frozenset[str]) -> Cell:
    outcome: Ending = "void"
    if record.outcome == "failed":
        outcome = "crashed" if record.crashed else "killed"
    elif record.outcome in ("passed", "unsupported"):
        outcome = record.outcome
    claimed = record.slug in claimants
    named = record.stage in shown_as(mutant.stage, mutant.side)
    return Cell(
        property=record.slug,
        mutant=mutant.name,
        spec=record.spec,
        outcome=outcome,
        stage=record.stage,
        reason=record.reason,
        seconds=record.duration_s,
        claimed=claimed,
        right=outcome == "killed" and named and (claimed or not claimants),
    )


@dataclass(frozen=True)
class Matrix:
    """Every mutant that was asked for, and the properties that were to kill them."""

    hunted: tuple[Hunted, ...]
    properties: tuple[Property, ...]
    """Those that claim one of the mutants."""
    candidates: int
    """Properties that there are to run on each mutant."""
    register: Mapping[str, Defect]
    """The shipped defects by id that none of the mutants leaves out."""

    @cached_property
    def by_name(self) -> dict[str, Hunted]:
        """By mutant."""
        return {one.mutant.name: one for one in self.hunted}

    @cached_property
    def scores(self) -> dict[str, int]:
        """By property: how many mutants it killed for the right reason."""
        scores = {prop.slug: 0 for prop in self.properties}
        for one in self.hunted:
            for cell in one.cells:
                if cell.property in scores:
                    scores[cell.property] += cell.right
        return scores

    def of_status(self, *statuses: Status) -> tuple[Hunted, ...]:
        """The mutants of which this became."""
        return tuple(one for one in self.hunted if one.status in statuses)

    def broken(self) -> tuple[str, ...]:
        """A sentence for each claim that does not hold."""
        return tuple(sentence for one in self.hunted for sentence in one.broken())

    def shown(self, defect: Defect) -> bool:
        """Whether every mutant of a shipped defect was killed for the right reason."""
        found = [self.by_name.get(name) for name in defect.mutants]
        return bool(found) and all(one is not None and one.status == "killed" for one in found)

    def median_seconds(self) -> float | None:
        """Of the times to the first kill."""
        times = self.times()
        return median(times) if times else None

    def times(self) -> tuple[float, ...]:
        """Seconds to the first kill, of each mutant that was killed."""
        return tuple(one.seconds for one in self.hunted if one.seconds is not None)

    @property
    def canary(self) -> str:
        """Why no outcome can be believed; empty where the canary was caught in every run."""
        return next((one.canary for one in self.hunted if one.canary), "")

    @property
    def code(self) -> int:
        """0: all killed, and as claimed; 1: not so; 69: nothing was measured, or a canary lived."""
        if self.canary or not any(one.cells for one in self.hunted):
            return VOID
        whole = not self.of_status("survived", "not measured") and not self.broken()
        return OK if whole else FAILED
