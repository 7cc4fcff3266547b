"""From the records of a run to one exit code and the sentences that say why.

A failure outweighs what could not be measured; a canary that lives outweighs both, because then no
outcome of the run can be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.results import baseline as baselines
from harness.results.baseline import Baseline
from harness.results.record import Canary, Record, count
from harness.results.runfile import Run

OK = 0
FAILED = 1
VOID = 69
SOFTWARE = 70
CONFIG = 78


@dataclass(frozen=True)
class Verdict:
    """The exit code, and one sentence for each thing that decided it."""

    code: int
    sentences: tuple[str, ...]


def judge(records: Sequence[Record], canary: Canary | None) -> Verdict:
    """The verdict on records whose outcomes have a baseline applied already."""
    failed = [f"{r.key} fails: {r.reason}" for r in records if r.outcome == "failed"]
    stale = [f"{r.key} passes, but the baseline says that it fails" for r in records if r.outcome == "stale"]
    void = [f"{r.key} could not be measured: {r.reason}" for r in records if r.outcome == "void"]
    if canary is not None and not canary.caught:
        alive = f"the canary was not caught ({canary.reason}), so no outcome of this run can be believed"
        return Verdict(VOID, (alive, *failed, *stale, *void))
    if failed or stale:
        return Verdict(FAILED, (*failed, *stale, *void))
    if void:
        return Verdict(VOID, tuple(void))
    measured = [r for r in records if r.outcome in ("passed", "expected")]
    if not measured:
        return Verdict(VOID, (f"nothing was measured: {len(records)} properties, all of them unsupported",))
    if canary is None:
        return Verdict(VOID, ("no canary ran, so nothing shows that this run could have failed",))
    return Verdict(OK, (_summary(records),))


def gate(run: Run, baseline: Baseline) -> Verdict:
    """The verdict on a complete run under a baseline, whatever baseline it was run with."""
    records = [baselines.apply(record, baseline) for record in run.records]
    verdict = judge(records, run.footer.canary)
    idle = len(baseline.keys() - {record.key for record in records})
    if idle:
        noun = "entry" if idle == 1 else "entries"
        note = f"{idle} {noun} of the baseline had no counterpart in the run"
        return Verdict(verdict.code, (*verdict.sentences, note))
    return verdict


def _summary(records: Sequence[Record]) -> str:
    return ", ".join(f"{n} {outcome}" for outcome, n in count(records).items() if n)
