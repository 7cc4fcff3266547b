"""list specs, hardware, implementations, properties."""

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
    hardware = "hardware"
    implementations = "implementations"
    properties = "properties"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("list")(list_)


def list_(what: What, form: FormatOption = Format.plain) -> None:
    """What there is to name: specs, hardware, implementations or properties."""
    tables = {
        What.specs: _specs,
        What.hardware: _hardware,
        What.implementations: _implementations,
        What.properties: _properties,
    }
    with progress(f"listing {what}"):
        table = tables[what]()
    show([table], form)


def _specs() -> Table:
    from harness.spec import load, names
    from harness.theory.describe import Table

    rows = ((spec.name, spec.title, len(spec.unknowns), len(spec.claims)) for spec in map(load, names()))
    return Table("Specs", ("name", "title", "unknowns", "claims"), tuple(rows))


def _hardware() -> Table:
    from harness.spec.hardware import hardware_names, load_hardware
    from harness.theory.describe import Table

    rows = (
        (
            one.name,
            one.title,
            one.memory.value / 1e9,
            one.bandwidth.value / 1e12,
            ", ".join(f"{form} {peak.value / 1e12:,.0f}" for form, peak in one.peak.items()),
            one.island,
            one.island_link.bandwidth / 1e9,
            one.network_link.bandwidth / 1e9,
            one.gpu_hour_usd.value,
        )
        for one in map(load_hardware, hardware_names())
    )
    headers = ("name", "title", "GB", "TB/s", "dense TFLOP/s", "island", "GB/s in it", "GB/s beyond", "USD/h")
    return Table("Hardware, from specs/hardware.toml", headers, tuple(rows))


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
