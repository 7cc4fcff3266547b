"""A family of transformers at test size, by the names of its config's attributes: no code per family."""

from __future__ import annotations

from typing import Any

from harness.implementations.protocols import Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers.library import config_class

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
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
"""Each applies where the family's config has the attribute. Values differ where they can, so that no two
sizes are equal by accident."""

INITIALIZER_RANGE = 0.2
"""Ten times the usual 0.02, at which outputs are so small that few defects show above a tolerance."""

PER_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 96},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
}
"""What a family keeps in a nested config, or calls by a name of its own."""


def shrunken(family: str) -> Any:
    """A config of `family` at test size.

    Raises AdapterError for an unknown family, Unsupported if its config refuses the recipe.
    """
    cls = config_class(family)
    try:
        default = cls()
        chosen = {name: value for name, value in RECIPE.items() if hasattr(default, name)}
        if getattr(default, "kv_lora_rank", None) is not None:
            chosen["num_key_value_heads"] = chosen.get("num_attention_heads", 4)
            chosen.pop("head_dim", None)  # under latent attention the config derives it
        if hasattr(default, "initializer_range"):
            chosen["initializer_range"] = INITIALIZER_RANGE
        chosen.update({name: None for name in ("layer_types", "mlp_layer_types") if name in vars(default)})
        chosen.update(PER_FAMILY.get(family, {}))
        return cls(**chosen)
    except Exception as error:
        raise Unsupported(f"the config of {family} cannot be shrunken: {describe(error)}") from error
