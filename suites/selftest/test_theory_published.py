"""Theory against figures that others published or measured: equal to the parameter, the FLOP and the byte."""

from __future__ import annotations

import pytest

from harness.spec import Architecture, load
from harness.theory import flops, memory, parameters, routing, serving, training

EXACT = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744, 38_955_423_744),
    "deepseek-v3": (671_026_404_352, 37_552_282_624, 36_625_603_584),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912, 5_132_849_472),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280, 1_178_994_688),
    "dbrx": (131_596_523_520, 36_469_708_800, 35_853_146_112),
    "llama-3.1-8b": (8_030_261_248, 8_030_261_248, 7_504_924_672),
    "llama-3.1-70b": (70_553_706_496, 70_553_706_496, 69_503_033_344),
    "llama-3.1-405b": (405_853_388_800, 405_853_388_800, 403_752_042_496),
    # Tied: without the looked-up tables means without the 2048 learned positions alone.
    "gpt3-175b": (174_604_259_328, 174_604_259_328, 174_604_259_328 - 2048 * 12288),
}
"""Total, active, active without input embedding: sums of parameter sizes of transformers 5.23.0's models on
the meta device (active: with k of the E experts), DeepSeek-V3 without its multi-token-prediction layer."""


@pytest.mark.parametrize("name", EXACT)
def test_counts_equal_those_of_real_models(name: str) -> None:
    """Total and active parameters are those of the published models, to the parameter."""
    architecture = load(name).architecture
    counted = (
        parameters.total(architecture),
        parameters.active(architecture, "all"),
        parameters.active(architecture, "no-input-embedding"),
    )
    assert counted == EXACT[name]


@pytest.mark.parametrize(
    ("name", "low", "high", "conventions"),
    [
        ("mixtral-8x7b", 12.85e9, 12.95e9, ("all", "no-router")),
        ("mixtral-8x22b", 38.5e9, 39.5e9, tuple(set(parameters.CONVENTIONS) - {"experts"})),
        ("deepseek-v3", 36.5e9, 37.5e9, ("no-input-embedding", "no-router", "matmul")),
        ("gpt-oss-120b", 5.125e9, 5.135e9, ("no-input-embedding", "matmul")),
        ("gpt-oss-20b", 3.605e9, 3.615e9, ("no-input-embedding", "matmul")),
        ("olmoe-1b-7b", 1.25e9, 1.35e9, ("all", "no-router")),
        ("qwen3-30b-a3b", 3.25e9, 3.35e9, ("no-router",)),
    ],
)
def test_conventions_that_reproduce_a_published_active_count(
    name: str, low: float, high: float, conventions: tuple[str, ...]
) -> None:
    """The published active count, read as the interval of its rounding, singles out its conventions."""
    found = parameters.conventions_matching(load(name).architecture, lambda count: low <= count < high)
    assert set(found) == set(conventions)


def test_palm_counts_as_published() -> None:
    """PaLM 540B has the 540.35e9 parameters of its paper: multi-query, parallel block, tied embeddings.

    With its norms' scales it would print as 540.36e9.
    """
    architecture = load("palm-540b").architecture
    assert parameters.conventions_matching(
        architecture, lambda count: 540.345e9 <= count < 540.355e9, parameters.total
    ) == ("matmul",)


@pytest.mark.parametrize(
    ("experts", "layers", "printed"),
    [
        (2048, 36, 600e9),
        (2048, 12, 200e9),
        (512, 36, 150e9),
        (512, 12, 50e9),
        (128, 36, 37e9),
        (128, 12, 12.5e9),
    ],
)
def test_gshard_table_follows_from_its_experts(experts: int, layers: int, printed: float) -> None:
    """GShard's table 1 (arXiv 2006.16668) is its expert matrices alone, rounded down by up to 5%.

    d_model 1024, d_ff 8192, two matrices, every other layer; the paper prints round figures.
    """
    base = load("mixtral-8x7b")
    dense = {"ffn.d_ff": 8192, "ffn.gated": False, "ffn.activation": "relu"}
    expert = {"moe.expert.d_ff": 8192, "moe.expert.gated": False, "moe.expert.activation": "relu"}
    shape = {"d_model": 1024, "n_layers": layers, "moe.n_experts": experts, "moe.period": 2}
    count = parameters.total(base.complete(shape | dense | expert), "experts")
    assert count == experts * layers // 2 * 2 * 1024 * 8192
    assert printed <= count <= 1.05 * printed


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [
        ("mixtral-8x7b", 26.57091584),
        ("deepseek-v3", 83.483295744),
        ("llama-3.1-70b", 144.372137984),
        ("gpt3-175b", 358.791143424),
    ],
)
def test_forward_flops_equal_those_counted(name: str, gigaflops: float) -> None:
    """Forward FLOPs per token of a 2048-token prefill are those that torch counts on eager models."""
    architecture = load(name).architecture
    assert flops.forward_per_token(architecture, 2048) == round(gigaflops * 1e9)
    assert flops.forward_total(architecture, 3, 2048) == 3 * 2048 * round(gigaflops * 1e9)


def test_absorbed_attention_multiplies_latents() -> None:
    """Absorbed, DeepSeek-V3's 128 heads meet keys of 512 + 64 and values of 512 elements in 61 layers."""
    architecture = load("deepseek-v3").architecture
    absorbed = flops.token_by_component(architecture, 1000, mla="absorbed")
    assert absorbed["attention.scores"] == 61 * 128 * 2 * (512 + 64) * 1000
    assert absorbed["attention.values"] == 61 * 128 * 2 * 512 * 1000
    same = [name for name in flops.COMPONENTS if name not in ("attention.scores", "attention.values")]
    expanded = flops.token_by_component(architecture, 1000)
    assert [absorbed[name] for name in same] == [expanded[name] for name in same]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mixtral-8x7b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("gpt3-175b", 4_718_592),
        ("deepseek-v3", 70_272),
    ],
)
def test_kv_cache_bytes_per_token(name: str, count: int) -> None:
    """One token's KV cache in 16 bits has its known size, latent attention's latents included."""
    assert memory.kv_cache_bytes_per_token(load(name).architecture, "bfloat16") == count


def test_windows_bound_the_cache() -> None:
    """In gpt-oss half of the layers keep 128 tokens: the cache grows by half the bytes beyond that."""
    architecture = load("gpt-oss-120b").architecture
    per_token = memory.kv_cache_bytes_per_token(architecture)
    assert memory.kv_cache_bytes(architecture, 128) == 128 * per_token
    assert memory.kv_cache_bytes(architecture, 8192, batch=3) == 3 * (8192 + 128) * per_token // 2


def test_expanded_latents_need_the_cache_of_full_heads() -> None:
    """DeepSeek-V3 with expanded keys and values caches 128 heads x (192 + 128) in each of 61 layers."""
    architecture = load("deepseek-v3").architecture
    assert memory.kv_cache_bytes_per_token(architecture, mla="expanded") == 61 * 128 * (192 + 128) * 2


def test_gpt_oss_parts_are_those_of_its_model_card() -> None:
    """gpt-oss-120b's table splits 116.83e9 into 114.71e9 MLP, 0.96e9 attention and 1.16e9 embeddings."""
    architecture = load("gpt-oss-120b").architecture
    embeddings = parameters.part(architecture, "embedding") + parameters.part(architecture, "unembedding")
    mlp = parameters.part(architecture, "experts") + parameters.part(architecture, "router")
    # The card prints two decimals of 1e9: half of the last one is the rounding.
    for counted, printed in ((mlp, 114.71e9), (parameters.part(architecture, "attention"), 0.96e9)):
        assert abs(counted - printed) <= 0.005e9
    assert abs(embeddings - 1.16e9) <= 0.005e9


@pytest.mark.parametrize(("convention", "mfu"), [("6n", 0.457), ("palm", 0.462)])
def test_palm_utilisation_as_published(convention: training.FlopConvention, mfu: float) -> None:
    """238.3e3 tokens/s on 6144 TPU v4 are 45.7% of peak without and 46.2% with attention."""
    per_token = training.flops_per_token(load("palm-540b").architecture, 2048, convention)
    # Printed to 0.1%, from a throughput printed to 0.1e3 tokens/s.
    assert training.mfu(per_token, 238.3e3, 6144, 275e12) == pytest.approx(mfu, abs=0.0005)


def test_gpt3_training_flops_as_published() -> None:
    """300e9 tokens at 6 FLOP per parameter are the 3.14e23 FLOP of the GPT-3 paper's table D.1."""
    total = 300_000_000_000 * training.flops_per_token(load("gpt3-175b").architecture, 2048)
    assert isinstance(total, int)
    assert 3.135e23 <= total < 3.145e23


def test_device_time_and_money_agree_with_each_other() -> None:
    """Days, hours and rent of a run follow from one another: 2.79e6 H800 hours at 2 USD are 5.58e6 USD."""
    days = training.days(2.15e25, 25_000, 312e12, 0.34)
    assert training.implied_mfu(2.15e25, 25_000, 312e12, days) == pytest.approx(0.34, rel=1e-12)
    # 2.15e25 / (25,000 * 312e12 * 0.34) s = 8.107e6 s.
    assert days == pytest.approx(93.83, abs=0.01)
    hours = training.device_hours(2048, 2_788_000 / 2048 / 24)
    assert hours == pytest.approx(2_788_000, rel=1e-12)
    assert training.cost(2048, 2_788_000 / 2048 / 24, 2.0) == pytest.approx(5.576e6, rel=1e-12)


def test_serving_costs_agree_with_each_other() -> None:
    """Throughput and cost per 1,000 tokens invert each other, and peak FLOP/s set the least cost."""
    rate = serving.tokens_per_second_at_cost(128, 1.0, 0.0049)
    assert rate == pytest.approx(128 / 3600 * 1000 / 0.0049, rel=1e-12)
    assert serving.cost_per_1k_tokens(128, 1.0, rate) == pytest.approx(0.0049, rel=1e-12)
    # At peak only the device-seconds count, not the number of devices.
    floor = serving.minimal_cost_per_1k_tokens(560e9, 128, 312e12, 1.0)
    assert floor == pytest.approx(560e9 * 1000 / 312e12 / 3600, rel=1e-12)
    assert serving.weight_bytes_per_device(1.8e12, 2, 8, 15) == pytest.approx(30e9, rel=1e-12)
    assert serving.parameters_per_node(1.8e12, 16) == pytest.approx(112.5e9, rel=1e-12)


def test_routing_expectations() -> None:
    """Tokens per expert and distinct experts follow the uniform law; extremes are exact."""
    assert routing.tokens_per_expert(60e6, 16, 2) == pytest.approx(7.5e6, rel=1e-12)
    assert routing.expected_distinct_experts(16, 2, 1) == pytest.approx(2, rel=1e-12)
    assert routing.expected_distinct_experts(16, 16, 1) == pytest.approx(16, rel=1e-12)
    assert routing.expected_distinct_experts(16, 2, 8) == pytest.approx(16 * (1 - (7 / 8) ** 8), rel=1e-12)


def test_unknown_names_are_refused_by_name() -> None:
    """A convention or component that does not exist is refused with those that do."""
    architecture: Architecture = load("mixtral-8x7b").architecture
    with pytest.raises(ValueError, match="no counting convention 'actve'; there are all, "):
        parameters.active(architecture, "actve")
    with pytest.raises(ValueError, match="no component 'expert'; there are embedding, "):
        parameters.part(architecture, "expert")
    with pytest.raises(ValueError, match="no FLOP convention '7n'; there are 6n, "):
        training.flops_per_token(architecture, 2048, "7n")  # type: ignore[arg-type]
