"""Tables of records: what a run found, how it was judged, what changed since another."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

from harness.results.compare import Comparison
from harness.results.gate import Verdict
from harness.results.record import OUTCOMES, Null, Record, count
from harness.results.runfile import Run
from harness.theory.describe import Table

NOT_RUN = ""


def summary(run: Run) -> tuple[Table, ...]:
    """Everything that a run found: outcomes, property x implementation, what did not pass, the canary."""
    canary = run.footer.canary
    rest = sorted((r for r in run.records if r.outcome != "passed"), key=lambda r: r.key)
    return (
        outcomes(run.records),
        matrix(run.records),
        Table(
            "What did not pass, and why",
            ("property", "implementation", "spec", "outcome", "reason"),
            tuple((r.slug, r.implementation, r.spec, r.outcome, r.reason) for r in rest),
        ),
        Table(
            "The canary, which must be caught",
            ("caught", "reason"),
            () if canary is None else ((canary.caught, canary.reason),),
        ),
    )


def outcomes(records: Sequence[Record]) -> Table:
    """How many properties ended in each outcome: one row per implementation and spec."""
    rows = (
        (*subject, *count([r for r in records if (r.implementation, r.spec) == subject]).values())
        for subject in _subjects(records)
    )
    return Table("Outcomes", ("implementation", "spec", *OUTCOMES), tuple(rows))


def matrix(records: Sequence[Record]) -> Table:
    """Property x implementation: one row per property, one column per implementation and spec."""
    subjects = _subjects(records)
    slugs = sorted({r.slug for r in records})
    ended = {(r.slug, r.implementation, r.spec): r.outcome for r in records}
    return Table(
        title="Property x implementation",
        headers=("property", *(f"{implementation} on {spec}" for implementation, spec in subjects)),
        rows=tuple((slug, *(ended.get((slug, *s), NOT_RUN) for s in subjects)) for slug in slugs),
    )


def counts(records: Sequence[Record]) -> str:
    """One line: how many properties ended in each outcome that occurred."""
    return ", ".join(f"{n} {outcome}" for outcome, n in count(records).items() if n) or "nothing was run"


def overhead(records: Sequence[Record], null: Null | Literal["off"] | None) -> tuple[str, ...]:
    """What the harness itself takes: on an implementation that computes nothing, and in this run."""
    told: list[str] = []
    if null == "off":
        told.append("null implementation: off (--no-null)")
    elif null is not None and null.measured:
        slowest = max(null.measured, key=lambda one: one.harness_s)
        times = [one.harness_s for one in null.measured]
        total = f"total {sum(times):.1f} s for {len(times)} properties"
        rest = f"; {len(null.left)} more were not measured, its budget being spent" if null.left else ""
        told.append(
            "harness overhead per property, measured on the null implementation (processor time): median "
            f"{median(times):.3f} s, most {slowest.harness_s:.3f} s ({slowest.slug}), {total}{rest}"
        )
        told.append(f"of these properties a constant satisfies {len(null.passed)}; the run file names them")
    timed = [r for r in records if r.implementation_s is not None]
    if whole := sum(r.duration_s for r in timed):
        own = whole - sum(r.implementation_s or 0.0 for r in timed)
        told.append(
            f"time of this run's properties outside of the implementations: {own:.1f} s of {whole:.1f} s "
            f"({own / whole:.0%})"
        )
    return tuple(told)


def overhead_by_property(null: Null | Literal["off"] | None) -> Table | None:
    """What the harness itself takes for each property, the most first; None where nothing was measured."""
    if null is None or null == "off" or not null.measured:
        return None
    slowest = sorted(null.measured, key=lambda one: -one.harness_s)
    rows = tuple((one.slug, one.outcome, f"{one.harness_s:.4f}") for one in slowest)
    return Table("Harness overhead", ("property", "on null", "processor seconds"), rows)


def left_out(records: Sequence[Record]) -> tuple[str, ...]:
    """One sentence for each implementation in its own shape, which most properties do not apply to."""
    own = sorted({r.implementation for r in records if r.spec_digest is None})
    why = "in its own shape it was not compared with a spec or the reference; --spec does that"
    return tuple(f"{implementation}: {why}" for implementation in own)


def judged(verdict: Verdict) -> Table:
    """What the gate says: one row for each property that decided it, or that the baseline names in vain."""
    headers = ("outcome", "property", "implementation", "spec", "reason")
    return Table(
        title=f"{verdict.headline} (exit code {verdict.code})",
        headers=headers if verdict.details else (),
        rows=tuple(
            (one.outcome, one.key.slug, one.key.implementation, one.key.spec, one.reason)
            for one in verdict.details
        ),
    )


def compared(comparison: Comparison) -> Table:
    """One row per property that is not as it was."""
    rows: list[tuple[object, ...]] = [
        ("added", str(r.key), NOT_RUN, r.outcome, r.reason) for r in comparison.added
    ]
    rows += [("removed", str(r.key), r.outcome, NOT_RUN, r.reason) for r in comparison.removed]
    rows += [("changed", str(a.key), a.outcome, b.outcome, b.reason) for a, b in comparison.changed]
    rows += [
        ("incomparable", str(a.key), a.outcome, b.outcome, "seed or spec file differs")
        for a, b in comparison.incomparable
    ]
    return Table(
        title=f"{len(rows)} differ, {comparison.unchanged} are unchanged",
        headers=("change", "property", "before", "after", "reason"),
        rows=tuple(rows),
    )


def _subjects(records: Sequence[Record]) -> list[tuple[str, str]]:
    return sorted({(r.implementation, r.spec) for r in records})
