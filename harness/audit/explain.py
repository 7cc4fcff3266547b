"""One claim from the printed figure to the verdict, step by step and in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from harness.audit.blocks import Values
from harness.audit.quantities import ARCHITECTURE, argument, terms
from harness.audit.quantity import middle, substituted
from harness.audit.verdicts import Conflict, Finding, Judged, Verdict, judge
from harness.audit.wording import completion, decided, dimensions, exact, number, span, theory
from harness.spec import Spec, SpecError
from harness.spec.errors import did_you_mean, sentence


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
    yield from (f"  assumes {assumed}" for assumed in claim.assumes)
    if claim.note:
        yield f"  note: {claim.note}"
    for verdict in verdicts:
        yield ""
        yield from _verdict(judged, verdict)


def _verdict(judged: Judged, verdict: Verdict) -> Iterator[str]:
    figure = verdict.figure
    yield f"printed {figure} ({', '.join(figure.sources)}): {verdict.outcome}"
    if verdict.reason:
        yield f"  {verdict.reason}"
    if figure.interval is not None and verdict.findings:
        unit = figure.readings[0].unit
        yield f"  that is {span(figure.interval.low, figure.interval.high, unit)}"
    for finding in verdict.findings:
        yield from _finding(judged.case.spec, finding)
    if verdict.slips:
        yield f"  theory admits the figure if it is read {' or '.join(verdict.slips)}"
    for conflict in about(judged.conflicts, verdict):
        yield from _conflict(judged.case.spec, conflict)


def _finding(spec: Spec, finding: Finding) -> Iterator[str]:
    quantity = finding.test.quantity
    share = f"{finding.holding:,} of {finding.admitted:,}"
    yield f"  {quantity.name} is {theory(finding)} where the other claims hold; fits in {share} completions"
    yield f"    {derivation(spec, finding)}"
    where = dimensions(spec, finding.example)
    if where:
        yield f"    at {where}"
    if finding.decider is not None:
        yield f"    {decided(finding)}"


def derivation(spec: Spec, finding: Finding) -> str:
    """The formula, with numbers, at the finding's example: symbols = numbers = result."""
    quantity, claim = finding.test.quantity, finding.test.claim
    arrays = {name: np.array([value]) for name, value in finding.example.items()}
    result = quantity.range(
        {argument(axis): Values(spec, arrays)[axis] for axis in quantity.axes}, claim.given
    )
    value = float((result.high if quantity.side == "most" else result.low).reshape(-1)[0])
    unit = f" {quantity.dimension}" if quantity.dimension not in ("", "x") else ""
    if quantity.formula == argument(quantity.name):
        return f"{quantity.formula} = {number(value)}{unit}"
    sign = {"exact": "=", "least": ">=", "most": "<="}[quantity.side]
    numbers = substituted(quantity.formula, names(spec, finding), exact)
    return f"{argument(quantity.name)} {sign} {quantity.formula} = {numbers} = {number(value)}{unit}"


def names(spec: Spec, finding: Finding) -> dict[str, Any]:
    """The numbers behind the names in a formula at the finding's example."""
    claim, quantity = finding.test.claim, finding.test.quantity
    found: dict[str, Any] = {argument(name): value for name, value in finding.example.items()}
    if quantity.block == ARCHITECTURE:
        built = spec.complete(completion(spec, finding.example))
        found |= terms(built, int(claim.given.get("context", 0)))
    return found | {name: middle(value) for name, value in claim.given.items()}


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
    return f"{dropped.claim.id} ({dropped.figure}): {then}, at {dimensions(spec, values)}"
