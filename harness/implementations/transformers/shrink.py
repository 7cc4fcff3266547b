"""A family of transformers at test size, by the names of its config's attributes: no code per family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.implementations.protocols import Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers import families

LAYERS = 4
RECIPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "attention_chunk_size": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
"""Each applies where the family's config has the attribute. Values differ where they can, so that no two
sizes are equal by accident. Sparse attention keeps 8 of the keys; its indexer has 32 heads because the sum
of two heads' ReLU is often exactly 0, and ties between keys would be broken by chance."""

KINDS = ("layer_types", "mlp_layer_types")
"""Lists of one word per layer."""


def _mrope(*section: int) -> dict[str, Any]:
    """Rotary positions of time, height and width: how many frequencies of half a rotated head each has."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


INITIALIZER_RANGE = 0.2
"""Ten times the usual 0.02, at which outputs are so small that few defects show above a tolerance."""

JITTER = ("router_jitter_noise", "input_jitter_noise")
JITTER_SIZE = 0.1
"""Noise on a router in training, where the family has some and leaves it at 0: it shows in no other mode."""

PER_FAMILY: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "moe_jitter_eps": JITTER_SIZE,
        },
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_key_value_heads": 4,
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * (LAYERS // 2),
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 3,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "layer_types": ["indexed_attention", "sliding_attention"] * (LAYERS // 2),
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 24], "rope_parameters": _mrope(3, 3, 2)},
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "glm4v_moe_text": {"rope_parameters": {**_mrope(1, 1, 2), "partial_rotary_factor": 0.5}},
    "glm5_next_text": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "index_kpool": 2,
        "layer_types": ["linear_attention", "indexed_attention"] * (LAYERS // 2),
    },
    "gpt2": {"n_inner": 96},
    "granitemoehybrid": {
        "shared_intermediate_size": 48,
        "mamba_chunk_size": 4,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    },
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "rel_extent": 16,
        "log_scaling_n_floor": 4,
    },
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "rel_extent": 16,
        "logits_mup_width_multiplier": 1.0,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "longcat_flash": {
        "num_layers": 2,
        "zero_expert_num": 4,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
        "head_dim": 8,
    },
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2)},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * (LAYERS // 2),
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 48,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_block_size": 2,
        "index_topk_blocks": 4,
    },
    "muse_spark_text": {"moe_hidden_size": 48, "layer_rope_theta": [500000.0, 0.0] * (LAYERS // 2)},
    "nemotron_h": {
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "chunk_size": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    },
    "nllb-moe": {
        "vocab_size": 129,
        "pad_token_id": 128,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "init_std": INITIALIZER_RANGE,
    },
    "qwen3_omni_moe_text": {"sliding_window": None},
    "qwen3_vl_moe_text": {"sliding_window": None},
    "qwen3_omni_moe_talker_text": {"sliding_window": None, "shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "eos_token_id": 1,
        "hc_lowrank": 16,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p5": {
        "pad_token_id": 1,
        "share_expert_dim": 32,
        "layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2),
        "num_sliding_attention_heads": 4,
    },
    "switch_transformers": {
        "vocab_size": 129,
        "pad_token_id": 128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 32,
        "num_layers": 2,
        "num_decoder_layers": LAYERS,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 2,
        "num_heads": 4,
        "router_jitter_noise": JITTER_SIZE,
    },
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
"""What the recipe cannot say: nested or oddly named sizes, and what a family's code asks of its config."""


def shrunken(family: str) -> Any:
    """A config of `family` at test size.

    Raises AdapterError for an unknown family, Unsupported if its config refuses the recipe.
    """
    cls = families.family(family).config
    if "text_config" in cls.sub_configs:
        inner = getattr(cls.sub_configs["text_config"], "model_type", "")
        raise Unsupported(f"{family} is a model around a text model: say transformers:{inner or 'NAME_text'}")
    try:
        default = cls()
        chosen = {name: value for name, value in RECIPE.items() if _has(default, name)}
        if _get(default, "kv_lora_rank") is not None:
            chosen["num_key_value_heads"] = chosen.get("num_attention_heads", 4)
            chosen["head_dim"] = RECIPE["qk_rope_head_dim"]  # where latent attention rotates that part alone
            if _get(default, "head_dim") != _get(default, "qk_rope_head_dim"):
                del chosen["head_dim"]
        known = vars(default)
        # Dropout aside, a pass in training mode differs from one in eval mode by its router's noise alone.
        chosen.update({name: 0.0 for name in known if "drop" in name and isinstance(known[name], float)})
        chosen.update({name: JITTER_SIZE for name in JITTER if known.get(name) == 0})
        if _has(default, "initializer_range"):
            chosen["initializer_range"] = INITIALIZER_RANGE
        chosen.update({name: _first_kinds(known[name]) for name in KINDS if known.get(name)})
        chosen.update(PER_FAMILY.get(family, {}))
        return cls(**chosen)
    except Exception as error:
        raise Unsupported(f"the config of {family} cannot be shrunken: {describe(error)}") from error


def _first_kinds(words: Sequence[str]) -> list[str]:
    """The words of the first layers, what they all begin with once; if some kind is not among them, every
    kind by turns."""
    run = next((i for i, word in enumerate(words) if word != words[0]), len(words))
    first, kinds = list(words[max(run - 1, 0) :][:LAYERS]), list(dict.fromkeys(words))
    enough = len(first) == LAYERS and set(first) == set(kinds)
    return first if enough else (kinds * LAYERS)[:LAYERS]


def _get(config: Any, name: str) -> Any:
    """The attribute, if it is there and one for all layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _has(config: Any, name: str) -> bool:
    try:
        getattr(config, name)
    except AttributeError:
        return False
    except RuntimeError:
        # A size that differs between layers refuses to be read as one, yet can be given as one.
        return True
    return True
