"""mutants: the kill matrix."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.printing import Format, PageOption, show
from harness.cli.progress import progress

if TYPE_CHECKING:
    from harness.conformance.property import Property
    from harness.results.kills.hunting import Plan
    from harness.results.kills.judging import Matrix

Names = list[str] | None


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(mutants)


def mutants(
    slugs: Annotated[
        Names, typer.Option("--property", metavar="SLUG", help="This property alone, on what it claims.")
    ] = None,
    names: Annotated[Names, typer.Option("--mutant", metavar="NAME", help="This mutant alone.")] = None,
    also: Annotated[
        Names, typer.Option(metavar="MODULE", help="A module of yours that enters mutants.")
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="K/N", help="The Kth of N equal parts of the mutants.")
    ] = "1/1",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    full: Annotated[bool, typer.Option("--full", help="Every property of a mutant's side.")] = False,
    seed: Annotated[int, typer.Option(help="Of every input.")] = 1,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a property may take.")] = 60.0,
    output: PageOption = None,
) -> None:
    """Put mutants under the suites, and write the kill matrix: which property kills which defect.

    What the same sources have measured is taken from .runs/mutants: a run that was interrupted goes on.
    """
    from harness.results import files
    from harness.results.kills import hunting, page

    hunting.enter(also or ())
    plan = hunting.Plan(seed, timeout, tuple(sorted(set(slugs or ()))), full, tuple(also or ()))
    chosen = _chosen(slugs or (), names or (), part)
    whole = not (slugs or names or also) and len(chosen) == len(_catalogue())
    folder = output or (Path("results") if whole else None)
    if folder is not None:
        files.ensure_writable(folder / page.FILE)
    matrix = _measured(chosen, plan, jobs)
    _publish(matrix, folder)
    raise typer.Exit(matrix.code)


def _catalogue() -> Collection[str]:
    from harness.mutants import CATALOGUE

    return CATALOGUE


def _properties() -> dict[str, Property]:
    from harness.conformance.catalogue import properties

    return {prop.slug: prop for prop, _ in properties()}


def _chosen(slugs: Sequence[str], names: Sequence[str], part: str) -> tuple[str, ...]:
    """The mutants that were asked for, in their order. Raises AdapterError for a name of nothing."""
    from harness.implementations.registry import AdapterError
    from harness.results.kills.hunting import share

    known = _properties()
    _known("property", slugs, known, "properties")
    _known("mutant", names, _catalogue(), "implementations")
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    k, n = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= k <= n:
        raise AdapterError(f"--part {part}: say K/N with K from 1 to N, for instance 3/10")
    claimed = {name for slug in slugs for name in known[slug].kills}
    asked = names or (claimed if slugs else _catalogue())
    return share(tuple(set(asked)), (k, n))


def _known(what: str, given: Iterable[str], known: Collection[str], listed: str) -> None:
    from harness.implementations.registry import AdapterError, did_you_mean

    for name in given:
        if name not in known:
            raise AdapterError(
                f"there is no {what} {name!r}{did_you_mean(name, known)}; "
                f"`moe-harness list {listed}` shows them all"
            )


def _measured(names: Sequence[str], plan: Plan, jobs: int) -> Matrix:
    """The matrix of these mutants: from their run files, those first made that are not there."""
    from harness.mutants.defects import register
    from harness.results.kills import pool
    from harness.results.kills.judging import Matrix
    from harness.results.kills.reading import cut_off, ended

    folder, claims = plan.folder(), _properties()
    folder.mkdir(parents=True, exist_ok=True)
    there = {name: one for name in names if (one := ended(name, plan, folder, claims.values())) is not None}
    missing = [name for name in names if name not in there]
    typer.echo(f"{len(there)} of {len(names)} mutants are taken from {folder}", err=True)
    with progress("mutants", total=len(missing)) as bar:
        for name, ending in pool.run(missing, plan, folder, jobs):
            one = ended(name, plan, folder, claims.values())
            there[name] = one or cut_off(name, plan, folder, claims.values(), ending or "it did not end")
            bar.step(name)
    hunted = tuple(there[name] for name in names)
    slugs = {slug for one in hunted for slug in one.claimants}
    defects = {key: one for key, one in register().items() if set(one.mutants) <= there.keys()}
    believed = tuple(prop for slug, prop in sorted(claims.items()) if slug in slugs)
    return Matrix(hunted, believed, len(plan.selected or claims), defects)


def _publish(matrix: Matrix, folder: Path | None) -> None:
    """Print the figures and what is wrong; write the page and the JSON file into the folder."""
    from harness.results import report
    from harness.results.kills import page

    show([page.head(matrix), page.exceptions(matrix)], Format.plain)
    if matrix.canary:
        typer.echo(f"the canary was not caught ({matrix.canary}), so no outcome can be believed")
    if folder is not None:
        written = report.write(folder, page.page(matrix))
        facts = folder / f"{page.FILE}.json"
        facts.write_text(json.dumps(page.as_json(matrix), separators=(",", ":")) + "\n", encoding="utf-8")
        typer.echo(f"wrote {written} and {facts}")
