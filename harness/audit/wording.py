"""Numbers, ranges and deciders in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isinf

from harness.audit.quantities import argument
from harness.audit.quantity import Side
from harness.audit.verdicts import Finding
from harness.spec import Spec


def number(value: float) -> str:
    """Four significant digits; whole numbers below a million in full."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def exact(value: float) -> str:
    """Every digit of a whole number, and enough of another one to reproduce it."""
    return str(int(value)) if value == int(value) and abs(value) < 1e16 else repr(value)


def span(low: float, high: float, unit: str = "") -> str:
    """A range in words: one value, two ends, or one bound."""
    if low == high:
        text = number(low)
    elif isinf(low):
        text = f"at most {number(high)}"
    elif isinf(high):
        text = f"at least {number(low)}"
    else:
        first, last = number(low), number(high)
        text = first if first == last else f"{first} to {last}"
    return f"{text} {unit}".strip()


def theory(finding: Finding) -> str:
    """What theory says of a figure, where the other claims hold; a bound at its loosest."""
    side: Side = finding.test.quantity.side
    unit = finding.test.readings[0].unit
    if not finding.test.fits:
        factor = finding.test.unit.factor
        return span(finding.low * factor, finding.high * factor, finding.test.quantity.dimension)
    if side == "least":
        return span(finding.low, inf, unit)
    if side == "most":
        return span(-inf, finding.high, unit)
    return span(finding.low, finding.high, unit)


def listed(values: Sequence[float]) -> str:
    """A few values, or the ends of many."""
    if len(values) <= 4:
        return ", ".join(number(value) for value in values)
    return f"{len(values)} values from {number(values[0])} to {number(values[-1])}"


def short(axis: str) -> str:
    """An axis without its table: "d_model", "days", "total parameters"."""
    return f"{argument(axis)} parameters" if axis.startswith("parameters.") else argument(axis)


def decided(finding: Finding) -> str:
    """Which unknown decides about a figure that holds in some completions only, and how."""
    decider = finding.decider
    if decider is None:
        return ""
    if decider.axis == finding.test.quantity.name:
        return f"the other claims leave it open: {listed(sorted({*decider.holds, *decider.fails}))}"
    if decider.alone:
        at, off = listed(decider.holds), listed(decider.fails)
        return f"{short(decider.axis)} decides: holds at {at}, fails at {off}"
    both = sorted(set(decider.holds) & set(decider.fails))
    return f"no unknown decides alone, {short(decider.axis)} comes nearest: open at {listed(both)}"


def completion(spec: Spec, values: Mapping[str, float]) -> dict[str, int | bool | float]:
    """Leaves of an architecture at one completion, by path and in their own types."""
    prefix = "architecture."
    leaves = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {path: typed(spec, path, value) for path, value in leaves.items()}


def typed(spec: Spec, path: str, value: float) -> int | bool | float:
    """A leaf's value in the type that its domain, or its one value, has."""
    leaf = spec.leaves[path]
    known = leaf.domain.values[0] if leaf.domain is not None else leaf.value
    if isinstance(known, bool):
        return bool(value)
    return int(value) if value == int(value) else value


def cell(value: float | bool) -> str:
    """A leaf's value as printed."""
    return str(value).lower() if isinstance(value, bool) else number(value)


def dimensions(spec: Spec, values: Mapping[str, float]) -> str:
    """A completion's values in one line: what is unknown, and what differs from what the sources say."""
    parts = []
    leaves = completion(spec, values)
    for name, value in values.items():
        path = name.removeprefix("architecture.")
        leaf = spec.leaves.get(path) if name.startswith("architecture.") else None
        if leaf is None:
            parts.append(f"{short(name)} {number(value)}")
        elif leaf.status == "unknown" or leaf.value != leaves[path]:
            parts.append(f"{argument(name)} {cell(leaves[path])}")
    return ", ".join(parts)
