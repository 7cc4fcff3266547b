"""list specs, implementations, properties."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from harness.cli.printing import Format, FormatOption, show
from harness.cli.progress import progress

if TYPE_CHECKING:
    from harness.theory.describe import Table


class What(StrEnum):
    """What can be listed."""

    specs = "specs"
    implementations = "implementations"
    properties = "properties"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("list")(list_)


def list_(what: What, form: FormatOption = Format.plain) -> None:
    """What there is to name: specs, implementations or properties."""
    tables = {What.specs: _specs, What.implementations: _implementations, What.properties: _properties}
    with progress(f"listing {what}"):
        table = tables[what]()
    show([table], form)


def _specs() -> Table:
    from harness.spec import load, names
    from harness.theory.describe import Table

    rows = ((spec.name, spec.title, len(spec.unknowns), len(spec.claims)) for spec in map(load, names()))
    return Table("Specs", ("name", "title", "unknowns", "claims"), tuple(rows))


def _implementations() -> Table:
    from harness.implementations.registry import names
    from harness.theory.describe import Table

    rows = (*((name,) for name in names()), ("package.module:factory",))
    return Table("Implementations", ("address",), rows)


def _properties() -> Table:
    from harness.conformance.catalogue import properties
    from harness.theory.describe import Table

    rows = sorted((p.slug, p.level, p.clause, ", ".join(p.needs), p.statement) for p, _ in properties())
    return Table("Properties", ("property", "level", "clause", "needs", "statement"), tuple(rows))
