"""How long requests take: passes, their times on a layout, pipelines, and batches that never run dry.

Letters: B sequences on all data-parallel ranks together, S prompt tokens, N output tokens of a request, p
pipeline stages, m microbatches. Seconds throughout; numbers may be arrays that broadcast. Passes are
described in `harness.theory.passes`, their prices in `harness.theory.roofline`; how large a batch fits in
memory, in `harness.theory.fitting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from harness.theory import flops
from harness.theory.passes import NOTHING, Pass, chunks, decode, prefill
from harness.theory.roofline import BOUNDS, Bound, Pricer, Step, pricer
from harness.theory.sharding import least, most

__all__ = [
    "BOUNDS",
    "NOTHING",
    "Bound",
    "Mixing",
    "Pass",
    "Pipelined",
    "Pricer",
    "Request",
    "Step",
    "chunks",
    "decode",
    "decode_mfu",
    "phase_rates",
    "pipeline_times",
    "prefill",
    "pricer",
    "request",
    "steady_state",
]

Mixing = Literal["even", "whole", "separate"]
"""How prompts join a running batch: cut into chunks that every pass carries alike (SARATHI, arXiv
2308.16369), whole beside a decode step (Orca, Yu et al. 2022, OSDI, section 3), or in passes of their own."""


@dataclass(frozen=True)
class Pipelined:
    """Passes that follow one another through the stages of a pipeline."""

    latency: Any
    """One microbatch through all stages."""
    slowest: Any
    """One microbatch in the slowest stage."""
    period: Any
    """From one pass of a microbatch to its next: what a token waits for."""
    all_through: Any
    """Until the last of the microbatches has left the last stage: what a prompt waits for."""
    tokens_per_second: Any
    """Of all microbatches together, in steady state."""


def pipeline_times(priced: Pricer, whole: Pass, microbatches: Any = 1) -> Pipelined:
    """A pass over the whole batch, divided into m microbatches that follow one another through p stages.

    A sequence's next token needs its last one, so that a microbatch comes round no sooner than its own
    latency; and the slowest stage serves all m of them in between: period = max(latency, m slowest), with
    m >= p and equal stages all of them are busy. Once, without a next round: latency + (m - 1) slowest.
    """
    part = whole.divided(microbatches)
    latency, slowest = priced.of(part), priced.slowest_stage(part)
    period = most(latency, microbatches * slowest)
    through = latency + (microbatches - 1) * slowest
    return Pipelined(latency, slowest, period, through, whole.tokens / period)


@dataclass(frozen=True)
class Request:
    """What its user sees, and what the devices yield."""

    ttft: Any
    """Time to first token, of a request that need not wait for a slot."""
    tpot: Any
    """Time per output token after the first."""
    tokens_per_second: Any
    """Output tokens of all sequences together."""

    @property
    def tokens_per_second_per_user(self) -> Any:
        """1 / TPOT."""
        return 1 / self.tpot


def request(priced: Pricer, batch: Any, prompt: Any, output: Any, microbatches: Any = 1) -> Request:
    """A static batch: B prompts prefilled at once, then N - 1 decode steps of all of them.

    Step i of 1 .. N - 1 finds S + i - 1 cached tokens; it is priced at their mean, S + N / 2 - 1: its time is
    linear in them but where a class changes its bound.
    """
    first = pipeline_times(priced, prefill(priced.architecture, batch, prompt), microbatches).all_through
    steps = most(output - 1, 0)
    cached = prompt + most(output / 2 - 1, 0)
    tpot = pipeline_times(priced, decode(priced.architecture, batch, cached), microbatches).period
    return Request(first, tpot, batch * output / (first + steps * tpot))


def steady_state(
    priced: Pricer,
    batch: Any,
    prompt: Any,
    output: Any,
    microbatches: Any = 1,
    mixing: Mixing = "even",
) -> Request:
    """Continuous batching at B slots that never run dry, each ended sequence replaced by a prompt.

    A request yields N tokens, the first with the last pass of its prompt. If its prompt takes one pass, it
    holds its slot for N passes, so that B / N requests end, and as many begin, in each: a pass decodes
    B (N - 1) / N tokens and prefills r = B S / N, and yields B. Per yielded token of a sequence,

      even      TPOT = t(decode + r prompt tokens), in chunks; the first token after the max(1, d N / B)
                passes over which a prompt is spread
      whole     where r is less than d prompts, B / (d N) of the passes carry d whole ones: TPOT is the mean,
                TTFT the pass with prompts; else as even
      separate  TPOT = t(decode) + B / (d N) t(d prompts), TTFT = t(d prompts), or all B / N of a pass

    with d data-parallel ranks, each of which reads prompts of its own: no prompt is divided over them;

    so that TPOT grows by S / N times the time of a prefilled token on top of the decode step's, and with it
    the price of prompts is paid in latency. Stages see the microbatches of `pipeline_times`: a prompt, too,
    is divided into m that follow one another (its chunks can: each needs what its stage kept of the last).
    """
    architecture = priced.architecture
    begin = batch / output
    decoding = decode(architecture, batch - begin, prompt + most(output / 2 - 1, 0))

    def period(one: Pass) -> Any:
        return pipeline_times(priced, one, microbatches).period

    ranks = priced.layout.data_parallel
    joined = prefill(architecture, most(begin, ranks), prompt)
    carrying = least(begin / ranks, 1)
    if mixing == "even":
        tpot = period(decoding + prefill(architecture, begin, prompt))
        ttft = most(ranks * output / batch, 1) * tpot
    elif mixing == "whole":
        ttft = period(decoding + joined)
        tpot = carrying * ttft + (1 - carrying) * period(decoding)
    elif mixing == "separate":
        ttft = period(joined)
        tpot = period(decoding) + carrying * ttft
    else:
        raise ValueError(f'no mixing "{mixing}"; there are even, whole and separate')
    return Request(ttft, tpot, batch / tpot)


def phase_rates(
    priced: Pricer, batch: Any, prompt: Any, output: Any, microbatches: Any = 1
) -> tuple[Any, Any]:
    """Tokens per second of each phase alone: of B prompts prefilled without end, and of B sequences decoded.

    What input and output tokens cost is the rent over these (`serving.cost_of_request`).
    """
    inward = prefill(priced.architecture, batch, prompt)
    outward = decode(priced.architecture, batch, prompt + most(output / 2 - 1, 0))
    return (
        pipeline_times(priced, inward, microbatches).tokens_per_second,
        pipeline_times(priced, outward, microbatches).tokens_per_second,
    )


def decode_mfu(priced: Pricer, batch: Any, context: int, microbatches: Any = 1) -> Any:
    """Model FLOPs utilisation of decoding: `flops.forward_per_token` of the causal mask, of all tokens per
    second, over the peak FLOP/s of all devices (PaLM, arXiv 2204.02311, appendix B, with the forward pass
    alone)."""
    mla: flops.LatentAttention = "absorbed" if priced.architecture.attention.mla else "expanded"
    per_token = flops.forward_per_token(priced.architecture, context + 1, attention="causal", mla=mla)
    rate = pipeline_times(priced, decode(priced.architecture, batch, context), microbatches).tokens_per_second
    peak = priced.hardware.peak_flops(priced.precision.multiplied)
    return per_token * rate / (priced.layout.devices * peak)
