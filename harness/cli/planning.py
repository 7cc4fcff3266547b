"""simulate: a server in time, without torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from harness.cli.printing import Format, FormatOption, show, show_json
from harness.cli.progress import progress


class Batching(StrEnum):
    """When a request may take a slot: as soon as one is free, or when all are."""

    continuous = "continuous"
    static = "static"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(simulate)


Option = typer.Option
Pairs = list[str] | None
Ways = Annotated[int, Option(min=1)]


def simulate(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a path.")] = "",
    hardware: Annotated[str, Option(metavar="NAME", help="From specs/hardware.toml.")] = "h100",
    gpus: Annotated[int, Option(min=1, help="What they are divided into follows.")] = 8,
    tensor_parallel: Annotated[int | None, Option(min=1, help="Default: what the other ways leave.")] = None,
    pipeline_parallel: Ways = 1,
    data_parallel: Ways = 1,
    expert_parallel: Ways = 1,
    rate: Annotated[float | None, Option(help="Requests per second; inf: all at once.")] = None,
    burstiness: Annotated[float, Option(help="Shape of the gamma law of the gaps; 1: Poisson.")] = 1.0,
    concurrency: Annotated[
        int | None, Option(help="Users in place of a rate: each sends when its last request is answered.")
    ] = None,
    requests: Annotated[int, Option(min=1, max=10_000_000, help="How many are sent.")] = 1000,
    prompt: Annotated[
        str, Option(help="Tokens: a number, 5,8,4 (repeated), uniform:LOW-HIGH or lognormal:MEAN:CV.")
    ] = "1024",
    output: Annotated[str, Option(help="The same of answers.")] = "256",
    batching: Annotated[Batching, Option(help="When a waiting request gets a slot.")] = Batching.continuous,
    slots: Annotated[int, Option(help="Requests that run at the same time.")] = 64,
    chunk: Annotated[
        int | None, Option(help="Tokens of an iteration, decoding first; default: 2048, or what slots take.")
    ] = None,
    draft_length: Annotated[int, Option(min=0, max=64, help="Tokens drafted in a round of speculation.")] = 0,
    acceptance: Annotated[
        float | None, Option(help="Probability that one of them stands; with --draft-length.")
    ] = None,
    draft_cost: Annotated[
        float | None, Option(help="Of drafting one, as a share of a pass; with --draft-length.")
    ] = None,
    slo: Annotated[Pairs, Option(metavar="NAME=S", help="ttft=0.5, tpot=0.05, e2e or queue.")] = None,
    precision: Annotated[str, Option(help="Formats to serve in.")] = "bfloat16",
    efficiency: Annotated[
        Pairs, Option(metavar="NAME=VALUE", help="compute=0.5, or measured (repeatable).")
    ] = None,
    skew: Annotated[float, Option(min=0, help="Popularity of experts falls as i^-skew.")] = 0,
    set_: Annotated[Pairs, Option("--set", metavar="LEAF=VALUE", help="Complete or change the spec.")] = None,
    gpu_hour_usd: Annotated[float | None, Option(min=0, help="Default: the hardware's.")] = None,
    memory_reserve: Annotated[
        float, Option(min=0, max=0.99, help="Share of memory for what theory leaves out.")
    ] = 0.1,
    seed: Annotated[int, Option(min=0, help="Of lengths, arrivals and drafts that stand.")] = 0,
    example: Annotated[
        bool, Option("--example", help="Seven requests in four slots under both kinds of batching, no SPEC.")
    ] = False,
    form: FormatOption = Format.plain,
) -> None:
    """Latency, throughput, occupancy and cost of serving, in simulated time.

    At the data sheet's rates, unless --efficiency says what is reached: NAME=VALUE, or constants that were
    fitted to measured serving rows, as measured or of one engine as measured:vllm.
    """
    import time

    from harness.planning import outcome, simulation
    from harness.planning.deployment import Deployment, divided
    from harness.planning.scheduling import Policy
    from harness.planning.settings import called, completed, efficiency_of, refuse_price, refuse_skew
    from harness.planning.workload import pace, workload
    from harness.spec import load
    from harness.spec.hardware import load_hardware
    from harness.theory.precision import precision as formats
    from harness.validation.silicon_constants import measured

    if example and spec:
        raise typer.BadParameter(f"--example has a server of its own; leave {spec} out")
    if example:
        show([outcome.example()], form)
        return
    if not spec:
        raise typer.BadParameter("give a SPEC, or --example")
    if (draft_length > 0) != (acceptance is not None) or (draft_cost is not None and not draft_length):
        raise typer.BadParameter("speculation takes --draft-length above 0 and --acceptance, or neither")
    document, machine = load(spec), load_hardware(hardware)
    price = machine.gpu_hour_usd.value if gpu_hour_usd is None else gpu_hour_usd
    refuse_price(price)
    refuse_skew(skew)
    deployment = Deployment(
        completed(document, set_ or ()),
        machine,
        divided(
            gpus,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            data_parallel=data_parallel,
            expert_parallel=expert_parallel,
        ),
        formats(precision),
        efficiency_of(efficiency or (), measured),
        skew,
        memory_reserve,
    )
    policy = Policy(
        slots,
        batching.value,
        max(2048, slots * (1 + draft_length)) if chunk is None else chunk,
        draft_length,
        acceptance or 0.0,
        draft_cost or 0.0,
    )
    bounds = outcome.slo(slo or ())
    sent = workload(
        requests, prompt, output, rate=rate, burstiness=burstiness, concurrency=concurrency, seed=seed
    )
    steps, cache = deployment.steps(policy), deployment.cache(sent, policy)
    with progress(f"serving {document.name}", total=requests) as state:
        start = time.process_time()
        record = simulation.simulate(sent, steps, policy, cache, seed=seed, ended=state.step)
        taken = time.process_time() - start
    asked = f"{requests:,} requests of {prompt} and {output} tokens {pace(rate, concurrency)}"
    served = f"{called(document, set_ or ())} in {precision} on {deployment.words()}"
    found = outcome.outcome(
        record,
        title=f"{served}, {asked}, {policy.words()}",
        bounds=bounds,
        gpus=gpus,
        gpu_hour_usd=price,
        taken=taken,
    )
    if form is Format.json:
        show_json(found.as_dict())
    else:
        show(found.tables(), form)
