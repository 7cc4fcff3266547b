"""The kill matrix as a page and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any, get_args

from harness.mutants.defects import Defect
from harness.results.kills.judging import Hunted, Matrix, Status
from harness.results.report import Page
from harness.theory.describe import Table

COMMAND = "moe-harness mutants"
FILE = "kill-matrix"
NAMED = 4
"""Properties or mutants that a row of the page names; the JSON file names all."""


def page(matrix: Matrix) -> Page:
    """The page, as `moe-harness mutants` writes it."""
    tables = (head(matrix), exceptions(matrix), _register(matrix), _mutants(matrix), _scores(matrix))
    return Page(f"{FILE}.md", "Kill matrix", COMMAND, tables)


def figures(matrix: Matrix) -> dict[str, object]:
    """The figures that tell what the matrix is worth, by what they are."""
    times, middle = matrix.times(), matrix.median_seconds()
    right = [one.right_seconds for one in matrix.hunted if one.right_seconds is not None]
    one_process = [defect for defect in matrix.register.values() if defect.mutants]
    shown = sum(map(matrix.shown, one_process))
    cells = [cell for one in matrix.hunted for cell in one.cells]
    of = {status: len(matrix.of_status(status)) for status in get_args(Status)}
    return {
        "mutants": len(matrix.hunted),
        "killed for the right reason": of["killed"],
        "killed, but no property that claims them names their stage": of["stage not named"],
        "survivors": of["survived"],
        "not measured": of["not measured"],
        "claims that do not hold": len(matrix.broken()),
        "properties that must kill": len(matrix.scores),
        "properties that killed nothing for the right reason": sum(not n for n in matrix.scores.values()),
        "cells measured": len(cells),
        "cells not measured": len(matrix.hunted) * matrix.candidates - len(cells),
        "shipped defects that mutants show": len(one_process),
        "of these, all mutants killed for the right reason": f"{shown} ({_share(shown, len(one_process))})",
        "shipped defects that no mutant shows": len(matrix.register) - len(one_process),
        "seconds to the first kill, median": None if middle is None else round(middle, 1),
        "seconds to the first kill, worst": round(max(times), 1) if times else None,
        "seconds to the first kill for the right reason, median": round(median(right), 1) if right else None,
    }


def head(matrix: Matrix) -> Table:
    """The figures as a table."""
    return Table(
        "Figures. A kill is a counterexample, never a crash; it is for the right reason where the property "
        "claims the mutant and names the stage that it breaks (of an engine, whose answers alone are seen, "
        "also the law that they then have). Seconds to the first kill are those of the properties of the "
        "mutant's side, model or engine, run until one fails, most telling first",
        ("figure", "value"),
        tuple((name, "none" if value is None else value) for name, value in figures(matrix).items()),
    )


def exceptions(matrix: Matrix) -> Table:
    """What is not as it should be: one row each."""
    rows: list[tuple[str, str, str]] = [
        (one.mutant.name, one.status, _why(one)) for one in matrix.hunted if one.status != "killed"
    ]
    rows += [(sentence.partition(" ")[0], "claim broken", sentence) for sentence in matrix.broken()]
    hunted = matrix.by_name.keys()  # of a part, a property may have had nothing to kill
    idle = (
        prop.slug for prop in matrix.properties if not matrix.scores[prop.slug] and hunted >= set(prop.kills)
    )
    rows += [(slug, "killed nothing", "") for slug in idle]
    return Table("What is not as it should be", ("mutant or property", "what", "why"), tuple(rows))


def as_json(matrix: Matrix) -> dict[str, Any]:
    """Every cell that was measured, and a summary of each mutant, property and shipped defect."""
    return {
        "made_by": COMMAND,
        "figures": figures(matrix),
        "mutants": [_mutant(matrix, one) for one in matrix.hunted],
        "properties": [
            {
                "property": prop.slug,
                "claims": len(prop.kills),
                "killed": sum(c.property == prop.slug for one in matrix.hunted for c in one.kills),
                "score": matrix.scores[prop.slug],
            }
            for prop in matrix.properties
        ],
        "defects": [
            defect.model_dump(mode="json") | {"shown": matrix.shown(defect)}
            for defect in matrix.register.values()
        ],
        "broken": list(matrix.broken()),
        "cells": [
            asdict(cell) | {"seconds": round(cell.seconds, 4)}
            for one in matrix.hunted
            for cell in sorted(one.cells, key=lambda cell: cell.property)
        ],
    }


def _mutant(matrix: Matrix, one: Hunted) -> dict[str, Any]:
    mutant, first = one.mutant, one.first
    return {
        "mutant": mutant.name,
        "side": mutant.side,
        "stage": mutant.stage,
        "spec": mutant.spec,
        "defect": mutant.defect,
        "origin": mutant.origin,
        "defects": [d.id for d in matrix.register.values() if mutant.name in d.mutants],
        "status": one.status,
        "reason": _why(one) if one.status != "killed" else "",
        "claimed_by": sorted(one.claimants),
        "killed_by": sorted(cell.property for cell in one.kills),
        "first_killed_by": first.property if first else None,
        "first_kill_seconds": None if one.seconds is None else round(one.seconds, 4),
        "first_right_kill_seconds": None if one.right_seconds is None else round(one.right_seconds, 4),
    }


def _register(matrix: Matrix) -> Table:
    rows = (_defect(matrix, defect) for defect in matrix.register.values())
    headers = ("id", "shipped in", "cause", "mutants", "killed by", "first kill s")
    return Table("Shipped defects", headers, tuple(rows))


def _defect(matrix: Matrix, defect: Defect) -> tuple[object, ...]:
    found = [matrix.by_name[name] for name in defect.mutants if name in matrix.by_name]
    slugs = sorted({cell.property for one in found for cell in one.cells if cell.right})
    times = [one.seconds for one in found if one.seconds is not None]
    return (
        defect.id,
        ", ".join(defect.shipped),
        defect.cause,
        ", ".join(defect.mutants) or "none",
        f"no mutant: {defect.unshown}" if defect.unshown else _few(slugs) or "not measured",
        f"{max(times):.1f}" if times else "",
    )


def _mutants(matrix: Matrix) -> Table:
    rows = (
        (
            one.mutant.name,
            one.mutant.stage,
            one.mutant.spec,
            one.mutant.defect,
            one.status,
            _few([cell.property for cell in one.kills]),
            "" if one.seconds is None else f"{one.seconds:.1f}",
        )
        for one in matrix.hunted
    )
    headers = ("mutant", "stage", "spec", "defect", "ended", "killed by", "first kill s")
    return Table("Mutants: the reference with one defect", headers, tuple(rows))


def _scores(matrix: Matrix) -> Table:
    killed: dict[str, list[str]] = {}
    for one in matrix.hunted:
        for cell in one.cells:
            if cell.right:
                killed.setdefault(cell.property, []).append(cell.mutant)
    rows = ((slug, score, _few(killed.get(slug, []))) for slug, score in matrix.scores.items())
    return Table("Properties", ("property", "score", "killed for the right reason"), tuple(rows))


def _why(one: Hunted) -> str:
    """Why a mutant was not killed for the right reason."""
    if one.ending:
        return one.ending
    if not one.kills:
        ended = sorted({cell.outcome for cell in one.cells})
        return f"no counterexample: {len(one.cells)} properties {', '.join(ended)}"
    stages = sorted({cell.stage or "none" for cell in one.kills})
    return f"it breaks {one.mutant.stage}; counterexamples name {', '.join(stages)}"


def _few(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
