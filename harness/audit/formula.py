"""Formulas in Python's own syntax: their named steps, and their value at given numbers.

A formula is one expression, or lines `name = expression` before it, each of which later lines may use.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}
_FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": math.log,
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
}
_NAME = re.compile(r"[A-Za-z_]\w*")


class Line(NamedTuple):
    """A step of a formula; the last one, the quantity itself, has no name."""

    name: str
    expression: str


def lines_of(formula: str) -> tuple[Line, ...]:
    """The steps of a formula in order. Raises ValueError if a line but the last one has no name."""
    *steps, last = formula.splitlines()
    found = [Line(*step.split(" = ", 1)) for step in steps if " = " in step]
    if len(found) < len(steps):
        raise ValueError(f"the formula {formula!r} has a step without a name; write it as name = expression")
    return (*found, Line("", last))


def one_line(formula: str) -> str:
    """The formula as part of a sentence: the quantity first, then its steps."""
    *steps, last = formula.splitlines()
    return f"{last}, where {', '.join(steps)}," if steps else last


def names_in(formula: str) -> tuple[str, ...]:
    """The names in a formula, each once, in order; those of functions and of steps are among them."""
    return tuple(dict.fromkeys(_NAME.findall(formula)))


def renamed(formula: str, names: Mapping[str, str]) -> str:
    """The formula with other names."""
    return _NAME.sub(lambda name: names.get(name[0], name[0]), formula)


def substituted(expression: str, values: Mapping[str, Any], show: Callable[[float], str]) -> str:
    """The expression with every name that is known replaced by its number."""

    def replace(match: re.Match[str]) -> str:
        value = values.get(match[0])
        if isinstance(value, list):
            return f"({', '.join(show(float(one)) for one in value)})"
        return match[0] if value is None or isinstance(value, str) else show(float(value))

    return _NAME.sub(replace, expression)


def value_of(expression: str, values: Mapping[str, Any]) -> float:
    """What an expression comes to. Raises ValueError if it is more than arithmetic on these values."""
    return float(_value(ast.parse(expression, mode="eval").body, values))


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, values))
        case ast.Compare(left, [op], [right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(one, values) for one in args))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic on {', '.join(values)}")
