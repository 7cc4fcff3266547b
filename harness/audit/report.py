"""The audit as data and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from harness.audit.assume import assumption_table, pin_table
from harness.audit.deciders import Decider
from harness.audit.derivation import derivation
from harness.audit.explain import about
from harness.audit.figures import Figure
from harness.audit.sources import (
    OUTCOMES,
    Disagreement,
    count_table,
    counts,
    disagreement_table,
    disagreements,
    documents,
    prints,
)
from harness.audit.verdicts import Conflict, Judged, Outcome, Verdict, judge
from harness.audit.wording import assumptions, decided, dimensions, joined, span, theory
from harness.spec import Spec
from harness.theory.describe import Table


@dataclass(frozen=True)
class Audit:
    """What follows from judging every claim of a spec."""

    spec: Spec
    verdicts: tuple[Verdict, ...]
    """One for each figure of each claim, in the order of the file."""
    conflicts: tuple[Conflict, ...]
    """The smallest sets of claims that cannot hold together."""
    blocks: Mapping[str, int]
    """Completions of each block of axes."""
    _judged: Judged

    @property
    def completions(self) -> int:
        """How many completions the claims were put to, over all blocks."""
        return sum(self.blocks.values())

    @property
    def disagreements(self) -> tuple[Disagreement, ...]:
        """Claims with several figures, and which of them theory admits."""
        return disagreements(self.verdicts)

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many figures have each outcome."""
        found = [verdict.outcome for verdict in self.verdicts]
        return {outcome: found.count(outcome) for outcome in OUTCOMES}

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dumps: an open end of a range is None."""
        return {
            "name": self.spec.name,
            "title": self.spec.title,
            "digest": self.spec.digest,
            "completions": self.completions,
            "blocks": dict(self.blocks),
            "counts": dict(self.counts),
            "verdicts": [self._verdict(verdict) for verdict in self.verdicts],
            "conflicts": [self._conflict(conflict) for conflict in self.conflicts],
            "claims": counts(self.spec, self.verdicts),
            "assumed": {pin.axis: list(pin.values) for pin in self.spec.pins},
            "assumptions": [
                {
                    "name": one.name,
                    "value": one.value,
                    "values": list(one.values),
                    "unit": one.unit,
                    "why": one.why,
                    "sources": list(one.sources),
                }
                for one in self.spec.assumptions.values()
            ],
            "disagreements": [
                {
                    "claim": one.claim,
                    "figures": {str(v.figure): v.outcome for v in one.verdicts},
                    "documents": {name: prints(one.verdicts, name) for name in documents(self.spec)},
                    "admits": one.admits,
                }
                for one in self.disagreements
            ],
        }

    def tables(self) -> list[Table]:
        """For people: counts, verdicts, assumptions, disagreements, conflicts, and what was searched."""
        if not self.verdicts:
            title = f"{self.spec.name} states no claims: there is nothing to judge"
            return [Table(title, (), ())]
        return list(self._tables())

    def _tables(self) -> Iterator[Table]:
        if self.spec.pins:
            yield pin_table(self.spec)
        yield count_table(self.spec, self.verdicts)
        summary = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        headers = ("claim", "printed", "by", "verdict", "theory", "why")
        for kind, title in (
            ("claim", f"{self.spec.name}: {summary}"),
            ("assumption", "Conventions of ours, judged as claims are"),
        ):
            rows = [self._row(v) for v in self.verdicts if v.claim.kind == kind and v.findings]
            if rows:
                yield Table(title, headers, tuple(rows))
        if self.spec.assumptions:
            yield assumption_table(self.spec)
        if self.disagreements:
            yield disagreement_table(self.spec, self.disagreements)
        shown = self._smallest()
        if shown:
            rows = [row for number, conflict in enumerate(shown, 1) for row in self._rows(number, conflict)]
            title = "Cannot hold together: the smallest conflicts of every figure that contradicts"
            title += f", {len(shown)} of {len(self.conflicts)}"
            yield Table(title, ("no.", "without", "printed", "it is", "at"), tuple(rows))
        for outcome in OUTCOMES[3:]:
            rows = [(v.claim.id, str(v.figure), self._by(v.figure), v.reason) for v in self._of(outcome)]
            if rows:
                yield Table(outcome.capitalize(), ("claim", "printed", "by", "why"), tuple(rows))
        title = f"Completions searched: {self.completions:,}"
        yield Table(title, ("block", "completions"), tuple(self.blocks.items()))

    def _by(self, figure: Figure) -> str:
        """Who prints a figure, in the order of the file."""
        order = list(self.spec.sources)
        return ", ".join(sorted(figure.sources, key=lambda one: order.index(one) if one in order else -1))

    def _of(self, outcome: Outcome) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome == outcome]

    def _row(self, verdict: Verdict) -> tuple[object, ...]:
        return (
            verdict.claim.id,
            str(verdict.figure),
            self._by(verdict.figure),
            verdict.outcome,
            theory(verdict.decisive) if verdict.decisive else "",
            self._why(verdict),
        )

    def _why(self, verdict: Verdict) -> str:
        found = verdict.decisive
        if found is None or not found.apart:
            return self._reason(verdict)
        apart = f"though the claims on the architecture leave {joined(found)}"
        return "; ".join(part for part in (self._reason(verdict), apart) if part)

    def _reason(self, verdict: Verdict) -> str:
        if verdict.outcome == "undetermined":
            return decided(verdict.decisive) if verdict.decisive else ""
        if verdict.outcome != "contradicts":
            found = assumptions(verdict.decisive) if verdict.decisive else ""
            return "; ".join(part for part in (verdict.reason, f"with {found}" if found else "") if part)
        if verdict.slips:
            return f"admitted if read {' or '.join(verdict.slips)}"
        conflicts = about(self.conflicts, verdict)
        if not conflicts:
            one = verdict.decisive
            left = f", which leave {joined(one)}" if one and one.linked and not one.apart else ""
            return f"not with as many of the others as can hold together{left}"
        others = [m.claim.id for m in conflicts[0].members if m.claim.id != verdict.claim.id]
        found = assumptions(verdict.decisive) if verdict.decisive else ""
        why = f"not with {', '.join(others)}" if others else "out of reach of every completion"
        return f"{why}, whether {found}" if found else why

    def _smallest(self) -> list[Conflict]:
        """For each figure that contradicts, the smallest conflict it is in."""
        found: list[Conflict] = []
        for verdict in self.verdicts:
            conflicts = about(self.conflicts, verdict)
            least = len(conflicts[0].members) if conflicts else 0
            found += [c for c in conflicts if len(c.members) == least and c not in found]
        return sorted(found, key=lambda conflict: len(conflict.members))

    def _rows(self, number: int, conflict: Conflict) -> Iterator[tuple[object, ...]]:
        if not conflict.releases:
            member = conflict.members[0]
            yield (number, member.claim.id, str(member.figure), "out of reach of every completion", "")
        for release in conflict.releases:
            figure = release.dropped.figure
            then = span(release.low, release.high, figure.readings[0].unit)
            where = dimensions(self.spec, release.values)
            yield (number, release.dropped.claim.id, str(figure), then, where)

    def _verdict(self, verdict: Verdict) -> dict[str, Any]:
        interval = verdict.figure.interval
        return {
            "claim": verdict.claim.id,
            "statement": verdict.claim.statement,
            "kind": verdict.claim.kind,
            "quantity": verdict.claim.quantity,
            "printed": [
                {"value": r.value, "unit": r.unit, "sources": list(r.sources)}
                for r in verdict.figure.readings
            ],
            "interval": None if interval is None else [_end(interval.low), _end(interval.high)],
            "verdict": verdict.outcome,
            "reason": verdict.reason,
            "read": list(verdict.slips),
            "findings": [
                {
                    "block": finding.block,
                    "low": _end(finding.low),
                    "high": _end(finding.high),
                    "unit": finding.test.readings[0].unit,
                    "completions": finding.admitted,
                    "holding": finding.holding,
                    "linked": {name: list(ends) for name, ends in finding.linked.items()},
                    "apart": finding.apart,
                    "derivation": list(derivation(self.spec, finding)),
                    "assumptions": {name: list(found) for name, found in finding.assumptions.items()},
                    "holds_at_what_is_assumed": finding.assumed,
                    "turns_with": {one.axis: list(one.values) for one in finding.steps},
                    "decider": None if finding.decider is None else _decider(finding.decider),
                    "pair": None
                    if finding.pair is None
                    else {
                        "axis": finding.pair.axis,
                        "alone": finding.pair.alone,
                        "share": finding.pair.share,
                        "cases": [{"at": at, **_decider(one)} for at, one in finding.pair.cases],
                    },
                }
                for finding in verdict.findings
            ],
        }

    def _conflict(self, conflict: Conflict) -> dict[str, Any]:
        return {
            "block": conflict.block,
            "members": [{"claim": m.claim.id, "printed": str(m.figure)} for m in conflict.members],
            "releases": [
                {
                    "without": release.dropped.claim.id,
                    "low": _end(release.low),
                    "high": _end(release.high),
                    "at": dict(release.values),
                }
                for release in conflict.releases
            ],
        }


def audit(spec: Spec) -> Audit:
    """Judge every claim of a spec. Raises SpecError on a spec that cannot be audited."""
    judged = judge(spec)
    blocks = {block.name: block.completions for block in judged.case.blocks}
    return Audit(spec, judged.verdicts, judged.conflicts, blocks, judged)


def _decider(decider: Decider) -> dict[str, Any]:
    return {
        "axis": decider.axis,
        "holds": list(decider.holds),
        "fails": list(decider.fails),
        "alone": decider.alone,
        "turns": [list(ends) for ends in decider.turns],
    }


def _end(value: float) -> float | None:
    return value if isfinite(value) else None
