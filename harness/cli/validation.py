"""validation: theory against what was published and measured, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.printing import Format, FormatOption, show
from harness.cli.progress import progress


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(validation)


def validation(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.md", help="Write a page of Markdown.")
    ] = None,
    silicon: Annotated[
        bool, typer.Option(help="Predict the measured serving rows too (extra `silicon`; takes a minute).")
    ] = True,
    form: FormatOption = Format.plain,
) -> None:
    """Every published figure beside its prediction, the error, and a reason beyond 10 %."""
    from harness.results import report
    from harness.results.validation import page

    with progress("validation"):
        made = page(*([output.name] if output else []), silicon=silicon)
    show(made.tables, form)
    if output is not None:
        typer.echo(f"\nwrote {report.write(output.parent, made)}", err=True)
