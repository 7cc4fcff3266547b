"""Whole training runs: utilisation, hours, cost, and what failures leave of them."""

from __future__ import annotations

from functools import cache

from harness.spec import load
from harness.spec.hardware import Format, load_hardware
from harness.theory import failures, flops, memory, parameters, training
from harness.theory.efficiency import Efficiency
from harness.theory.layout import Layout
from harness.theory.steps import Overlap, TrainingStep, training_step
from harness.validation import published
from harness.validation.fit import fitted
from harness.validation.held import Row, Section
from harness.validation.shapes import CONTEXT, gpt
from harness.validation.training_tables import h100_compute

HIDDEN = Overlap(expert=1.0, pipeline=1.0, data=1.0)
"""What DualPipe hides (DeepSeek-V3, section 3.2.1): all-to-alls and hand-overs; and the gradients'."""
CHECKPOINT_SECONDS, RESTART_SECONDS = 10.0, 600.0


def utilisation() -> Section:
    """Table 3 of PaLM, by its own convention and from the rates that it gives."""
    palm = load("palm-540b").architecture
    chips, peak = published.PALM_CHIPS, load_hardware("tpu-v4").peak_flops("bfloat16")
    rate = published.PALM_TOKENS_PER_SECOND

    def percent(convention: training.FlopConvention) -> float:
        return 100 * training.mfu(training.flops_per_token(palm, CONTEXT, convention), rate, chips, peak)

    work = training.work_per_token(palm, CONTEXT, recompute="full")
    repeated = published.PALM_HFU / published.PALM_MFU * work.model - work.model
    nlg = gpt(20480, 105, 128)
    gpus, seconds = published.MT_NLG[0]
    nlg_rate = published.MT_NLG_BATCH * CONTEXT / seconds

    def nlg_percent(convention: training.FlopConvention) -> float:
        counted = training.flops_per_token(nlg, CONTEXT, convention)
        return 100 * training.mfu(counted, nlg_rate, gpus, published.A100_PEAK)

    gpt3 = load("gpt3-175b").architecture
    with_attention = training.flops_per_token(gpt3, CONTEXT, "palm") / training.flops_per_token(gpt3, CONTEXT)
    davinci = 100e12 * published.GPT3_TERAFLOPS * with_attention / published.V100_PEAK
    square = 12 * published.GOPHER_LAYERS * published.GOPHER_WIDTH * CONTEXT
    gopher_rate = published.GOPHER_STEPS_PER_SECOND * published.GOPHER_BATCH * CONTEXT
    gopher = training.mfu(
        6 * published.GOPHER_PARAMETERS + square, gopher_rate, published.GOPHER_CHIPS, published.TPU_V3_PEAK
    )
    why = f"the paper repeats {100 * repeated / work.forward:.0f} % of a forward pass, not all of it"
    return Section(
        "PaLM, table 3: utilisation",
        "Chowdhery et al. 2022, arXiv 2204.02311, section 4.1, table 3 and appendix B",
        "the rates that the paper gives (tokens/s; steps/s of Gopher at its final batch; FLOP/s of GPT-3), "
        "its formula 6 N + 12 L H h S, peaks of data sheets. Nothing fitted; HFU with every layer "
        "recomputed",
        (
            Row("PaLM 540B, MFU", published.PALM_MFU, percent("palm"), "%"),
            Row("PaLM 540B, without attention", published.PALM_MFU_WITHOUT_ATTENTION, percent("6n"), "%"),
            Row("PaLM 540B, HFU", published.PALM_HFU, training.hfu(percent("palm"), work), "%", why),
            Row("Megatron-Turing NLG, MFU", published.MT_NLG_MFU, nlg_percent("palm"), "%"),
            Row(
                "Megatron-Turing NLG, without attention",
                published.MT_NLG_MFU_WITHOUT_ATTENTION,
                nlg_percent("6n"),
                "%",
            ),
            Row("GPT-3, MFU", published.GPT3_MFU, davinci, "%", "no rate is given but FLOP/s on weights"),
            Row("Gopher, MFU", published.GOPHER_MFU, 100 * gopher, "%"),
        ),
    )


def gpt3() -> Section:
    """Table D.1 of GPT-3."""
    architecture = load("gpt3-175b").architecture
    total = training.flops_per_token(architecture, CONTEXT) * published.GPT3_TOKENS
    days = total / (1e15 * training.SECONDS_PER_DAY)
    return Section(
        "GPT-3, table D.1",
        "Brown et al. 2020, arXiv 2005.14165, table D.1",
        "2 FLOP per parameter and token forward, three passes; nothing fitted",
        (
            Row("parameters", published.GPT3_PARAMETERS, parameters.total(architecture)),
            Row("training compute", published.GPT3_FLOPS, total, "FLOP"),
            Row("training compute", published.GPT3_PETAFLOP_DAYS, days, "PF-days"),
        ),
    )


@cache
def deepseek_step(compute: float, *, hidden: bool = True, multiplied: Format = "fp8") -> TrainingStep:
    """A step of DeepSeek-V3 on 2,048 H800: 16 stages of two chunks, experts 64 ways, optimizer sharded."""
    pipeline = 16
    layout = Layout(
        pipeline_parallel=pipeline,
        data_parallel=published.DEEPSEEK_GPUS // pipeline,
        expert_parallel=64,
        zero_stage=1,
        schedule="zbv",
        virtual_stages=2,
    )
    return training_step(
        load("deepseek-v3").architecture,
        load_hardware("h800"),
        layout,
        batch_tokens=published.DEEPSEEK_BATCH * published.DEEPSEEK_CONTEXT,
        context=published.DEEPSEEK_CONTEXT,
        efficiency=Efficiency(compute=compute),
        multiplied=multiplied,
        overlap=HIDDEN if hidden else Overlap(),
    )


def hours(step: TrainingStep) -> float:
    """GPU-hours of DeepSeek-V3's tokens at the pace of this step."""
    seconds = published.DEEPSEEK_TOKENS / float(step.tokens_per_second)
    return training.device_hours(published.DEEPSEEK_GPUS, seconds / training.SECONDS_PER_DAY)


def deepseek() -> Section:
    """Table 1 of DeepSeek-V3, with the efficiency of Llama 3's table."""
    architecture, share = load("deepseek-v3").architecture, h100_compute()
    predicted, price = hours(deepseek_step(share)), load_hardware("h800").gpu_hour_usd.value
    exposed, half = (
        hours(deepseek_step(share, hidden=False)),
        hours(deepseek_step(share, multiplied="bfloat16")),
    )
    own = fitted(
        lambda _, compute: hours(deepseek_step(compute)), [published.DEEPSEEK_HOURS], [0], (0.05, 1.5)
    )
    why = (
        f"{exposed / 1e3:,.0f}e3 h if no all-to-all were hidden, {half / 1e3:,.0f}e3 h at the rate of "
        f"bfloat16, which attention keeps; with all hidden the printed hours are a share of {own:.2f} of the "
        "FP8 peak: scaling in small blocks, grouped experts and SMs given to sending are not in the model"
    )
    later = published.DEEPSEEK_LATER_HOURS
    per_token = training.flops_per_token(architecture, CONTEXT, "forward-x3")
    active = parameters.active(architecture, "no-input-embedding")
    run_seconds = published.DEEPSEEK_MFU_HOURS * failures.SECONDS_PER_HOUR
    rate = 6 * active * published.DEEPSEEK_TOKENS / run_seconds
    utilised = 100 * rate / load_hardware("h800").peak_flops("fp8")
    at_theirs = 100 * rate / published.DEEPSEEK_MFU_PEAK
    mfu_why = (
        f"the source's peak is 1,513e12, of a PCIe card: of that it is {at_theirs:.1f} %; ours is the SXM's"
    )
    return Section(
        "DeepSeek-V3, table 1: hours and cost on H800",
        "DeepSeek-AI 2024, arXiv 2412.19437, table 1 and section 3; Austin et al. 2025 for the MFU",
        f"nothing fitted: the share of the peak is Llama 3's, {share:.3f}, applied to FP8. 16 stages, "
        "experts 64 ways, ZeRO-1 and batches of 15,360 x 4,096 as printed; the schedule is ZB-V, whose "
        "bubble is nearest to DualPipe's, with all-to-alls, hand-overs and gradients hidden, as the paper "
        "says of DualPipe",
        (
            Row("pre-training", published.DEEPSEEK_HOURS, predicted, "H800 h", why),
            Row(
                "cost",
                published.DEEPSEEK_COST,
                (predicted + later) * price,
                "USD",
                "as the hours, on which it rests",
            ),
            Row(
                "cost of the printed hours",
                published.DEEPSEEK_COST,
                (published.DEEPSEEK_HOURS + later) * price,
                "USD",
            ),
            Row(
                "context extension and fine-tuning",
                later,
                None,
                "H800 h",
                "their tokens are not printed",
            ),
            Row("compute of a token, three passes", published.DEEPSEEK_GFLOP, per_token / 1e9, "GFLOP"),
            Row("MFU of the FP8 peak", published.DEEPSEEK_MFU, utilised, "%", mfu_why),
            Row(
                "cache of a token",
                published.DEEPSEEK_CACHE,
                memory.kv_cache_bytes_per_token(architecture),
                "bytes",
            ),
        ),
    )


def failing() -> Section:
    """Effective training time of the largest published runs."""
    rows = []
    for name, least, gpus in (
        ("Llama 3", published.LLAMA_EFFECTIVE, published.LLAMA_GPUS),
        ("MegaScale", published.MEGASCALE_EFFECTIVE, published.MEGASCALE_GPUS),
    ):
        between = failures.mean_time_between_failures(gpus, failures.LLAMA_3_RATE)
        left = 100 * failures.best_goodput(CHECKPOINT_SECONDS, between, RESTART_SECONDS)
        why = f"with a restart in {RESTART_SECONDS / 2:.0f} s it would be "
        why += f"{100 * failures.best_goodput(CHECKPOINT_SECONDS, between, RESTART_SECONDS / 2):.1f} %"
        rows.append(Row(f"{name}, {gpus:,} GPUs: effective time", least, float(left), "%", why, bound=">"))
    return Section(
        "Effective time of the largest runs",
        "Llama 3, arXiv 2407.21783, section 3.3.4 and table 5; MegaScale, arXiv 2402.15627, section 6.3",
        f"failures: 419 in 54 days of 16,384 GPUs for both; assumed {CHECKPOINT_SECONDS:.0f} s for a "
        f"checkpoint and {RESTART_SECONDS:.0f} s for a restart (MegaScale: detection in less than 10 "
        "minutes), at the best interval",
        tuple(rows),
    )


def counted_flops() -> Section:
    """FLOPs of a forward pass against a counter of what PyTorch multiplies."""
    return Section(
        "Forward pass of a token, counted by PyTorch",
        "torch.utils.flop_counter.FlopCounterMode (2.13) over transformers 5.23.0 on the meta device",
        "2,048 tokens, full attention; nothing fitted",
        tuple(
            Row(
                name,
                gigaflop,
                flops.forward_total(load(name).architecture, 1, CONTEXT) / CONTEXT / 1e9,
                "GFLOP",
            )
            for name, gigaflop in published.FORWARD_GFLOP.items()
        ),
    )
