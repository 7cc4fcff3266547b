"""Numbers, ranges and deciders in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isinf

from harness.audit.deciders import Decider, Pair
from harness.audit.quantities import argument
from harness.audit.quantity import Side
from harness.audit.verdicts import Finding
from harness.spec import Reading, Spec
from harness.spec.printed import Interval

_CHANGES = 3
"""Single changes that turn a figure, of those that one line names."""


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


def meant(reading: Reading, interval: Interval) -> str:
    """What a printed figure stands for."""
    if reading.value in ("yes", "no"):
        return f"{reading.value} (1 for yes, 0 for no)"
    if isinf(interval.low) and interval.high_open:
        return f"less than {span(interval.high, interval.high, reading.unit)}"
    if isinf(interval.high) and interval.low_open:
        return f"more than {span(interval.low, interval.low, reading.unit)}"
    return span(interval.low, interval.high, reading.unit)


def theory(finding: Finding) -> str:
    """What theory says of a figure, where the other claims hold; a bound at its loosest."""
    side: Side = finding.test.quantity.side
    unit = finding.test.readings[0].unit
    if finding.test.readings[0].value in ("yes", "no"):
        low, high = ("no" if end == 0 else "yes" for end in (finding.low, finding.high))
        return low if low == high else f"{low} or {high}"
    if not finding.test.fits:
        factor = finding.test.unit.factor
        return span(finding.low * factor, finding.high * factor, finding.test.quantity.dimension)
    if side == "least":
        return span(finding.low, inf, unit)
    if side == "most":
        return span(-inf, finding.high, unit)
    return span(finding.low, finding.high, unit)


def listed(values: Sequence[float], most: int = 4) -> str:
    """A few values, or the ends of many."""
    if len(values) <= most:
        return ", ".join(number(value) for value in values)
    return f"{len(values)} values from {number(values[0])} to {number(values[-1])}"


def short(axis: str) -> str:
    """An axis without its table: "d_model", "days", "total parameters"."""
    return f"{argument(axis)} parameters" if axis.startswith("parameters.") else argument(axis)


def turning(decider: Decider, name: str = "") -> str:
    """At which values of the decider's axis (`name`, if given) the figure holds, fails, or is still open."""
    name = f" {name}" if name else ""
    both = sorted(set(decider.holds) & set(decider.fails))
    yes, no = ([v for v in side if v not in both] for side in (decider.holds, decider.fails))
    if len(decider.turns) == 1:
        low, high = decider.turns[0]
        first, then = (("holds", yes), ("fails", no)) if low in yes else (("fails", no), ("holds", yes))
        up_to = "up to" if len(first[1]) > 1 else "at"
        onwards = "from" if len(then[1]) > 1 else "at"
        return f"{first[0]} {up_to}{name} {number(low)}, {then[0]} {onwards} {number(high)}"
    sides = (("holds at", yes), ("fails at", no), ("open at", both))
    texts = [f"{word}{{}} {listed(values)}" for word, values in sides if values]
    return ", ".join(text.format("" if i else name) for i, text in enumerate(texts))


def decided(finding: Finding) -> str:
    """What decides about a figure that holds in some completions only, and at which values it turns."""
    decider, pair = finding.decider, finding.pair
    if decider is None:
        return ""
    ours = "" if finding.assumed is None else f"; {_verb(finding.assumed)} at what is assumed"
    if decider.axis == finding.test.quantity.name:
        return f"the other claims leave it open{ours}"
    if decider.alone:
        return f"{short(decider.axis)} decides: {turning(decider)}{ours}"
    if pair is None:
        return f"no unknown decides alone, {short(decider.axis)} comes nearest: {turning(decider)}{ours}"
    names = f"{short(pair.axis)} and {short(pair.cases[0][1].axis)}"
    if pair.alone:
        return f"{names} decide: {'; '.join(cases(pair, 2))}{ours}"
    where = "what is assumed" if finding.assumed is not None else "the numbers of the derivation"
    changes = " or ".join(f"{short(one.axis)} {listed(one.values)}" for one in finding.steps[:_CHANGES])
    turned = f", {_verb(not finding.holds_there)} there with {changes}" if changes else ""
    nearest = f"no two unknowns decide, {names} come nearest ({100 * pair.share:.0f} % told)"
    return f"{nearest}; {_verb(finding.holds_there)} at {where}{turned}"


def cases(pair: Pair, limit: int) -> list[str]:
    """What the second axis decides at each value of the first, at `limit` of those that leave it a choice."""
    telling = [case for case in pair.cases if case[1].holds and case[1].fails]
    texts = [
        f"at {short(pair.axis)} {number(at)} {turning(one, short(one.axis))}" for at, one in telling[:limit]
    ]
    if telling[limit:]:
        texts.append(f"and so on at {len(telling) - limit} more")
    for holds in (True, False):
        values = [at for at, one in pair.cases if bool(one.holds) is holds and bool(one.fails) is not holds]
        if values:
            texts.append(f"{_verb(holds)} at {short(pair.axis)} {listed(values)}")
    return texts


def _verb(holds: bool) -> str:
    return "holds" if holds else "fails"


def joined(finding: Finding) -> str:
    """What the claims on the architecture leave of the counts that a block takes from it."""
    left = (f"{short(name)} {span(*ends)}" for name, ends in finding.linked.items())
    return " and ".join(left)


def assumptions(finding: Finding) -> str:
    """The assumptions that the quantity of a figure rests on, at the values that the other claims leave."""
    return ", ".join(f"{short(name)} {listed(values)}" for name, values in finding.assumptions.items())


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
