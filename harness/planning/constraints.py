"""Constraints as people type them: `tensor_parallel<=8`, `schedule==1f1b,interleaved`, `gpus<=4096`.

A constraint is a field, a comparison, and a number, words or another field; nothing is evaluated as code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.spec.errors import SpecError, did_you_mean

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|!=|<|>|=)\s*([^\s<>=!].*?)\s*")
Fields = Mapping[str, Collection[str] | None]
"""Fields that may be constrained: the words that one may be, or None where it is a number."""


@dataclass(frozen=True)
class Constraint:
    """`field` compared with any of `wanted` (numbers or words), or with another field."""

    text: str
    field: str
    comparison: str
    wanted: tuple[float | str, ...]
    other: str = ""
    """The field on the right, where it is one; then `wanted` is empty."""

    def holds(self, columns: Mapping[str, Any]) -> npt.NDArray[np.bool_] | bool:
        """Whether each row keeps it. columns: [N] arrays, or one value for all rows, by field."""
        compare = OPERATORS[self.comparison]
        value = columns[self.field]
        if self.other:
            return compare(value, columns[self.other])  # type: ignore[no-any-return]
        kept = [compare(value, one) for one in self.wanted]
        together = np.logical_and if self.comparison == "!=" else np.logical_or
        return together.reduce(kept)  # type: ignore[no-any-return]


def parse(text: str, fields: Fields) -> Constraint:
    """A constraint from its text. Raises SpecError on anything but a known field, comparison and value."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise SpecError(f'"{text}" is no constraint; write one as tensor_parallel<=8 or schedule==1f1b')
    field, comparison, right = found.groups()
    known(field, fields)
    words = fields[field]
    if words is None and right in fields and fields[right] is None:
        return Constraint(text, field, comparison, (), right)
    parts = [part.strip() for part in right.split(",")]
    if len(parts) > 1 and comparison not in ("==", "=", "!="):
        raise SpecError(f'"{text}" compares with {len(parts)} values; give one, or write == or !=')
    if words is None:
        return Constraint(text, field, comparison, tuple(number(part, field) for part in parts))
    if comparison not in ("==", "=", "!="):
        raise SpecError(f'"{text}" orders words; write {field}=={parts[0]} or {field}!={parts[0]}')
    return Constraint(text, field, comparison, tuple(word(part, field, words) for part in parts))


def parse_all(texts: Sequence[str], fields: Fields) -> tuple[Constraint, ...]:
    """Every constraint of a list."""
    return tuple(parse(text, fields) for text in texts)


def known(field: str, fields: Collection[str]) -> None:
    """Raise SpecError, with the nearest one, where there is no such field."""
    if field not in fields:
        raise SpecError(f'no field "{field}"; {did_you_mean(field, fields)}')


def word(text: str, field: str, words: Collection[str]) -> str:
    """One of the words that a field may be. Raises SpecError."""
    if text not in words:
        raise SpecError(f'{field} is never "{text}"; {did_you_mean(text, words)}')
    return text


def number(text: str, field: str) -> float:
    """A finite number. Raises SpecError."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SpecError(f'{field} cannot be "{text}"; give a number')
    return value


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """KEY=VALUE of every text. Raises SpecError naming the option where one is something else, or twice."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise SpecError(f'{option} takes KEY=VALUE, and "{text}" is none')
        if (key := key.strip()) in found:
            raise SpecError(f"{option} {key} is both {found[key]} and {value.strip()}; give it once")
        found[key] = value.strip()
    return found
