"""`moe-harness mutants`: what it measures, what it takes up again, and mutants that no run survives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.mutants import CATALOGUE
from harness.results.kills import hunting
from suites.selftest.stubs import command, environment, moe_harness

ODD = '''
"""Mutants that are odd in one way each."""

import os
import signal
import time

from harness.mutants.defect import patched


@patched(stage="combine")
def odd_dies(model):
    """Ends its process."""
    model.forward = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


@patched(stage="combine")
def odd_hangs(model):
    """Gives no answer."""
    model.forward = lambda *_, **__: time.sleep(600)


@patched(stage="combine")
def odd_crashes(model):
    """Raises."""
    model.forward = lambda *_, **__: 1 / 0


@patched(stage="combine")
def odd_harmless(model):
    """Has no defect."""
'''
TWO = ("parameters.every-weight-is-used", "compute.logits-equal-reference")


def facts(folder: Path) -> dict[str, Any]:
    """What the command wrote for programs."""

    def strange(constant: str) -> None:
        raise AssertionError(f"{constant} in the JSON")

    found: dict[str, Any] = json.loads((folder / "kill-matrix.json").read_text(), parse_constant=strange)
    return found


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder, which holds its run files and what it writes."""
    return moe_harness("mutants", *arguments, "--output", ".", cwd=folder)


def test_a_mutant_is_killed_for_the_right_reason(tmp_path: Path) -> None:
    """A kill names property, stage, counterexample and seconds; a second run takes it from its file."""
    chosen = ("--mutant", "canary", "--property", "routing.selects-k-distinct", "--jobs", "1")
    done = run(tmp_path, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 1 mutants are taken from" in done.stderr
    first = facts(tmp_path)
    (cell,) = first["cells"]
    assert (cell["property"], cell["mutant"]) == ("routing.selects-k-distinct", "canary")
    assert (cell["outcome"], cell["stage"], cell["claimed"], cell["right"]) == (
        "killed",
        "select",
        True,
        True,
    )
    assert cell["reason"]
    (mutant,) = first["mutants"]
    assert (mutant["status"], mutant["first_killed_by"]) == ("killed", cell["property"])
    assert mutant["first_kill_seconds"] == cell["seconds"]
    assert (tmp_path / "kill-matrix.md").read_text().startswith("# Kill matrix\n")
    again = run(tmp_path, *chosen)
    assert again.returncode == 0
    assert "1 of 1 mutants are taken from" in again.stderr
    assert facts(tmp_path) == first


def test_other_sources_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides an outcome decides where run files are: the sources, the seed and what was asked."""
    plan = hunting.Plan()
    there = plan.folder()
    assert hunting.Plan().folder() == there
    assert hunting.Plan(seed=2).folder() != there
    assert hunting.Plan(full=True).folder() != there
    monkeypatch.setattr(hunting, "sources", lambda: "others")
    assert plan.folder() != there


def test_the_parts_are_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten parts hold each mutant once, in sizes that differ by one at most."""
    parts = [hunting.share(tuple(CATALOGUE), (k, 10)) for k in range(1, 11)]
    assert sorted(name for part in parts for name in part) == sorted(CATALOGUE)
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--mutant", "canry"), "there is no mutant 'canry', did you mean 'canary'?"),
        (
            ("--property", "routing.selects-k-distinc"),
            "there is no property 'routing.selects-k-distinc', did you mean 'routing.selects-k-distinct'?",
        ),
        (("--part", "11/10"), "--part 11/10: say K/N with K from 1 to N"),
        (("--part", "tenth"), "--part tenth: say K/N with K from 1 to N"),
        (("--also", "no_such_module"), "--also no_such_module: cannot be imported"),
    ],
)
def test_what_there_is_not_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of nothing is refused before anything runs: exit code 78."""
    assert command("mutants", *arguments) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_mutants_that_no_process_survives_are_outcomes(tmp_path: Path) -> None:
    """One that dies is not measured, one that hangs or crashes is not killed, and the rest go on."""
    (tmp_path / "odd_mutants.py").write_text(ODD)
    odd = ("odd-dies", "odd-hangs", "odd-crashes", "odd-harmless")
    names = [word for name in (*odd, "canary") for word in ("--mutant", name)]
    slugs = [word for slug in (TWO[1], "routing.selects-k-distinct") for word in ("--property", slug)]
    done = run(tmp_path, *names, *slugs, "--also", "odd_mutants", "--timeout", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    found = {one["mutant"]: one for one in facts(tmp_path)["mutants"]}
    assert {name: one["status"] for name, one in found.items()} == {
        "odd-dies": "not measured",
        "odd-hangs": "survived",
        "odd-crashes": "survived",
        "odd-harmless": "survived",
        "canary": "killed",
    }
    assert found["odd-dies"]["reason"].startswith("the process died while it ran ")
    crashed = {c["mutant"]: c["reason"] for c in facts(tmp_path)["cells"] if c["outcome"] == "crashed"}
    assert crashed["odd-hangs"] == "timed out after 5.0 s"
    assert crashed["odd-crashes"].startswith("crashed: ZeroDivisionError")


@pytest.mark.parametrize(
    "measures", [("mutants", "--mutant", "canary"), ("false-alarms",), ("survey", "transformers")]
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    measures: tuple[str, ...], tmp_path: Path
) -> None:
    """What would be measured in vain is not measured: one sentence says so, and 78."""
    (tmp_path / "page").write_text("a file, not a folder")
    done = moe_harness(*measures, "--output", "page/results", cwd=tmp_path)
    assert done.returncode == 78
    assert "page" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / ".runs").exists()


def test_an_interrupted_matrix_goes_on(tmp_path: Path) -> None:
    """Ctrl-C ends in 130 with no process left; what had ended is taken up by the next run."""
    (tmp_path / "odd_mutants.py").write_text(ODD)
    chosen = ("--mutant", "canary", "--mutant", "odd-hangs", "--also", "odd_mutants", "--jobs", "1")
    arguments = ("mutants", *chosen, "--property", "routing.selects-k-distinct", "--output", ".")
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob(".runs/mutants/*/odd-hangs.jsonl")):
        time.sleep(0.05)
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.endswith("moe-harness: interrupted\n")
    assert not psutil.wait_procs(left, timeout=30)[1]
    (kept,) = tmp_path.glob(".runs/mutants/*/canary.jsonl")
    assert '"kind": "footer"' in kept.read_text().splitlines()[-1]
