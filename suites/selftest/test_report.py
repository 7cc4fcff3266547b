"""The committed tables are what the commands write."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.results import report
from harness.results.record import Canary
from suites.selftest.stubs import ROOT
from suites.selftest.test_results import record, written


@pytest.mark.parametrize("make", [report.leak, report.figures])
def test_a_committed_page_is_up_to_date(make: Callable[[], report.Page]) -> None:
    """What is computed now is, to the letter, what is committed: if not, run `moe-harness report`."""
    page = make()
    committed = ROOT / "results" / page.file
    assert committed.read_text(encoding="utf-8") == page.text()


def test_the_report_runs_and_gives_what_is_committed(tmp_path: Path) -> None:
    """`moe-harness report` finds nothing new, and every page that it writes is the committed one."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "baseline.toml", tmp_path / "results")
    command = [sys.executable, "-m", "harness", "report", "--output", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = sorted((tmp_path / "results").glob("*.md"))
    assert [page.name for page in pages] == ["audit-gpt4-leak.md", "conformance.md", "figures.md"]
    for page in pages:
        assert page.read_text(encoding="utf-8") == (ROOT / "results" / page.name).read_text(encoding="utf-8")


def test_the_conformance_page_tells_everything_that_did_not_pass(tmp_path: Path) -> None:
    """Outcomes are counted, every reason is shown, and nothing on the page depends on when it was run."""
    found = (
        record("a.b"),
        record("a.c", "failed", reason="1 | 2 differ", duration_s=3.0),
        record("a.b", "unsupported", implementation="other", reason="no capability 'cache'"),
    )
    page = report.conformance(written(tmp_path / "1.jsonl", *found))
    again = report.conformance(written(tmp_path / "2.jsonl", *reversed(found)))
    assert page.text() == again.text()
    outcomes, _, rest, canary = page.tables
    assert outcomes.rows == (("other", "dbrx", 0, 0, 1, 0, 0, 0), ("reference", "dbrx", 1, 1, 0, 0, 0, 0))
    assert [row[-1] for row in rest.rows] == ["no capability 'cache'", "1 | 2 differ"]
    assert "| 1 \\| 2 differ" in page.text()
    assert canary.rows == ((True, "token 0 chose expert 1 twice"),)
    alive = written(tmp_path / "3.jsonl", *found, canary=Canary(caught=False, reason="it passed"))
    assert report.conformance(alive).tables[-1].rows == ((False, "it passed"),)


def test_a_page_is_written_where_it_is_told(tmp_path: Path) -> None:
    """A page ends up under its own name, in a folder that is made if need be."""
    page = report.figures()
    path = report.write(tmp_path / "new" / "folder", page)
    assert path == tmp_path / "new" / "folder" / "figures.md"
    assert path.read_text(encoding="utf-8") == page.text()
