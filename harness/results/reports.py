"""A property's record on its way through pytest: made where the test ran, carried by the test's report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from harness.results import baseline as baselines
from harness.results import failures
from harness.results.baseline import Baseline
from harness.results.record import Canary, Null, OnNull, Record, jsonable

if TYPE_CHECKING:
    from harness.conformance.case import Case
    from harness.conformance.overhead import Measured
    from harness.conformance.property import Property
    from harness.conformance.subjects import Subject

RECORD, CANARY, NULL = "harness_record", "harness_canary", "harness_null"
"""Attributes of a report, JSON text; pytest-xdist carries them to the controlling process."""
NOTHING = hashlib.sha256().hexdigest()
"""The digest of a case that drew no input."""
LETTERS = {"passed": ".", "failed": "F", "unsupported": "u", "expected": "x", "stale": "S", "void": "V"}


def planned(prop: Property, subject: Subject, seed: int) -> Record:
    """The record of a property that has not been run."""
    return Record(
        slug=prop.slug,
        clause=prop.clause,
        level=prop.level,
        implementation=subject.address,
        spec=subject.spec,
        spec_digest=subject.digest,
        seed=seed,
        outcome="void",
        reason="not run",
        duration_s=0.0,
    )


def ended(
    plan: Record,
    error: BaseException | None,
    baseline: Baseline,
    *,
    case: Case | None,
    duration_s: float,
    telemetry: dict[str, Any],
) -> Record:
    """The record of a property that ended with `error`, or without one, under the baseline."""
    from harness.conformance.verdict import verdict

    ending = verdict(error)
    facts = {**(case.facts if case is not None else {}), **ending.facts}
    record = plan.model_copy(
        update={
            "outcome": ending.outcome,
            "reason": ending.reason,
            "stage": ending.stage,
            "crashed": ending.crashed,
            "input_digest": case.digest if case is not None and case.digest != NOTHING else None,
            "facts": jsonable(facts),
            "duration_s": duration_s,
            "implementation_s": min(case.clock.seconds, duration_s) if case is not None else None,
            "telemetry": jsonable(telemetry),
        }
    )
    return baselines.apply(record, baseline)


def attach(report: pytest.TestReport, record: Record, baseline: Baseline, *, short: bool) -> None:
    """Make a test's report say what the record says, and carry it.

    `short`: one paragraph in the place of a traceback.
    """
    setattr(report, RECORD, record.model_dump_json())
    match record.outcome:
        case "passed":
            report.outcome, report.longrepr = "passed", None
        case "failed" | "stale":
            report.outcome = "failed"
            if short or record.outcome == "stale":
                report.longrepr = _paragraph(record)
        case "expected":
            report.outcome, report.longrepr = "skipped", record.reason
            report.wasxfail = baseline[record.key].reason
        case "unsupported" | "void":
            path, line, _ = report.location
            report.outcome = "skipped"
            report.longrepr = (path, line or 0, f"{record.outcome}: {record.reason}")


def properties(record: Record) -> list[tuple[str, object]]:
    """What a JUnit file tells about the test."""
    return [
        ("property", record.slug),
        ("clause", record.clause),
        ("implementation", record.implementation),
        ("spec", record.spec),
        ("seed", record.seed),
        ("input_digest", record.input_digest or ""),
        ("outcome", record.outcome),
        *((f"fact.{name}", str(value)) for name, value in record.facts.items()),
    ]


def attach_canary(report: pytest.TestReport, *, caught: bool, reason: str) -> None:
    """Make the canary's report carry how it did."""
    setattr(report, CANARY, Canary(caught=caught, reason=reason).model_dump_json())
    report.outcome = "passed" if caught else "failed"
    report.longrepr = None if caught else f"The canary was not caught: {reason}"


def attach_null(report: pytest.TestReport, measured: Sequence[Measured], left: Sequence[str]) -> None:
    """Make the null implementation's report carry how it did; it fails where the run is vacuous."""
    null = Null(measured=tuple(OnNull(**asdict(one)) for one in measured), left=tuple(left))
    setattr(report, NULL, null.model_dump_json())
    report.outcome = "failed" if null.vacuous else "passed"
    what = "A constant satisfies every property of this run:"
    report.longrepr = f"{what} {', '.join(null.passed)}" if null.vacuous else None


def died(plan: str) -> Record:
    """The record of a planned property whose process died while it ran."""
    record = Record.model_validate_json(plan)
    reason = "crashed: the process died while it ran this property"
    return record.model_copy(update={"outcome": "failed", "reason": reason, "crashed": True})


def record_of(report: pytest.TestReport) -> Record | None:
    """The record that a report carries."""
    text = getattr(report, RECORD, None)
    return None if text is None else Record.model_validate_json(text)


def canary_of(report: pytest.TestReport) -> Canary | None:
    """The canary that a report carries."""
    text = getattr(report, CANARY, None)
    return None if text is None else Canary.model_validate_json(text)


def null_of(report: pytest.TestReport) -> Null | None:
    """What the null implementation showed, where a report carries that."""
    text = getattr(report, NULL, None)
    return None if text is None else Null.model_validate_json(text)


def status(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Category, letter and word of a report that carries a record, the canary or the null implementation."""
    record, canary, null = record_of(report), canary_of(report), null_of(report)
    if canary is not None:
        return ("canary caught", "c", "CAUGHT") if canary.caught else ("failed", "C", "NOT CAUGHT")
    if null is not None:
        return ("failed", "N", "VACUOUS") if null.vacuous else ("null measured", "n", "MEASURED")
    if record is None:
        return None
    # a stale entry is listed among the failures, where it is looked for
    category = "failed" if record.outcome == "stale" else record.outcome
    return category, LETTERS[record.outcome], record.outcome.upper()


def _paragraph(record: Record) -> str:
    where = f" at the stage {record.stage}" if record.stage else ""
    title = (
        f"{record.implementation} on {record.spec} breaks {record.slug}{where}"
        if record.outcome == "failed"
        else f"{record.slug} of {record.implementation} on {record.spec}"
    )
    return f"{title}:\n{failures.paragraph(record)}"
