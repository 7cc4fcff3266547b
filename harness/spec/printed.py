"""Figures as printed: the interval of values that a careful writer would have printed that way.

A printed figure is the interval of its rounding, half a unit of its last significant digit to either side
("~1.8e12" is 1.75e12 to 1.85e12), never a point with a guessed tolerance. Without a decimal point, zeros
at the end of the mantissa are placeholders, not digits ("25,000" is 24,500 to 25,500).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from math import inf

_FIGURE = re.compile(
    r"(?P<mantissa>[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?:[eE](?P<exponent>[+-]?\d+))?"
    r"\s*(?P<suffix>[kKMBT])?\s*(?P<unit>%|x)?"
)
_SUFFIXES = {"k": 3, "K": 3, "M": 6, "B": 9, "T": 12}
_BOUND = re.compile(r"(<=|>=|<|>|≤|≥)\s*")


@dataclass(frozen=True)
class Interval:
    """From low to high; an open end does not belong to it."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies in it; NaN does not."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return bool(above and below)


def interval(text: str, *, exact: bool = False) -> Interval:
    """What a printed figure stands for: "1.8e12", "~1.8T", "25,000", "<30", ">=10", "90-100", "32-36%".

    A range runs from its lower to its upper figure as printed, and a bound from its figure as printed:
    neither is widened by rounding. "%" and "x" are units and do not scale. `exact`: a count, which is
    only itself (120 layers). Raises ValueError on text that is no figure.
    """
    bare = text.strip().removeprefix("~").strip()
    bound = _BOUND.match(bare)
    if bound is not None:
        return _bounded(bound[1], float(_read(bare[bound.end() :], text)[0]))
    first = _FIGURE.match(bare)
    if first is None:
        raise ValueError(_no_figure(text))
    rest = bare[first.end() :].strip()
    if rest[:1] in ("-", "\N{EN DASH}"):
        low, high = _read(bare[: first.end()], text)[0], _read(rest[1:], text)[0]
        low *= _shared_scale(bare[: first.end()], rest[1:])
        if low > high:
            raise ValueError(f'"{text}" runs downwards; print the lower figure first')
        return Interval(float(low), float(high))
    value, half = _read(bare, text)
    return (
        Interval(float(value), float(value)) if exact else Interval(float(value - half), float(value + half))
    )


def is_figure(text: str) -> bool:
    """Whether `interval` can read the text ("yes" and "twice" are statements, not figures)."""
    try:
        interval(text)
    except ValueError:
        return False
    return True


def _no_figure(text: str) -> str:
    return f'"{text}" is no printed figure; write one like "~1.8e12", "25,000", "<30" or "90-100"'


def _bounded(sign: str, value: float) -> Interval:
    if sign in ("<", "<=", "≤"):
        return Interval(-inf, value, low_open=True, high_open=sign == "<")
    return Interval(value, inf, low_open=sign == ">", high_open=True)


def _read(figure: str, whole: str) -> tuple[Decimal, Decimal]:
    """Value and half a unit of the last significant digit."""
    match = _FIGURE.fullmatch(figure.strip().removeprefix("~").strip())
    if match is None:
        raise ValueError(_no_figure(whole))
    mantissa = match["mantissa"].replace(",", "")
    scale = int(match["exponent"] or 0) + _SUFFIXES.get(match["suffix"] or "", 0)
    if abs(scale) > 300:
        raise ValueError(f'"{whole}" is out of range; an exponent is at most 300')
    digits = mantissa.lstrip("+-")
    if "." in digits:
        last = -len(digits.partition(".")[2])
    else:
        last = len(digits) - len(digits.rstrip("0")) if digits.strip("0") else 0
    ten = Decimal(10)
    return Decimal(mantissa) * ten**scale, ten ** (last + scale) / 2


def _shared_scale(low: str, high: str) -> Decimal:
    """In "90-100M" the suffix of the upper figure scales the lower one, if that has none of its own."""
    first, second = _FIGURE.fullmatch(low.strip()), _FIGURE.fullmatch(high.strip())
    if first is None or second is None or first["suffix"] or first["exponent"] or not second["suffix"]:
        return Decimal(1)
    return Decimal(10) ** _SUFFIXES[second["suffix"]]
