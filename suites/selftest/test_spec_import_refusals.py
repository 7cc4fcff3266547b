"""Import of config.json, the other half: what cannot be imported says which field is in the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spec import Architecture, SpecError
from harness.spec.families import FAMILIES
from harness.spec.families.fields import ConfigError
from harness.spec.huggingface import from_config, import_config
from harness.theory import parameters
from suites.selftest.tiny_configs import DBRX, LLAMA3, TINY, VARIANTS, YARN, tiny

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
    ("llama", {"rope_theta": None}, "rope_theta"),
    ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor"),
    ("minimax_m2", {"partial_rotary_factor": None}, "partial_rotary_factor"),
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
    sizes = set(TINY[family]) - {*FAMILIES[family].defaults, *FAMILIES[family].extra}
    assert len(sizes) > 4
    for key in sizes:
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


def test_the_text_model_inside_is_suggested_only_if_it_can_be_imported() -> None:
    """A model around a text model is refused, and the way around that is named where there is one."""
    for text_config, advised in ((tiny("llama"), True), ({"model_type": "llama4_text"}, False), (3, False)):
        with pytest.raises(SpecError) as error:
            from_config({"model_type": "seer", "vision_config": {"depth": 1}, "text_config": text_config})
        assert ("save its text_config" in str(error.value)) is advised


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
    config, refusals = tiny(family, changes), []
    for spot, edit, value in edits:
        keys = sorted({*config, *FAMILIES[family].defaults, *FAMILIES[family].extra, *FAMILIES[family].only})
        key = keys[spot % len(keys)]
        if edit == "retype":
            config[key] = value
        elif key in config:
            held = config.pop(key)
            if edit == "rename":
                config[key + "_"] = held
    try:
        architecture = from_config(config)
    except ConfigError as error:
        refusals.append(error)
        architecture = None
    assert not any("fit together" in refusal.wrong for refusal in refusals), (
        "the validator spoke, not a field"
    )
    if architecture is None:
        return
    assert Architecture.model_validate(architecture.model_dump()) == architecture
    assert parameters.total(architecture) > 0
    assert not any(key.endswith("_") for key in config)
