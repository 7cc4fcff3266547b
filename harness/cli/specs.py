"""spec import, validate, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    group = typer.Typer(rich_markup_mode=None, help="Make, check and print specs.")
    group.command("import")(import_)
    group.command()(validate)
    group.command()(show)
    app.add_typer(group, name="spec")


def import_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.json", help="Of a Hugging Face model.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the spec; default: from the path.")] = None,
) -> None:
    """Turn a config.json into a spec: exact, or refused by the name of the field."""
    from harness.spec.huggingface import import_config

    text = import_config(config, name)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


def validate(files: Annotated[list[Path], typer.Argument(metavar="FILE...")]) -> None:
    """Check specs; the first that is wrong ends in a sentence that says where."""
    from harness.spec import load

    for path in files:
        spec = load(path)
        unknown = f", {len(spec.unknowns)} unknown" if spec.unknowns else ""
        typer.echo(f"{path}: valid ({len(spec.leaves)} leaves{unknown}, {len(spec.claims)} claims)")


def show(
    name: Annotated[str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a path.")],
) -> None:
    """Print a spec as it is written."""
    from harness.spec import load

    typer.echo(load(name).path.read_text(encoding="utf-8"), nl=False)
