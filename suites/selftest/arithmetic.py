"""Formulas worked out without the audit, by arithmetic and comparisons alone, and numbers as printed."""

from __future__ import annotations

import ast
import math
import operator

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Not: operator.not_,
}
FUNCTIONS = {"exp": math.exp, "log": math.log, "min": min, "max": max, "floor": math.floor, "ceil": math.ceil}


def evaluated(node, values):
    """A formula's value, computed without the theory: arithmetic and comparisons alone."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return values[node.id]
        case ast.BinOp():
            return OPERATORS[type(node.op)](evaluated(node.left, values), evaluated(node.right, values))
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](evaluated(node.operand, values))
        case ast.Call():
            return FUNCTIONS[node.func.id](*(evaluated(one, values) for one in node.args))
        case ast.Compare():
            right = evaluated(node.comparators[0], values)
            return OPERATORS[type(node.ops[0])](evaluated(node.left, values), right)
    raise AssertionError(ast.dump(node))


def worked_out(formula, values):
    """The value of a formula's last line, where each line before it has named a number for those after it.

    None for a formula that names a procedure (a search, a simulation): these have tests of their own.
    """
    known, found = dict(values), None
    for line in ast.parse(formula).body:
        if called(line) - set(FUNCTIONS):
            return None
        found = float(evaluated(line.value, known))
        if isinstance(line, ast.Assign):
            known[line.targets[0].id] = found
    return found


def called(tree):
    """The functions that a formula names."""
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call)}


def is_sum(text, *, of_names):
    """Whether a text is an expression that can be worked out, of names and numbers or of numbers alone."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - called(tree)
    single = isinstance(tree, ast.Name | ast.Constant | ast.Tuple)  # 8,192
    return not single and not called(tree) - set(FUNCTIONS) and (of_names or not named)


def as_printed(value, text):
    """Whether a number is printed so: rounded to four digits, or to a whole number of five or six."""
    said = float(text.replace(",", ""))
    last = 10.0 ** (math.floor(math.log10(abs(said))) - 3) if said else 1e-300
    last = min(last, 1) if "e" not in text else last
    # 1e-7: numbers in a formula have nine digits, and differences of a few of them lose some
    return abs(said - value) <= last / 2 + 1e-7 * abs(value)
