"""The formula of a figure with numbers in the place of its names, and where each number is from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.audit.blocks import Values
from harness.audit.formula import lines_of, names_in, substituted, value_of
from harness.audit.quantities import ARCHITECTURE, argument, terms
from harness.audit.quantity import Quantity, is_axis, middle
from harness.audit.units import TERMS, UNITS
from harness.audit.verdicts import Finding
from harness.audit.wording import completion, exact, listed, number, span
from harness.spec import Claim, Spec


def derivation(spec: Spec, finding: Finding) -> tuple[str, ...]:
    """The formula at the finding's example, line by line: symbols = numbers = result.

    A constant that is printed as a figure counts as the number that it prints; what its rounding makes of the
    result stands in a line of its own.
    """
    quantity, claim = finding.test.quantity, finding.test.claim
    values = Values(spec, {name: np.array([value]) for name, value in finding.example.items()})
    arguments = {argument(axis): values[axis] for axis in quantity.axes}
    value = float(quantity.nominal(arguments, claim.given).reshape(-1)[0])
    found = [*_lines(quantity, names(spec, finding), value)]
    found[-1] += _in_own_unit(finding, value)
    spans = quantity.spans(claim.given)
    if spans:
        ends = (float(end.reshape(-1)[0]) for end in quantity.ends(arguments, claim.given))
        given = " and ".join(f"{name} {_end(low)} to {_end(high)}" for name, (low, high) in spans.items())
        found.append(f"with {given}: {_between(finding, *ends)}")
    return tuple(found)


def _lines(quantity: Quantity, known: dict[str, Any], value: float) -> Iterator[str]:
    """Each step of the formula; the last one is what theory, not the formula, gives."""
    *steps, (_, last) = lines_of(quantity.formula)
    known = dict(known)
    for name, expression in steps:
        known[name] = value_of(expression, known)
        unit = TERMS.get(name, "")
        numbers = substituted(expression, known, _digits)
        yield f"{name} = {expression} = {numbers} = {number(known[name])} {unit}".rstrip()
    result = f"{number(value)} {'' if quantity.dimension == 'x' else quantity.dimension}".rstrip()
    if last == argument(quantity.name):
        yield f"{last} = {result}"
        return
    sign = {"exact": "=", "least": ">=", "most": "<="}[quantity.side]
    yield f"{argument(quantity.name)} {sign} {last} = {substituted(last, known, _digits)} = {result}"


def _digits(value: float) -> str:
    """Every digit of a whole number, and nine of another one."""
    return exact(value) if value == int(value) and abs(value) < 1e16 else f"{value:.9g}"


def _end(value: float) -> str:
    """An end of a rounding, which has one digit more than the figure."""
    text = number(value)
    return text if float(text.replace(",", "")) == value else f"{value:,.10g}"


def _between(finding: Finding, low: float, high: float) -> str:
    test = finding.test
    own = test.fits and test.readings[0].unit in UNITS
    factor, unit = (test.unit.factor, test.readings[0].unit) if own else (1.0, test.quantity.dimension)
    return span(low / factor, high / factor, unit)


def names(spec: Spec, finding: Finding) -> dict[str, Any]:
    """The numbers behind the names in a formula at the finding's example."""
    claim, quantity = finding.test.claim, finding.test.quantity
    found: dict[str, Any] = {argument(name): value for name, value in finding.example.items()}
    if quantity.block == ARCHITECTURE:
        built = spec.complete(completion(spec, finding.example))
        convention = claim.given.get("convention", "all")
        found |= terms(built, int(claim.given.get("context", 0)), convention)
    constants = {name: middle(value) for name, value in claim.given.items() if not _names_axis(value)}
    return found | constants


def _names_axis(value: Any) -> bool:
    return isinstance(value, str) and is_axis(value)


def steps(spec: Spec, finding: Finding) -> Iterator[str]:
    """Each name of the formula: its number, its unit and where it is from."""
    quantity, known = finding.test.quantity, names(spec, finding)
    axes = {argument(axis): axis for axis in finding.example}
    for name in names_in(quantity.formula):
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


def _in_own_unit(finding: Finding, value: float) -> str:
    """= the result in the unit that the figure is printed in, where that is not the quantity's own."""
    unit = finding.test.readings[0].unit
    if not finding.test.fits or unit not in UNITS or finding.test.unit.factor == 1:
        return ""
    return f" = {number(value / finding.test.unit.factor)} {unit}"
