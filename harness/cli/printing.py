"""How a command prints what it was given."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
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
PageOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder for the page; without it only the whole is written, to results."
    ),
]


def show(tables: Iterable[Table], form: Format) -> None:
    """Print tables in any format; several of them in JSON are a list."""
    from harness.results.render import as_json, render, room

    if form is Format.json:
        show_json([as_json(table) for table in tables])
    else:
        style: Literal["plain", "markdown"] = "markdown" if form is Format.markdown else "plain"
        width = room(is_terminal=sys.stdout.isatty())
        typer.echo("\n\n".join(render(table, style, width).rstrip() for table in tables))


def show_lines(text: str) -> None:
    """Print lines of text, wrapped under their own indentation where people read them."""
    from harness.results.render import room

    width = room(is_terminal=sys.stdout.isatty())
    for line in text.splitlines():
        inside = " " * (len(line) - len(line.lstrip()) + 4)
        typer.echo(line if width is None else textwrap.fill(line, width, subsequent_indent=inside))


def show_json(facts: object) -> None:
    """Print facts as JSON."""
    typer.echo(json.dumps(facts, indent=2, default=str))
