"""How a command prints what it was given."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from harness.theory.describe import Table


class Format(StrEnum):
    """How tables are printed."""

    plain = "plain"
    markdown = "markdown"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]


def show(tables: Iterable[Table], form: Format) -> None:
    """Print tables in any format; several of them in JSON are a list."""
    from harness.results.tables import as_json, render

    found = list(tables)
    if form is Format.json:
        show_json([as_json(table) for table in found])
    else:
        style: Literal["plain", "markdown"] = "markdown" if form is Format.markdown else "plain"
        typer.echo("\n\n".join(render(table, style).rstrip() for table in found))


def show_json(facts: object) -> None:
    """Print facts as JSON."""
    typer.echo(json.dumps(facts, indent=2, default=str))
