"""Which layouts serve a model, at what time per token and what price.

Letters: N layouts, K stages that may need most memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.planning import layouts
from harness.planning.constraints import Constraint, known, number, parse_all
from harness.planning.report import GB, WAYS, Plan, percent, plain, rounded, scaled
from harness.planning.search import (
    FIELDS,
    Goal,
    Question,
    Watch,
    constraint_limits,
    counted,
    memory_limit,
    search,
    within,
    worst,
)
from harness.planning.selection import Batch, Limit
from harness.planning.settings import refuse_skew
from harness.planning.space import SERVED, serving_space
from harness.spec.errors import SpecError
from harness.spec.hardware import Hardware
from harness.theory import serving
from harness.theory.inference import pricer, request_mfu, steady_state
from harness.theory.precision import PRECISIONS, Precision, precision
from harness.theory.states import serving_memory

COSTS = ("usd_per_1k", "usd_per_1k_input", "usd_per_1k_decode")
RESULTS = ("gpus", "batch", "sequences", "tpot", "ttft", "tokens_per_second", "mfu", *COSTS, "memory")
"""Columns beside Layout's fields that constraints may name: see `_evaluated`."""
CONSTRAINED: Mapping[str, Collection[str] | None] = {
    **dict.fromkeys(
        ("tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel", *RESULTS), None
    ),
    "precision": tuple(PRECISIONS),
}
PROMISES = ("tpot", "ttft")
"""What an SLO may bound, in seconds."""
GOAL = Goal(
    name="serving",
    ranks={"time": ("tpot", 1), "cost": ("usd_per_1k", 1), "throughput": ("tokens_per_second", -1)},
    axes=("tpot", "usd_per_1k"),
    shape=(
        "tensor_parallel",
        "pipeline_parallel",
        "data_parallel",
        "expert_parallel",
        "precision",
    ),
    columns=(
        *WAYS,
        plain("precision", "precision"),
        plain("batch per DP rank", "batch"),
        scaled("TPOT, ms", "tpot", 1e-3),
        scaled("TTFT, ms", "ttft", 1e-3),
        rounded("tokens/s", "tokens_per_second"),
        percent("MFU", "mfu"),
        plain("USD per 1,000", "usd_per_1k"),
        plain("USD per 1,000 in", "usd_per_1k_input"),
        plain("USD per 1,000 out", "usd_per_1k_decode"),
        scaled("GB a GPU", "memory", GB),
        percent("of it weights", "weights_share"),
    ),
    definitions={
        "TPOT": "mean pass of a batch that never runs dry, prompts read on the way included",
        "TTFT": "pass that holds a prompt, whole in one microbatch; waiting for a slot is left out",
        "tokens/s": "output tokens of all GPUs",
        "MFU": "FLOP of all tokens, prompts' too, over the peak of all GPUs in the same time",
        "USD per 1,000": "rent of all GPUs for 1,000 output tokens, their prompts included",
        "USD per 1,000 in": "USD for 1,000 prompt tokens: rent of what prompts add to passes",
        "USD per 1,000 out": "USD for 1,000 output tokens without their prompts: rent of all the rest",
    },
)


def default_precisions(hardware: Hardware) -> tuple[str, ...]:
    """bfloat16, and fp8 where the hardware multiplies it."""
    return ("bfloat16", "fp8") if "fp8" in hardware.peak else ("bfloat16",)


def plan(
    question: Question,
    *,
    prompt: int,
    output: int,
    precisions: Sequence[str] = (),
    slo: Mapping[str, str] | None = None,
    skew: float = 0.0,
    load: float = 1.0,
    watch: Watch | None = None,
) -> Plan:
    """Layouts x batch x precision under continuous batching, `theory.inference.steady_state`, prompts whole.

    Requests of `prompt` and `output` tokens never run dry for the share `load` of the time, and none come in
    the rest: all rent falls on those that do. tpot and ttft are in seconds, usd_per_1k is USD for 1,000
    output tokens with what reading their prompts takes, memory is bytes of the fullest rank with every
    sequence at its full length. A pipeline runs a microbatch per stage where the batch has as many sequences.
    Raises SpecError where nothing fits, or hardware does not multiply a precision.
    """
    counted("prompt", prompt)
    counted("output", output)
    within(question.architecture, "a prompt with its answer", prompt + output)
    refuse_skew(skew)
    if not 0 < load <= 1:
        raise SpecError(f"a load of {load:g} is no share of the day that is served; give above 0 to 1")
    promised = _promises(slo or {})
    forms = [precision(name) for name in dict.fromkeys(precisions or default_precisions(question.hardware))]
    constraints = parse_all(question.constraints, CONSTRAINED)
    architecture, impossible = question.architecture, layouts.RuledOut()
    space = serving_space(architecture, question.gpus, question.hardware.island)
    space = space.trying(question.tries, SERVED)
    found = layouts.shapes(architecture, space, question.gpus, question.fewest, impossible)
    parts = layouts.serving_layouts(architecture, space, found)
    total = len(forms) * sum(len(part) for part in parts)

    def batches() -> Iterator[Batch]:
        for form in forms:
            for part in parts:
                columns = _evaluated(question, part, form, prompt, output, skew, load)
                yield Batch(part.layout, columns, _limits(question, columns, constraints, promised))

    name = f"{question.name}, prompts of {prompt:,} and answers of {output:,} tokens"
    if load < 1:
        name += f", rent of all day for {load:.3g} of it that is served"
    asked = replace(question, name=f"{name},")
    return search(asked, GOAL, batches(), total, impossible, watch)


def _promises(slo: Mapping[str, str]) -> dict[str, float]:
    for name in slo:
        known(name, PROMISES)
    promised = {name: number(text, name) for name, text in slo.items()}
    for name, value in promised.items():
        if value <= 0:
            raise SpecError(f"an SLO of {name}={value} can never be kept; give seconds above 0")
    return promised


def _evaluated(
    question: Question,
    part: layouts.Served,
    form: Precision,
    prompt: int,
    output: int,
    skew: float,
    load: float,
) -> dict[str, Any]:
    """The columns of one part in one precision."""
    layout, batch, architecture = part.layout, part.batch, question.architecture
    priced = pricer(architecture, question.hardware, layout, form, question.efficiency, skew)
    sequences = batch * layout.data_parallel
    answered = steady_state(priced, sequences, prompt, output, layout.pipeline_parallel, mixing="whole")
    need = serving_memory(
        architecture,
        layout,
        form,
        batch=batch,
        context=prompt + output,
        stage=part.stages,
        tokens=batch + np.maximum(1, batch / output) * prompt,
    )
    gpus = layout.devices
    price = question.price * serving.cost_factor_at_load(load)
    usd = serving.cost_per_1k_tokens(gpus, price, answered.tokens_per_second)
    reading = answered.filling / answered.tpot
    columns = {name: getattr(layout, name) for name in FIELDS} | worst(need, len(batch))
    return columns | {
        "gpus": gpus,
        "batch": batch,
        "sequences": sequences,
        "precision": form.name,
        "tpot": answered.tpot,
        "ttft": answered.ttft,
        "tokens_per_second": answered.tokens_per_second,
        "mfu": request_mfu(priced, prompt, output, answered.tokens_per_second),
        "usd_per_1k": usd,
        "usd_per_1k_input": usd * reading * output / prompt,
        "usd_per_1k_decode": usd * (1 - reading),
        "weights_share": columns["memory_weights"] / columns["memory"],
    }


def _limits(
    question: Question,
    columns: Mapping[str, Any],
    constraints: Sequence[Constraint],
    promised: Mapping[str, float],
) -> list[Limit]:
    limits = [memory_limit(question, columns), *constraint_limits(constraints, columns)]
    limits += [_promise(name, most, columns[name]) for name, most in promised.items()]
    return limits


def _promise(name: str, most: float, seconds: Any) -> Limit:
    def sentence(facts: Mapping[str, Any]) -> str:
        return f"{name.upper()} is {facts[name]:.4g} s, {facts[name] - most:.2g} s over {most:g} s"

    return Limit(f"{name}<={most:g}", seconds <= most, sentence)
