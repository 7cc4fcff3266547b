"""false-alarms: the fast profile on what is right, seed after seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.printing import Format, show
from harness.cli.progress import progress


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("false-alarms")(false_alarms)


def false_alarms(
    implementations: Annotated[
        list[str] | None,
        typer.Option("--impl", metavar="ADDRESS", help="In the place of both references (repeatable)."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="How many, one seed each.")] = 1000,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    seed: Annotated[int, typer.Option(min=1, help="The first; the others follow.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page.")] = Path("results"),
) -> None:
    """Run the fast profile on both references with many seeds, and write what failed: nothing should.

    The shipped kinds of spec take turns. What the same sources have run is taken from .runs/false-alarms: a
    search that was interrupted goes on. Exit 1 if anything failed, 69 if anything could not be measured.
    """
    from harness.implementations.registry import resolve
    from harness.results import false_alarms as alarms
    from harness.results import files, report

    chosen = tuple(implementations or alarms.IMPLEMENTATIONS)
    for address in chosen:
        resolve(address)
    files.ensure_writable(output / alarms.FILE)
    trials = []
    with progress("false alarms", total=runs) as bar:
        for one in alarms.search(range(seed, seed + runs), seed, chosen, jobs):
            trials.append(one)
            bar.step(f"{sum(len(t.wrong) for t in trials)} wrong")
    found = alarms.Found.of(chosen, trials)
    page = found.page()
    show(list(page.tables[:2]), Format.plain)
    written = report.write(output, page)
    facts = output / f"{alarms.FILE}.json"
    facts.write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    typer.echo(f"wrote {written} and {facts}")
    raise typer.Exit(found.code)
