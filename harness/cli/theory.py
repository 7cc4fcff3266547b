"""describe, audit, solve: what follows from a spec, without torch."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.cli.printing import Format, FormatOption, show, show_json, show_lines
from harness.cli.progress import progress

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a path.")]


AssumeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE[,VALUE]",
        help="What if an assumption, an entry of [training] or [serving], or a leaf were this (repeatable).",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (describe, audit, solve):
        app.command()(command)


def describe(
    spec: SpecArgument,
    context: Annotated[int, typer.Option(min=1, help="Tokens of context.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    form: FormatOption = Format.plain,
) -> None:
    """Parameters, FLOPs and bytes of a spec, under each counting convention."""
    from harness.spec import load
    from harness.theory import describe as theory

    description = theory.describe(load(spec), context=context, batch=batch)
    if json or form is Format.json:
        show_json(description.as_dict())
    else:
        show(description.tables(), form)


def audit(
    spec: SpecArgument,
    explain: Annotated[str, typer.Option(metavar="CLAIM", help="One claim's derivation in numbers.")] = "",
    assume: AssumeOption = None,
    form: FormatOption = Format.plain,
) -> None:
    """Whether the claims of a spec can be true together."""
    from harness import audit as audits
    from harness.spec import load

    document = audits.assume(load(spec), assume or ())
    with progress(f"audit of {document.name}"):
        found = audits.explain(document, explain) if explain else audits.audit(document)
    if isinstance(found, str) and form is Format.json:
        show_json({"claim": explain, "explanation": found.splitlines()})
    elif isinstance(found, str):
        show_lines(found)
    elif form is Format.json:
        show_json(found.as_dict())
    else:
        show(found.tables(), form)


def solve(
    spec: SpecArgument,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="CLAIM", help="A claim that has to hold (repeatable).")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Completions to list.")] = 40,
    assume: AssumeOption = None,
    form: FormatOption = Format.plain,
) -> None:
    """The dimensions that agree with as many claims of a spec as can hold together."""
    from harness import audit as audits
    from harness.spec import load

    document = audits.assume(load(spec), assume or ())
    with progress(f"solving {document.name}"):
        found = audits.solve(document, limit=limit, keep=keep or ())
    if form is Format.json:
        show_json(found.as_dict())
    else:
        show(found.tables(), form)
