"""survey: every MoE family of a library under the suites."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.printing import Format, PageOption, show
from harness.cli.progress import progress

if TYPE_CHECKING:
    from harness.results.baseline import Baseline
    from harness.results.survey.reading import Survey
    from harness.results.survey.running import Plan

BASELINE = "baseline-survey.toml"


class Library(StrEnum):
    """What can be surveyed."""

    transformers = "transformers"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(survey)


def survey(
    library: Annotated[Library, typer.Argument(help="Whose families.")],
    families: Annotated[
        list[str] | None, typer.Option("--family", metavar="NAME", help="This family alone (repeatable).")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Families at a time.")] = os.cpu_count() or 1,
    limit: Annotated[
        float, typer.Option("--time-limit", min=1.0, help="Seconds that a family may take.")
    ] = 180.0,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 1,
    baseline: Annotated[
        Path | None, typer.Option(help=f"Known failures [default: {BASELINE} in results]")
    ] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Bring this baseline up to date with the survey.")
    ] = None,
    output: PageOption = None,
) -> None:
    """Put every MoE family of an installed library under the suites, tiny, each in a process of its own.

    What the same sources have measured is taken from .runs/survey: a survey that was interrupted goes on.
    """
    from harness.results import baseline as baselines
    from harness.results import files
    from harness.results.survey.running import Plan

    folder = output or Path("results")
    if output is not None or not families:
        files.ensure_writable(folder / "survey")
    path = baseline or (folder if (folder / BASELINE).exists() else Path("results")) / BASELINE
    known = baselines.load(path) if baseline is not None or path.exists() else {}
    if write_baseline is not None:
        baselines.ensure_writable(write_baseline)
    addresses = {name: f"{library}:{name}" for name in _chosen(families or ())}
    found = _measured(addresses, Plan(seed, limit), jobs, known)
    _publish(found, output or (None if families else folder))
    if write_baseline is not None:
        added, removed = baselines.write(write_baseline, found.records)
        typer.echo(f"wrote {write_baseline}: {added} added, {removed} removed")
    raise typer.Exit(found.verdict.code)


def _chosen(asked: Sequence[str]) -> tuple[str, ...]:
    """The families that were asked for. Raises AdapterError for one that there is not."""
    from harness.implementations.registry import AdapterError, did_you_mean
    from harness.implementations.transformers.families import moe

    known = moe().families
    for name in asked:
        if name not in known:
            inner = moe().around.get(name)
            hint = f"; it is a model around {inner!r}" if inner else did_you_mean(name, known)
            raise AdapterError(f"transformers has no MoE family {name!r}{hint}")
    return tuple(dict.fromkeys(asked)) or tuple(known)


def _measured(addresses: Mapping[str, str], plan: Plan, jobs: int, baseline: Baseline) -> Survey:
    """The survey of these families, by name: from their run files, those first made that are not there."""
    from harness.implementations.transformers import shrink
    from harness.implementations.transformers.families import moe
    from harness.implementations.transformers.library import library
    from harness.results.survey import reading, running

    folder = plan.folder()
    folder.mkdir(parents=True, exist_ok=True)
    endings = {name: "" for name in addresses if reading.ended(name, folder)}
    missing = {name: address for name, address in addresses.items() if name not in endings}
    typer.echo(f"{len(endings)} of {len(addresses)} families are taken from {folder}", err=True)
    preload = ("harness.implementations.transformers.everything",)
    with progress("survey", total=len(missing)) as bar:
        for name, ending in running.run(missing, plan, folder, jobs, preload):
            endings[name] = ending
            bar.step(name)
    found = moe()
    return reading.Survey(
        f"transformers {library().__version__}",
        tuple(
            reading.surveyed(
                name,
                folder,
                plan,
                baseline,
                address=address,
                ending=endings[name],
                model=found.families[name].model.__name__,
                shape=found.families[name].shape,
                overrides=shrink.PER_FAMILY.get(name, {}),
            )
            for name, address in addresses.items()
        ),
        found.around,
        found.broken,
    )


def _publish(found: Survey, folder: Path | None) -> None:
    """Print the figures and what is wrong; write the page and the JSON file into the folder."""
    from harness.results import report
    from harness.results.survey import page
    from harness.results.survey.reading import unexpected
    from harness.theory.describe import Table

    wrong = tuple((r.implementation, r.slug, r.outcome, r.reason) for r in unexpected(found.records))
    rest = tuple((one.family, one.why) for one in found.of("not run"))
    tables = [page.summary(found)]
    tables += [Table("Unexpected", ("family", "property", "outcome", "reason"), wrong)] if wrong else []
    tables += [Table("Not run", ("family", "why"), rest)] if rest else []
    show(tables, Format.plain)
    typer.echo(found.verdict.headline)
    if folder is not None:
        written = report.write(folder, page.page(found))
        facts = written.with_suffix(".json")
        facts.write_text(json.dumps(page.as_json(found), indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {written} and {facts}")
