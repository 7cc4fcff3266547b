"""The work of `moe-harness report`: the pages of `results/`, written and printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harness.cli.progress import progress

if TYPE_CHECKING:
    from harness.results.report import Page
    from harness.results.runfile import Run

SUBJECTS = (
    "reference@mixtral-8x7b",
    "reference@qwen3-30b-a3b",
    "reference@gpt-oss-20b",
    "reference@deepseek-v3",
    "transformers:mixtral@mixtral-8x7b",
    "transformers:qwen3_moe@qwen3-30b-a3b",
    "transformers:gpt_oss@gpt-oss-20b",
    "transformers:deepseek_v3@deepseek-v3",
)
"""The reference on each spec beside an implementation of the same spec by others."""
ENGINES = ("reference@mixtral-8x7b", "transformers:mixtral@mixtral-8x7b")
RUN_FILE = Path(".runs") / "report.jsonl"
BASELINE = "baseline.toml"


def make(folder: Path, *, engines: bool = False) -> int:
    """Write and print every page; the exit code is that of the suites' run. With `engines` also the page of
    what is generated, which takes minutes.

    A baseline.toml in the folder says which failures are known. Raises RunFileError if the run was cut off.
    """
    from harness.results import report, suites
    from harness.results.gate import FAILED

    for make in (report.leak, report.figures):
        with progress("report", detail=make.__name__):
            page = make()
        publish(folder, page)
    code = _conformance(folder, SUBJECTS, suites.ARCHITECTURE, report.conformance)
    if engines and code in (0, FAILED):
        code = max(code, _conformance(folder, ENGINES, suites.ENGINES, report.engines))
    return code


def _conformance(
    folder: Path, subjects: Sequence[str], parts: Sequence[str], make: Callable[[Run], Page]
) -> int:
    """Run parts of the suites on subjects, publish the page that `make` makes of it; pytest's exit code."""
    from harness.results import suites
    from harness.results.gate import SOFTWARE
    from harness.results.runfile import read

    arguments = [word for subject in subjects for word in ("--impl", subject)]
    if (folder / BASELINE).exists():
        arguments += ["--baseline", str(folder / BASELINE)]
    RUN_FILE.unlink(missing_ok=True)
    code = suites.run([*arguments, "--run-file", str(RUN_FILE)], parts)
    if not RUN_FILE.exists():
        return code or SOFTWARE
    publish(folder, make(read(RUN_FILE)))
    return code


def publish(folder: Path, page: Page) -> None:
    """Write the page into the folder, and print it."""
    from harness.results import report

    path = report.write(folder, page)
    typer.echo(page.text())
    typer.echo(f"wrote {path}\n")
