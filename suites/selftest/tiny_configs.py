"""config.json files of small models: one a family, and variants of them that change what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "qwen3": {**SIZES, "head_dim": 16},
    "gpt2": GPT2,
    "mixtral": {**SIZES, **ROUTED},
    "qwen2_moe": {**SIZES, **QWEN_MOE},
    "qwen3_moe": {**SIZES, **QWEN3_MOE},
    "olmoe": {**SIZES, **QWEN3_MOE},
    "gpt_oss": {**SIZES, **ROUTED, "head_dim": 16},
    "minimax_m2": {**SIZES, **ROUTED, "head_dim": 16, "rotary_dim": 8},
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
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    ("gpt2", {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False}),
    ("gpt2", {"scale_attn_weights": False, "n_ctx": 64}),
    ("mixtral", {"sliding_window": 9, "head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
    ("qwen2_moe", {"mlp_only_layers": [0, 1], "use_sliding_window": False, "sliding_window": 0}),
    (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True, "head_dim": 12}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": True}),
    ("olmoe", {"num_key_value_heads": None, "attention_bias": True}),
    ("gpt_oss", {"attention_bias": False, "sliding_window": 9, "layer_types": ["full_attention"] * 4}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "sliding_window": 9}),
    ("minimax_m2", {"partial_rotary_factor": 0.25, "rotary_dim": None}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "n_shared_experts": 0}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", **GROUPS, "first_k_dense_replace": 0}),
    ("deepseek_v2", {"q_lora_rank": None, "mlp_bias": True, "rope_scaling": YARN, "aux_loss_alpha": 0.001}),
    ("glm4_moe", {"attention_bias": True, "use_qk_norm": True, "head_dim": 16, **GROUPS}),
    ("dbrx", {"ffn_config": {**DBRX["ffn_config"], "moe_normalize_expert_weights": None}}),
)
IDS = [f"{family}-{i}" for i, (family, _) in enumerate(VARIANTS)]


def tiny(family: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a small model of a family."""
    return {"model_type": family, **TINY[family], **(changes or {})}
