"""tiny: a random checkpoint for a server."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Checkpoint(StrEnum):
    """Formats that a tiny model is written in."""

    transformers = "transformers"
    gguf = "gguf"
    both = "both"


GGUF_NAME = "model.gguf"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(tiny)


def tiny(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a path.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    form: Annotated[
        Checkpoint, typer.Option("--format", help="safetensors, GGUF of float32, or both.")
    ] = Checkpoint.transformers,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
    vocab: Annotated[
        int, typer.Option(min=2, max=1_000_000, help="Tokens, one printable character each.")
    ] = 128,
    noise: Annotated[
        float,
        typer.Option(
            min=0, max=10, help="On every weight, relative to its spread: a draft of the same seed."
        ),
    ] = 0.0,
) -> None:
    """Write the shrunken twin of a spec with random weights, as a checkpoint that servers load."""
    from harness.implementations.tiny import checkpoint, gguf
    from harness.implementations.tiny import tiny as draw
    from harness.spec import load

    if math.isnan(noise):
        raise typer.BadParameter("--noise is nan; give a number from 0 to 10")
    document = load(spec)
    model = draw(document.name, document.architecture, seed=seed, vocab_size=vocab, noise=noise)
    if form is not Checkpoint.gguf:
        checkpoint.write(model, folder)
    if form is not Checkpoint.transformers:
        gguf.write(model, folder / GGUF_NAME)
    size = sum(tensor.numel() for tensor in model.weights.values())
    typer.echo(f"{folder}: {model.family}, {size:,} parameters, {vocab} tokens, {form.value}")
