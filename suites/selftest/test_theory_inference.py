"""Passes and their prices: limits, monotonicity, conservation over ranks, arrays in place of numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec import Architecture, SpecError, load
from harness.spec.hardware import load_hardware
from harness.theory import flops, memory, parameters, serving
from harness.theory.collectives import on_islands, place
from harness.theory.efficiency import Efficiency
from harness.theory.inference import (
    BOUNDS,
    NOTHING,
    Pass,
    Pricer,
    chunks,
    decode,
    prefill,
    pricer,
)
from harness.theory.layout import Layout
from harness.theory.precision import precision
from harness.theory.roofline import Step

SPECS = (
    "mixtral-8x7b",
    "llama-3.1-70b",
    "deepseek-v3",
    "gpt-oss-20b",
    "palm-540b",
    "olmoe-1b-7b",
    "gpt3-175b",
)
EXACT = 1e-9
"""Relative: the same sums in another order."""


def architecture(name: str) -> Architecture:
    """That of a shipped spec."""
    return load(name).architecture


def priced(
    name: str, hardware: str = "h100", form: str = "bfloat16", skew: float = 0.0, **ways: Any
) -> Pricer:
    """A pricer at the data sheet's rates."""
    return pricer(architecture(name), load_hardware(hardware), Layout(**ways), precision(form), skew=skew)


def without_links(one: Pricer, pass_: Pass) -> float:
    """Milliseconds of a pass, communication left out."""
    step = one.step(pass_)
    return 1e3 * float(step.seconds - step.communication)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [1, 100, 999, 5000])
def test_chunks_add_up_to_their_prefill(name: str, chunk: int) -> None:
    """Tokens and pairs of a prompt in chunks are those of the whole; each chunk reads the cache once."""
    model, prompt = architecture(name), 999
    whole, parts = prefill(model, 1, prompt), list(chunks(model, prompt, chunk))
    together = sum(parts, NOTHING)
    for count in ("tokens", "pairs", "window_pairs"):
        assert getattr(together, count) == getattr(whole, count)
    assert together.sequences == len(parts) == -(-prompt // chunk)
    assert together.cached == sum(range(0, prompt, chunk))


@pytest.mark.parametrize("name", SPECS)
def test_a_pass_counts_the_pairs_of_its_masks(name: str) -> None:
    """Decoding and prefilling several tokens after a cache admit the same pairs, as flops counts them."""
    model = architecture(name)
    window = model.attention.window
    for cached, new in ((0, 7), (100, 1), (500, 3)):
        one, other = decode(model, 2, cached, new), prefill(model, 2, new, cached)
        assert one.pairs == other.pairs == 2 * flops.admitted_pairs(new, cached, None)
        assert one.window_pairs == other.window_pairs == 2 * flops.admitted_pairs(new, cached, window)
        assert (one.sequences, other.sequences) == (2 * new, 2)
    with pytest.raises(ValueError, match="chunk of 0"):
        list(chunks(model, 10, 0))


@pytest.mark.parametrize("name", SPECS)
def test_one_device_does_the_floating_point_operations_of_the_pass(name: str) -> None:
    """Work on a single device is that of `flops`: a prefill's with latents expanded, a decode's absorbed."""
    one = priced(name)
    model, peak = one.architecture, one.hardware.peak_flops("bfloat16")
    for cached in (0, 300):
        mla: flops.LatentAttention = "recomputed" if model.attention.mla else "expanded"
        expected = flops.forward_total(
            model, 3, 200, cached=cached, attention="causal", logits="last", mla=mla
        )
        assert one.step(prefill(model, 3, 200, cached)).work * peak == pytest.approx(expected, rel=EXACT)
    mla = "absorbed" if model.attention.mla else "expanded"
    expected = flops.forward_total(model, 5, 1, cached=700, attention="causal", mla=mla)
    assert one.step(decode(model, 5, 700)).work * peak == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "gpt-oss-20b", "deepseek-v3", "gpt3-175b"])
def test_one_sequence_reads_its_active_weights_and_its_cache(name: str) -> None:
    """On one device a token takes the bytes of the active matrices and of its cache, over bytes/s."""
    one, context = priced(name), 600
    model = one.architecture
    routers = parameters.part(model, "router.weight")
    weights = 2 * parameters.active(model, "matmul")
    # A window layer keeps W tokens, and reads or writes W of them too: W - 1 cached and the new one.
    kept = memory.kv_cache_bytes(model, context + 1, dtype="bfloat16")
    step = one.step(decode(model, 1, context))
    bandwidth = one.hardware.bandwidth.value
    assert step.weights == pytest.approx(weights / bandwidth, rel=EXACT)
    assert routers < weights
    if model.attention.mla is None:  # 128 heads share a latent: that is 242 FLOP per byte, just below a ridge
        assert step.cache == pytest.approx(kept / bandwidth, rel=EXACT)
    assert step.bound == "weights"
    assert step.seconds == pytest.approx(sum(getattr(step, bound) for bound in BOUNDS))


@pytest.mark.parametrize("name", SPECS)
def test_few_tokens_are_bound_by_weights_and_many_by_compute(name: str) -> None:
    """One sequence at no context leaves compute unused; ten million tokens, all of it used but by caches."""
    one = priced(name)
    assert one.step(decode(one.architecture, 1, 0)).bound == "weights"
    many = one.step(decode(one.architecture, 10**7, 0))
    assert many.bound == "compute"
    assert many.utilisation > 0.98  # writing each token's cache entry takes up to 1.6 % (OLMoE, multi-head)
    prompt = one.step(prefill(one.architecture, 8, 4096))
    assert prompt.bound == "compute"


@given(
    st.sampled_from(SPECS),
    st.integers(1, 4000),
    st.integers(0, 5000),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0.0, 0.8]),
)
def test_more_of_anything_takes_longer(name: str, batch: int, context: int, ways: int, skew: float) -> None:
    """A step's time grows with batch, context and tokens, and falls with the hardware's rates."""
    one = priced(name, skew=skew, tensor_parallel=ways)
    model = one.architecture
    seconds = one.of(decode(model, batch, context))
    slack = 1 - 1e-3  # the table of skewed routing is linear between points of a concave function
    assert one.of(decode(model, batch + 1, context)) >= seconds * (slack if skew else 1)
    assert one.of(decode(model, batch, context + 1)) >= seconds
    assert one.of(decode(model, batch, context, tokens=3)) >= seconds * (slack if skew else 1)
    slow = pricer(model, one.hardware, one.layout, one.precision, Efficiency(0.5, 0.5, 0.5), skew)
    latency = one.step(NOTHING).communication  # what no rate shortens
    pure = seconds - latency
    assert pure <= slow.of(decode(model, batch, context)) - latency <= 2 * pure * (1 + EXACT)


@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8-weights"])
def test_a_dense_step_turns_to_compute_at_the_ridge(form: str) -> None:
    """The matrices of a dense model leave the weights' bound at the batch that `serving` computes."""
    one, hardware = priced("llama-3.1-70b", form=form), load_hardware("h100")
    used = one.precision
    ridge = serving.compute_bound_batch(
        hardware.peak_flops(used.multiplied), hardware.bandwidth.value, {"bfloat16": 2}.get(form, 1)
    )
    (below, read), (above, _) = (
        (one.matrices_token * batch, one.matrices_read) for batch in (0.999 * ridge, 1.001 * ridge)
    )
    assert below < read < above


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x7b", "olmoe-1b-7b"])
@pytest.mark.parametrize("ways", [2, 4, 8])
def test_ranks_divide_the_work_and_the_bytes(name: str, ways: int) -> None:
    """Where every head can be divided, t ranks do the work of one together and read the same bytes."""
    one, several = priced(name), priced(name, tensor_parallel=ways)
    routers = 2 * parameters.part(one.architecture, "router.weight")
    for pass_ in (decode(one.architecture, 16, 500), prefill(one.architecture, 2, 900)):
        alone, together = one.step(pass_), several.step(pass_)
        # Routers are copied to every rank: that much work is done t times.
        again = (ways - 1) * routers * pass_.tokens / one.hardware.peak_flops("bfloat16")
        assert ways * together.work == pytest.approx(alone.work + again, rel=EXACT)
    for coefficient in ("cache_full", "logits_read", "expert_read", "pair_full"):
        assert ways * getattr(several, coefficient) == pytest.approx(getattr(one, coefficient), rel=EXACT)


def test_one_key_value_head_and_latents_are_copied() -> None:
    """Every tensor rank reads the whole cache of multi-query and latent attention; data ranks divide it."""
    for name in ("palm-540b", "deepseek-v3"):
        one, tensor, data = priced(name), priced(name, tensor_parallel=8), priced(name, data_parallel=8)
        assert tensor.cache_full == one.cache_full
        assert 8 * data.cache_full == pytest.approx(one.cache_full, rel=EXACT)


def test_expert_parallel_ranks_share_experts() -> None:
    """e ranks hold E / e experts each, read all of them at a large batch, and have the mean load.

    The busiest of them has more by the spread, or by the skew.
    """
    model = architecture("deepseek-v3")
    whole = priced("deepseek-v3", "h200", "fp8", data_parallel=32, expert_parallel=1)
    split = priced("deepseek-v3", "h200", "fp8", data_parallel=32, expert_parallel=32)
    assert split.held == 8
    assert split.copies == 1
    assert whole.copies == 32
    tokens = 65_536
    (computed, read), (_, all_read) = split._experts(tokens), whole._experts(tokens / 32)
    assert 32 * read == pytest.approx(all_read, rel=1e-6)  # all touched, but for 1e-9 of them
    even = tokens * 8 / 32 * split.expert_assignment
    assert even < computed < 1.02 * even  # sqrt(16,384) of 16,384, twice
    assert (
        priced("deepseek-v3", "h200", "fp8", data_parallel=32, expert_parallel=32, skew=1.0)._experts(tokens)[
            0
        ]
        > 2 * computed
    )
    assert split.step(decode(model, 4096, 1000)).communication > 0
    assert whole.step(decode(model, 4096, 1000)).communication == 0


def test_copies_of_the_experts_share_the_tokens() -> None:
    """Four data-parallel ranks with all experts each take a quarter of the tokens, and do as one does."""
    one, four = priced("mixtral-8x7b"), priced("mixtral-8x7b", data_parallel=4)
    for batch in (4, 64, 4000):
        alone, shared = (
            of.classes(decode(of.architecture, n, 100)) for of, n in ((one, batch), (four, 4 * batch))
        )
        for mine, theirs in zip(alone, shared, strict=True):
            assert mine == pytest.approx(theirs, rel=EXACT)


def test_nothing_is_sent_by_one_rank_and_less_by_a_parallel_block() -> None:
    """One rank sends nothing; PaLM's parallel block reduces once a layer, half as often as two in turn."""
    assert priced("palm-540b").step(decode(architecture("palm-540b"), 8, 100)).communication == 0
    model = architecture("palm-540b")
    serial = model.model_copy(update={"parallel_block": False})
    hardware, layout = load_hardware("h100"), Layout(tensor_parallel=8)
    times = [
        pricer(one, hardware, layout, precision("bfloat16")).step(decode(one, 8, 100)).communication
        for one in (model, serial)
    ]
    assert 2 * times[0] == pytest.approx(times[1], rel=EXACT)


@pytest.mark.parametrize("hardware", ["a100-80gb", "h100"])
@pytest.mark.parametrize("ways", [4, 8, 16, 32])
def test_all_reduces_take_their_fastest_algorithm(hardware: str, ways: int) -> None:
    """Two a layer: large ones as `collectives` says, small ones inside an island in one hop."""
    one = priced("llama-3.1-70b", hardware, tensor_parallel=ways)
    machine, layers = one.hardware, one.architecture.n_layers
    large = 10**6
    payload = large * one.architecture.d_model * 2
    each = on_islands("all-reduce", place(ways, 1, machine), payload, machine)
    assert one.links.seconds(large, min) == pytest.approx(2 * layers * each, rel=1e-6)  # slope from 1e9 bytes
    if ways <= machine.island:
        nothing = one.links.seconds(0, min)
        assert nothing == pytest.approx(2 * layers * machine.island_link.latency, rel=EXACT)


def test_tokens_are_sent_to_the_ranks_of_their_experts() -> None:
    """Dispatch sends a token once to every rank that holds one of its experts; combine brings it back."""
    one = priced("deepseek-v3", "h200", data_parallel=8, expert_parallel=8)
    model, per_rank = one.architecture, 1024
    assert model.moe is not None
    generator = np.random.default_rng(3)
    chosen = generator.random((20_000, model.moe.n_experts)).argpartition(8, axis=1)[:, :8] // 32
    ranks = np.array([len(set(token)) for token in chosen.tolist()]).mean()
    size = per_rank * ranks * 7 / 8 * model.d_model * 2
    link = one.hardware.island_link
    each = 2 * (link.latency + size / link.bandwidth)
    # 3 %: what drawing with replacement leaves out; the sample's own error is 0.2 %.
    assert one.links.seconds(8 * per_rank, min) == pytest.approx(58 * each, rel=0.03)


def test_context_ranks_divide_the_cache_and_pass_it_round() -> None:
    """c ranks read and multiply 1/c each, and send keys and values c - 1 times."""
    one, several = priced("llama-3.1-8b"), priced("llama-3.1-8b", context_parallel=4)
    for coefficient in ("cache_full", "pair_full", "matrices_token"):
        assert 4 * getattr(several, coefficient) == pytest.approx(getattr(one, coefficient), rel=EXACT)
    tokens, link = 4096, one.hardware.island_link
    entry = memory.kv_cache_bytes_per_token(one.architecture, "bfloat16")
    expected = 3 * (32 * link.latency + tokens / 4 * entry / link.bandwidth)
    assert several.links.seconds(tokens, min) == pytest.approx(expected, rel=EXACT)


ARRAYS = {
    "tensor_parallel": np.array([1, 2, 4, 8, 8, 16, 8, 1]),
    "pipeline_parallel": np.array([1, 2, 1, 4, 1, 1, 2, 1]),
    "data_parallel": np.array([1, 1, 2, 1, 4, 1, 8, 16]),
    "expert_parallel": np.array([1, 2, 8, 8, 16, 4, 1, 16]),
    "context_parallel": np.array([1, 1, 1, 2, 1, 1, 1, 2]),
}


@pytest.mark.parametrize("skew", [0.0, 0.9])
@pytest.mark.parametrize("name", ["deepseek-v3", "llama-3.1-70b", "qwen3-30b-a3b"])
def test_arrays_of_layouts_are_priced_like_each_of_them(name: str, skew: float) -> None:
    """A pricer over arrays gives, element by element, what a pricer of that layout gives."""
    moe = architecture(name).moe is not None
    arrays = {way: array for way, array in ARRAYS.items() if moe or way != "expert_parallel"}
    together = priced(name, skew=skew, **arrays)
    for pass_ in (decode(together.architecture, 64, 1000), prefill(together.architecture, 2, 500, 100)):
        found, stage = together.of(pass_), together.slowest_stage(pass_)
        step = together.step(pass_)
        for i in range(8):
            alone = priced(name, skew=skew, **{way: int(array[i]) for way, array in arrays.items()})
            assert found[i] == pytest.approx(alone.of(pass_), rel=EXACT)
            assert stage[i] == pytest.approx(alone.slowest_stage(pass_), rel=EXACT)
            for part in fields(Step):
                whole = np.broadcast_to(getattr(step, part.name), (8,))
                assert whole[i] == pytest.approx(getattr(alone.step(pass_), part.name), rel=EXACT)


def test_arrays_of_architectures_are_priced_like_each_of_them() -> None:
    """Completions of a spec with unknown dimensions are priced at once like one by one."""
    spec = load("gpt4-leak")
    unknowns: dict[str, Any] = {
        "d_model": np.array([10752.0, 12288.0]),
        "vocab_size": np.array([100352.0, 50304.0]),
        "attention.n_heads": np.array([96.0, 128.0]),
        "attention.head_dim": np.array([112.0, 96.0]),
        "attention.n_kv_heads": np.array([96.0, 1.0]),
        "moe.expert.gated": np.array([0.0, 1.0]),
        "moe.expert.d_ff": np.array([43008.0, 32768.0]),
    }
    assert set(unknowns) == {leaf.path for leaf in spec.unknowns}

    def times(i: int | slice) -> Any:
        chosen = {path: array[i] for path, array in unknowns.items()}
        model = spec.vectorised(chosen)
        one = pricer(model, load_hardware("h100"), Layout(8, 16), precision("float16"))
        return one.of(decode(model, 256, 2000) + prefill(model, 1, 500))

    together = times(slice(None))
    assert together.shape == (2,)
    assert together.tolist() == pytest.approx([float(times(0)), float(times(1))], rel=EXACT)


def test_arrays_of_batches_are_priced_like_each_of_them() -> None:
    """So does an array in a pass."""
    one = priced("mixtral-8x7b", tensor_parallel=8)
    batches = np.array([1.0, 8.0, 300.0])
    found = one.of(decode(one.architecture, batches, 100))
    assert found.tolist() == pytest.approx(
        [one.of(decode(one.architecture, b, 100)) for b in batches.tolist()]
    )


@given(st.sampled_from(SPECS), st.integers(1, 300), st.integers(0, 3000), st.integers(0, 700))
def test_four_counts_price_a_mixed_batch(name: str, batch: int, context: int, prompt: int) -> None:
    """`seconds` equals the time of the whole pass; windows at the mean are an upper bound."""
    one = priced(name, tensor_parallel=4)
    pass_ = decode(one.architecture, batch, context) + prefill(one.architecture, 1, prompt)
    found = one.seconds(pass_.tokens, pass_.sequences, pass_.cached, pass_.pairs)
    expected = one.step(pass_).seconds
    assert one.of(pass_) == pytest.approx(expected, rel=EXACT)
    if one.architecture.attention.window is not None:
        assert found >= expected * (1 - EXACT)
    elif one.architecture.attention.mla is not None:
        assert found == pytest.approx(expected, rel=1e-2)  # a decoded token's own pair is taken as expanded
    else:
        assert found == pytest.approx(expected, rel=EXACT)


def test_hardware_without_the_format_is_refused() -> None:
    """An A100 does not multiply FP8: the sentence says what it has."""
    with pytest.raises(SpecError, match="a100-80gb multiplies no fp8; it has"):
        priced("mixtral-8x7b", "a100-80gb", "fp8")
