"""A serving run as tables and as JSON."""

from __future__ import annotations

from typing import Any

from harness.benchmark.metrics import OVERALL, PER_REQUEST, QUANTILES
from harness.benchmark.serving import Run
from harness.theory.describe import Table

MILLISECONDS = 1e3
COLUMNS = ("mean", "std", *(f"p{q}" for q in QUANTILES))


def tables(run: Run, title: str) -> list[Table]:
    """Overall figures, and those per request; a void run has none of them, only the reason."""
    if run.void:
        rows = tuple(
            (one.number, one.reason, _tokens(one.loaded), _tokens(one.alone)) for one in run.mismatches
        )
        return [
            Table(f"VOID: {run.void}", ("request", "difference", "under load", "alone"), rows),
        ]
    overall = tuple(
        (name, "not shown" if value is None else _number(value), definition)
        for name, definition in OVERALL.items()
        for value in (run.summary.overall[name],)
    )
    spread = tuple(
        (
            name,
            *(f"{MILLISECONDS * found[column]:.2f}" if found else "none" for column in COLUMNS),
            PER_REQUEST[name],
        )
        for name, found in run.summary.spread.items()
    )
    checked = f"all {run.compared} answers equal to those that the same requests get alone, in the same run"
    return [
        Table(f"{title}; {checked}", ("figure", "value", "definition"), overall),
        Table("Latency, ms", ("figure", *COLUMNS, "definition"), spread),
    ]


def as_json(run: Run) -> dict[str, Any]:
    """Everything that the tables show, in seconds, and why the run is void if it is."""
    if run.void:
        mismatches = [vars(one) for one in run.mismatches]
        return {"void": run.void, "compared": run.compared, "mismatches": mismatches}
    return {
        "void": "",
        "compared": run.compared,
        "overall": dict(run.summary.overall),
        "seconds": {name: dict(found) for name, found in run.summary.spread.items()},
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _tokens(tokens: tuple[int, ...]) -> str:
    shown = " ".join(map(str, tokens[:12]))
    return f"{shown} ..." if len(tokens) > 12 else shown
