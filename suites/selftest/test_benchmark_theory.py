"""What an estimate costs: one run, every program at the same work, answers beside the times."""

from __future__ import annotations

import builtins

import pytest

from harness.benchmark import estimators


@pytest.fixture
def no_peers(monkeypatch):
    """As if nothing but this project were installed."""
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name.split(".")[0] in ("llmflops", "llm_analysis"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_a_program_that_is_not_installed_is_named_and_not_counted(no_peers):
    """Without the other programs the table has ours alone, and says which are missing."""
    table, _ = estimators.run(rounds=2, step=lambda _: None)
    assert {row[1] for row in table.rows} == {estimators.OURS}
    assert len(table.rows) == len(estimators.UNITS)
    assert "not installed: llm-flops, llm-analysis" in table.title


def test_ratios_are_of_times_of_one_run(monkeypatch):
    """A program that answers twice has about the time of two: its ratio to one answer is above 1."""
    ours = estimators.PROGRAMS[estimators.OURS]()

    def twice():
        ours[estimators.STEP]()
        return ours[estimators.STEP]()

    monkeypatch.setattr(
        estimators,
        "PROGRAMS",
        {estimators.OURS: lambda: ours, "twice": lambda: {estimators.STEP: twice}},
    )
    table, _ = estimators.run(rounds=5, step=lambda _: None)
    (row,) = [row for row in table.rows if row[1] == "twice"]
    # 1.2: half of what doing everything twice must cost, on CPU time's median over rounds
    assert float(row[4]) > 1.2
    assert row[2] == next(one[2] for one in table.rows if one[0] == estimators.STEP)


def test_one_estimate_of_many_agrees_with_one(no_peers):
    """The vectorised decode step at batch 32 is the single one's."""
    import numpy as np

    from harness.spec import load
    from harness.spec.hardware import load_hardware
    from harness.theory.layout import Layout
    from harness.theory.passes import decode
    from harness.theory.precision import PRECISIONS
    from harness.theory.roofline import pricer

    spec = load("mixtral-8x7b").architecture
    priced = pricer(spec, load_hardware("h100"), Layout(tensor_parallel=8), PRECISIONS["bfloat16"])
    many = priced.of(decode(spec, np.array([1, 32]), 2048))
    # 1e-12: the same formula, grouped otherwise, in float64
    assert many[1] == pytest.approx(priced.step(decode(spec, 32, 2048)).seconds, rel=1e-12)
