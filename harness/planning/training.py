"""Which layouts train a model, in what time and at what price.

Letters: N layouts, K stages that may need most memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.planning import layouts
from harness.planning.constraints import parse_all
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
from harness.planning.space import TRAINED, WORDS, training_space
from harness.spec.document import Spec
from harness.spec.errors import SpecError
from harness.spec.hardware import Format
from harness.spec.printed import interval
from harness.theory import training
from harness.theory.efficiency import IDEAL
from harness.theory.precision import precision
from harness.theory.states import training_memory
from harness.theory.steps import EXPOSED, Overlap, training_step

TOKENS = 1e12
"""Of a run, where neither the spec nor the user says."""
SERVED_ALONE = ("cache", "kernel_seconds", "launch_seconds", "sequence_seconds")
"""Fields of Efficiency that a training step does not meet: no title claims them."""
LOST = ("recompute", "bubble", "imbalance", "tensor", "expert", "context", "pipeline", "data", "optimizer")
"""Parts of a step's time that are not the model's own computation, as shares of the step."""
RESULTS = ("gpus", "microbatches", "batch", "seconds", "tokens_per_second", "days", "usd", "memory")
CONSTRAINED: Mapping[str, Collection[str] | None] = {
    **dict.fromkeys(
        (
            "data_parallel",
            *(name for name in TRAINED if name not in WORDS),
            *RESULTS,
            "mfu",
            "hfu",
            "mfu_causal",
            *(f"{name}_share" for name in LOST),
        ),
        None,
    ),
    **WORDS,
}
"""What constraints may name: see `_evaluated`."""
GOAL = Goal(
    name="training",
    ranks={"time": ("days", 1), "cost": ("usd", 1), "throughput": ("tokens_per_second", -1)},
    axes=("days", "memory"),
    shape=("tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel", "context_parallel"),
    columns=(
        *WAYS,
        plain("CP", "context_parallel"),
        plain("ZeRO", "zero_stage"),
        plain("schedule", "schedule"),
        plain("chunks", "virtual_stages"),
        plain("microbatch", "microbatch"),
        plain("of them", "microbatches"),
        plain("recompute", "recompute"),
        scaled("GB a GPU", "memory", GB),
        plain("s a step", "seconds"),
        percent("MFU (PaLM)", "mfu"),
        percent("causal", "mfu_causal"),
        percent("bubble", "bubble_share"),
        percent("sent", "sent_share"),
        plain("days", "days"),
        rounded("USD", "usd"),
    ),
    definitions={
        "MFU (PaLM)": f"{training.FLOP_CONVENTIONS['palm']}; over 100 % where kernels skip what it counts",
        "causal": "the same of what is multiplied: no masked half of the square, no look-up of embeddings",
        "sent": "communication that takes time of its own, as a share of the step",
        "days, USD": "of the whole run at this step's rate, without failures",
    },
)


def tokens_of(document: Spec) -> float:
    """Tokens of the spec's own training run; TOKENS where it says nothing of them.

    Where it gives several to try, what its sources print. Raises SpecError where they print several figures,
    or none.
    """
    given = document.training.get("tokens", TOKENS)
    if isinstance(given, int | float):
        return float(given)
    claims = [claim for claim in document.claims if claim.quantity == "training.tokens"]
    printed = {interval(reading.value) for claim in claims for reading in claim.readings}
    if len(printed) != 1:
        raise SpecError(f"{document.name} has several counts of training tokens to try; give --tokens")
    (one,) = printed
    return (one.low + one.high) / 2


def plan(
    question: Question,
    *,
    batch_tokens: float,
    context: int,
    tokens: float = TOKENS,
    precisions: Sequence[str] = ("bfloat16",),
    overlap: Overlap = EXPOSED,
    watch: Watch | None = None,
) -> Plan:
    """Layouts of `training_space`, or of what the question tries, by `theory.steps.training_step`.

    A step holds whole microbatches on every rank, at most BATCH_SLACK off `batch_tokens`; days and usd are
    of `tokens` tokens at its rate, without failures. memory is bytes of the fullest rank (`theory.states`:
    mixed-precision Adam). mfu counts as PaLM did, mfu_causal what is multiplied: only it is a share of the
    peak. Where fewer devices are asked for than there are, the front is of time against devices. `precisions`
    names the one in which matrices are multiplied; states are those of 16 bits.
    Raises SpecError where nothing fits.
    """
    counted("batch", batch_tokens)
    counted("sequence", context)
    within(question.architecture, "a sequence", context)
    counted("run", tokens, 1e30)
    sequences = batch_tokens / context
    constraints = parse_all(question.constraints, CONSTRAINED)
    architecture, impossible = question.architecture, layouts.RuledOut()
    if len(precisions) != 1:
        raise SpecError(f"a run multiplies in one precision, and {len(precisions)} are given; give one")
    multiplied = precision(precisions[0]).multiplied
    question.hardware.peak_flops(multiplied)
    space = training_space(architecture, question.gpus, question.hardware.island, context, sequences)
    space = space.trying(question.tries, TRAINED)
    found = layouts.shapes(architecture, space, question.gpus, question.fewest, impossible)
    grids = layouts.training_grids(architecture, space, found, sequences, impossible)

    def batches() -> Iterator[Batch]:
        for grid in grids:
            columns = _evaluated(question, grid, context, tokens, multiplied, overlap)
            runs = Limit("schedule", np.isfinite(columns["seconds"]), _no_bubble)
            limits = [runs, memory_limit(question, columns), *constraint_limits(constraints, columns)]
            yield Batch(grid.layout, columns, limits)

    of = f"{multiplied}, {tokens:.4g} tokens in steps of {batch_tokens:,.0f}, sequences of {context:,}"
    used = replace(question.efficiency, **{name: getattr(IDEAL, name) for name in SERVED_ALONE})
    asked = replace(question, name=f"{question.name}, {of},", efficiency=used)
    goal = GOAL if question.least_gpus is None else replace(GOAL, axes=("days", "gpus"))
    return search(asked, goal, batches(), sum(map(len, grids)), impossible, watch)


def _no_bubble(facts: Mapping[str, Any]) -> str:
    return f"the bubble of {facts['schedule']} has no closed form at these times of a stage's passes"


def _evaluated(
    question: Question,
    grid: layouts.Grid,
    context: int,
    tokens: float,
    multiplied: Format,
    overlap: Overlap,
) -> dict[str, Any]:
    """The columns of one grid."""
    layout, architecture = grid.layout, question.architecture
    batch = grid.microbatches * layout.microbatch * layout.data_parallel
    step = training_step(
        architecture,
        question.hardware,
        layout,
        batch_tokens=batch * context,
        context=context,
        efficiency=question.efficiency,
        multiplied=multiplied,
        overlap=overlap,
    )
    need = training_memory(
        architecture, layout, context=context, microbatches=grid.microbatches, stage=grid.stages
    )
    seconds, gpus = step.seconds, layout.devices
    rate = batch * context / seconds
    days = tokens / rate / training.SECONDS_PER_DAY
    multiplied_flops = training.work_per_token(architecture, context, attention="causal").model
    parts = {name: getattr(step, name) for name in LOST}
    sent = sum(parts[name] for name in ("tensor", "expert", "context", "pipeline", "data"))
    columns = {name: getattr(layout, name) for name in FIELDS} | worst(need, len(grid))
    columns |= {f"{name}_share": part / seconds for name, part in parts.items()}
    return columns | {
        "gpus": gpus,
        "microbatches": grid.microbatches,
        "batch": batch,
        "seconds": seconds,
        "tokens_per_second": rate,
        "days": days,
        "usd": training.cost(gpus, days, question.price),
        "mfu": step.mfu,
        "hfu": step.hfu,
        "mfu_causal": training.mfu(multiplied_flops, rate, gpus, step.peak_flops),
        "sent_share": sent / seconds,
    }
