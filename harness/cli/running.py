"""check, compare, summary, gate, servers, report: runs, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.printing import Format, FormatOption, show, show_json

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run file.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    to_pytest = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=to_pytest)(check)
    for command in (compare, summary, gate, servers, report):
        app.command()(command)


def check(context: typer.Context) -> None:
    """Put implementations under the suites: `pytest` on them, with its arguments.

    --impl ADDRESS, --spec SPEC (both repeatable), --seed N, --run-file PATH, --baseline PATH,
    --write-baseline PATH, --profile fast, --no-null, --reproduce DIR, --shrink-seconds SECONDS, --telemetry,
    --timeout-property SECONDS; and pytest's own, such as -n 2, -k NAME.
    """
    from harness.results.suites import run

    raise typer.Exit(run(context.args))


def compare(before: RunArgument, after: RunArgument, form: FormatOption = Format.plain) -> None:
    """What changed from one run to another."""
    from harness.results import tables
    from harness.results.compare import compare as compared
    from harness.results.runfile import read

    show([tables.compared(compared(read(before), read(after)))], form)


def summary(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run files of one set-up.")],
    form: FormatOption = Format.plain,
) -> None:
    """What one run found, or several together: property x implementation, and what did not pass."""
    from harness.results import tables
    from harness.results.runfile import combine, read

    show(tables.summary(combine([read(run) for run in runs])), form)


def gate(
    run: RunArgument,
    baseline: Annotated[Path | None, typer.Option(help="Known failures.")] = None,
    form: FormatOption = Format.plain,
) -> None:
    """Judge a run: exit 1 for a failure or a stale entry, 69 if it measured nothing.

    With a baseline, the failures that it lists are expected.
    """
    from harness.results import baseline as baselines
    from harness.results import tables
    from harness.results.gate import gate as judged
    from harness.results.runfile import read

    verdict = judged(read(run), {} if baseline is None else baselines.load(baseline))
    if form is Format.json:
        show_json(verdict.as_dict())
    else:
        show([tables.judged(verdict)], form)
    raise typer.Exit(verdict.code)


def servers(
    runs: Annotated[list[str], typer.Argument(metavar="NAME=RUN...", help="Run files, one of each server.")],
    output: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("results"),
) -> None:
    """Write what the suites found of real servers: property x server, each under the name it is given."""
    from harness.cli.reporting import publish
    from harness.results import servers as tables
    from harness.results.runfile import RunFileError, read

    named = dict(run.rpartition("=")[::2] for run in runs)
    if len(named) < len(runs):
        raise RunFileError("two runs have one name: a server has one run")
    if "" in named:
        raise RunFileError("a run of a server needs its name: say NAME=RUN")
    publish(output, tables.page({name: read(Path(path)) for name, path in named.items()}))


def report(
    output: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results"),
    engines: Annotated[
        bool, typer.Option("--engines", help="Decoding and serving too, which takes minutes.")
    ] = False,
) -> None:
    """Audit the leak, run the suites on the reference and on transformers, write and print the tables."""
    from harness.cli.reporting import make

    raise typer.Exit(make(output, engines=engines))
