"""The kill matrix: which property fails which mutant, out of one run of all of them."""

from __future__ import annotations

from collections.abc import Mapping

from harness.results.report import Page
from harness.results.runfile import Run
from harness.theory.describe import Table

COMMAND = "moe-harness kills"
PREFIX = "mutant:"


Matrix = Mapping[str, list[str]]


def matrix(run: Run) -> tuple[Matrix, Matrix]:
    """Property -> the mutants that it kills, and mutant -> the properties that kill it.

    A kill is a counterexample: a property that crashed on a mutant has not killed it.
    """
    by_property: dict[str, list[str]] = {}
    by_mutant: dict[str, list[str]] = {}
    for record in run.records:
        if record.implementation.startswith(PREFIX):
            mutant = record.implementation.removeprefix(PREFIX)
            kills, killed = by_property.setdefault(record.slug, []), by_mutant.setdefault(mutant, [])
            if record.outcome == "failed" and not record.reason.startswith(("crashed", "timed out")):
                kills.append(mutant)
                killed.append(record.slug)
    return by_property, by_mutant


def survivors(run: Run) -> list[str]:
    """The mutants that no property kills."""
    return sorted(name for name, slugs in matrix(run)[1].items() if not slugs)


def page(run: Run, described: Mapping[str, tuple[str, str, str]]) -> Page:
    """The matrix both ways; `described`: mutant -> stage, defect, origin."""
    by_property, by_mutant = matrix(run)
    specs = {record.implementation.removeprefix(PREFIX): record.spec for record in run.records}
    left = len(survivors(run))
    return Page(
        "kill-matrix.md",
        "Kill matrix",
        COMMAND,
        (
            Table(
                f"{len(by_property)} properties on {len(by_mutant)} mutants, {left} of which survive",
                ("property", "kills", "mutants"),
                tuple(
                    (slug, len(names), ", ".join(sorted(names)))
                    for slug, names in sorted(by_property.items())
                ),
            ),
            Table(
                "Mutants: the reference with one defect",
                ("mutant", "spec", "stage", "defect", "shipped in", "killed by"),
                tuple(
                    (name, specs[name], *described.get(name, ("", "", "")), f"{len(slugs)} properties")
                    for name, slugs in sorted(by_mutant.items())
                ),
            ),
        ),
    )
