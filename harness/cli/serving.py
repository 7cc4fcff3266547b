"""bench serve, bench batching: an engine under load, seen by its client."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.printing import Format, FormatOption, show, show_json
from harness.cli.progress import progress


class ServedDType(StrEnum):
    """In which a model can be served from this process."""

    float32 = "float32"
    float64 = "float64"


Option = typer.Option
ImplOption = Annotated[
    str, Option(help="reference, transformers:NAME, openai:URL or package.module:factory.")
]
SpecOption = Annotated[str | None, Option(help="Whose twin is served, where the engine takes one.")]
DatasetOption = Annotated[
    str,
    Option(
        help="fixed:PROMPT:OUTPUT, uniform:LOW-HIGH:LOW-HIGH or skewed:PROMPT:MEAN, in tokens, or a file of "
        "JSON lines."
    ),
]
RequestsOption = Annotated[int, Option(min=1, help="How many are sent.")]
RateOption = Annotated[float, Option(help="Requests per second; inf: all at once.")]
BurstinessOption = Annotated[float, Option(help="Shape of the gamma law of the gaps; 1: Poisson.")]
ConcurrencyOption = Annotated[int | None, Option(min=1, help="Requests in flight at most.")]
TemperatureOption = Annotated[float, Option(min=0, help="0 is greedy; else each request has a seed.")]
SloOption = Annotated[list[str] | None, Option(help="ttft=SECONDS, tpot=... or e2e=... (repeatable).")]
SlotsOption = Annotated[int | None, Option(min=1, help="Requests that run at the same time.")]
PagesOption = Annotated[int | None, Option(min=1, help="Of the KV cache; with --slots.")]
PageSizeOption = Annotated[int | None, Option(min=1, help="Tokens; with --slots.")]
ChunkOption = Annotated[int | None, Option(min=1, help="Tokens per iteration; with --slots.")]
StaticOption = Annotated[bool, Option("--static", help="Static batching; with --slots.")]
SpeculationOption = Annotated[str | None, Option(help="METHOD:LENGTH, such as prompt_lookup:3.")]
DTypeOption = Annotated[
    ServedDType, Option(help="Of a model in this process; float32 answers may part where logits nearly tie.")
]
SeedOption = Annotated[int, Option(min=0, help="Of weights, prompts, lengths and arrivals.")]
OutputOption = Annotated[Path | None, Option("--output", "-o", help="A Markdown file to write.")]
PictureOption = Annotated[Path | None, Option(help="An SVG file to write; needs the extra plot.")]


def serve(
    impl: ImplOption,
    spec: SpecOption = None,
    dataset: DatasetOption = "uniform:8-32:4-24",
    requests: RequestsOption = 64,
    rate: RateOption = float("inf"),
    burstiness: BurstinessOption = 1.0,
    concurrency: ConcurrencyOption = None,
    temperature: TemperatureOption = 0.0,
    slo: SloOption = None,
    slots: SlotsOption = None,
    pages: PagesOption = None,
    page_size: PageSizeOption = None,
    chunk: ChunkOption = None,
    static: StaticOption = False,
    speculation: SpeculationOption = None,
    dtype: DTypeOption = ServedDType.float64,
    seed: SeedOption = 0,
    output: OutputOption = None,
    picture: PictureOption = None,
    form: FormatOption = Format.plain,
) -> None:
    """TTFT, TPOT, throughput and the rest under load.

    Every request is asked again alone: unless all answers are the same the run is void, and exits 69.
    """
    from harness.benchmark import report
    from harness.benchmark.setup import speculation as method
    from harness.reference.engine import Batching, Limits

    sizes = {"sequences": slots, "pages": pages, "page_size": page_size, "chunk": chunk}
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if slots is None and (given or static):
        raise typer.BadParameter("--pages, --page-size, --chunk and --static need --slots beside them")
    batching: Batching = "static" if static else "continuous"
    limits = None if slots is None else replace(Limits(batching=batching), **given)
    load = report.Load(dataset, requests, rate, burstiness, concurrency, temperature, seed)
    with progress("bench serve", total=2 * requests) as state:
        code, tables, facts = report.serve(
            impl,
            spec,
            load,
            limits=limits,
            speculation=None if speculation is None else method(speculation),
            dtype=dtype.value,
            bounds=slo or [],
            output=output,
            picture=picture,
            step=state.step,
        )
    if form is Format.json:
        show_json(facts)
    else:
        show(tables, form)
    raise typer.Exit(code)


def batching(
    spec: Annotated[str, Option(help="Whose twin is served.")] = "mixtral-8x7b",
    seed: SeedOption = 0,
    output: OutputOption = None,
    picture: PictureOption = None,
    form: FormatOption = Format.plain,
) -> None:
    """Continuous beside static batching on the reference, in one run: slots, occupancy, throughput."""
    from harness.benchmark import batching as work

    with progress("bench batching") as state:
        tables = work.run(spec, seed=seed, output=output, picture=picture, step=state.step)
    show(tables, form)
