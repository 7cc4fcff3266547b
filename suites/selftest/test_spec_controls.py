"""The shipped controls: models whose published figures the harness must reproduce."""

import pytest

from harness.spec import Spec, load, names
from harness.spec.printed import interval
from harness.theory import parameters

CONTROLS = [name for name in names() if not load(name).unknowns]

# Counted on the meta device from the classes of transformers 5.23.0, as test_transformers_agrees does again;
# PaLM has no class there.
TOTALS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "deepseek-v3": 671_026_404_352,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "olmoe-1b-7b": 6_919_161_856,
    "dbrx": 131_596_523_520,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "gpt3-175b": 174_604_259_328,
    "qwen3-32b": 32_762_123_264,
    "minimax-m2.5": 228_689_748_992,
    "kimi-k2.5": 1_026_408_209_408,
}
CLASSES = {
    "mixtral-8x7b": ("Mixtral", {}),
    "mixtral-8x22b": (
        "Mixtral",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
        },
    ),
    "deepseek-v3": ("DeepseekV3", {"num_nextn_predict_layers": 0}),
    "qwen3-235b-a22b": (
        "Qwen3Moe",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
            "num_experts": 128,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
        },
    ),
    "gpt-oss-120b": ("GptOss", {}),
    "gpt-oss-20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "olmoe-1b-7b": ("Olmoe", {"intermediate_size": 1024}),
    "dbrx": (
        "Dbrx",
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama-3.1-8b": (
        "Llama",
        {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "llama-3.1-70b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    "llama-3.1-405b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
        },
    ),
    "gpt3-175b": ("GPT2", {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}),
    "qwen3-32b": (
        "Qwen3",
        {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "minimax-m2.5": (
        "MiniMaxM2",
        {
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_experts": 256,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "vocab_size": 200064,
        },
    ),
    "kimi-k2.5": (
        "DeepseekV3",
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "first_k_dense_replace": 1,
            "vocab_size": 163840,
            "num_nextn_predict_layers": 0,
        },
    ),
}
"""Family, and the sizes in which the model differs from its configuration class."""


TRUNCATED = {("llama-3.1-405b", "405e9")}
"""Figures that the source cut off instead of rounding: 405.85e9 is printed as 405B."""


@pytest.fixture(params=CONTROLS)
def control(request: pytest.FixtureRequest) -> Spec:
    """Each shipped spec that has no unknowns."""
    return load(request.param)


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_exact(name: str) -> None:
    """Theory of the spec counts what the published code instantiates, to the parameter."""
    assert parameters.total(load(name).architecture) == TOTALS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_agrees(name: str) -> None:
    """The class of the transformers library, at full size on the meta device, has that many parameters."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    family, sizes = CLASSES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model_class = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    with torch.device("meta"):
        model = model_class(config)
    assert sum(tensor.numel() for tensor in model.parameters()) == TOTALS[name]


def test_published_figures_are_reproduced(control: Spec) -> None:
    """Each published count is a rounding of theory's, under some convention or the one the source states."""
    counts = {"parameters.total": parameters.total, "parameters.active": parameters.active}
    claims = [claim for claim in control.claims if claim.quantity in counts]
    assert claims
    for claim in claims:
        stated = claim.given.get("convention")
        for reading in claim.readings:
            if (control.name, reading.value) in TRUNCATED:
                cut = interval(reading.value, exact=True).low
                assert cut < counts[claim.quantity](control.architecture) < cut + 1e9
                continue
            inside = interval(reading.value).__contains__
            matching = parameters.conventions_matching(control.architecture, inside, counts[claim.quantity])
            assert stated in matching if stated else matching, (claim.id, reading.value)


def test_figures_and_inferences_have_a_source(control: Spec) -> None:
    """Every claim cites one, and every leaf that is not published says why it has its value."""
    assert control.sources
    assert all(reading.sources for claim in control.claims for reading in claim.readings)
    assert all(leaf.why for leaf in control.leaves.values() if leaf.status != "published")
