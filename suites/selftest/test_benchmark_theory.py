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


def test_ratios_are_of_medians_of_one_run(monkeypatch):
    """By a clock that estimates move themselves, one that takes 1 against 2.5 has a ratio of 2.5."""
    clock = [0.0]

    def taking(seconds):
        def estimate():
            clock[0] += seconds
            return 1.0

        return dict.fromkeys(estimators.UNITS, estimate)

    monkeypatch.setattr(estimators.time, "process_time", lambda: clock[0])
    programs = {estimators.OURS: lambda: taking(1.0), "slow": lambda: taking(2.5)}
    monkeypatch.setattr(estimators, "PROGRAMS", programs)
    monkeypatch.setattr(estimators, "_many", lambda rounds: None)  # moves no such clock
    table, _ = estimators.run(rounds=3, step=lambda _: None)
    assert {(row[1], row[3], row[4]) for row in table.rows} == {
        (estimators.OURS, "1000000.0", "1.00"),
        ("slow", "2500000.0", "2.50"),
    }


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
