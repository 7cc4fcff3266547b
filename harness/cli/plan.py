"""plan: the layouts that train or serve a spec, without torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from harness.cli.printing import Format, FormatOption, show, show_json
from harness.cli.progress import progress


class Goal(StrEnum):
    """What the devices are for."""

    train = "train"
    serve = "serve"


class Rank(StrEnum):
    """What the best layout has least of, or of throughput most."""

    time = "time"
    cost = "cost"
    throughput = "throughput"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(plan)


Pairs = list[str] | None
CONTEXT = 8192
ONLY = {
    Goal.train: ("batch_tokens", "context", "tokens", "overlap"),
    Goal.serve: ("prompt", "output", "slo", "skew", "load_"),
}
"""Options that another goal has no use for."""


def plan(
    call: typer.Context,
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a path.")],
    hardware: Annotated[str, typer.Option(metavar="NAME", help="From specs/hardware.toml.")],
    gpus: Annotated[int, typer.Option(min=1, help="At most so many.")],
    goal: Annotated[Goal, typer.Option(help="To train or to serve.")],
    least_gpus: Annotated[int | None, typer.Option(min=1, help="At least so many; default: 95 %.")] = None,
    rank: Annotated[Rank, typer.Option(help="Best by what.")] = Rank.time,
    batch_tokens: Annotated[float, typer.Option(min=1, help="Training: tokens of a step.")] = 4_194_304,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Training: tokens of a sequence; default: 8192, or the model's positions."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Training: of the whole run; default: the spec's.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Serving: tokens of a prompt.")] = 1024,
    output: Annotated[int, typer.Option(min=1, help="Serving: tokens of an answer.")] = 256,
    precision: Annotated[Pairs, typer.Option(help="To train in; to serve in (repeatable).")] = None,
    slo: Annotated[Pairs, typer.Option(metavar="NAME=S", help="Serving: tpot=0.03, ttft=2.")] = None,
    skew: Annotated[float, typer.Option(min=0, help="Serving: popularity of experts falls as i^-skew.")] = 0,
    load_: Annotated[
        float, typer.Option("--load", help="Serving: share of the day that is served; rent is for all of it.")
    ] = 1,
    constraints: Annotated[
        Pairs, typer.Option(metavar="TEXT", help="Such as tensor_parallel<=8 (repeatable).")
    ] = None,
    try_: Annotated[
        Pairs, typer.Option("--try", metavar="FIELD=V,V", help="Values to try, and no others (repeatable).")
    ] = None,
    set_: Annotated[
        Pairs, typer.Option("--set", metavar="LEAF=VALUE", help="Complete or change the spec (repeatable).")
    ] = None,
    efficiency: Annotated[
        Pairs, typer.Option(metavar="NAME=VALUE", help="compute=0.5, or measured (repeatable).")
    ] = None,
    overlap: Annotated[
        Pairs, typer.Option(metavar="NAME=SHARE", help="Training: sent under computation, as expert=1.")
    ] = None,
    gpu_hour_usd: Annotated[float | None, typer.Option(min=0, help="Default: the hardware's.")] = None,
    memory_reserve: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of memory for what theory leaves out.")
    ] = 0.1,
    limit: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 10,
    every: Annotated[bool, typer.Option(help="Rank all, not the best of each way to divide GPUs.")] = False,
    form: FormatOption = Format.plain,
) -> None:
    """Layouts that fit, the best first, with those that nothing beats and what rules others out.

    At the data sheet's rates, unless --efficiency says what is reached: NAME=VALUE, or constants that were
    fitted to measured serving rows, as measured or of one engine as measured:vllm.
    """
    from harness.planning import serving, training
    from harness.planning.constraints import pairs
    from harness.planning.search import Question
    from harness.planning.settings import called, completed, efficiency_of, overlap_of
    from harness.spec import load
    from harness.spec.hardware import load_hardware
    from harness.validation.silicon_constants import measured

    unused = [one for other, names in ONLY.items() if other is not goal for one in names]
    for name in unused:
        source = call.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = f"--{name.strip('_').replace('_', '-')}"
            raise typer.BadParameter(f"{option} means nothing with --goal {goal}; leave it out")
    names = [text.partition("=")[0].strip() for text in efficiency or ()]
    if goal is Goal.train and (alone := [name for name in names if name in training.SERVED_ALONE]):
        raise typer.BadParameter(f"--efficiency {alone[0]} means nothing with --goal train; leave it out")
    document = load(spec)
    question = Question(
        architecture=completed(document, set_ or ()),
        hardware=load_hardware(hardware),
        gpus=gpus,
        name=called(document, set_ or ()),
        least_gpus=least_gpus,
        constraints=tuple(constraints or ()),
        tries=pairs(try_ or (), "--try"),
        efficiency=efficiency_of(efficiency or (), measured),
        gpu_hour_usd=gpu_hour_usd,
        memory_reserve=memory_reserve,
        rank=rank.value,
        limit=limit,
        every=every,
    )
    with progress(f"layouts of {document.name}") as state:

        def watch(done: int, total: int) -> None:
            state.done, state.total = done, total

        if goal is Goal.train:
            run = training.tokens_of(document) if tokens is None else tokens
            found = training.plan(
                question,
                batch_tokens=batch_tokens,
                context=min(CONTEXT, question.architecture.max_positions) if context is None else context,
                tokens=run,
                precisions=precision or ("bfloat16",),
                overlap=overlap_of(overlap or ()),
                watch=watch,
            )
        else:
            found = serving.plan(
                question,
                prompt=prompt,
                output=output,
                precisions=tuple(precision or ()),
                slo=pairs(slo or (), "--slo"),
                skew=skew,
                load=load_,
                watch=watch,
            )
    if form is Format.json:
        show_json(found.as_dict())
    else:
        show(found.tables(), form)
