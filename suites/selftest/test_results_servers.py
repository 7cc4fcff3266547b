"""The page of real servers: what each made of the properties, and nothing that none of them offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.results.runfile import read
from harness.results.servers import page
from suites.selftest.stubs import command, moe_harness


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one property that the reference passes, and of one that it is not asked."""
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    done = moe_harness("check", "-k", "is_causal", "--spec", "mixtral-8x7b", "--run-file", str(path))
    assert path.exists(), done.stdout + done.stderr
    return path


def test_a_row_is_a_property_that_some_server_offers(run_file: Path) -> None:
    """Each server is a column under its own name; an unsupported property is an empty cell, or no row."""
    run = read(run_file)
    nothing = run.records[0].model_copy(update={"outcome": "unsupported", "reason": "lacks it"})
    empty = type(run)(run.path, run.header, (nothing,), run.footer)
    _, matrix, rest = page({"one": run, "other": empty}).tables
    assert matrix.headers == ("property", "one", "other")
    assert ("attention.is-causal", "passed", "") in matrix.rows
    assert rest.rows == ()
    assert page({"other": empty}).tables[1].rows == ()


def test_the_command_writes_the_page(run_file: Path, tmp_path: Path) -> None:
    """`servers NAME=RUN` writes servers.md; a run without a name is refused."""
    assert command("servers", f"mine 1.0={run_file}", "--output", str(tmp_path)) == 0
    assert "mine 1.0" in (tmp_path / "servers.md").read_text()
    assert command("servers", str(run_file), "--output", str(tmp_path)) == 78
