"""Formulas as they are explained: steps, numbers in the place of names, and values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from harness.audit import explain
from harness.audit.formula import lines_of, names_in, one_line, renamed, substituted, value_of
from harness.audit.quantities import QUANTITIES
from suites.selftest.small_specs import BASE, claim, spec

STEPS = "mean = 1 / (gpus * rate)\nkept = exp(-mean)\nkept * days"


def test_a_formula_has_named_steps():
    """Lines before the last one are named; the last one is the quantity."""
    assert lines_of(STEPS) == (("mean", "1 / (gpus * rate)"), ("kept", "exp(-mean)"), ("", "kept * days"))
    assert lines_of("a * (b == 3)") == (("", "a * (b == 3)"),)
    assert names_in(STEPS) == ("mean", "gpus", "rate", "kept", "exp", "days")
    assert one_line("a / b") == "a / b"
    assert one_line(STEPS) == "kept * days, where mean = 1 / (gpus * rate), kept = exp(-mean),"
    with pytest.raises(ValueError, match="write it as name = expression"):
        lines_of("1 / gpus\n2")


def test_names_become_other_names_or_numbers():
    """Whole names only, of those that are known."""
    assert renamed("rate * rates", {"rate": "gpu_hour_usd"}) == "gpu_hour_usd * rates"
    assert (
        substituted("a * ab + f(c)", {"a": 2, "c": [1, 2.5], "ab": "text"}, str) == "2.0 * ab + f((1.0, 2.5))"
    )


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(1 - p) ** 2 / 2", 0.125),
        ("2 * p % 0.75", 0.25),
        ("(p < 1) * (n >= 3) + (n != 3)", 1),
        ("(not flag) * n", 3),
        ("exp(log(n)) - 3 + max(p, n) + floor(p)", 3),
    ],
)
def test_arithmetic_comes_out(expression, value):
    """Sums, powers, remainders, comparisons and the functions of one number."""
    assert math.isclose(value_of(expression, {"p": 0.5, "n": 3, "flag": 0}), value, abs_tol=1e-12)


@pytest.mark.parametrize("expression", ["n + unknown", "gain(n)", "n[0]", "(1, n)", "n.real", "'n'"])
def test_what_is_no_arithmetic_is_refused(expression):
    """A name without a number, a procedure, and anything but numbers."""
    with pytest.raises(ValueError, match="is no arithmetic on n"):
        value_of(expression, {"n": 3})


@pytest.mark.parametrize("name", QUANTITIES)
def test_every_formula_can_be_read(name):
    """Its lines have names, and no step is called like an argument."""
    quantity = QUANTITIES[name]
    steps = {line.name for line in lines_of(quantity.formula)[:-1]}
    arguments = {axis.rpartition(".")[2] for axis in quantity.axes} | {*quantity.given, *quantity.optional}
    assert not steps & arguments


def test_each_step_is_explained_with_its_numbers(tmp_path, monkeypatch):
    """A step stands in a line of its own with its value, which the lines after it take in its place."""
    rent = QUANTITIES["training.rent"]
    formula = "mtbf = days * 24 / 7\nmtbf * 7 * gpus * gpu_hour_usd"
    monkeypatch.setitem(QUANTITIES, rent.name, replace(rent, formula=formula))
    given = 'given = { gpus = "~10", days = 2, gpu_hour_usd = 3 }'
    text = explain(
        spec(tmp_path, claim("rent", "training.rent", ("1440", "USD", "A"), extra=given), base=BASE), "rent"
    )
    assert "    mtbf = days * 24 / 7 = 2 * 24 / 7 = 6.857 s\n" in text
    shown = "rent = mtbf * 7 * gpus * gpu_hour_usd = 6.85714286 * 7 * 10 * 3 = 1,440 USD\n"
    assert f"    {shown}    with gpus 5 to 15: 720 to 2,160 USD\n" in text
