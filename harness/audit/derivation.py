"""The formula of a figure with numbers in the place of its names, and where each number is from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.audit.blocks import Values
from harness.audit.quantities import ARCHITECTURE, argument, terms
from harness.audit.quantity import is_axis, middle, substituted
from harness.audit.units import TERMS, UNITS
from harness.audit.verdicts import Finding
from harness.audit.wording import completion, exact, listed, number
from harness.spec import Claim, Spec


def derivation(spec: Spec, finding: Finding) -> str:
    """The formula, with numbers, at the finding's example: symbols = numbers = result."""
    quantity = finding.test.quantity
    value = result(spec, finding)
    unit = f" {quantity.dimension}" if quantity.dimension not in ("", "x") else ""
    if quantity.formula == argument(quantity.name):
        return f"{quantity.formula} = {number(value)}{unit}"
    sign = {"exact": "=", "least": ">=", "most": "<="}[quantity.side]
    numbers = substituted(quantity.formula, names(spec, finding), exact)
    return f"{argument(quantity.name)} {sign} {quantity.formula} = {numbers} = {number(value)}{unit}"


def result(spec: Spec, finding: Finding) -> float:
    """The quantity at the finding's example, in its own dimension; a bound where theory knows no more."""
    quantity, claim = finding.test.quantity, finding.test.claim
    arrays = {name: np.array([value]) for name, value in finding.example.items()}
    values = Values(spec, arrays)
    found = quantity.range({argument(axis): values[axis] for axis in quantity.axes}, claim.given)
    return float((found.high if quantity.side == "most" else found.low).reshape(-1)[0])


def names(spec: Spec, finding: Finding) -> dict[str, Any]:
    """The numbers behind the names in a formula at the finding's example."""
    claim, quantity = finding.test.claim, finding.test.quantity
    found: dict[str, Any] = {argument(name): value for name, value in finding.example.items()}
    if quantity.block == ARCHITECTURE:
        built = spec.complete(completion(spec, finding.example))
        found |= terms(built, int(claim.given.get("context", 0)))
    constants = {name: middle(value) for name, value in claim.given.items() if not _names_axis(value)}
    return found | constants


def _names_axis(value: Any) -> bool:
    return isinstance(value, str) and is_axis(value)


def steps(spec: Spec, finding: Finding) -> Iterator[str]:
    """Each name of the formula: its number, its unit and where it is from."""
    quantity, known = finding.test.quantity, names(spec, finding)
    axes = {argument(axis): axis for axis in finding.example}
    for name in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", quantity.formula)):
        value = known.get(name)
        axis = axes.get(name, "")
        origin = _origin(spec, finding.test.claim, name, axis)
        if isinstance(value, list):
            yield f"{name} = {', '.join(map(str, value))}{origin}"
        elif isinstance(value, bool | int | float | np.number):
            yield f"{name} = {number(float(value))} {_unit(spec, name, axis)}".rstrip() + origin


def _unit(spec: Spec, name: str, axis: str) -> str:
    table, _, key = axis.partition(".")
    if table == "assumptions":
        return spec.assumptions[key].unit
    return TERMS.get(name, "")


def _origin(spec: Spec, claim: Claim, name: str, axis: str) -> str:
    """Where a number is from, in brackets."""
    table, _, key = axis.partition(".")
    if name in claim.given and not _names_axis(claim.given[name]):
        given = claim.given[name]
        return f" (given by the claim as {given})" if isinstance(given, str) else " (given by the claim)"
    pinned = any(pin.axis == axis for pin in spec.pins)
    by = " on the command line" if pinned else ""
    if table == "assumptions":
        one = spec.assumptions[key]
        cited = f"; {', '.join(one.sources)}" if one.sources else ""
        return f" (assumed{by}; tried: {listed(one.values)}; {one.why}{cited})"
    if pinned:
        return " (assumed on the command line)"
    if table in ("training", "serving"):
        entry = {"training": spec.training, "serving": spec.serving}[table][key]
        return f" ([{table}] tries {listed(entry)})" if isinstance(entry, list) else f" (stated in [{table}])"
    if table == "architecture":
        leaf = spec.leaves[key]
        return f" ({leaf.status}{': ' + ', '.join(leaf.sources) if leaf.sources else ''})"
    return " (counted over the architecture)"


def in_own_unit(finding: Finding, value: float) -> str:
    """The result in the unit that the figure is printed in, where that is not the quantity's own."""
    unit = finding.test.readings[0].unit
    if not finding.test.fits or unit not in UNITS or finding.test.unit.factor == 1:
        return ""
    return f"{number(value / finding.test.unit.factor)} {unit}"
