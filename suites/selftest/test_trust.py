"""What a run is worth: the null implementation in every run, the second reference, and false alarms."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.results.false_alarms import QUICK, SPECS
from harness.results.runfile import read
from suites.selftest.stubs import command, moe_harness


def checked(tmp_path: Path, *arguments: str) -> tuple[int, str, Path]:
    """Exit code, output and run file of `check`."""
    file = tmp_path / "run.jsonl"
    done = moe_harness("check", *arguments, "--run-file", str(file), *QUICK)
    return done.returncode, done.stdout, file


def test_a_run_that_a_constant_passes_is_void(tmp_path: Path) -> None:
    """Where the null implementation passes all that it ran on, the run ends in 69, as `gate` does then."""
    code, said, file = checked(tmp_path, "--spec", "mixtral-8x7b", "-k", "token_order or distinct")
    assert code == 69
    assert "an implementation that computes nothing passed all 2 of this run's properties" in said
    null = read(file).footer.null
    assert null not in (None, "off")
    assert sorted(null.passed) == ["routing.selects-k-distinct", "routing.token-order-is-irrelevant"]
    assert command("gate", str(file)) == 69


def test_a_single_property_may_be_asked_for(tmp_path: Path) -> None:
    """One property alone gets its outcome, and the run says that a constant satisfies it."""
    code, said, _ = checked(tmp_path, "--spec", "mixtral-8x7b", "-k", "token_order")
    assert code == 0
    assert "of these properties a constant satisfies 1" in said


def test_null_is_measured_and_is_no_result(tmp_path: Path) -> None:
    """Each distinct property runs once on null, its time is told, and its outcome is none of the run's."""
    code, said, file = checked(
        tmp_path, "--spec", "mixtral-8x7b", "--spec", "dbrx", "-k", "token_order or distinct or strict", "-vv"
    )
    assert code == 0
    assert re.search(
        r"Harness overhead\n.*\n.*\n(\S+ +(passed|failed|void|crashed|unsupported) +[\d.]+\n){3}", said
    )
    assert (
        "harness overhead per property, measured on the null implementation (processor time): median" in said
    )
    assert "time of this run's properties outside of the implementations: " in said
    run = read(file)
    assert {r.implementation for r in run.records} == {"reference"}
    assert all(r.implementation_s is not None and r.implementation_s <= r.duration_s for r in run.records)
    null = run.footer.null
    assert null not in (None, "off")
    assert sorted(one.slug for one in null.measured) == sorted({r.slug for r in run.records})
    assert "parameters.loading-is-strict" not in null.passed


def test_null_can_be_left_out(tmp_path: Path) -> None:
    """With --no-null it does not run, and both the output and the run file say so."""
    code, said, file = checked(tmp_path, "--spec", "mixtral-8x7b", "-k", "token_order", "--no-null")
    assert code == 0
    assert "null implementation: off (--no-null)" in said
    assert read(file).footer.null == "off"


def test_null_runs_once_under_parallel_workers(tmp_path: Path) -> None:
    """Under -n 2 one worker measures it."""
    code, said, file = checked(tmp_path, "--spec", "mixtral-8x7b", "-k", "distinct or strict", "-n", "2")
    assert code == 0
    assert "1 null measured" in said
    assert read(file).footer.null not in (None, "off")


@pytest.mark.parametrize("spec", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "palm-540b"])
def test_the_second_reference_passes(spec: str, tmp_path: Path) -> None:
    """Another dispatch, attention and order of summation, in float64: the fast profile holds of it too."""
    code, said, file = checked(
        tmp_path, "--impl", "independent", "--spec", spec, "--profile", "fast", "--no-null"
    )
    assert code == 0, said
    assert {r.outcome for r in read(file).records} <= {"passed", "unsupported"}


def test_the_second_reference_shares_no_arithmetic_with_the_first() -> None:
    """Of the reference's modules it imports none but the one that names and draws weights."""
    folder = Path(__file__).resolve().parents[2] / "harness" / "implementations" / "independent"
    lines = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    borrowed = [line for line in lines if "import" in line and "harness.reference" in line]
    assert borrowed == ["from harness.reference import weights as named"]


@pytest.mark.slow
def test_false_alarms_are_counted(tmp_path: Path) -> None:
    """Four seeds find nothing wrong with what is right, and a defect where there is one."""
    done = moe_harness("false-alarms", "--runs", "4", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "false-alarms.json").read_text())
    assert (found["runs"], found["outcomes"]["failed"], found["wrong"]) == (4, 0, [])


def test_a_broken_implementation_is_an_alarm(tmp_path: Path) -> None:
    """Exit 1, with seed, spec, property and reason on the page and in the JSON file."""
    done = moe_harness(
        "false-alarms", "--impl", "mutant:canary", "--runs", "1", "--jobs", "1", "-o", str(tmp_path)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "false-alarms.json").read_text())
    distinct = next(one for one in found["wrong"] if one["slug"] == "routing.selects-k-distinct")
    assert (distinct["seed"], distinct["spec"]) == (1, SPECS[0])
    assert "routing.selects-k-distinct" in (tmp_path / "false-alarms.md").read_text()
