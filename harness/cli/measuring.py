"""bench: how fast, beside a floor that is measured in the same run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from harness.cli import serving
from harness.cli.printing import Format, FormatOption, show
from harness.cli.progress import progress


class DType(StrEnum):
    """In which a layer can be measured."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    group = typer.Typer(rich_markup_mode=None, help="Measure speed.")
    group.command()(layer)
    group.command()(serving.serve)
    group.command()(serving.batching)
    group.command()(theory)
    app.add_typer(group, name="bench")


def layer(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens (repeatable; default: 512 and 4096).")
    ] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="Repeatable; default: both.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Turns that each candidate takes.")] = 7,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A Markdown file to write.")] = None,
    form: FormatOption = Format.plain,
) -> None:
    """The reference's MoE layer beside plain matmuls of the same FLOPs, and beside transformers."""
    from harness.results.files import ensure_writable
    from harness.telemetry import machine
    from harness.theory.describe import Table

    if output is not None:
        ensure_writable(output)
    sizes, kinds = tokens or [512, 4096], dtype or list(DType)
    with progress("bench layer", total=len(sizes) * len(kinds) * (rounds + 1)) as state:
        import torch

        from harness.reference import benchmark

        rows = benchmark.layer(
            tokens=sizes,
            dtypes=[getattr(torch, one.value) for one in kinds],
            rounds=rounds,
            seed=seed,
            progress=state.step,
        )
    facts = machine()
    where = f"On {facts['cpu']}, {facts['system']}, torch {facts['torch']}."
    if output is not None:
        benchmark.write(output, rows, where)
    title = f"One MoE layer, forward, one thread. {where}"
    show([Table(title, benchmark.COLUMNS, tuple(map(benchmark.cells, rows)))], form)


def theory(
    rounds: Annotated[int, typer.Option(min=2, help="Turns that each program takes.")] = 15,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A Markdown file to write.")] = None,
    form: FormatOption = Format.plain,
) -> None:
    """What an estimate of theory costs, beside programs that make the same one."""
    from harness.benchmark import estimators
    from harness.benchmark.report import write
    from harness.results.files import ensure_writable

    if output is not None:
        ensure_writable(output)
    with progress("bench theory", total=len(estimators.UNITS) * rounds) as state:
        tables = estimators.run(rounds=rounds, step=state.step)
    if output is not None:
        write(output, "What an estimate costs", "moe-harness bench theory", tables)
    show(tables, form)
