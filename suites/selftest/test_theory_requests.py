"""How long requests take, in pipelines and in batches that never run dry; and what others printed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec import load
from harness.spec.hardware import Hardware, load_hardware
from harness.theory import flops, parameters
from harness.theory.inference import (
    NOTHING,
    Mixing,
    Pass,
    Pricer,
    decode,
    decode_mfu,
    mixed_times,
    phase_rates,
    pipeline_times,
    prefill,
    pricer,
    request,
    request_mfu,
    steady_state,
)
from harness.theory.layout import Layout
from harness.theory.precision import precision

EXACT = 1e-9
"""Relative: the same sums in another order."""


def priced(name: str, hardware: str = "h100", form: str = "bfloat16", **ways: Any) -> Pricer:
    """A pricer at the data sheet's rates."""
    return pricer(load(name).architecture, load_hardware(hardware), Layout(**ways), precision(form))


def without_links(one: Pricer, pass_: Pass) -> float:
    """Milliseconds of a pass, communication left out."""
    step = one.step(pass_)
    return 1e3 * float(step.seconds - step.communication)


@pytest.mark.parametrize("stages", [1, 4, 16])
@pytest.mark.parametrize("microbatches", [1, 4, 16, 40])
def test_pipelines_keep_their_slowest_stage_busy(stages: int, microbatches: int) -> None:
    """A period is no shorter than a microbatch's latency, nor than all of them in the slowest stage.

    With one stage nothing overlaps.
    """
    one = priced("llama-3.1-405b", tensor_parallel=8, pipeline_parallel=stages)
    whole = decode(one.architecture, 640, 2000)
    found = pipeline_times(one, whole, microbatches)
    part = whole.divided(microbatches)
    assert found.latency == pytest.approx(one.of(part))
    assert found.period == max(found.latency, microbatches * found.slowest)
    assert found.tokens_per_second == pytest.approx(640 / found.period)
    assert found.latency <= found.all_through <= microbatches * found.latency * (1 + EXACT)
    # Stages together do what the pass does, hand-overs apart: the slowest has at least its share.
    handed = one.links.handovers[0] + part.tokens * one.links.handovers[1]
    assert stages * found.slowest >= (found.latency - handed) * (1 - EXACT)
    # Equal microbatches through one stage of the slowest's time and the others: each starts when the stage
    # and its own last stage have ended.
    rest = (found.latency - found.slowest) / max(stages - 1, 1)
    ends = [0.0] * microbatches
    for stage in range(stages):
        free = 0.0
        for i in range(microbatches):
            free = ends[i] = max(free, ends[i]) + (rest if stage < stages - 1 else found.slowest)
    assert found.all_through == pytest.approx(ends[-1], rel=1e-6)  # rest, with hand-overs, may be the slower
    if stages == 1:
        assert found.period == pytest.approx(microbatches * found.latency)


def test_a_steady_batch_is_its_passes_played_out() -> None:
    """With 8 slots and 4 tokens each, 2 prompts join every pass; played out, it takes TPOT and yields 8."""
    one, batch, prompt, output = priced("llama-3.1-8b"), 8, 300, 4
    model = one.architecture
    decoding = sum((decode(model, 2, prompt + done) for done in range(output - 1)), NOTHING)
    played = one.of(decoding + prefill(model, 2, prompt))
    for mixing in ("even", "whole"):
        found = steady_state(one, batch, prompt, output, mixing=mixing)
        assert found.tpot == pytest.approx(played, rel=EXACT)
        assert found.tokens_per_second == pytest.approx(batch / played, rel=EXACT)
        assert found.ttft == found.tpot  # two prompts end with every pass
    seldom = {mixing: steady_state(one, 2, prompt, 10, mixing=mixing) for mixing in ("even", "whole")}
    assert seldom["even"].ttft == pytest.approx(5 * seldom["even"].tpot)  # a fifth of a prompt in each pass
    assert seldom["whole"].tpot < seldom["whole"].ttft < 5 * seldom["even"].tpot
    apart = steady_state(one, batch, prompt, output, mixing="separate")
    assert apart.tpot == pytest.approx(one.of(decoding) + one.of(prefill(model, 2, prompt)), rel=EXACT)


@given(st.integers(1, 200), st.integers(1, 3000), st.integers(1, 2000))
def test_mixing_prompts_in_evenly_is_fastest(batch: int, prompt: int, output: int) -> None:
    """On one device, a dense model's TPOT is least with even chunks and largest with passes apart.

    It nears the decode step's for long outputs.
    """
    one = priced("llama-3.1-8b")
    modes: tuple[Mixing, ...] = ("even", "whole", "separate")
    even, whole, apart = (steady_state(one, batch, prompt, output, mixing=mixing) for mixing in modes)
    slack = 1 + EXACT
    assert even.tpot <= whole.tpot * slack
    assert whole.tpot <= apart.tpot * slack
    forever = steady_state(one, batch, prompt, 10**9)
    step = one.of(decode(one.architecture, batch, prompt + 0.5e9))
    assert forever.tpot == pytest.approx(step, rel=1e-5)  # a prompt in a billion passes
    with pytest.raises(ValueError, match="no mixing"):
        steady_state(one, 1, 1, 1, mixing="never")  # type: ignore[arg-type]


def answers(one: Pricer, batch: int, prompt: int = 1000, output: int = 100) -> list[float]:
    """TTFT and TPOT of a static batch, and of steady ones under every mixing."""
    modes: tuple[Mixing, ...] = ("even", "whole", "separate")
    stages = one.layout.pipeline_parallel
    found = [request(one, batch, prompt, output, stages)]
    found += [steady_state(one, batch, prompt, output, stages, mixing) for mixing in modes]
    return [float(value) for each in found for value in (each.ttft, each.tpot)]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-70b", "gpt-oss-20b", "deepseek-v3"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_request_is_not_divided_over_data_parallel_ranks(name: str, stages: int) -> None:
    """Alone, or with no more of them than ranks, requests wait as long as a lone one on one rank.

    No expert is shared between ranks here: those that are see the tokens of all.
    """
    ways: dict[str, Any] = {"tensor_parallel": 8, "pipeline_parallel": stages}
    alone = answers(priced(name, "h200", **ways), 1)
    for ranks in (2, 8):
        one = priced(name, "h200", data_parallel=ranks, **ways)
        for batch in (1, 2, ranks):
            if batch <= ranks:
                assert answers(one, batch) == pytest.approx(alone, rel=EXACT)


def test_ranks_that_share_experts_send_them_what_there_is() -> None:
    """A token on one of 8 ranks touches the experts of a token; idle ranks add nothing to their load."""
    one = priced("deepseek-v3", "h200", data_parallel=8, expert_parallel=8)
    lone = decode(one.architecture, 1, 500).spread(1, 8)
    assert (lone.tokens, lone.routed) == (8, 1)
    assert one.classes(lone)[1] == one._experts(1)
    assert one.classes(lone)[0] == priced("deepseek-v3", "h200").classes(decode(one.architecture, 1, 500))[0]
    both = lone + prefill(one.architecture, 3, 100).spread(3, 8)
    assert both.routed == pytest.approx(301)
    assert both.divided(2).routed == pytest.approx(150.5)
    assert both.tokens == pytest.approx(8 + 800)  # as if every rank had a prompt and a token


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-70b", "gpt-oss-20b"])
def test_more_ranks_never_slow_a_batch(name: str) -> None:
    """A fixed batch on more data-parallel ranks waits no longer for tokens, at any size."""
    for batch in (1, 3, 8, 100, 4096):
        found = [answers(priced(name, tensor_parallel=8, data_parallel=n), batch)[1::2] for n in (1, 2, 4, 8)]
        for fewer, more in itertools.pairwise(found):
            assert all(b <= a * (1 + EXACT) for a, b in zip(fewer, more, strict=True))


@pytest.mark.parametrize("stages", [1, 2, 8])
@pytest.mark.parametrize("output", [1, 2, 256])
def test_a_prompt_is_not_divided_over_a_pipeline(stages: int, output: int) -> None:
    """No batch has its first token before a whole prompt is through, nor earlier than a smaller batch."""
    one = priced("mixtral-8x7b", tensor_parallel=8 // stages, pipeline_parallel=stages)
    modes: tuple[Mixing, ...] = ("whole", "separate")
    for mixing in modes:
        batches = (1, 2, 3, 5, 8, 16, 40, 64, 100, 256, 1000, 4096)
        first = [steady_state(one, n, 2048, output, stages, mixing).ttft for n in batches]
        assert first[0] >= one.of(prefill(one.architecture, 1, 2048)) * (1 - EXACT)
        assert all(b >= a * (1 - EXACT) for a, b in itertools.pairwise(first))
    static = [request(one, n, 2048, output, stages).ttft for n in batches]
    assert all(b >= a * (1 - EXACT) for a, b in itertools.pairwise(static))


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 64))
def test_prompts_lie_in_as_many_microbatches_as_there_are(m: int, sequences: int, prompts: int) -> None:
    """With one in each it is the pass divided; with fewer some are plain, and a stage serves both."""
    one = priced("llama-3.1-70b", tensor_parallel=2, pipeline_parallel=4)
    decoding, reading = decode(one.architecture, sequences, 700), prefill(one.architecture, prompts, 300)
    found = mixed_times(one, decoding, reading, prompts, m)
    if prompts >= m:
        whole = pipeline_times(one, decoding + reading, m)
        assert found.period == pytest.approx(whole.period, rel=EXACT)
        assert found.all_through == pytest.approx(whole.all_through, rel=EXACT)
    else:
        plain = decoding.divided(m)
        fuller = plain + prefill(one.architecture, 1, 300)
        served = prompts * one.slowest_stage(fuller) + (m - prompts) * one.slowest_stage(plain)
        assert found.period == pytest.approx(max(one.of(fuller), served), rel=EXACT)
    assert found.tokens_per_second == pytest.approx((sequences + 300 * prompts) / found.period, rel=EXACT)


def test_prompts_take_what_they_add_to_passes() -> None:
    """Without them a token would take `filling` less; of a static batch it is the prefill."""
    one = priced("llama-3.1-8b")
    for mixing in ("even", "whole", "separate"):
        found = steady_state(one, 64, 1000, 100, mixing=mixing)
        step = one.of(decode(one.architecture, 64 - 0.64, 1000 + 49))
        assert found.tpot - found.filling == pytest.approx(step, rel=EXACT)
    static = request(one, 64, 1000, 100)
    assert 64 / static.tokens_per_second - static.filling == pytest.approx(0.99 * static.tpot, rel=EXACT)


def test_utilisation_of_requests_is_of_all_their_flops() -> None:
    """MFU of prompts and answers lies between those of the phases, and nears the prompts' for long ones."""
    one = priced("llama-3.1-8b")
    found = steady_state(one, 64, 1000, 100)
    mfu = request_mfu(one, 1000, 100, found.tokens_per_second)
    played = sum(
        flops.forward_total(one.architecture, 1, 1, cached=1000 + i, attention="causal") for i in range(99)
    )
    played += flops.forward_total(one.architecture, 1, 1000, attention="causal", logits="last")
    peak = one.hardware.peak_flops("bfloat16")
    assert mfu == pytest.approx(
        played * found.tokens_per_second / 100 / peak, rel=1e-5
    )  # steps at their middle
    assert decode_mfu(one, 64, 1050) < mfu < 1
    long = steady_state(one, 64, 8000, 1)
    assert request_mfu(one, 8000, 1, long.tokens_per_second) > 0.95


def test_a_static_batch_is_its_steps_played_out() -> None:
    """TTFT is the prefill; the tokens of all steps, each at its own context, take what the mean step says."""
    one, batch, prompt, output = priced("llama-3.1-8b"), 16, 500, 100
    model = one.architecture
    found = request(one, batch, prompt, output)
    steps = [one.of(decode(model, batch, prompt + done)) for done in range(output - 1)]
    first = one.of(prefill(model, batch, prompt))
    assert found.ttft == pytest.approx(first)
    assert batch * output / found.tokens_per_second == pytest.approx(first + sum(steps), rel=EXACT)
    assert found.tokens_per_second_per_user == pytest.approx(1 / found.tpot)


def test_decode_utilisation_is_of_the_models_flops() -> None:
    """MFU on one device at a huge batch is near 1, and that of p stages needs p microbatches."""
    assert 0.9 < decode_mfu(priced("llama-3.1-8b"), 10**6, 1) < 1
    one = priced("llama-3.1-405b", tensor_parallel=8, pipeline_parallel=4)
    alone, filled = (decode_mfu(one, 256, 1000, microbatches) for microbatches in (1, 4))
    assert alone < filled < 4 * alone


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-70b", "deepseek-v3"])
def test_input_tokens_cost_less_than_output_tokens(name: str) -> None:
    """Prefill yields more tokens per second than decoding at any batch, most of all at one sequence."""
    one = priced(name, "h200", tensor_parallel=8)
    ratios = []
    for batch in (1, 32, 1024):
        inward, outward = phase_rates(one, batch, 2048, 256)
        assert inward > outward
        ratios.append(inward / outward)
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-70b"])
def test_time_on_links_falls_slower_than_the_ranks_grow(name: str) -> None:
    """Twice the tensor ranks take less than half off the time on links, and each is busy for less of it."""
    steps = []
    for ways in (2, 4, 8, 16):
        one = priced(name, tensor_parallel=ways)
        steps.append(one.step(decode(one.architecture, 64, 2048)))
    for fewer, more in itertools.pairwise(steps):
        assert more.communication > fewer.communication / 2
        assert more.utilisation < fewer.utilisation


PUBLISHED_MIXTRAL = {1: 0.962, 8: 3.224, 32: 3.816, 128: 4.838}


@pytest.mark.parametrize("batch", PUBLISHED_MIXTRAL)
def test_mixtral_decodes_as_a_roofline_with_distinct_experts(batch: int) -> None:
    """Mixtral on 8 H100 at 2048 + 128 tokens: milliseconds of the roofline without links, to their digits."""
    one = priced("mixtral-8x7b", tensor_parallel=8)
    found = without_links(one, decode(one.architecture, batch, 2048 + 128))
    assert found == pytest.approx(PUBLISHED_MIXTRAL[batch], abs=1e-3)  # printed to 0.001


def test_llama_on_a100_is_near_another_speed_of_light() -> None:
    """Llama-70B on 8 A100, one prompt of 2048: aiconfigurator's SOL mode says 158.5 and 8.59 ms."""
    one = priced("llama-3.1-70b", "a100-80gb", tensor_parallel=8)
    assert without_links(one, decode(one.architecture, 1, 2048)) == pytest.approx(8.59, rel=0.01)
    # Its prefill has communication; ours by the fastest algorithm at the full rate.
    assert 1e3 * one.of(prefill(one.architecture, 1, 2048)) == pytest.approx(158.5, rel=0.03)


POPE_TABLE_2 = (
    ("int8", "prefill", 1, 0.29, 0.43),
    ("int8", "decode", 64, 1.82, 0.14),
    ("bfloat16", "prefill", 512, 85.2, 0.76),
    ("bfloat16", "decode", 512, 6.0, 0.33),
)
"""PaLM 540B on 64 TPU v4, 2048 in and 64 out: weights, phase, batch, seconds, MFU (arXiv 2211.05102)."""


@pytest.mark.parametrize(("form", "phase", "batch", "seconds", "mfu"), POPE_TABLE_2)
def test_no_published_palm_run_beats_the_roofline(
    form: str, phase: str, batch: int, seconds: float, mfu: float
) -> None:
    """Work on 64 chips over the printed time is the printed MFU, and the roofline's time is below it."""
    hardware: Hardware = load_hardware("tpu-v4")
    model = load("palm-540b").architecture
    # int8 weights, multiplied in bfloat16; activations batch-sharded as by data parallelism, weights divided.
    used = precision("bfloat16" if form == "bfloat16" else "int8-weights")
    one = pricer(model, hardware, Layout(tensor_parallel=16, pipeline_parallel=4), used)
    pass_ = prefill(model, batch, 2048) if phase == "prefill" else decode(model, batch, 2048 + 32)
    steps = 1 if phase == "prefill" else 64
    per_token = 2 * parameters.active(model)
    implied = steps * per_token * pass_.tokens / (64 * hardware.peak_flops("bfloat16") * seconds)
    assert implied == pytest.approx(mfu, abs=0.02)  # printed to 0.01, of a time printed to two digits
    read = replace(one, links=replace(one.links, reductions=((0.0, 0.0),), handovers=(0.0, 0.0))).of(pass_)
    assert steps * read / 4 < seconds
