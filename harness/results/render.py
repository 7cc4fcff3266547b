"""How any table is written: as text that fits where it is read, as Markdown, as JSON."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

from tabulate import tabulate

from harness.theory.describe import Table

Format = Literal["plain", "markdown"]
GAP = 2
"""Characters between two columns of plain text."""
PADDING = 2
"""By which tabulate makes a column wider than its header."""
MANY = 8
"""Columns of a table that is written row by row where words would have to be broken for it to fit."""
NOTHING = "(none)"
"""The body of a table without rows."""
_NUMBER = re.compile(r"-?[\d,]*\.?\d+(e[+-]?\d+)?")
_BREAKS = (re.compile(r"\s+"), re.compile(r"\s+|(?<=-)"), re.compile(r""))
"""Where a cell may be broken: between words; after hyphens too; anywhere."""


def room(*, is_terminal: bool) -> int | None:
    """Characters of a line where people read it; None where a program does, and lines stay whole."""
    return shutil.get_terminal_size().columns if is_terminal or os.environ.get("COLUMNS") else None


def render(table: Table, form: Format = "plain", width: int | None = None) -> str:
    """The table as text: columns, or a section of Markdown. Columns are wrapped to `width` characters."""
    rows = [[_cell(value) for value in row] for row in table.rows]
    aligned = [_side(column) for column in zip(*rows, strict=True)]
    headers, title, style = list(table.headers), table.title, "simple"
    if form == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        style = "github"
    elif width is not None and rows:
        title = textwrap.fill(title, width)
        if len(headers) > MANY and _least(headers, rows) > width:
            return f"{title}\n{_records(headers, rows, width)}"
        headers, rows = _wrapped(headers, rows, width)
    body = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=aligned)
    body = body if rows or not headers else NOTHING
    return f"### {title}\n\n{body}\n" if form == "markdown" else f"{title}\n{body}"


def as_json(table: Table) -> dict[str, Any]:
    """The table as an object: its title, and an object for each row."""
    return {
        "title": table.title,
        "rows": [dict(zip(table.headers, row, strict=True)) for row in table.rows],
    }


def _fit(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[int], re.Pattern[str]]:
    """Widths of the columns of a text of `width` characters, and where cells have to be broken for that.

    The widest columns give way first, and words stay whole while they can. Where there is less room than
    a character for each column, the text is as narrow as it can be.
    """
    columns = list(zip(headers, *rows, strict=True))
    natural = _longest(columns, re.compile(r"$"))
    left = width - GAP * (len(columns) - 1)
    for breaks in _BREAKS:
        least = _longest(columns, breaks)
        for most in range(max(natural), 0, -1):
            widths = [min(full, max(most, part)) for full, part in zip(natural, least, strict=True)]
            if sum(widths) <= left:
                return widths, breaks
    return least, _BREAKS[-1]


def _least(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters of the narrowest text whose words are whole."""
    widths = _longest(list(zip(headers, *rows, strict=True)), _BREAKS[0])
    return sum(widths) + GAP * (len(widths) - 1)


def _records(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Every row as a paragraph of "header cell, header cell"; empty cells are left out."""
    texts = [
        ", ".join(f"{name} {cell}" for name, cell in zip(headers, row, strict=True) if cell) for row in rows
    ]
    return "\n".join(
        textwrap.fill(text, width, initial_indent="- ", subsequent_indent="  ") for text in texts
    )


def _longest(columns: Sequence[Sequence[str]], breaks: re.Pattern[str]) -> list[int]:
    """Characters of the longest part of each column, whose first cell is its header."""
    lengths = ([max(map(len, breaks.split(cell))) for cell in column] for column in columns)
    return [max(PADDING + max(header, 1), *cells) for header, *cells in lengths]


def _wrapped(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """The same cells with line breaks in them. tabulate's own wrapping takes 1,000 for a broken number."""
    widths, breaks = _fit(headers, rows, width)

    def wrapped(cells: Sequence[str], padding: int) -> list[str]:
        return [
            textwrap.fill(cell, most - padding, break_on_hyphens=breaks is not _BREAKS[0])
            for cell, most in zip(cells, widths, strict=True)
        ]

    return wrapped(headers, PADDING), [wrapped(row, 0) for row in rows]


def _side(column: Sequence[str]) -> str:
    return "right" if all(map(_NUMBER.fullmatch, column)) else "left"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
