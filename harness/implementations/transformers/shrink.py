"""A family of transformers at test size, by the names of its config's attributes: no code per family."""

from __future__ import annotations

from collections.abc import Sequence
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

KINDS = ("layer_types", "mlp_layer_types")
"""Lists of one word per layer."""

INITIALIZER_RANGE = 0.2
"""Ten times the usual 0.02, at which outputs are so small that few defects show above a tolerance."""

PER_FAMILY: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1},
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
    if "text_config" in cls.sub_configs:
        inner = getattr(cls.sub_configs["text_config"], "model_type", "")
        raise Unsupported(f"{family} is a model around a text model: say transformers:{inner or 'NAME_text'}")
    try:
        default = cls()
        chosen = {name: value for name, value in RECIPE.items() if _has(default, name)}
        if getattr(default, "kv_lora_rank", None) is not None:
            chosen["num_key_value_heads"] = chosen.get("num_attention_heads", 4)
            chosen["head_dim"] = RECIPE["qk_rope_head_dim"]  # where latent attention rotates that part alone
            if getattr(default, "head_dim", None) != getattr(default, "qk_rope_head_dim", None):
                del chosen["head_dim"]
        if _has(default, "initializer_range"):
            chosen["initializer_range"] = INITIALIZER_RANGE
        chosen.update({name: _first_kinds(vars(default)[name]) for name in KINDS if vars(default).get(name)})
        chosen.update(PER_FAMILY.get(family, {}))
        return cls(**chosen)
    except Exception as error:
        raise Unsupported(f"the config of {family} cannot be shrunken: {describe(error)}") from error


def _first_kinds(words: Sequence[str]) -> list[str]:
    """The words of the first layers if all kinds are among them, else every kind by turns."""
    first, kinds = list(words[:LAYERS]), list(dict.fromkeys(words))
    return first if set(first) == set(kinds) else (kinds * LAYERS)[:LAYERS]


def _has(config: Any, name: str) -> bool:
    try:
        getattr(config, name)
    except AttributeError:
        return False
    except RuntimeError:
        # A size that differs between layers refuses to be read as one, yet can be given as one.
        return True
    return True
