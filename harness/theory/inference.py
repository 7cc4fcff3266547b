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
    "mixed_times",
    "phase_rates",
    "pipeline_times",
    "prefill",
    "pricer",
    "request",
    "request_mfu",
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
    return Pipelined(latency, slowest, period, through, whole.routed / period)


def mixed_times(priced: Pricer, decoding: Pass, prompts: Pass, each: Any, microbatches: Any = 1) -> Pipelined:
    """The same where `prompts`, `each` of a rank, join sequences that decode in all m microbatches.

    Sequences divide a batch, and nothing divides a prompt: it goes through all stages in one microbatch, so
    that k = min(m, max(1, each)) of them hold prompts beside their share of the decoding. Latency, slowest
    stage and `all_through` (prompts that begin together) are of these k; in a period a stage serves all m.
    Passes are in step, as a simulated server's: microbatches without a prompt wait for those that hold one,
    where an engine that lets them overtake would not, so that the period is an upper bound.
    """
    holding = least(most(each, 1), microbatches)
    plain = decoding.divided(microbatches)
    fuller = plain + prompts.divided(holding)
    latency, slowest = priced.of(fuller), priced.slowest_stage(fuller)
    others = (microbatches - holding) * priced.slowest_stage(plain)
    period = most(latency, holding * slowest + others)
    through = latency + (holding - 1) * slowest
    return Pipelined(latency, slowest, period, through, (decoding.routed + prompts.routed) / period)


@dataclass(frozen=True)
class Request:
    """What its user sees, and what the devices yield."""

    ttft: Any
    """Time to first token without waiting for a slot, of the last of the requests that begin together."""
    tpot: Any
    """Time per output token after the first."""
    tokens_per_second: Any
    """Output tokens of all sequences together."""
    filling: Any
    """Of the B / tokens_per_second seconds that an output token of each sequence takes, those for prompts."""

    @property
    def tokens_per_second_per_user(self) -> Any:
        """1 / TPOT."""
        return 1 / self.tpot


def request(priced: Pricer, batch: Any, prompt: Any, output: Any, microbatches: Any = 1) -> Request:
    """A static batch: B prompts prefilled at once, then N - 1 decode steps of all of them.

    Step i of 1 .. N - 1 finds S + i - 1 cached tokens; it is priced at their mean, S + N / 2 - 1: its time is
    linear in them but where a class changes its bound. Of microbatches there are no more than sequences of a
    rank, here and below.
    """
    ranks, microbatches = _divided(priced, batch, microbatches)
    inward = prefill(priced.architecture, batch, prompt).spread(batch, ranks)
    first = pipeline_times(priced, inward, microbatches).all_through
    steps = most(output - 1, 0)
    cached = prompt + most(output / 2 - 1, 0)
    outward = decode(priced.architecture, batch, cached).spread(batch, ranks)
    tpot = pipeline_times(priced, outward, microbatches).period
    return Request(first, tpot, batch * output / (first + steps * tpot), first / output)


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

      even      TPOT = t(decode + r prompt tokens), in chunks; the first token after the max(1, m N / b)
                passes over which a prompt is spread
      whole     where r is less than d prompts, b / N of the passes carry one for each rank: TPOT is the mean,
                TTFT the pass with prompts; else all carry b / N
      separate  TPOT = t(decode) + b / N t(a prompt for each rank), TTFT = t(prompts), or all b / N of a pass

    with b = max(1, B / d) sequences on the busiest of d data-parallel ranks, each of which reads prompts of
    its own: no prompt is divided over them, nor over microbatches, unless in chunks that need what their
    stage kept of the last (`even`);

    so that TPOT grows by S / N times the time of a prefilled token on top of the decode step's, and with it
    the price of prompts is paid in latency. Stages see the microbatches of `pipeline_times`, and with whole
    prompts those of `mixed_times`: TTFT is until all prompts that join a pass are through, TPOT its period.
    """
    architecture = priced.architecture
    ranks, microbatches = _divided(priced, batch, microbatches)
    begin = batch / output
    decoding = decode(architecture, batch - begin, prompt + most(output / 2 - 1, 0)).spread(batch, ranks)
    alone = pipeline_times(priced, decoding, microbatches).period
    busy = least(most(batch, 1), ranks)
    each = batch / (busy * output)
    carrying, each = least(each, 1), most(each, 1)
    joined = prefill(architecture, busy * each, prompt).spread(busy, ranks)
    if mixing == "even":
        chunked = prefill(architecture, begin, prompt).spread(batch, ranks)
        mixed = pipeline_times(priced, decoding + chunked, microbatches)
        tpot = mixed.period
        ttft = (most(microbatches * output * busy / batch, 1) - 1) * tpot + mixed.all_through
    elif mixing == "whole":
        mixed = mixed_times(priced, decoding, joined, each, microbatches)
        ttft = mixed.all_through
        tpot = carrying * mixed.period + (1 - carrying) * alone
    elif mixing == "separate":
        apart = mixed_times(priced, NOTHING, joined, each, least(microbatches, each))
        ttft = apart.all_through
        tpot = alone + carrying * apart.period
    else:
        raise ValueError(f'no mixing "{mixing}"; there are even, whole and separate')
    return Request(ttft, tpot, batch / tpot, tpot - alone)


def _divided(priced: Pricer, batch: Any, microbatches: Any) -> tuple[Any, Any]:
    """Data-parallel ranks, and microbatches of the busiest one: a sequence or more in each."""
    ranks = priced.layout.data_parallel
    return ranks, least(microbatches, most(batch / ranks, 1))


def phase_rates(
    priced: Pricer, batch: Any, prompt: Any, output: Any, microbatches: Any = 1
) -> tuple[Any, Any]:
    """Tokens per second of each phase alone: of B prompts prefilled without end, and of B sequences decoded.

    What input and output tokens cost is the rent over these (`serving.cost_of_request`).
    """
    ranks, microbatches = _divided(priced, batch, microbatches)
    inward = prefill(priced.architecture, batch, prompt).spread(batch, ranks)
    outward = decode(priced.architecture, batch, prompt + most(output / 2 - 1, 0)).spread(batch, ranks)
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
    ranks, microbatches = _divided(priced, batch, microbatches)
    outward = decode(priced.architecture, batch, context).spread(batch, ranks)
    rate = pipeline_times(priced, outward, microbatches).tokens_per_second
    return _mfu(priced, per_token * rate)


def request_mfu(priced: Pricer, prompt: int, output: int, tokens_per_second: Any) -> Any:
    """The same of whole requests: for each N output tokens the FLOP of a prompt and of N - 1 decode steps."""
    model, latent = priced.architecture, priced.architecture.attention.mla is not None
    inward = flops.forward_total(
        model, 1, prompt, attention="causal", logits="last", mla="recomputed" if latent else "expanded"
    )
    middle = prompt + max(output // 2 - 1, 0)
    outward = flops.forward_total(
        model, 1, 1, cached=middle, attention="causal", mla="absorbed" if latent else "expanded"
    )
    return _mfu(priced, (inward + (output - 1) * outward) * tokens_per_second / output)


def _mfu(priced: Pricer, flops_per_second: Any) -> Any:
    """Of the peak of all devices."""
    peak = priced.hardware.peak_flops(priced.precision.multiplied)
    return flops_per_second / (priced.layout.devices * peak)
