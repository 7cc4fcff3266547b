"""The leak, worked: serving."""

from __future__ import annotations

from collections.abc import Iterator

from harness.spec import load
from harness.spec.architecture import Architecture
from harness.spec.hardware import load_hardware
from harness.theory import memory, parameters, pipeline, routing
from harness.theory import serving as theory
from harness.validation.shapes import gpt, leaked
from harness.validation.worked import Worked

TOTAL, GPUS, NODES, BATCH, CONTEXT = 1.8e12, 128, 16, 512, 2048
A100, H100 = "a100-80gb", "h100"


def serving() -> Iterator[Worked]:
    """Nodes, batches, caches, cost."""
    yield from _nodes()
    yield from _caches()
    yield from _cost()


def _nodes() -> Iterator[Worked]:
    each = theory.parameters_per_node(TOTAL, NODES)
    yield Worked("parameters of a node, 1.8e12 over 16", "112.5e9", each, "", "1.8e12 / 16")
    counted = parameters.by_component(leaked())
    whole = counted["experts.weights"] + counted["attention.projections"]
    node = theory.parameters_per_node(whole, NODES)
    yield Worked("parameters of a node, 1.83e12 over 16", "114e9", node, "", f"{whole:,} / 16")
    for width, gigabytes in ((2, "28.1"), (1, "14.1")):
        found = theory.weight_bytes_per_device(TOTAL, width, 8, NODES) / 1e9
        yield Worked(
            f"weights of a GPU in {8 * width} bits", gigabytes, found, "GB", f"1.8e12 x {width} / 128"
        )
    stated = theory.weight_bytes_per_device(130e9, 2, 8, 1) / 1e9
    yield Worked("weights of a GPU of 130e9 a node", "32.5", stated, "GB", "130e9 x 2 / 8, not under 30")
    yield Worked("nodes that 130e9 implies", "14", TOTAL / 130e9, "", "1.8e12 / 130e9, rounded")
    yield Worked("total that 130e9 implies", "2.08e12", 130e9 * NODES, "parameters", "130e9 x 16")
    yield Worked("layers of a node", "7.5", leaked().n_layers / NODES, "", "120 / 16: stages are uneven")
    found = routing.tokens_per_expert(4096, 16, 2)
    yield Worked("tokens of an expert in a batch of 4,096", "512", found, "tokens", "4,096 x 2 / 16")
    chunked = pipeline.bubble("interleaved", 15, 150, 8)
    yield Worked("bubble of 8 chunks and 150 microbatches", "0.0117", chunked, "of ideal", "14 / (8 x 150)")


def _caches() -> Iterator[Worked]:
    palm = load("palm-540b").architecture

    def terabytes(architecture: Architecture) -> float:
        return memory.kv_cache_bytes(architecture, CONTEXT, BATCH, "bfloat16") / 1e12

    def heads(architecture: Architecture, count: int, width: int) -> Architecture:
        changed = architecture.attention.model_copy(update={"n_kv_heads": count, "head_dim": width})
        return architecture.model_copy(update={"attention": changed})

    for width, size in ((256, "6.08"), (128, "3.04")):
        found = terabytes(heads(palm, palm.attention.n_heads, width))
        how = f"2 x {palm.n_layers} layers x 48 x {width} x 2,048 x 512 x 2 bytes"
        yield Worked(f"cache of PaLM, multi-head of {width}", size, found, "TB", how)
    eight = terabytes(heads(palm, palm.attention.n_heads, 256)) / 2
    yield Worked("the same with heads of 256, in 8 bits", "3", eight, "TB", "one byte in the place of two")
    many = terabytes(heads(palm, palm.attention.n_heads, 128))
    weights = memory.weight_bytes(palm, "bfloat16") / 1e12
    yield Worked("that cache over the weights", "2.8", many / weights, "x", f"{many:.3f} / {weights:.3f} TB")
    nlg = gpt(20480, 105, 128)
    yield Worked("cache of MT-NLG", "9.0", terabytes(nlg), "TB", "2 x 105 x 20,480 x 2,048 x 512 x 2 bytes")
    model = leaked()
    how = "2 x 120 x 10,752 x 2,048 x 512 x 2 bytes"
    yield Worked("cache of the leak's shape, multi-head", "5.4", terabytes(model), "TB", how)
    single = terabytes(leaked(heads=84, kv_heads=1))
    yield Worked("the same, multi-query", "0.064", single, "TB", "one head of 128")


def _cost() -> Iterator[Worked]:
    model = leaked()
    active = parameters.active_by_component(model)
    forward = 2 * (active["experts.weights"] + active["attention.projections"])
    a100, h100 = load_hardware(A100), load_hardware(H100)
    rate = theory.tokens_per_second_at_cost(GPUS, 1.0, 0.0049)
    yield Worked(
        "tokens/s at 0.0049 USD on A100 at 1 USD", "7,256", rate, "tokens/s", "128 x 1000 / (3600 x 0.0049)"
    )
    yield Worked("of a GPU", "56.7", rate / GPUS, "tokens/s", f"{rate:,.0f} / 128")
    cents = theory.tokens_per_second_at_cost(GPUS, 1.0, 0.0049 / 100)
    yield Worked("were they cents", "100", cents / rate, "x as many", f"{cents:,.0f} tokens/s")
    used = 100 * rate / theory.tokens_per_second_at_peak(forward, GPUS, a100.peak_flops("bfloat16"))
    yield Worked("utilisation there", "10", used, "%", f"{rate:,.0f} x {forward:.4g} / (128 x 312e12)")
    per_gpu = theory.weight_bytes_per_device(TOTAL, 2, 8, NODES)
    stage = per_gpu / a100.bandwidth.value
    yield Worked("reading a stage's weights", "13.8", 1e3 * stage, "ms", f"{per_gpu:.4g} bytes / 2.039e12")
    waiting = rate * stage
    yield Worked(
        "microbatch that rate wants", "100", waiting, "sequences", f"{rate:,.0f} x {1e3 * stage:.2f} ms"
    )
    yield Worked("sequences in flight", "1,600", waiting * NODES, "", f"{waiting:.1f} x 16 stages")
    user = 1 / (stage * NODES)
    yield Worked("tokens/s of a user", "4.5", user, "tokens/s", f"1 / (16 x {1e3 * stage:.2f} ms)")
    for price, shown, share in ((2.0, "33,862", "14.8"), (1.0, "16,931", "7.4")):
        rate = theory.tokens_per_second_at_cost(GPUS, price, 0.0021)
        how = f"128 x {price:g} x 1000 / (3600 x 0.0021)"
        yield Worked(f"tokens/s at 0.0021 USD on H100 at {price:g} USD", shown, rate, "tokens/s", how)
        used = 100 * rate / theory.tokens_per_second_at_peak(forward, GPUS, h100.peak_flops("bfloat16"))
        yield Worked("utilisation there", share, used, "%", f"{rate:,.0f} x {forward:.4g} / (128 x 989.4e12)")
    needed = TOTAL * 2 * 100 / 3 / 1e12
    yield Worked("dense 1.8e12 at 33.3 tokens/s", "120", needed, "TB/s", "3.6 TB x 33.3")
    yield Worked("what 8 H100 read", "26.8", 8 * h100.bandwidth.value / 1e12, "TB/s", "8 x 3.35")
    fastest = theory.weight_bound_tokens_per_second(TOTAL * 2, 8, h100.bandwidth.value)
    yield Worked("so that it cannot", "<33.33", fastest, "tokens/s", "26.8 / 3.6")
