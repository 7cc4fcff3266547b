"""Steps of inference that measured kernels and other calculators give, beside ours.

Every calculator's figures are predicted by the rule that it charges experts by, within our roofline: that a
rule reproduces them tells what they charge. Measured kernels are predicted with the constants that
`harness.validation.silicon` fits to measured serving rows, among which is no Mixtral and no A100.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import exp, log

from harness.spec import load
from harness.spec.hardware import load_hardware
from harness.theory.describe import Table
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.inference import Pricer, decode, prefill, pricer
from harness.theory.layout import Layout
from harness.theory.precision import PRECISIONS
from harness.theory.states import serving_memory
from harness.validation import published
from harness.validation.fit import fitted
from harness.validation.held import Row, Section
from harness.validation.silicon_constants import measured
from harness.validation.training_tables import a100_compute

PROMPT, OUTPUT = 2048, 256
MIDDLE = PROMPT + OUTPUT // 2
"""Cached tokens of a decode step, on average over an answer."""
ENGINE = "trtllm"
"""Whose kernels aiconfigurator measured, unless it is told otherwise."""
GENZ_LINKS = 1.8
"""Milliseconds of communication that GenZ adds to a step, as it reports them."""
BANDWIDTH_ALONE = Efficiency(latency=0.0)
"""Links without latency."""
SILICON = "aiconfigurator SILICON"


TOUCHED, CHOSEN, ALL = RULES = (
    "experts that the batch touches",
    "k experts, whatever the batch",
    "all experts, whatever the batch",
)
"""Which experts of a layer a decode step reads."""


@cache
def mixtral(efficiency: Efficiency = IDEAL) -> Pricer:
    """Mixtral 8x7B over the tensor ways of 8 H100, in 16 bits."""
    return pricer(
        load("mixtral-8x7b").architecture,
        load_hardware("h100"),
        Layout(8),
        PRECISIONS["bfloat16"],
        efficiency,
    )


def mixtral_seconds(batch: int, rule: str, efficiency: Efficiency = IDEAL, *, links: bool = True) -> float:
    """A decode step in the middle of an answer, experts charged by a rule."""
    priced = mixtral(efficiency)
    step = decode(priced.architecture, batch, MIDDLE)
    computing, reading = priced.classes(step)[1]
    moe = priced.architecture.moe
    assert moe is not None
    whatever = {CHOSEN: moe.top_k, ALL: moe.n_experts}
    ruled = whatever[rule] * priced.expert_read if rule in whatever else reading
    seconds = priced.of(step) - max(computing, reading) + max(computing, ruled)
    return float(seconds if links else seconds - priced.links.seconds(step.tokens, min))


def mixtral_steps() -> Section:
    """The decode step of Mixtral against the batch: measured kernels and four calculators."""
    real = measured(ENGINE)
    rows = []
    for one in published.MIXTRAL:
        seconds, ideal = mixtral_seconds(one.batch, TOUCHED, real), mixtral_seconds(one.batch, TOUCHED)
        why = f"{1e3 * ideal:.2f} ms at data-sheet rates"
        rows.append(Row(f"batch {one.batch}, measured kernels", one.measured, 1e3 * seconds, "ms", why))
    for one in published.MIXTRAL:
        touched = 1e3 * mixtral_seconds(one.batch, TOUCHED, BANDWIDTH_ALONE)
        chosen = 1e3 * mixtral_seconds(one.batch, CHOSEN, links=False)
        every = 1e3 * mixtral_seconds(one.batch, ALL)
        without = 1e3 * mixtral_seconds(one.batch, ALL, links=False)
        rows += [
            Row(
                f"batch {one.batch}, aiconfigurator SOL: experts touched",
                one.sol,
                touched,
                "ms",
                f"with all experts it would be {every:.2f}",
            ),
            Row(
                f"batch {one.batch}, GenZ: k experts, and {GENZ_LINKS} ms of links",
                one.genz,
                chosen + GENZ_LINKS,
                "ms",
                f"without links {chosen:.2f}",
            ),
            Row(
                f"batch {one.batch}, llm-flops: active weights, no links",
                one.llm_flops,
                chosen,
                "ms",
                f"with experts touched {touched:.2f}",
            ),
            Row(
                f"batch {one.batch}, llm-analysis: all experts",
                one.llm_analysis,
                every,
                "ms",
                f"it charges {one.llm_analysis - without:.2f} ms beside weights and cache, we "
                f"{every - without:.2f} for all-reduces: its links slow down more with the batch",
            ),
        ]
    return Section(
        "Mixtral 8x7B: a decode step against the batch, 8 H100",
        "aiconfigurator 0.12.0 (SILICON, SOL), GenZ, llm-flops 0.0.1, llm-analysis 0.2.2, as run; "
        "efficiencies 1",
        "measured kernels: the constants that are fitted to measured serving rows of other models "
        "(TensorRT-LLM's). Calculators: our roofline with the rule that each charges experts by, at "
        "data-sheet rates; nothing fitted, but for GenZ's own figure of its links",
        tuple(rows),
    )


def rules() -> Table:
    """Which rule the measured steps admit, with the same constants for all rules."""
    real, rows = measured(ENGINE), []
    times = [one.measured for one in published.MIXTRAL]
    for rule in RULES:
        ideal = [1e3 * mixtral_seconds(one.batch, rule) for one in published.MIXTRAL]
        found = [1e3 * mixtral_seconds(one.batch, rule, real) for one in published.MIXTRAL]
        errors = [abs(log(mine / time)) for mine, time in zip(found, times, strict=True)]
        above = [
            f"batch {one.batch}: {least:.2f} ms at least"
            for one, least in zip(published.MIXTRAL, ideal, strict=True)
            if least > one.measured
        ]
        growth, seen = found[1] - found[0], times[1] - times[0]
        mean = 100 * (exp(sum(errors) / len(errors)) - 1)
        rows.append((rule, f"{growth:.2f}", f"{seen:.2f}", f"{mean:.0f} %", "; ".join(above)))
    return Table(
        "Which rule the measured steps of Mixtral admit",
        (
            "what is read",
            "growth from batch 1 to 8, ms",
            "measured",
            "mean error",
            "above what was measured, at rates that cannot be beaten",
        ),
        tuple(rows),
    )


def llama_70b() -> Section:
    """Prefill and decode of Llama 3.1 70B on A100."""
    llama, hardware, bf16 = (
        load("llama-3.1-70b").architecture,
        load_hardware("a100-80gb"),
        PRECISIONS["bfloat16"],
    )

    def milliseconds(efficiency: Efficiency, ways: int = 8, *, links: bool = True) -> tuple[float, float]:
        priced = pricer(llama, hardware, Layout(ways), bf16, efficiency)
        first, later = (
            1e3 * float(priced.of(one) - (not links) * priced.links.seconds(one.tokens, min))
            for one in (prefill(llama, 1, PROMPT), decode(llama, 1, PROMPT))
        )
        return first, later

    prompt, step = milliseconds(Efficiency(compute=a100_compute()))[0], milliseconds(measured(ENGINE))[1]

    def decoded(_: int, share: float) -> float:
        return milliseconds(replace(measured(ENGINE), memory=share))[1]

    alone = fitted(decoded, [published.LLAMA_70B[SILICON][1]], [0], (0.3, 0.95))
    ideal = milliseconds(IDEAL)
    by_source = {
        SILICON: (prompt, step),
        "aiconfigurator SOL": milliseconds(BANDWIDTH_ALONE),
        "GenZ": ideal,
        "llm-analysis": ideal,
    }
    later = f"constants of later GPUs: alone this figure is one of memory at {alone:.2f} of the data sheet, "
    later += f"and theirs is {measured(ENGINE).memory:.2f}"
    bare = milliseconds(IDEAL, links=False)
    rows = []
    for source, found in by_source.items():
        for name, figure, mine, least in zip(
            ("prefill", "decode"), published.LLAMA_70B[source], found, bare, strict=True
        ):
            why = f"{figure - least:.1f} ms of it are not products or memory but links, of which ours take "
            why += f"{mine - least:.1f}: it takes all-reduces for slower"
            rows.append(Row(f"{source}, {name}", figure, mine, "ms", later if source == SILICON else why))
    for name, figure, mine in zip(
        ("prefill", "decode"), published.LLM_VIEWER_70B, milliseconds(IDEAL, 1), strict=True
    ):
        rows.append(Row(f"LLM-Viewer on one GPU, {name}", figure, mine, "ms"))
    return Section(
        "Llama 3.1 70B: prefill and decode step on 8 A100",
        "aiconfigurator 0.12.0, GenZ, llm-analysis 0.2.2, LLM-Viewer, as run; one sequence of 2,048 tokens",
        f"SILICON: prefill by the share of the peak of Megatron-LM's table 1, {a100_compute():.3f}; decode "
        "by the constants of measured serving rows, none of them of an A100. SOL: links without latency; "
        "the others: data-sheet rates",
        tuple(rows),
    )


def deepseek() -> Section:
    """DeepSeek-V3 served on 8 H200, as aiconfigurator estimates it from measured kernels."""
    architecture, layout, fp8 = (
        load("deepseek-v3").architecture,
        Layout(8, expert_parallel=8),
        PRECISIONS["fp8"],
    )
    priced = pricer(architecture, load_hardware("h200"), layout, fp8, measured(ENGINE))
    batch = 32
    first = 1e3 * priced.of(prefill(architecture, batch, PROMPT))
    alone = 1e3 * priced.of(prefill(architecture, 1, PROMPT))
    each = 1e3 * priced.of(decode(architecture, batch, MIDDLE))
    size = serving_memory(
        architecture, layout, fp8, batch=batch, context=PROMPT + OUTPUT, tokens=batch * PROMPT
    )
    ttft, tpot, gib = published.DEEPSEEK_SERVED
    waits = f"32 prompts in one pass; one after another they would take {batch * alone:,.0f} ms"
    ours = f"weights {size.weights / 2**30:.1f}, activations {size.activations / 2**30:.1f}, cache "
    ours += f"{size.cache / 2**30:.1f}: the runtime's own memory and its buffers are not counted"
    return Section(
        "DeepSeek-V3 served on 8 H200",
        "aiconfigurator 0.12.0, SILICON, as run",
        "FP8 weights, experts 8 ways, 32 sequences of 2,048 + 256 tokens; the constants of measured serving "
        "rows, some of which are DeepSeek-V3's; nothing fitted to these three",
        (
            Row("time to first token", ttft, float(first), "ms", waits),
            Row("time per output token", tpot, float(each), "ms", "kernels of latent attention take longer"),
            Row("memory of a GPU", gib, float(size.total) / 2**30, "GiB", ours),
        ),
    )
