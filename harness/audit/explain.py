"""One claim from the printed figure to the verdict, step by step and in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.audit.deciders import Decider
from harness.audit.derivation import derivation, steps
from harness.audit.verdicts import Conflict, Finding, Judged, Verdict, judge
from harness.audit.wording import (
    cases,
    decided,
    dimensions,
    joined,
    listed,
    meant,
    number,
    short,
    span,
    theory,
)
from harness.spec import Spec, SpecError
from harness.spec.errors import did_you_mean, sentence

_MOST = 12
"""Values, or cases, that a line of an explanation lists."""


def explain(spec: Spec, claim_id: str) -> str:
    """Everything the audit says about one claim. Raises SpecError if the spec has no such claim."""
    known = [claim.id for claim in spec.claims]
    if claim_id not in known:
        wrong = f'no claim is called "{claim_id}"' if known else "the spec states no claims"
        right = did_you_mean(claim_id, known) if known else "add a [[claim]]"
        raise SpecError(sentence(spec.path, None, "claim", wrong, right))
    return "\n".join(lines(judge(spec), claim_id))


def lines(judged: Judged, claim_id: str) -> Iterator[str]:
    """The lines of `explain`, from an audit that was made before."""
    verdicts = [verdict for verdict in judged.verdicts if verdict.claim.id == claim_id]
    claim = verdicts[0].claim
    yield f"{claim.id}: {claim.statement}"
    if claim.kind == "assumption":
        yield "  a convention of ours: it gives way before any claim of a source"
    yield from (f"  takes for granted: {assumed}" for assumed in claim.assumes)
    if claim.note:
        yield f"  note: {claim.note}"
    for pin in judged.case.spec.pins:
        yield f"  assumed on the command line: {pin.axis} = {', '.join(map(str, pin.values))}"
    for verdict in verdicts:
        yield ""
        yield from _verdict(judged, verdict)


def _verdict(judged: Judged, verdict: Verdict) -> Iterator[str]:
    figure, spec = verdict.figure, judged.case.spec
    said = (
        f"printed {figure} ({', '.join(figure.sources)})" if figure.readings else "no source prints a figure"
    )
    yield f"{said}: {verdict.outcome}"
    if verdict.reason:
        yield f"  {verdict.reason}"
    if figure.interval is not None and verdict.findings:
        yield f"  as printed, that is {meant(figure.readings[0], figure.interval)}"
    for finding in verdict.findings:
        yield from _finding(spec, finding)
    if verdict.slips:
        yield f"  theory admits the figure if it is read {' or '.join(verdict.slips)}"
    conflicts = about(judged.conflicts, verdict)
    smallest = [one for one in conflicts if len(one.members) == len(conflicts[0].members)]
    for conflict in smallest:
        yield from _conflict(spec, conflict)
    if len(smallest) < len(conflicts):
        yield f"  it is in {len(conflicts) - len(smallest)} larger conflicts too"


def _finding(spec: Spec, finding: Finding) -> Iterator[str]:
    quantity = finding.test.quantity
    yield f"  {quantity.name}, judged over the block {finding.block}:"
    yield from (f"    {step}" for step in steps(spec, finding))
    yield from (f"    {line}" for line in derivation(spec, finding))
    where = dimensions(spec, finding.example)
    if where:
        yield f"    at {where}"
    if finding.linked:
        kept = "no completion here has it, so that all count" if finding.apart else "only these count"
        yield f"    the claims on the architecture leave {joined(finding)}: {kept}"
    share = f"{finding.holding:,} of {finding.admitted:,}"
    yield f"    theory: {theory(finding)} where the other claims hold; the figure fits at {share} completions"
    if finding.decider is not None:
        yield f"    {decided(finding)}"
    if finding.decider is not None and finding.decider.alone:
        yield from (f"      {line}" for line in _turns(finding.decider))
    if finding.pair is not None:
        yield from (f"      {case}" for case in cases(finding.pair, _MOST))
    now, then = ("holds", "fails") if finding.holds_there else ("fails", "holds")
    for step in finding.steps:
        change = f"{short(step.axis)} {listed(step.values, _MOST)}"
        yield f"      {now} at the numbers above, {then} there with {change}"


def _turns(decider: Decider) -> Iterator[str]:
    name = short(decider.axis)
    yield f"holds at {name} {listed(decider.holds, _MOST)}"
    yield f"fails at {name} {listed(decider.fails, _MOST)}"
    turns = [f"{number(low)} and {number(high)}" for low, high in decider.turns]
    more = f", and {len(turns) - _MOST} times more" if len(turns) > _MOST else ""
    yield f"turns between {', between '.join(turns[:_MOST])}{more}"


def about(conflicts: Sequence[Conflict], verdict: Verdict) -> list[Conflict]:
    """The conflicts that the figure of a verdict takes part in, if it contradicts."""
    if verdict.outcome != "contradicts":
        return []
    key = (verdict.claim.id, verdict.figure.readings)
    return [c for c in conflicts if key in {(m.claim.id, m.figure.readings) for m in c.members}]


def _conflict(spec: Spec, conflict: Conflict) -> Iterator[str]:
    if not conflict.releases:
        yield "  out of reach of every completion, whatever the other claims say"
        return
    yield f"  cannot hold together: {', '.join(member.claim.id for member in conflict.members)}"
    for release in conflict.releases:
        yield f"    without {release_text(spec, release.dropped, release.low, release.high, release.values)}"


def release_text(spec: Spec, dropped: Any, low: float, high: float, values: Mapping[str, float]) -> str:
    """What a dropped member's quantity is where the rest of a conflict holds."""
    unit = dropped.figure.readings[0].unit
    then = span(low, high, unit)
    ours = "; ours" if dropped.claim.kind == "assumption" else ""
    return f"{dropped.claim.id} ({dropped.figure}{ours}): {then}, at {dimensions(spec, values)}"
