"""bench: how fast, beside a floor that was measured in the same run."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    group = typer.Typer(rich_markup_mode=None, help="Measure speed.")
    group.command()(layer)
    group.callback()(lambda: None)
    app.add_typer(group, name="bench")


def layer() -> None:
    """The reference layer beside plain matmuls of the same FLOPs."""
