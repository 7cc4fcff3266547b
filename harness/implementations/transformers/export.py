"""From an Architecture to a config of transformers, exact or refused.

A family's function below writes what its config can say. Whether that is all there was to say is not
judged by a second list: the config is read back by `harness.spec.huggingface`, which was written
independently, and must give the same architecture again; the first field that differs is what the family
cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.implementations.protocols import Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers.library import config_class
from harness.implementations.transformers.shrink import INITIALIZER_RANGE
from harness.spec.architecture import Architecture, FeedForward, Moe, RopeScaling

NOT_COMPARED = ("dtype", "auxiliary_loss")
"""Fields that set no arithmetic of the forward pass: the dtype of the weights as published, and the
coefficients of losses (which loss a model computes is told by its capability)."""

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

SCORES_IN_WEIGHTS_DTYPE = ("gpt_oss", "dbrx")
"""Families whose router computes in the dtype of the model; all others here compute in float32."""

MLA_NORM_EPS = 1e-6
"""The norms of latent attention take their module's default, whatever rms_norm_eps says."""


def config(architecture: Architecture, family: str) -> Any:
    """The config of `family` that is `architecture`.

    Raises Unsupported naming the field that the family cannot express, or saying that there is no export.
    """
    if family not in EXPORTS:
        raise Unsupported(f"no architecture can be exported to {family}; there are {', '.join(EXPORTS)}")
    said = dict(fields(architecture, family))
    difference = next(_differences(architecture, family, said), None)
    if difference is not None:
        raise Unsupported(f"transformers:{family} cannot express {difference}")
    try:
        # Without a padding token: the row of one would get no gradient.
        return config_class(family)(**said, pad_token_id=None, initializer_range=INITIALIZER_RANGE)
    except Exception as error:
        raise Unsupported(f"the config of {family} refuses this architecture: {describe(error)}") from error


def fields(architecture: Architecture, family: str) -> Mapping[str, Any]:
    """The keys of a config.json of `family`, without its model_type."""
    try:
        return EXPORTS[family](architecture)
    except _LackingError as lacking:
        raise Unsupported(f"transformers:{family} cannot express {lacking}") from None


class _LackingError(Exception):
    """A part that a family must have, or cannot have: names the field."""


def _differences(architecture: Architecture, family: str, said: Mapping[str, Any]) -> Iterator[str]:
    from harness.spec.errors import SpecError
    from harness.spec.huggingface import from_config

    try:
        back = from_config({"model_type": family, **said}, name=family)
    except SpecError as error:
        yield f"this architecture: {error}"
        return
    if architecture.moe is not None:
        dtype = architecture.moe.router.dtype
        if dtype != "float32" and not (family in SCORES_IN_WEIGHTS_DTYPE and dtype == architecture.dtype):
            yield f"moe.router.dtype = {dtype!r}"
    want, got = _leaves(_meaning(architecture)), _leaves(_meaning(back))
    for path in dict.fromkeys((*want, *got)):
        if path.split(".")[0] not in NOT_COMPARED and want.get(path) != got.get(path):
            yield f"{path} = {want.get(path)!r} (its config means {got.get(path)!r})"


def _meaning(a: Architecture) -> dict[str, Any]:
    """The fields, with what can be written in two ways put in one."""
    said = a.model_dump()
    said["attention"]["pattern"] = windows = tuple(a.is_window_layer(i) for i in range(a.n_layers))
    if not any(windows):
        said["attention"]["window"] = None  # of a pattern that is longer than the model
    if a.moe is not None:
        for name in ("first_dense", "period", "offset"):
            del said["moe"][name]
        said["moe"]["layers"] = tuple(i for i in range(a.n_layers) if a.is_moe_layer(i))
        del said["moe"]["router"]["dtype"]  # a config does not say it: see SCORES_IN_WEIGHTS_DTYPE
        if a.moe.router.order == "after_topk":
            said["moe"]["router"]["normalise"] = True  # a softmax of the selected sums to one as it is
        if a.moe.router.n_groups == 1:
            del said["moe"]["router"]["group_score"]
    return said


def _leaves(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        parts = (_leaves(item, f"{at}.{key}" if at else key) for key, item in value.items())
        return {path: leaf for part in parts for path, leaf in part.items()}
    return {at: value}


def _moe(a: Architecture) -> Moe:
    if a.moe is None:
        raise _LackingError("an architecture without experts (moe = None)")
    return a.moe


def _dense(a: Architecture) -> FeedForward:
    if a.moe is not None or a.ffn is None:
        raise _LackingError("experts: it is a dense family (moe)")
    return a.ffn


def _activation(ff: FeedForward) -> str:
    if ff.activation not in ACTIVATIONS:
        raise _LackingError(f"activation = {ff.activation!r}")
    return ACTIVATIONS[ff.activation]


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    said = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.original_max_positions is not None:
        said["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        said |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        said |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            said["attention_factor"] = scaling.attention_factor
        if scaling.mscale or scaling.mscale_all_dim:
            said |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return said


def _rotary(a: Architecture) -> dict[str, Any]:
    """What the families with RMSNorm and rotary positions have in common."""
    rope = a.attention.rope
    if rope is None:
        raise _LackingError(f"positions = {a.positions!r}")
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.d_model,
        "num_hidden_layers": a.n_layers,
        "num_attention_heads": a.attention.n_heads,
        "num_key_value_heads": a.attention.n_kv_heads,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm.eps,
        "rope_theta": rope.theta,
        "rope_scaling": _scaling(rope.scaling),
        "tie_word_embeddings": a.tie_embeddings,
    }


def _mixtral(a: Architecture) -> dict[str, Any]:
    moe = _moe(a)
    return _rotary(a) | {
        "head_dim": a.attention.head_dim,
        "hidden_act": _activation(moe.expert),
        "intermediate_size": moe.expert.d_ff,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": a.attention.window,
        "router_jitter_noise": moe.router.jitter,
    }


def _qwen3_moe(a: Architecture) -> dict[str, Any]:
    moe = _moe(a)
    return _rotary(a) | {
        "head_dim": a.attention.head_dim,
        "hidden_act": _activation(moe.expert),
        "attention_bias": a.attention.qkv_bias,
        "intermediate_size": moe.expert.d_ff if a.ffn is None else a.ffn.d_ff,
        "moe_intermediate_size": moe.expert.d_ff,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(a.n_layers) if not a.is_moe_layer(i)],
        "use_sliding_window": a.attention.window is not None,
        "sliding_window": a.attention.window,
    }


def _olmoe(a: Architecture) -> dict[str, Any]:
    moe = _moe(a)
    return _rotary(a) | {
        "hidden_act": _activation(moe.expert),
        "attention_bias": a.attention.qkv_bias,
        "clip_qkv": a.attention.qkv_clip,
        "intermediate_size": moe.expert.d_ff,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.normalise,
    }


def _gpt_oss(a: Architecture) -> dict[str, Any]:
    moe = _moe(a)
    if moe.expert.activation != "clamped_swiglu":
        raise _LackingError(f"moe.expert.activation = {moe.expert.activation!r}")
    kinds = {True: "sliding_attention", False: "full_attention"}
    return _rotary(a) | {
        "head_dim": a.attention.head_dim,
        "attention_bias": a.attention.qkv_bias,
        "hidden_act": "silu",
        "swiglu_limit": moe.expert.clamp,
        "intermediate_size": moe.expert.d_ff,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "layer_types": [kinds[a.is_window_layer(i)] for i in range(a.n_layers)],
        "sliding_window": a.attention.window,
    }


def _deepseek_v3(a: Architecture) -> dict[str, Any]:
    moe, mla, rope = _moe(a), a.attention.mla, a.attention.rope
    if mla is None or rope is None:
        raise _LackingError("attention that is not latent (attention.mla = None)")
    if a.norm.eps != MLA_NORM_EPS:
        raise _LackingError(f"norm.eps = {a.norm.eps} (the norms of its latents keep {MLA_NORM_EPS})")
    if moe.shared is None or moe.shared.d_ff % moe.expert.d_ff:
        raise _LackingError("moe.shared.d_ff that is no multiple of moe.expert.d_ff")
    return _rotary(a) | {
        "hidden_act": _activation(moe.expert),
        "attention_bias": a.attention.qkv_bias,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_interleave": rope.layout == "interleaved",
        "intermediate_size": moe.expert.d_ff if a.ffn is None else a.ffn.d_ff,
        "moe_intermediate_size": moe.expert.d_ff,
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared.d_ff // moe.expert.d_ff,
        "first_k_dense_replace": moe.first_dense,
        "n_group": moe.router.n_groups,
        "topk_group": moe.router.topk_groups,
        "norm_topk_prob": moe.router.normalise,
        "routed_scaling_factor": moe.router.scaling_factor,
    }


def _llama(a: Architecture) -> dict[str, Any]:
    ffn = _dense(a)
    return _rotary(a) | {
        "head_dim": a.attention.head_dim,
        "hidden_act": _activation(ffn),
        "attention_bias": a.attention.qkv_bias,
        "mlp_bias": ffn.bias,
        "intermediate_size": ffn.d_ff,
    }


def _gpt2(a: Architecture) -> dict[str, Any]:
    ffn = _dense(a)
    return {
        "vocab_size": a.vocab_size,
        "n_positions": a.max_positions,
        "n_embd": a.d_model,
        "n_layer": a.n_layers,
        "n_head": a.attention.n_heads,
        "n_inner": ffn.d_ff,
        "activation_function": "gelu_new" if ffn.activation == "gelu_tanh" else _activation(ffn),
        "layer_norm_epsilon": a.norm.eps,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _dbrx(a: Architecture) -> dict[str, Any]:
    moe, rope = _moe(a), a.attention.rope
    if rope is None or rope.scaling is not None:
        raise _LackingError("attention.rope.scaling, or positions other than rope")
    return {
        "vocab_size": a.vocab_size,
        "d_model": a.d_model,
        "n_layers": a.n_layers,
        "n_heads": a.attention.n_heads,
        "max_seq_len": a.max_positions,
        "tie_word_embeddings": a.tie_embeddings,
        "rope_theta": rope.theta,
        "attn_config": {
            "kv_n_heads": a.attention.n_kv_heads,
            "clip_qkv": a.attention.qkv_clip,
            "rope_theta": rope.theta,
        },
        "ffn_config": {
            "ffn_hidden_size": moe.expert.d_ff,
            "ffn_act_fn": {"name": _activation(moe.expert)},
            "moe_num_experts": moe.n_experts,
            "moe_top_k": moe.top_k,
            "moe_normalize_expert_weights": 1.0 if moe.router.normalise else None,
        },
    }


EXPORTS: Mapping[str, Callable[[Architecture], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "llama": _llama,
    "gpt2": _gpt2,
    "dbrx": _dbrx,
}
