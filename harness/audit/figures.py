"""What the sources print for a claim, as intervals; and why some of it is put to no quantity."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from harness.audit.quantities import QUANTITIES
from harness.audit.units import COUNTED, UNITS, Unit
from harness.spec import Claim, Reading, Spec
from harness.spec.printed import Interval, interval, is_figure
from harness.spec.schema import leaf_types

_STATEMENTS = {"yes": Interval(1.0, 1.0), "no": Interval(0.0, 0.0)}


@dataclass(frozen=True)
class Unjudged:
    """Why a claim, or one figure of it, is put to no quantity."""

    outcome: Literal["not quantitative", "not yet judged"]
    """Whether nothing here could be computed, or something that the theory or the spec lacks."""
    reason: str


@dataclass(frozen=True)
class Figure:
    """A value that some sources print for a claim; those that mean the same interval share one."""

    readings: tuple[Reading, ...]
    interval: Interval | None
    unit: Unit
    unjudged: Unjudged | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Who prints it."""
        return tuple(source for reading in self.readings for source in reading.sources)

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(map(printed, self.readings)))


def printed(reading: Reading) -> str:
    """A reading with its unit."""
    return f"{reading.value} {reading.unit}".strip()


def unit_of(reading: Reading) -> Unit | None:
    """The unit of a reading: none printed means that of the quantity; None if it is not known."""
    return UNITS.get(reading.unit) if reading.unit else Unit("")


def figures_of(spec: Spec, claim: Claim) -> tuple[Figure, ...]:
    """The readings of a claim, those of the same interval and dimension together."""
    truth = _is_truth(spec, claim.quantity)
    grouped: dict[tuple[Any, ...], list[Reading]] = {}
    for reading in claim.readings:
        figure = _figure(claim, (reading,), truth)
        key = (figure.interval, figure.unit, figure.unjudged and reading.value)
        grouped.setdefault(key, []).append(reading)
    return tuple(_figure(claim, tuple(readings), truth) for readings in grouped.values())


def _figure(claim: Claim, readings: tuple[Reading, ...], truth: bool) -> Figure:
    value, unit = readings[0].value, unit_of(readings[0])
    if unit is None:
        unknown = readings[0].unit
        near = get_close_matches(unknown, UNITS, n=1, cutoff=0.6)
        reason = f"the audit does not know the unit {unknown!r}" + (f"; is it {near[0]}?" if near else "")
        return Figure(readings, None, Unit(""), Unjudged("not yet judged", reason))
    if value in _STATEMENTS and truth:
        return Figure(readings, _STATEMENTS[value], unit)
    if not is_figure(value):
        said = f"{value!r} {'affirms it' if value == 'yes' else 'denies it'}, and is no figure"
        reason = said if value in _STATEMENTS else f"{value!r} is no figure"
        reason += f" of {claim.quantity}" if claim.quantity else ""
        return Figure(readings, None, unit, Unjudged("not quantitative", reason))
    exact = bool(claim.given.get("exact")) or unit.dimension in COUNTED
    return Figure(readings, interval(value, exact=exact), unit)


def _is_truth(spec: Spec, name: str) -> bool:
    """Whether a quantity is true or false (1 or 0), so that "yes" and "no" are figures of it."""
    if name in QUANTITIES:
        return not QUANTITIES[name].dimension
    table, _, key = name.partition(".")
    if table == "architecture":
        return leaf_types().get(key) is bool
    if table == "assumptions" and key in spec.assumptions:
        return set(spec.assumptions[key].values) <= {0.0, 1.0}
    return False
