"""What a quantity is: a closed form, what it is a function of, and the formula that explains it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        return match[0] if value is None or isinstance(value, (str, Architecture)) else show(float(value))

    return re.sub(r"[A-Za-z_]\w*", replace, formula)
