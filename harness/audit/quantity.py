"""What a quantity is: a closed form, what it is a function of, and the formula that explains it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

from harness.audit.axes import Numbers
from harness.spec import Architecture
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
    """In Python's own syntax, over the arguments and, for an architecture, over `terms`."""

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
            formula=re.sub(r"[A-Za-z_]\w*", lambda name: arguments.get(name[0], name[0]), self.formula),
        )

    def range(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Range:
        """Bounds at every completion: `arguments` are arrays (or an Architecture of arrays) by argument name.

        A figure among the `given` constants is taken at both ends of its interval: every closed form here is
        monotone in each of them.
        """
        constants = {
            name: _ends(given[name]) for name in (*self.given, *self.optional, *arguments) if name in given
        }
        corners = [
            np.asarray(
                self.compute(**{**arguments, **dict(zip(constants, ends, strict=True))}), dtype=np.float64
            )
            for ends in product(*constants.values())
        ]
        low, high = corners[0], corners[0]
        for corner in corners[1:]:
            low, high = np.minimum(low, corner), np.maximum(high, corner)
        if self.side == "least":
            high = np.full((1,) * low.ndim, np.inf)
        elif self.side == "most":
            low = np.full((1,) * high.ndim, -np.inf)
        return Range(low, high)


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
    return ends[0] if len(ends) == 1 else (ends[0] + ends[1]) / 2


def substituted(formula: str, names: Mapping[str, Any], show: Callable[[float], str]) -> str:
    """The formula with every name that is known replaced by its number."""

    def replace(match: re.Match[str]) -> str:
        value = names.get(match[0])
        if isinstance(value, list):
            return f"({', '.join(show(float(one)) for one in value)})"
        return match[0] if value is None or isinstance(value, (str, Architecture)) else show(float(value))

    return re.sub(r"[A-Za-z_]\w*", replace, formula)
