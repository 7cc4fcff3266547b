"""Import of config.json: exact, or refused by the name of the field that is in the way."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spec import Architecture, SpecError, load
from harness.spec.families import FAMILIES
from harness.spec.families.fields import ConfigError
from harness.spec.huggingface import from_config, import_config, survey
from harness.theory import parameters

pytest.importorskip("transformers")
from suites.selftest import hf_meta

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 6,
    "moe_intermediate_size": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 22,
    "kv_lora_rank": 26,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DBRX = {
    "vocab_size": 131,
    "d_model": 48,
    "n_heads": 6,
    "n_layers": 3,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 12, "moe_top_k": 3, "moe_loss_weight": 0.05},
}
GPT2 = {"vocab_size": 131, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 6}
ROUTED = {"num_local_experts": 12, "num_experts_per_tok": 3}
QWEN_MOE = {
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "num_experts": 12,
    "num_experts_per_tok": 3,
}
QWEN3_MOE = {key: value for key, value in QWEN_MOE.items() if not key.startswith("shared")}

TINY: Mapping[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gpt2": GPT2,
    "mixtral": {**SIZES, **ROUTED},
    "qwen2_moe": {**SIZES, **QWEN_MOE},
    "qwen3_moe": {**SIZES, **QWEN3_MOE},
    "olmoe": {**SIZES, **QWEN3_MOE},
    "gpt_oss": {**SIZES, **ROUTED},
    "minimax_m2": {**SIZES, **ROUTED, "rotary_dim": 64},
    "deepseek_v3": {**DEEPSEEK, **GROUPS, "rope_scaling": YARN},
    "kimi_k2": {**DEEPSEEK, "n_group": 1, "topk_group": 1},
    "deepseek_v2": DEEPSEEK,
    "glm4_moe": {key: DEEPSEEK[key] for key in DEEPSEEK if "lora" not in key and "head_dim" not in key}
    | {"num_key_value_heads": 2},
    "dbrx": DBRX,
}
TINY["olmoe"].pop("moe_intermediate_size")

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((family, {}) for family in TINY),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True}),
    (
        "llama",
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "num_key_value_heads": None, "hidden_act": "gelu_new"},
    ),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}}),
    ("mistral", {"sliding_window": None, "head_dim": 12}),
    ("mistral", {"sliding_window": 9, "rope_scaling": {**YARN, "mscale": 0, "mscale_all_dim": 0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0, "attention_bias": True},
    ),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("gpt2", {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False}),
    ("gpt2", {"scale_attn_weights": False, "n_ctx": 64}),
    ("mixtral", {"sliding_window": 9, "head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
    ("qwen2_moe", {"mlp_only_layers": [0, 1], "use_sliding_window": False, "sliding_window": 0}),
    ("qwen2_moe", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True, "head_dim": 12}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": True}),
    ("olmoe", {"num_key_value_heads": None, "attention_bias": True}),
    ("gpt_oss", {"attention_bias": False, "sliding_window": 9, "layer_types": ["full_attention"] * 4}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "head_dim": 12}),
    ("minimax_m2", {"partial_rotary_factor": 0.25, "rotary_dim": None, "head_dim": 16}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "n_shared_experts": 0}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", **GROUPS, "first_k_dense_replace": 0}),
    ("deepseek_v2", {"q_lora_rank": None, "mlp_bias": True, "rope_scaling": YARN, "aux_loss_alpha": 0.001}),
    ("glm4_moe", {"attention_bias": True, "use_qk_norm": True, "head_dim": 16, **GROUPS}),
    ("dbrx", {"ffn_config": {**DBRX["ffn_config"], "moe_normalize_expert_weights": None}}),
)
IDS = [f"{family}-{i}" for i, (family, _) in enumerate(VARIANTS)]

has_published = pytest.mark.skipif(hf_meta.published() is None, reason="aiconfigurator-core is not installed")


def tiny(family: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a small model of a family."""
    return {"model_type": family, **TINY[family], **(changes or {})}


def real(file: str) -> dict[str, Any]:
    """A published config.json."""
    folder = hf_meta.published()
    assert folder is not None
    loaded: dict[str, Any] = json.loads((folder / f"{file}_config.json").read_text())
    return loaded


def check_facts(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Everything that transformers' own objects say about a config, against the imported architecture."""
    made = hf_meta.model(config)
    counted = {key: value for key, value in parameters.by_component(architecture).items() if value}
    assert hf_meta.by_component(made) == counted
    routing = {i for i in range(architecture.n_layers) if architecture.is_moe_layer(i)}
    assert hf_meta.moe_layers(made) == routing
    read, attention = made.config, architecture.attention
    assert read.vocab_size == architecture.vocab_size
    assert read.max_position_embeddings == architecture.max_positions
    window = getattr(read, "sliding_window", None) or None
    kinds = (
        getattr(read, "layer_types", None)
        or ["full_attention" if window is None else "sliding_attention"] * 4
    )
    for i in range(architecture.n_layers):
        windowed = kinds[i % len(kinds)] == "sliding_attention" and window is not None
        assert architecture.is_window_layer(i) == windowed
        assert not windowed or attention.window == window
    check_attention(made, architecture)


def check_attention(made: Any, architecture: Architecture) -> None:
    """Scale and rotary embedding of the first layer."""
    attention = architecture.attention
    layer = next(module for name, module in made.named_modules() if name.endswith((".self_attn", ".attn")))
    scale = attention.scale or attention.head_dim**-0.5
    scaling = attention.rope.scaling if attention.rope else None
    if attention.mla is not None and scaling is not None and scaling.mscale_all_dim:
        scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2
    assert layer.scaling == pytest.approx(scale, rel=1e-12)  # float64 on both sides
    if attention.rope is None:
        return
    rotary = next(
        module for name, module in made.named_modules() if name.endswith(("rotary_emb", "rotary_embedding"))
    )
    whole = attention.mla.qk_rope_head_dim if attention.mla else attention.head_dim
    assert 2 * len(rotary.inv_freq) == (attention.rope.dim or whole)
    rope = made.config.rope_parameters
    assert rope["rope_type"] == (scaling.kind if scaling else "default")
    if made.config.model_type != "dbrx":  # whose attention holds a theta of its own, which the files give
        assert rope["rope_theta"] == attention.rope.theta
    if scaling is not None:
        assert rope["factor"] == scaling.factor
        assert rope.get("original_max_position_embeddings") == scaling.original_max_positions


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_a_family_imports_as_transformers_builds_it(family: str, changes: dict[str, Any]) -> None:
    """Parameters by component, MoE layers, windows, scale and rope are those of transformers' model."""
    config = tiny(family, changes)
    check_facts(config, from_config(config))


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_what_transformers_saves_imports_the_same(family: str, changes: dict[str, Any]) -> None:
    """A config.json means the same after transformers 5 has read it and written it anew."""
    config = tiny(family, changes)
    if family != "dbrx":
        assert from_config(hf_meta.saved(config)) == from_config(config)


def test_what_transformers_makes_of_dbrx_is_refused() -> None:
    """transformers 5.23.0 reads and writes rope_theta 10000 beside the one of attn_config, which it ignores."""
    saved = hf_meta.saved(tiny("dbrx"))
    assert saved["rope_parameters"]["rope_theta"] != saved["attn_config"]["rope_theta"]
    with pytest.raises(SpecError, match=r"attn_config\.rope_theta: 500000 contradicts 10000"):
        from_config(saved)
    del saved["rope_parameters"]
    assert from_config(saved) == from_config(tiny("dbrx"))


def test_every_family_is_tried() -> None:
    """No family is supported without a model of it in these tests."""
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_configuration_class(family: str) -> None:
    """An absent key means what transformers 5.23.0 makes of its absence."""
    import transformers

    known = transformers.CONFIG_MAPPING[hf_meta.CODE_OF.get(family, family)]
    fields = {name: field.default for name, field in known.__dataclass_fields__.items()}
    ours = FAMILIES[family]
    stated = {**ours.defaults, **ours.extra, **{key: allowed[0] for key, (allowed, _) in ours.only.items()}}
    folded = {"rope_theta", "rope_scaling"}  # into rope_parameters: `check_facts` compares what comes out
    assert set(ours.defaults) <= set(fields) | folded
    for key in set(stated) & set(fields):
        assert fields[key] == stated[key], key


@has_published
def test_published_configs_are_imported_exactly_or_refused_by_field() -> None:
    """Of the real files every one is either imported to the parameter or refused naming a field of it."""
    folder = hf_meta.published()
    assert folder is not None
    rows = survey(folder)
    assert len(rows) == 89
    for row in rows:
        config = json.loads((folder / row.file).read_text())
        if row.architecture is not None:
            check_facts(config, row.architecture)
        else:
            assert row.field.partition(".")[0] in config, row
    imported = [row for row in rows if row.outcome == "imported"]
    assert {row.model_type for row in imported} >= {
        "deepseek_v3",
        "gpt_oss",
        "kimi_k2",
        "llama",
        "minimax_m2",
    }
    assert {row.model_type for row in imported} >= {"mixtral", "qwen3", "qwen3_moe"}


@has_published
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mixtral-8x7b", "mistralai--Mixtral-8x7B-v0.1"),
        ("mixtral-8x22b", "mistralai--Mixtral-8x22B-v0.1"),
        ("deepseek-v3", "deepseek-ai--DeepSeek-V3"),
        ("gpt-oss-120b", "openai--gpt-oss-120b"),
        ("gpt-oss-20b", "openai--gpt-oss-20b"),
        ("qwen3-235b-a22b", "Qwen--Qwen3-235B-A22B"),
        ("qwen3-30b-a3b", "Qwen--Qwen3-30B-A3B"),
        ("llama-3.1-70b", "meta-llama--Meta-Llama-3.1-70B"),
    ],
)
def test_shipped_specs_agree_with_the_published_configs(name: str, file: str) -> None:
    """A spec written by hand and the import of the published file are one architecture."""
    shipped, imported = load(name).architecture, from_config(real(file))
    if name == "deepseek-v3":  # its loss stands in the paper, not in the file
        imported = imported.model_copy(update={"auxiliary_loss": shipped.auxiliary_loss})
    assert shipped == imported


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_written_specs_read_back_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The TOML of an import, loaded, is the architecture that was imported."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny(family, changes)))
    toml = tmp_path / "imported.toml"
    toml.write_text(import_config(path, name="imported"))
    assert toml.read_text().startswith("#:schema spec.schema.json\n")
    assert load(toml).architecture == from_config(tiny(family, changes))
    assert load(toml).name == "imported"


def test_what_the_file_does_not_say_is_marked(tmp_path: Path) -> None:
    """An assumed or quantised dtype is inferred, and what was left out or defaulted is listed."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}})))
    assert load(_written(tmp_path, path)).leaves["dtype"].status == "inferred"
    path.write_text(json.dumps(tiny("mixtral", {"torch_dtype": "float16", "attention_dropout": 0.1})))
    spec = load(_written(tmp_path, path))
    assert (spec.leaves["dtype"].status, spec.leaves["dtype"].value) == ("published", "float16")
    note = spec.sources["config"].note
    assert "rms_norm_eps" in note.partition("left out")[0]
    assert "attention_dropout (noise in training only)" in note.partition("left out")[2]


def _written(folder: Path, path: Path) -> Path:
    toml = folder / "out.toml"
    toml.write_text(import_config(path))
    return toml


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}}, "rope_scaling.mscale"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "rope_scaling.high_freq_factor"),
    ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
    ("llama", {"rope_scaling": {**YARN, "mscale_all_dim": 0}}, "rope_scaling.mscale"),
    ("llama", {"rope_scaling": YARN, "rope_parameters": LLAMA3}, "rope_scaling"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"vision_config": {}}, "vision_config"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "auto_map"),
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("llama", {"hidden_size": 48.0}, "hidden_size"),
    ("llama", {"hidden_size": True}, "hidden_size"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama", {"num_attention_heads": 5}, "num_key_value_heads"),
    ("llama", {"num_attention_heads": 10}, "num_attention_heads"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype"),
    ("llama", {"dtype": "bfloat16", "torch_dtype": "float16"}, "torch_dtype"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}, "max_window_layers"),
    ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 5}, "decoder_sparse_step"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 20}, "shared_expert_intermediate_size"),
    ("qwen3_moe", {"num_local_experts": 16}, "num_local_experts"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmoe", {"head_dim": 16}, "head_dim"),
    ("mixtral", {"num_experts_per_tok": 13}, "num_experts_per_tok"),
    ("gpt_oss", {"swiglu_alpha": 2.0}, "swiglu_alpha"),
    ("gpt_oss", {"experts_per_token": 4}, "experts_per_token"),
    ("minimax_m2", {"attn_type_list": [1, 0, 1, 0]}, "attn_type_list"),
    ("minimax_m2", {"partial_rotary_factor": 0.25}, "rotary_dim"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("deepseek_v3", {"head_dim": 24}, "head_dim"),
    ("deepseek_v3", {"n_group": 5}, "n_group"),
    ("deepseek_v3", {"n_group": 12, "topk_group": 6}, "n_group"),
    ("deepseek_v3", {"first_k_dense_replace": 4}, "first_k_dense_replace"),
    ("deepseek_v3", {"index_topk": 2048}, "index_topk"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("glm4_moe", {"partial_rotary_factor": 0.4, "head_dim": 18}, "partial_rotary_factor"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"n_ctx": 32}, "n_ctx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    (
        "dbrx",
        {"ffn_config": {**DBRX["ffn_config"], "moe_normalize_expert_weights": 2}},
        "ffn_config.moe_norm",
    ),
    ("dbrx", {"attn_config": {"kv_n_heads": 2}}, "attn_config.rope_theta"),
    ("dbrx", {"rope_theta": 1e4}, "attn_config.rope_theta"),
)


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    REFUSED,
    ids=[f"{family}-{field}-{i}" for i, (family, _, field) in enumerate(REFUSED)],
)
def test_what_a_spec_cannot_express_is_refused_by_field(
    family: str, changes: dict[str, Any], field: str
) -> None:
    """The field that is in the way is named, in one sentence that begins with the file."""
    with pytest.raises(SpecError) as error:
        from_config(tiny(family, changes), name="some/config.json")
    sentence = str(error.value)
    assert sentence.startswith(f"some/config.json: {field}")
    assert "\n" not in sentence


@pytest.mark.parametrize("family", TINY)
def test_sizes_are_never_assumed(family: str) -> None:
    """Without one of its sizes no file is imported: the class's defaults are not the named model."""
    for key in (
        set(TINY[family])
        - {"num_key_value_heads", "rope_scaling", "rotary_dim"}
        - set(FAMILIES[family].defaults)
    ):
        config = tiny(family)
        del config[key]
        with pytest.raises(SpecError):
            from_config(config)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "llama", "hidden_size": 4', "config.json:1: ends in the middle of its JSON"),
        ("", "ends in the middle"),
        ('{"model_type":\n nonsense}', "config.json:2: is not JSON"),
        ("[1, 2]", "a config.json is one object"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "model_type: stands twice"),
        ("[" * 100_000, "beyond all bounds"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "beyond all bounds"),
        ("{}", "model_type: is missing"),
        ('{"model_type": 3}', "model_type: got 3"),
        ('{"model_type": "mixtrall"}', 'did you mean "mixtral"?'),
        ('{"model_type": "deepseek_v32"}', "known are dbrx"),
        (
            '{"model_type": "qwen3_vl",\n "vision_config": {"depth": 1},\n "text_config": {}}',
            "config.json:2: vision",
        ),
        ('{"model_type": "gpt2",\n "n_emdb": 4}', "n_embd: is missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    """A broken, foreign or unknown file ends in a sentence with its name, never in a traceback."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        import_config(path)
    assert says in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_a_directory_and_bytes_are_refused(tmp_path: Path) -> None:
    """What cannot be read at all says so."""
    with pytest.raises(SpecError, match="cannot be read"):
        import_config(tmp_path / "none.json")
    with pytest.raises(SpecError, match="is a directory"):
        import_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(SpecError, match="not UTF-8"):
        import_config(tmp_path / "config.json")


def test_an_unknown_key_is_refused_with_a_suggestion() -> None:
    """A misspelt key is not passed over."""
    with pytest.raises(SpecError, match=r'attention_biass: .*did you mean "attention_bias"\?'):
        from_config(tiny("llama", {"attention_biass": True}))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([10**30, 1e-6, 0.5, 1.0, math.nan, math.inf, -1.0])
    | st.sampled_from(["silu", "yarn", "bfloat16", "sliding_attention", "greedy", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["factor", "rope_theta", "type", "mscale", "name", "x"]), inner, max_size=3
        )
    ),
    max_leaves=4,
)


@given(
    variant=st.sampled_from(VARIANTS),
    edits=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(["drop", "rename", "retype"]), JSON), max_size=3
    ),
)
@settings(max_examples=600, deadline=None)
def test_a_damaged_config_is_imported_soundly_or_refused(
    variant: tuple[str, dict[str, Any]], edits: list[tuple[int, str, Any]]
) -> None:
    """Keys dropped, misspelt or given other values: a validated architecture or a SpecError, nothing else."""
    family, changes = variant
    config = tiny(family, changes)
    for spot, edit, value in edits:
        keys = sorted({*config, *FAMILIES[family].defaults, *FAMILIES[family].extra, *FAMILIES[family].only})
        key = keys[spot % len(keys)]
        if edit == "retype":
            config[key] = value
        elif key in config:
            held = config.pop(key)
            if edit == "rename":
                config[key + "_"] = held
    architecture = None
    with contextlib.suppress(ConfigError):
        architecture = from_config(config)
    if architecture is None:
        return
    assert Architecture.model_validate(architecture.model_dump()) == architecture
    assert parameters.total(architecture) > 0
    assert not any(key.endswith("_") for key in config)


def test_import_loads_no_framework() -> None:
    """Importing a config.json needs neither torch nor transformers."""
    code = "import sys, harness.spec.huggingface as _; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
