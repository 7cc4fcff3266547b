"""From the records of a run to one exit code and the sentences that say why.

A failure outweighs what could not be measured; a canary that lives outweighs both, because then no
outcome of the run can be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from harness.results import baseline as baselines
from harness.results.baseline import Baseline
from harness.results.record import Canary, Key, Null, Outcome, Record
from harness.results.runfile import Run

OK = 0
FAILED = 1
VOID = 69
SOFTWARE = 70
CONFIG = 78


@dataclass(frozen=True)
class Detail:
    """One property that decided a verdict, or that a baseline names and the run does not."""

    outcome: Outcome | Literal["not run"]
    key: Key
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The exit code, the sentence that says why, and each property that decided it."""

    code: int
    headline: str
    details: tuple[Detail, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return {
            "exit_code": self.code,
            "headline": self.headline,
            "details": [
                {
                    "outcome": one.outcome,
                    "property": one.key.slug,
                    "implementation": one.key.implementation,
                    "spec": one.key.spec,
                    "reason": one.reason,
                }
                for one in self.details
            ],
        }


def judge(
    records: Sequence[Record], canary: Canary | None, null: Null | Literal["off"] | None = None
) -> Verdict:
    """The verdict on records whose outcomes have a baseline applied already."""
    details = tuple(
        Detail(r.outcome, r.key, r.reason)
        for outcome in ("failed", "stale", "void")
        for r in records
        if r.outcome == outcome
    )
    failed, stale, void = (sum(d.outcome == o for d in details) for o in ("failed", "stale", "void"))
    if canary is not None and not canary.caught:
        why = f"the canary was not caught ({canary.reason}), so no outcome of this run can be believed"
        return Verdict(VOID, why, details)
    if failed or stale:
        return Verdict(FAILED, f"new failures: {failed}, stale entries: {stale}", details)
    if isinstance(null, Null) and null.vacuous:
        why = (
            f"an implementation that computes nothing passed all {len(null.passed)} of this run's properties"
        )
        return Verdict(VOID, f"{why}, so its outcomes show nothing; run others beside them", details)
    if void:
        return Verdict(VOID, f"properties that could not be measured: {void}", details)
    if not any(r.outcome in ("passed", "expected") for r in records):
        return Verdict(VOID, f"nothing was measured: {len(records)} properties, none of them supported")
    if canary is None:
        return Verdict(VOID, "no canary ran, so nothing shows that this run could have failed")
    return Verdict(OK, "nothing failed that was not expected to")


def gate(run: Run, baseline: Baseline) -> Verdict:
    """The verdict on a complete run under a baseline, whatever baseline it was run with."""
    records = [baselines.apply(record, baseline) for record in run.records]
    verdict = judge(records, run.footer.canary, run.footer.null)
    idle = sorted(baseline.keys() - {record.key for record in records})
    notes = (Detail("not run", key, "is in the baseline, but not in the run") for key in idle)
    return replace(verdict, details=(*verdict.details, *notes))
