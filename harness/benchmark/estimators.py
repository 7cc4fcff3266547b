"""How long theory takes for an estimate, beside programs that make the same one, in one run.

A candidate starts from numbers in memory (no files) and gives its answer once. Candidates take turns within
every round, so that what disturbs the machine disturbs all of them; time is CPU time of this process, and
ratios are of medians. Answers stand beside the times: who charges other work has no faster way to the same.

Calculon (Isaev et al. 2023) would be a third: it is published as no package, and the one of that name on
PyPI is another program.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np

from harness.spec import load
from harness.spec.hardware import load_hardware
from harness.theory.describe import Table
from harness.theory.layout import Layout
from harness.theory.passes import decode
from harness.theory.precision import PRECISIONS
from harness.theory.roofline import pricer
from harness.theory.states import training_memory
from harness.theory.steps import training_step

Estimate = Callable[[], float]
"""Seconds or bytes."""
Program = Callable[[], Mapping[str, Estimate]]
"""The works that a program can do. Raises ImportError where it is not installed."""

OURS, LLM_FLOPS, LLM_ANALYSIS = "moe-harness", "llm-flops", "llm-analysis"
DECODE = "decode step of Mixtral 8x7B, batch 32 at 2,048 tokens, TP8 on H100, bf16"
STEP = (
    "training step of Llama 3.1 70B, 64 microbatches of 4,096 tokens, TP8 x PP8 on A100, full recomputation"
)
MEMORY = "memory of one GPU in that step"
UNITS = {DECODE: ("ms", 1e3), STEP: ("s", 1.0), MEMORY: ("GB", 1e-9)}
BATCH, CONTEXT, MICROBATCHES, SEQUENCE = 32, 2048, 64, 4096
TRAINED = Layout(tensor_parallel=8, pipeline_parallel=8, recompute="full")

CHARGES: Mapping[tuple[str, str], str] = {
    (OURS, DECODE): "experts that 32 tokens are expected to hit; two all-reduces a layer",
    (LLM_FLOPS, DECODE): "two experts of eight at any batch; no communication",
    (LLM_ANALYSIS, DECODE): "all eight experts at any batch",
    (OURS, STEP): "the pipeline's bubble, all communication exposed, memory-bound kernels",
    (LLM_ANALYSIS, STEP): "no bubble",
    (OURS, MEMORY): "stage 0: seven more microbatches in flight, its embedding",
    (LLM_ANALYSIS, MEMORY): "one microbatch in flight",
}
"""What an answer counts, where answers differ."""

REPEATS = 20
"""Estimates between two looks at the clock: one is near its resolution."""
MANY = 10_000
"""Batch sizes that one vectorised estimate prices."""


def run(*, rounds: int, step: Callable[[str], object]) -> list[Table]:
    """Time every program at every work that it can do; `step` is told after each round."""
    able: dict[str, Mapping[str, Estimate]] = {}
    absent = []
    for name, program in PROGRAMS.items():
        try:
            able[name] = program()
        except ImportError:
            absent.append(name)
    rows: list[tuple[object, ...]] = []
    for work, (unit, factor) in UNITS.items():
        candidates = {name: works[work] for name, works in able.items() if work in works}
        answers = {name: estimate() for name, estimate in candidates.items()}
        seconds = _timed(candidates, rounds, partial(step, work))
        for name, each in seconds.items():
            ratio = f"{each / seconds[OURS]:.2f}"
            answer, charged = f"{answers[name] * factor:.4g} {unit}", CHARGES.get((name, work), "")
            rows.append((work, name, answer, f"{each * 1e6:.1f}", ratio, charged))
    headers = ("work", "program", "answer", "us of CPU per estimate", "of ours", "what it charges")
    missing = f"; not installed: {', '.join(absent)}" if absent else ""
    return [Table(f"One estimate, medians of {rounds} rounds{missing}", headers, tuple(rows)), _many(rounds)]


def _timed(candidates: Mapping[str, Estimate], rounds: int, step: Callable[[], object]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, estimate in candidates.items():
            begin = time.process_time()
            for _ in range(REPEATS):
                estimate()
            seconds[name].append((time.process_time() - begin) / REPEATS)
        step()
    return {name: median(found) for name, found in seconds.items()}


def _many(rounds: int) -> Table:
    """What one estimate costs where a search asks for many at once."""
    spec, hardware, batches = load("mixtral-8x7b").architecture, load_hardware("h100"), np.arange(1, MANY + 1)
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        priced = pricer(spec, hardware, Layout(tensor_parallel=8), PRECISIONS["bfloat16"])
        priced.of(decode(spec, batches, CONTEXT))
        seconds.append((time.process_time() - begin) / MANY)
    each = median(seconds)
    row = (f"decode step at {MANY:,} batch sizes in one call", f"{each * 1e6:.3f}", f"{1 / each:,.0f}")
    headers = ("work", "us of CPU per estimate", "estimates per second")
    return Table("The same theory over arrays", headers, (row,))


def _ours() -> Mapping[str, Estimate]:
    mixtral, llama = load("mixtral-8x7b").architecture, load("llama-3.1-70b").architecture
    h100, a100 = load_hardware("h100"), load_hardware("a100-80gb")

    def decoding() -> float:
        priced = pricer(mixtral, h100, Layout(tensor_parallel=8), PRECISIONS["bfloat16"])
        return float(priced.step(decode(mixtral, BATCH, CONTEXT)).seconds)

    def training() -> float:
        tokens = MICROBATCHES * SEQUENCE
        return float(training_step(llama, a100, TRAINED, batch_tokens=tokens, context=SEQUENCE).seconds)

    def memory() -> float:
        found = training_memory(llama, TRAINED, context=SEQUENCE, microbatches=MICROBATCHES)
        return float(found.total)

    return {DECODE: decoding, STEP: training, MEMORY: memory}


def _llm_flops() -> Mapping[str, Estimate]:
    import llmflops

    def decoding() -> float:
        model = llmflops.ModelConfig(
            "mixtral", 4096, 32, 32, 32000, 14336, 8, num_experts=8, num_experts_per_tok=2
        )
        found = llmflops.throughput(
            model,
            gpu="H100-SXM",
            sequence_length=CONTEXT,
            output_tokens=0,
            max_batch=BATCH,
            parallelism=llmflops.ParallelConfig(8),
            mem_efficiency=1.0,
            allow_hf_fetch=False,
        )
        return float(found["decode_step_ms"]) / 1e3

    return {DECODE: decoding}


def _llm_analysis() -> Mapping[str, Estimate]:
    from llm_analysis import config
    from llm_analysis.analysis import ActivationRecomputation, LLMAnalysis
    from llm_analysis.logger import logger

    logger.setLevel(logging.CRITICAL)

    def decoding() -> float:
        model = config.ModelConfig(
            "mixtral", 32, 32, 4096, 32000, CONTEXT + 1, 8, None, None, 3.5, "mixtral", 8, 2
        )
        gpu = config.GPUConfig("h100", 80, 3350, 450, 1e-5, 989.4)
        ways = config.ParallelismConfig(8, 1, 1, 1)
        analysis = LLMAnalysis(
            model, gpu, config.DtypeConfig(), ways, flops_efficiency=1, hbm_memory_efficiency=1
        )
        return float(analysis.inference(BATCH, CONTEXT, 1)["decode_latency"])

    def trained() -> Mapping[str, float]:
        model = config.ModelConfig("llama", 80, 64, 8192, 128256, SEQUENCE, 8, None, None, 3.5, "llama")
        gpu = config.GPUConfig("a100", 80, 2039, 300, 1e-5, 312)
        ways = config.ParallelismConfig(8, 8, 1, 1)
        analysis = LLMAnalysis(
            model, gpu, config.DtypeConfig(), ways, flops_efficiency=1, hbm_memory_efficiency=1
        )
        found: Mapping[str, float] = analysis.training(
            batch_size_per_gpu=1,
            gradient_accumulation_steps=MICROBATCHES,
            seq_len=SEQUENCE,
            activation_recomputation=ActivationRecomputation.FULL,
        )
        return found

    return {
        DECODE: decoding,
        STEP: lambda: float(trained()["latency_per_iter"]),
        MEMORY: lambda: float(trained()["(weight+op_state+grad+act)_memory_per_gpu"]),
    }


PROGRAMS: Mapping[str, Program] = {OURS: _ours, LLM_FLOPS: _llm_flops, LLM_ANALYSIS: _llm_analysis}
