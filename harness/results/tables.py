"""Tables of a run, and how any table is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from tabulate import tabulate

from harness.results.compare import Comparison
from harness.results.record import Record, count
from harness.theory.describe import Table

Format = Literal["plain", "markdown"]
NOT_RUN = ""
_NUMBER = re.compile(r"-?[\d,]*\.?\d+(e[+-]?\d+)?")


def render(table: Table, form: Format = "plain") -> str:
    """The table as text: columns, or a section of Markdown."""
    body = tabulate(
        [[_cell(value) for value in row] for row in table.rows],
        headers=table.headers,
        tablefmt="github" if form == "markdown" else "simple",
        disable_numparse=True,
        colalign=["right" if _numeric(column) else "left" for column in zip(*table.rows, strict=True)],
    )
    return f"### {table.title}\n\n{body}\n" if form == "markdown" else f"{table.title}\n{body}"


def as_json(table: Table) -> dict[str, Any]:
    """The table as an object: its title, and an object for each row."""
    return {
        "title": table.title,
        "rows": [dict(zip(table.headers, row, strict=True)) for row in table.rows],
    }


def matrix(records: Sequence[Record]) -> Table:
    """Property x implementation: one row per property, one column per implementation and spec."""
    subjects = sorted({(r.implementation, r.spec) for r in records})
    slugs = sorted({r.slug for r in records})
    ended = {(r.slug, r.implementation, r.spec): r.outcome for r in records}
    return Table(
        title="Property x implementation",
        headers=("property", *(f"{implementation} on {spec}" for implementation, spec in subjects)),
        rows=tuple((slug, *(ended.get((slug, *s), NOT_RUN) for s in subjects)) for slug in slugs),
    )


def counts(records: Sequence[Record]) -> str:
    """One line: how many properties ended in each outcome that occurred."""
    return ", ".join(f"{n} {outcome}" for outcome, n in count(records).items() if n) or "nothing was run"


def compared(comparison: Comparison) -> Table:
    """One row per property that is not as it was."""
    rows: list[tuple[object, ...]] = [
        ("added", str(r.key), NOT_RUN, r.outcome, r.reason) for r in comparison.added
    ]
    rows += [("removed", str(r.key), r.outcome, NOT_RUN, r.reason) for r in comparison.removed]
    rows += [("changed", str(a.key), a.outcome, b.outcome, b.reason) for a, b in comparison.changed]
    rows += [
        ("incomparable", str(a.key), a.outcome, b.outcome, "seed or spec file differs")
        for a, b in comparison.incomparable
    ]
    return Table(
        title=f"{len(rows)} differ, {comparison.unchanged} are unchanged",
        headers=("change", "property", "before", "after", "reason"),
        rows=tuple(rows),
    )


def _numeric(column: Sequence[object]) -> bool:
    return all(_NUMBER.fullmatch(_cell(value)) for value in column)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
