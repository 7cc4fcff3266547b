"""The plugin in processes of its own: parallel workers, and runs that are ended from outside."""

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

from harness.results.runfile import RunFileError, read
from suites.selftest.stubs import ODD, QUICK, STUBS, command, environment, pytest_in, write

HANG = (
    STUBS
    + '''
@conformance("stub.slow", clause="c", needs=())
def test_slow(case):
    """Takes its time."""
    import time
    time.sleep(60)
'''
)


def outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """Outcome and reason by property."""
    return {r.slug: (r.outcome, r.reason) for r in read(path).records}


def test_parallel_workers_find_the_same(tmp_path: Path) -> None:
    """Under -n 2 the records are those of a plain run, in one run file with one canary."""
    write(tmp_path)
    arguments = ("--impl", f"{ODD}good", "--impl", f"{ODD}nan", "--shrink-seconds=0")
    plain = pytest_in(tmp_path, *arguments, "--run-file=plain.jsonl")
    parallel = pytest_in(tmp_path, *arguments, "--run-file=parallel.jsonl", "-n", "2")
    assert plain.returncode == parallel.returncode == 1
    found: list[list[dict[str, Any]]] = []
    for name in ("plain.jsonl", "parallel.jsonl"):
        run = read(tmp_path / name)
        assert run.footer.canary is not None
        assert run.footer.canary.caught
        rows = [r.model_dump(exclude={"duration_s", "implementation_s"}) for r in run.records]
        found.append(sorted(rows, key=lambda row: (row["implementation"], row["slug"])))
    assert found[0] == found[1]
    assert "1 canary caught" in parallel.stdout


def test_a_worker_that_dies_is_an_outcome(tmp_path: Path) -> None:
    """Under pytest-xdist even a killed process fails only its own properties, and the run is complete."""
    write(tmp_path)
    done = pytest_in(tmp_path, "--impl", f"{ODD}killed", "-n", "2", "--run-file=run.jsonl")
    assert done.returncode == 1
    died = ("failed", "crashed: the process died while it ran this property")
    assert outcomes(tmp_path / "run.jsonl") == {
        "stub.finite": died,
        "stub.shape": died,
        "stub.cached": ("unsupported", "the model declares no capability 'cache'"),
    }


def test_an_unusable_option_is_one_sentence_under_xdist_too(tmp_path: Path) -> None:
    """Exit code 78 comes from the controlling process, before a worker starts."""
    write(tmp_path)
    done = pytest_in(tmp_path, "--impl", f"{ODD}absent", "-n", "2")
    assert done.returncode == 78
    assert "has no 'absent'" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The workers that a run has started."""
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_from_outside_is_no_result(
    tmp_path: Path, number: signal.Signals, workers: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured is on disk, but without a footer: every reader refuses it, and no process is left."""
    write(tmp_path, stubs=HANG)
    run = tmp_path / "run.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *QUICK, "--impl", f"{ODD}good", "--run-file=run.jsonl", *workers],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    measured = {"stub.finite", "stub.shape", "stub.cached"}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        run.exists() and all(slug in run.read_text() for slug in measured)
    ):
        time.sleep(0.05)
    left = children(process)
    process.send_signal(number)
    code = process.wait(timeout=30)
    assert code == (2 if number == signal.SIGINT else -signal.SIGKILL)
    assert not psutil.wait_procs(left, timeout=30)[1]
    lines = [json.loads(line) for line in run.read_text().splitlines()]
    assert {line["slug"] for line in lines[1:]} == measured
    for arguments in (("gate", str(run)), ("compare", str(run), str(run)), ("summary", str(run))):
        assert command(*arguments) == 78
        out, err = capsys.readouterr()
        assert "there is no footer" in err
        assert out == ""


def test_an_implementation_that_interrupts_cannot_fake_a_result(tmp_path: Path) -> None:
    """A SIGINT from within ends the run as Ctrl-C does: exit code 2, and no footer."""
    write(tmp_path)
    done = pytest_in(tmp_path, "--impl", f"{ODD}interrupts", "--run-file=run.jsonl")
    assert done.returncode == 2
    with pytest.raises(RunFileError, match="there is no footer"):
        read(tmp_path / "run.jsonl")


def test_a_run_that_stops_at_the_first_failure_is_no_result(tmp_path: Path) -> None:
    """Under -x the rest was not measured, so there is no footer."""
    write(tmp_path)
    done = pytest_in(tmp_path, "--impl", f"{ODD}nan", "-x", "--run-file=run.jsonl")
    assert done.returncode == 1
    with pytest.raises(RunFileError, match="there is no footer"):
        read(tmp_path / "run.jsonl")
