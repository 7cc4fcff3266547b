"""Training steps of published tables: iteration times, FLOP/s per GPU, and what explains an error.

One number is fitted in each table, the share of the peak that matrix products reach
(`Efficiency.compute`); memory and links run at their data sheets' rates. No row is predicted with a number
that was fitted to it.
"""

from __future__ import annotations

from functools import cache

from harness.spec import Architecture, load
from harness.spec.hardware import load_hardware
from harness.theory import training
from harness.theory.efficiency import Efficiency
from harness.theory.flops import Pairs
from harness.theory.layout import Layout, Recompute
from harness.theory.steps import PARTS, Overlap, TrainingStep, training_step
from harness.validation import published
from harness.validation.fit import fitted, halves, held_out, singles
from harness.validation.held import Row, Section
from harness.validation.shapes import CONTEXT, gpt

COMPUTE = (0.2, 1.5)
"""Between which a share of the peak is sought; beyond 1 only where a model lacks time that the run took."""
LLAMA_CHUNKS = 7
"""Of layers on a stage. 126 layers on 16 stages with one removed at either end (section 3.3.2) are 8 chunks
of one layer with two empty ones; with none empty there can be 7."""


def told(step: TrainingStep) -> str:
    """Where the time of a step goes, in words: every part of at least 1 %."""
    parts = sorted(((float(getattr(step, name)) / float(step.seconds), name) for name in PARTS), reverse=True)
    return "of the predicted time " + ", ".join(
        f"{name} is {100 * share:.0f} %" for share, name in parts if share >= 0.01
    )


def chunks(layers: int, stages: int) -> int:
    """The fewest chunks above one into which the layers of a stage divide; 1 without a pipeline."""
    each = layers // stages
    return next((n for n in range(2, each + 1) if each % n == 0), 1) if stages > 1 else 1


def _on_a100(model: Architecture, layout: Layout, batch: int, compute: float) -> TrainingStep:
    """A step of `batch` sequences, attention counted over the full square as both papers count it."""
    return training_step(
        model,
        load_hardware("a100-80gb"),
        layout,
        batch_tokens=batch * CONTEXT,
        context=CONTEXT,
        attention="full",
        efficiency=Efficiency(compute=compute),
    )


@cache
def megatron_step(row: int, compute: float) -> TrainingStep:
    """A row of `published.MEGATRON` as one step: microbatches of one sequence, everything recomputed."""
    one = published.MEGATRON[row]
    v = chunks(one.layers, one.pipeline)
    layout = Layout(
        one.tensor,
        one.pipeline,
        one.gpus // (one.tensor * one.pipeline),
        schedule="interleaved" if v > 1 else "1f1b",
        virtual_stages=v,
        recompute="full",
        flash=False,
        sequence_parallel=False,
    )
    return _on_a100(gpt(one.hidden, one.layers, one.heads), layout, one.batch, compute)


def hardware_teraflops(row: int, seconds: float) -> float:
    """FLOP/s of a GPU in 1e12, the repeated forward pass included (Narayanan et al. 2021, eq. 3)."""
    one = published.MEGATRON[row]
    work = training.work_per_token(gpt(one.hidden, one.layers, one.heads), CONTEXT, recompute="full")
    return work.hardware * one.batch * CONTEXT / (seconds * one.gpus * 1e12)


def megatron_seconds() -> tuple[float, ...]:
    """Iteration times that the published FLOP/s imply."""
    rows = enumerate(published.MEGATRON)
    return tuple(hardware_teraflops(row, 1.0) / one.teraflops for row, one in rows)


def megatron() -> Section:
    """Table 1 of Narayanan et al. 2021: each half predicted with the number that the other half gives."""
    times = megatron_seconds()
    found = held_out(
        lambda row, compute: float(megatron_step(row, compute).seconds), times, halves(len(times)), COMPUTE
    )
    rows = []
    for row, one in enumerate(published.MEGATRON):
        seconds, why = found.predicted[row], told(megatron_step(row, found.parameters[row]))
        name, teraflops = f"{one.billions:g}e9 on {one.gpus:,}", hardware_teraflops(row, seconds)
        rows += [
            Row(f"{name}: iteration", times[row], seconds, "s", why),
            Row(f"{name}: of peak", one.percent, 100e12 * teraflops / published.A100_PEAK, "%", why),
        ]
    first, second = found.parameters[0], found.parameters[1]
    return Section(
        "Megatron-LM, table 1: training steps on A100",
        "Narayanan et al. 2021, arXiv 2104.04473, table 1",
        "iteration times are those that the printed FLOP/s imply by the paper's eq. 3. Assumed, as the "
        "table does not say: microbatches of one sequence, full recomputation, interleaved schedules with "
        f"the fewest chunks above one. Fitted: one share of the peak, {first:.3f} from the even rows for the "
        f"odd ones, {second:.3f} from the odd rows for the even ones",
        tuple(rows),
    )


@cache
def a100_compute() -> float:
    """The share of an A100's peak that matrix products reach, fitted to all of Megatron-LM's table 1."""
    times = megatron_seconds()
    return fitted(
        lambda row, compute: float(megatron_step(row, compute).seconds), times, range(len(times)), COMPUTE
    )


def mt_nlg() -> Section:
    """Megatron-Turing NLG, with the efficiency of another table: nothing is fitted here."""
    largest = published.MEGATRON[8]
    model = gpt(largest.hidden, largest.layers, largest.heads)
    rows = []
    for gpus, seconds in published.MT_NLG:
        layout = Layout(8, 35, gpus // 280, recompute="full", flash=False, sequence_parallel=False)
        step = training_step(
            model,
            load_hardware("a100-80gb"),
            layout,
            batch_tokens=published.MT_NLG_BATCH * CONTEXT,
            context=CONTEXT,
            attention="full",
            efficiency=Efficiency(compute=a100_compute()),
        )
        work = training.work_per_token(model, CONTEXT, recompute="full").hardware
        reached = work * published.MT_NLG_BATCH * CONTEXT / (seconds * gpus * 1e12)
        why = (
            f"the same model, program and GPUs reach {largest.teraflops} TFLOP/s in table 1 of Megatron-LM, "
        )
        why += f"a benchmark, and {reached:.0f} in this run: what the run lost, the shape does not tell; "
        why += told(step)
        rows.append(Row(f"530e9 on {gpus:,}: iteration", seconds, float(step.seconds), "s", why))
    return Section(
        "Megatron-Turing NLG 530B: iterations of 1,920 sequences",
        "Smith et al. 2022, arXiv 2201.11990, section 2.4",
        f"the share of the peak that fits Megatron-LM's table 1, {a100_compute():.3f}. Assumed: microbatches "
        "of one sequence, full recomputation, 1F1B (240, 192 and 160 microbatches are no multiple of 35 "
        "stages)",
        tuple(rows),
    )


@cache
def korthikanti_step(row: int, recompute: Recompute, compute: float) -> TrainingStep:
    """A row of `published.KORTHIKANTI`: full recomputation without, selective with sequence parallelism."""
    one = published.KORTHIKANTI[row]
    layout = Layout(
        8,
        one.pipeline,
        1,
        microbatch=one.microbatch,
        schedule="interleaved" if one.chunks > 1 else "1f1b",
        virtual_stages=one.chunks,
        recompute=recompute,
        flash=False,
        sequence_parallel=recompute == "selective",
    )
    return _on_a100(gpt(one.hidden, one.layers, one.heads), layout, one.batch, compute)


PAIRS: tuple[Pairs, Pairs] = ("causal", "full")
WAYS: tuple[Recompute, Recompute] = ("full", "selective")


def korthikanti() -> Section:
    """Table 5 of Korthikanti et al.: selective times by the number of the full ones, and the reverse."""
    models = published.KORTHIKANTI
    times = [one.full for one in models] + [one.selective for one in models]

    def step(row: int, compute: float) -> TrainingStep:
        return korthikanti_step(row % len(models), WAYS[row // len(models)], compute)

    folds = tuple(range(len(models))), tuple(range(len(models), 2 * len(models)))
    found = held_out(lambda row, compute: float(step(row, compute).seconds), times, folds, COMPUTE)
    rows = []
    for row, seconds in enumerate(found.predicted):
        one, way = models[row % len(models)], WAYS[row // len(models)]
        predicted = step(row, found.parameters[row])
        first = row // len(models) * len(models)
        narrow, wide = (
            fitted(lambda row, compute: float(step(row, compute).seconds), times, [place], COMPUTE)
            for place in (first, first + len(models) - 1)
        )
        why = f"alone the narrowest model would take a share of {narrow:.3f} of the peak, and the widest "
        why += f"{wide:.3f}: larger matrices reach more, and one share stands for all; {told(predicted)}; "
        why += f"with equal stages {float(predicted.seconds - predicted.imbalance):.3g} s"
        rows.append(Row(f"{one.name}, {way} recomputation", times[row], seconds, "s", why))
    for row, one in enumerate(models):
        full, selective = (float(korthikanti_step(row, way, a100_compute()).seconds) for way in WAYS)
        share = 1 - one.selective / one.full
        lacking = (full - selective) / share - full
        why = f"{lacking:.2g} s more in both, {100 * lacking / full:.0f} % of the longer, would give what is "
        why += "printed: time that neither repeats, as launches, the loss and data, and that the model lacks"
        rows.append(Row(f"{one.name}: time saved", 100 * share, 100 * (1 - selective / full), "%", why))
    return Section(
        "Korthikanti et al. 2022: iterations with full and with selective recomputation",
        "arXiv 2205.05198, tables 3 and 5, as Calculon transcribes them",
        f"fitted: one share of the peak, {found.parameters[4]:.3f} from the full rows for the selective "
        f"ones, {found.parameters[0]:.3f} from the selective rows for the full ones; time saved with "
        f"Megatron-LM's {a100_compute():.3f}",
        tuple(rows),
    )


@cache
def llama_step(row: int, compute: float) -> TrainingStep:
    """A row of `published.LLAMA`: nothing recomputed, flash attention, optimizer sharded."""
    one = published.LLAMA[row]
    layout = Layout(
        one.tensor,
        one.pipeline,
        one.data,
        context_parallel=one.context_ways,
        zero_stage=1,
        schedule="interleaved",
        virtual_stages=LLAMA_CHUNKS,
    )
    return training_step(
        load("llama-3.1-405b").architecture,
        load_hardware("h100"),
        layout,
        batch_tokens=one.batch * one.data * one.context,
        context=one.context,
        efficiency=Efficiency(compute=compute),
    )


def llama_teraflops(row: int, compute: float) -> float:
    """Model FLOP/s of a GPU in 1e12, attention counted as the causal mask admits it."""
    step, context = llama_step(row, compute), published.LLAMA[row].context
    work = training.work_per_token(load("llama-3.1-405b").architecture, context, attention="causal")
    return float(work.model * step.tokens_per_second / step.devices) / 1e12


@cache
def h100_compute() -> float:
    """The share of an H100's peak that matrix products reach, fitted to all of Llama 3's table 4."""
    rates = [one.teraflops for one in published.LLAMA]
    return fitted(llama_teraflops, rates, range(len(rates)), COMPUTE)


def llama() -> Section:
    """Table 4 of Llama 3, each row predicted with the number that the other two give."""
    rates = [one.teraflops for one in published.LLAMA]
    found = held_out(llama_teraflops, rates, singles(len(rates)), COMPUTE)
    peak = load_hardware("h100").peak_flops("bfloat16")
    rows = []
    for row, one in enumerate(published.LLAMA):
        name, why = f"{one.gpus:,} GPUs, {one.context:,} tokens", told(llama_step(row, found.parameters[row]))
        rate = found.predicted[row]
        rows += [
            Row(f"{name}: per GPU", one.teraflops, rate, "TFLOP/s", why),
            Row(f"{name}: MFU", one.percent, 100e12 * rate / peak, "%", why),
        ]
    spec = load("llama-3.1-405b")
    total = training.flops_per_token(spec.architecture, 8192) * published.LLAMA_TOKENS
    rows.append(Row("training compute, 6 N D", published.LLAMA_FLOPS, total, "FLOP"))
    shown = ", ".join(f"{parameter:.3f}" for parameter in found.parameters)
    longest = published.LLAMA[-1]
    causal, square = (
        training.work_per_token(spec.architecture, longest.context, attention=pairs).model for pairs in PAIRS
    )
    return Section(
        "Llama 3 405B, table 4: training steps on H100",
        "Grattafiori et al. 2024, arXiv 2407.21783, table 4",
        f"fitted: one share of the peak, leaving one row out: {shown}. Assumed: {LLAMA_CHUNKS} chunks of "
        "layers on a stage, microbatches of one sequence, nothing recomputed. FLOP/s count attention as the "
        f"causal mask admits it: with the full square the row of {longest.context:,} tokens would be one of "
        f"{longest.teraflops * square / causal:.0f} TFLOP/s",
        tuple(rows),
    )


@cache
def megascale_step(row: int, compute: float, *, hidden: bool) -> TrainingStep:
    """A row of `published.MEGASCALE`: Megatron-LM with everything that is sent exposed, or MegaScale with all
    of it hidden and attention beside the feed-forward network."""
    one = published.MEGASCALE[row]
    model = gpt(12288, 96, 96, published.MEGASCALE_VOCABULARY)
    layout = Layout(8, 8, one.gpus // 64, schedule="interleaved", virtual_stages=6, zero_stage=1)
    return training_step(
        model.model_copy(update={"parallel_block": hidden}),
        load_hardware("a100-80gb"),
        layout,
        batch_tokens=one.batch * CONTEXT,
        context=CONTEXT,
        efficiency=Efficiency(compute=compute),
        overlap=Overlap(tensor=1.0, pipeline=1.0, data=1.0) if hidden else Overlap(),
    )


def megascale() -> Section:
    """Table 2 of MegaScale, each half of a program's rows by the number that the other half gives."""
    rows, shown = [], []
    for name, hidden in (("Megatron-LM", False), ("MegaScale", True)):
        times = [one.megascale if hidden else one.megatron for one in published.MEGASCALE]

        def step(row: int, compute: float, hidden: bool = hidden) -> TrainingStep:
            return megascale_step(row, compute, hidden=hidden)

        def seconds(row: int, compute: float, hidden: bool = hidden) -> float:
            return float(step(row, compute, hidden).seconds)

        found = held_out(seconds, times, halves(len(times)), COMPUTE)
        shown.append(f"{name} {found.parameters[0]:.3f} and {found.parameters[1]:.3f}")
        for row, one in enumerate(published.MEGASCALE):
            own, most = (fitted(seconds, times, [place], COMPUTE) for place in (row, len(times) - 1))
            why = (
                f"alone it would take a share of {own:.3f} of the peak, and the largest run {most:.3f}: what "
            )
            why += "grows with GPUs, as waiting for the slowest, is not in the model; "
            why += told(step(row, found.parameters[row]))
            rows.append(Row(f"{name} on {one.gpus:,}", times[row], found.predicted[row], "s", why))
    return Section(
        "MegaScale, table 2: 175e9 parameters on up to 12,288 A100",
        "Jiang et al. 2024, arXiv 2402.15627, tables 1 and 2 and section 6.1",
        f"fitted: one share of the peak for each program, each half by the other: {'; '.join(shown)}. "
        "Assumed: flash attention, nothing recomputed, sequence parallelism, optimizer sharded, "
        "microbatches of one sequence, 200 Gb/s for a GPU; MegaScale hides what it sends, as it says, "
        "Megatron-LM nothing; windows are left out",
        tuple(rows),
    )
