"""gate, compare and summary on run files: the same facts in every format, and the exit code they deserve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.results import baseline as baselines
from suites.selftest.stubs import command
from suites.selftest.test_results import record, written

pytestmark = pytest.mark.usefixtures("whole_lines")


def test_a_run_is_gated_as_it_deserves(tmp_path: Path) -> None:
    """0 where nothing new failed, 1 for a failure or a stale entry of the baseline."""
    before, after, baseline = tmp_path / "before.jsonl", tmp_path / "after.jsonl", tmp_path / "known.toml"
    written(before, record("a.b"), record("a.c"))
    failing = written(after, record("a.b", "failed"), record("a.c"))
    assert command("gate", str(before)) == 0
    assert command("gate", str(after)) == 1
    baselines.write(baseline, failing.records)
    assert command("gate", str(after), "--baseline", str(baseline)) == 0
    assert command("gate", str(before), "--baseline", str(baseline)) == 1


def test_a_verdict_reads_the_same_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The headline, the exit code, and one row for each property that decided or is missed."""
    run, baseline = tmp_path / "run.jsonl", tmp_path / "known.toml"
    written(run, record("a.b", "failed", reason="1 | 2 differ"), record("a.c"))
    baselines.write(baseline, [record("a.gone", "failed")])
    shown = {}
    for form in ("plain", "markdown", "json"):
        assert command("gate", str(run), "--baseline", str(baseline), "--format", form) == 1
        shown[form] = capsys.readouterr().out
    headline, _, _, *rows = shown["plain"].splitlines()
    assert headline == "new failures: 1, stale entries: 0 (exit code 1)"
    assert [row.split()[:4] for row in rows] == [
        ["failed", "a.b", "reference", "dbrx"],
        ["not", "run", "a.gone", "reference"],
    ]
    assert shown["markdown"].startswith(f"### {headline}\n\n| outcome")
    assert "| 1 \\| 2 differ" in shown["markdown"]
    told = json.loads(shown["json"])
    assert (told["exit_code"], told["headline"]) == (1, "new failures: 1, stale entries: 0")
    assert told["details"][0] == {
        "outcome": "failed",
        "property": "a.b",
        "implementation": "reference",
        "spec": "dbrx",
        "reason": "1 | 2 differ",
    }


def test_a_verdict_without_details_is_its_headline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing decided, there is no empty table."""
    run = tmp_path / "run.jsonl"
    written(run, record())
    assert command("gate", str(run)) == 0
    assert capsys.readouterr().out == "nothing failed that was not expected to (exit code 0)\n"


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`compare` names what changed from one run to another."""
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    written(before, record("a.b"), record("a.c"))
    written(after, record("a.b", "failed"), record("a.c"))
    assert command("compare", str(before), str(after), "--format", "json") == 0
    (table,) = json.loads(capsys.readouterr().out)
    (row,) = table["rows"]
    assert (row["change"], row["before"], row["after"]) == ("changed", "passed", "failed")


def test_runs_are_summed_up_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`summary` of two jobs' files is one table of properties by implementation, in every format."""
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    written(one, record("a.b"), record("a.c", "failed"))
    written(two, record("a.b", implementation="other"))
    shown = {}
    for form in ("plain", "markdown", "json"):
        assert command("summary", str(one), str(two), "--format", form) == 0
        shown[form] = capsys.readouterr().out
    assert "property    other on dbrx    reference on dbrx" in shown["plain"]
    assert "### Property x implementation" in shown["markdown"]
    outcomes, matrix, rest, canary = json.loads(shown["json"])
    assert matrix["rows"] == [
        {"property": "a.b", "other on dbrx": "passed", "reference on dbrx": "passed"},
        {"property": "a.c", "other on dbrx": "", "reference on dbrx": "failed"},
    ]
    assert [(row["implementation"], row["passed"], row["failed"]) for row in outcomes["rows"]] == [
        ("other", 1, 0),
        ("reference", 1, 1),
    ]
    assert [row["reason"] for row in rest["rows"]] == ["because"]
    assert canary["rows"][0]["caught"] is True


def test_runs_that_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`summary` of the same run twice, or of two seeds, is one sentence and exit code 78."""
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    written(one, record())
    written(two, record("a.c"), seed=2)
    assert command("summary", str(one), str(one)) == 78
    assert command("summary", str(one), str(two)) == 78
    first, second = capsys.readouterr().err.splitlines()
    assert f"a.b of reference on dbrx is also in {one}" in first
    assert "seed is 2, but 1" in second
