"""What a quantity is: a closed form, what it is a function of, and the formula that explains it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

from harness.audit.axes import Numbers
from harness.audit.formula import renamed
from harness.spec.printed import interval

Side = Literal["exact", "least", "most"]


class Range(NamedTuple):
    """Between which values theory puts a quantity, at each completion; equal where it is exact."""

    low: Numbers
    high: Numbers


LINKS: Mapping[str, str] = {"parameters.total": "total", "parameters.active": "active"}
"""Counts of the architecture that other blocks take as given, and the argument they are there."""


@dataclass(frozen=True)
class Quantity:
    """A closed form over one block of axes.

    `side` "least" ("most"): theory knows a bound only, and the quantity may be anything from it upwards
    (downwards). `given` names constants that a claim must bring, `optional` those that it may; it may also
    fix an axis. A constant that is printed as a figure stands for the interval of its rounding.
    """

    name: str
    dimension: str
    """Of `harness.audit.units`."""
    block: str
    axes: tuple[str, ...]
    """Names of axes; their last part names the argument. "architecture" stands for all the leaves."""
    given: tuple[str, ...]
    optional: tuple[str, ...]
    side: Side
    compute: Callable[..., Any]
    formula: str
    """As `harness.audit.formula` reads it, over the arguments and, for an architecture, over `terms`."""

    def bound(self, given: Mapping[str, Any]) -> Quantity:
        """The same where a claim's constants fix some axes, or name axes of the spec for arguments."""
        named = {name: value for name, value in given.items() if isinstance(value, str) and is_axis(value)}
        fixed = [axis for axis in self.axes if argument(axis) in given]
        if not named and not fixed:
            return self
        arguments = {name: argument(axis) for name, axis in named.items()}
        constants = [argument(axis) for axis in fixed if argument(axis) not in named]
        axes = (*(axis for axis in self.axes if axis not in fixed), *named.values())

        def compute(**values: Any) -> Any:
            own = {name: values.pop(there) for name, there in arguments.items()}
            return self.compute(**values, **own)

        return replace(
            self,
            axes=tuple(dict.fromkeys(axes)),
            given=tuple(name for name in (*self.given, *constants) if name not in named),
            optional=tuple(name for name in self.optional if name not in named),
            compute=compute,
            formula=renamed(self.formula, arguments),
        )

    def range(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Range:
        """Bounds at every completion: `arguments` are arrays (or an Architecture of arrays) by argument name.

        A figure among the `given` constants is taken at both ends of its interval: every closed form here is
        monotone in each of them.
        """
        low, high = self.ends(arguments, given)
        if self.side == "least":
            high = np.full((1,) * low.ndim, np.inf)
        elif self.side == "most":
            low = np.full((1,) * high.ndim, -np.inf)
        return Range(low, high)

    def ends(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Range:
        """The closed form alone, at the ends of every figure among the `given` constants."""
        constants = self._constants(arguments, given)
        spans = [_ends(value) for value in constants.values()]
        named = [dict(zip(constants, one, strict=True)) for one in product(*spans)]
        corners = [self._at({**arguments, **one}) for one in named]
        low, high = corners[0], corners[0]
        for corner in corners[1:]:
            low, high = np.minimum(low, corner), np.maximum(high, corner)
        return Range(low, high)

    def nominal(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Numbers:
        """The closed form alone, at the number that every figure among the `given` constants prints."""
        constants = self._constants(arguments, given)
        return self._at({**arguments, **{name: middle(value) for name, value in constants.items()}})

    def spans(self, given: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """The figures among the `given` constants, each between the ends of its interval."""
        found = {name: _ends(value) for name, value in self._constants({}, given).items()}
        return {name: (ends[0], ends[-1]) for name, ends in found.items() if len(ends) > 1}

    def _constants(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in (*self.given, *self.optional, *arguments) if name in given}

    def _at(self, values: Mapping[str, Any]) -> Numbers:
        return np.asarray(self.compute(**values), dtype=np.float64)


def is_axis(name: str) -> bool:
    """Whether a name is that of a leaf, or of an entry of a table of the spec."""
    return name.startswith(("architecture.", "training.", "serving.", "assumptions."))


def argument(axis: str) -> str:
    """The argument that an axis is passed as."""
    return LINKS.get(axis, axis.rpartition(".")[2])


def _ends(constant: Any) -> tuple[Any, ...]:
    if not isinstance(constant, str) or not re.match(r"~?\d", constant):
        return (constant,)
    span = interval(constant)
    return (span.low, span.high)


def middle(constant: Any) -> Any:
    """A given constant as one number: a printed figure as its middle, anything else as it is."""
    ends = _ends(constant)
    return ends[0] if len(ends) == 1 else float(f"{(ends[0] + ends[1]) / 2:.12g}")
