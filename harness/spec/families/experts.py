"""Families with experts and grouped queries: mixtral, qwen2_moe, qwen3_moe, olmoe, gpt_oss, minimax_m2."""

from __future__ import annotations

from harness.spec.architecture import Architecture, FeedForward, Router
from harness.spec.families.dense import WINDOWED, gated, used_window
from harness.spec.families.fields import MAX_LAYERS, Fields, same
from harness.spec.families.parts import (
    ACTIVATIONS,
    BASE,
    MTP,
    Family,
    attention,
    balanced,
    decoder,
    dtype,
    heads,
    routed,
    window_everywhere,
    windows_by_layer,
)
from harness.spec.families.rope import ROPE, rope

AUXILIARY = {"router_aux_loss_coef": 0.001}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def expert(f: Fields, width: str) -> FeedForward:
    """One gated expert as wide as the number at the key `width`."""
    return FeedForward(d_ff=f.count(width), activation=f.word("hidden_act", ACTIVATIONS))


def dense_unless_all_routed(
    f: Fields, layers: tuple[int, int, int], *, bias: bool = False
) -> FeedForward | None:
    """The dense network of the layers that are no MoE layers; its keys are checked in any case."""
    ffn = gated(f, bias=bias)
    return None if layers == (0, 1, 0) else ffn


def jitter(f: Fields) -> float:
    """The noise on routers in training; absent or null is none."""
    noise = f.weight("router_jitter_noise")
    if noise >= 1:
        raise f.refuse("router_jitter_noise", f"got {noise:g}", "it must be below 1")
    return noise


def _mixtral(f: Fields) -> Architecture:
    router = Router(jitter=jitter(f))
    moe = routed(f, expert(f, "intermediate_size"), router, experts="num_local_experts")
    made = attention(f, rope(f, heads(f)[2], theta=1e6), windows=window_everywhere(f))
    return decoder(f, made, moe=moe, loss=balanced(f))


def sparse_layers(f: Fields) -> tuple[int, int, int]:
    """Qwen: layer i routes if (i + 1) % decoder_sparse_step == 0 and mlp_only_layers does not list it."""
    n_layers, step = f.count("num_hidden_layers", most=MAX_LAYERS), f.count("decoder_sparse_step")
    listed = [] if f.value("mlp_only_layers") is None else f.value("mlp_only_layers")
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < n_layers for i in listed):
        raise f.refuse("mlp_only_layers", "is no list of layers", f"list numbers from 0 to {n_layers - 1}")
    candidates = range(step - 1, n_layers, step)
    dense = set(listed) & set(candidates)
    if len(dense) == len(candidates):
        key = "mlp_only_layers" if candidates else "decoder_sparse_step"
        raise f.refuse(key, "it leaves no layer with experts", "import a dense family instead")
    first = max(dense) + 1 if dense else 0
    if any(i not in dense for i in candidates if i < first):
        raise f.refuse(
            "mlp_only_layers", "the listed layers are not the first ones", "a spec has dense layers first"
        )
    return first, step, step - 1


def _qwen2_moe(f: Fields) -> Architecture:
    layers = sparse_layers(f)
    router = Router(normalise=f.flag("norm_topk_prob"))
    shared = expert(f, "shared_expert_intermediate_size")
    moe = routed(
        f,
        expert(f, "moe_intermediate_size"),
        router,
        experts="num_experts",
        layers=layers,
        shared=shared,
        shared_gate=True,
    )
    f.count("max_window_layers", least=0)
    window = used_window(f)
    if window is not None and f.value("layer_types") is None:
        # transformers 4 and 5 put the windows on different layers.
        raise f.refuse("use_sliding_window", "it is ambiguous which layers have windows", "give layer_types")
    made = attention(
        f,
        rope(f, heads(f)[2]),
        qkv_bias=f.flag("qkv_bias"),
        windows=windows_by_layer(f, window, lambda _: False),
    )
    return decoder(f, made, ffn=dense_unless_all_routed(f, layers), moe=moe, loss=balanced(f))


def _qwen3_moe(f: Fields) -> Architecture:
    layers, bias = sparse_layers(f), f.flag("attention_bias")
    router = Router(normalise=f.flag("norm_topk_prob"))
    moe = routed(f, expert(f, "moe_intermediate_size"), router, experts="num_experts", layers=layers)
    used = f.flag("use_sliding_window")
    if f.value("max_window_layers") is not None and f.count("max_window_layers", least=0) and used:
        # transformers 4 left the first of these layers without a window, transformers 5 does not.
        raise f.refuse(
            "max_window_layers", "it is ambiguous which layers have windows", "leave it out or make it 0"
        )
    window = used_window(f)
    made = attention(
        f,
        rope(f, heads(f)[2]),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=(window, ("full",) if window is None else ("window",)),
    )
    return decoder(f, made, ffn=dense_unless_all_routed(f, layers), moe=moe, loss=balanced(f))


def _olmoe(f: Fields) -> Architecture:
    n_heads, _, head_dim = heads(f)
    if n_heads * head_dim != f.count("hidden_size"):
        # The norms of queries and keys are as wide as hidden_size says, whatever head_dim says.
        raise f.refuse("head_dim", f"{n_heads} heads of {head_dim} are not hidden_size wide", "leave it out")
    bias = f.flag("attention_bias")
    router = Router(normalise=f.flag("norm_topk_prob"))
    moe = routed(f, expert(f, "intermediate_size"), router, experts="num_experts")
    made = attention(f, rope(f, head_dim), qkv_bias=bias, o_bias=bias, qk_norm="width")
    return decoder(f, made, moe=moe, loss=balanced(f))


def _gpt_oss(f: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    clamped = FeedForward(
        d_ff=f.count("intermediate_size"),
        activation="clamped_swiglu",
        bias=True,
        clamp=f.number("swiglu_limit"),
    )
    # The weights are a softmax of the selected logits, in the precision of the model.
    router = Router(order="after_topk", normalise=False, bias=True, dtype=dtype(f))
    moe = routed(f, clamped, router, experts="num_local_experts")
    windows = windows_by_layer(f, f.count_or_none("sliding_window"), lambda layer: layer % 2 == 0)
    turned = rope(f, heads(f)[2], theta=150000.0, absent=GPT_OSS_ROPE)
    made = attention(f, turned, qkv_bias=bias, o_bias=bias, windows=windows, sinks=True)
    original = f.count_or_none("initial_context_length")
    if original and turned.scaling and original != turned.scaling.original_max_positions:
        wrong = f"{original} differs from original_max_position_embeddings"
        raise f.refuse("initial_context_length", wrong, "keep one of the two")
    if f.count_or_none("experts_per_token") not in (None, moe.top_k):
        raise f.refuse("experts_per_token", f"it differs from num_experts_per_tok = {moe.top_k}", "keep one")
    return decoder(f, made, moe=moe, loss=balanced(f))


def _minimax_m2(f: Fields) -> Architecture:
    router = Router(score="sigmoid", correction_bias=True, jitter=jitter(f))
    moe = routed(f, expert(f, "intermediate_size"), router, experts="num_local_experts")
    head_dim, rotated = heads(f)[2], f.count_or_none("rotary_dim")
    turned = rope(f, head_dim, theta=5e6, partial=1.0 if rotated is None else rotated / head_dim)
    if rotated is not None and rotated != (turned.dim or head_dim):
        raise f.refuse("rotary_dim", f"{rotated} contradicts partial_rotary_factor", "keep one of the two")
    kinds = f.value("attn_type_list")
    if kinds is not None and not (isinstance(kinds, list) and all(same(kind, 1) for kind in kinds)):
        raise f.refuse(
            "attn_type_list", "a spec cannot express linear attention", "it must be 1 for every layer"
        )
    return decoder(f, attention(f, turned, qk_norm="width"), moe=moe)


QWEN_MOE = {
    **WINDOWED,
    **AUXILIARY,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}

FAMILIES = (
    Family(
        "mixtral",
        _mixtral,
        {
            **BASE,
            **ROPE,
            **AUXILIARY,
            "rms_norm_eps": 1e-5,
            "head_dim": None,
            "sliding_window": None,
        },
        extra={"router_jitter_noise": 0.0},
        aliases={"num_experts": "num_local_experts"},
    ),
    Family(
        "qwen2_moe",
        _qwen2_moe,
        {**BASE, **ROPE, **QWEN_MOE, "qkv_bias": True},
        extra={"head_dim": None},
        only={"use_mrope": ((False,), "positions in three axes")},
    ),
    Family(
        "qwen3_moe",
        _qwen3_moe,
        {
            **BASE,
            **ROPE,
            **{
                key: value
                for key, value in QWEN_MOE.items()
                if key not in ("layer_types", "max_window_layers")
            },
            "attention_bias": False,
        },
        extra={"head_dim": None, "max_window_layers": None},
        aliases={"num_local_experts": "num_experts"},
        only={
            "qkv_bias": ((False,), "attention_bias decides"),
            "use_qk_norm": ((True,), "the family always has these norms"),
            "shared_expert_intermediate_size": ((0, None), "the family has no shared expert"),
        },
    ),
    Family(
        "olmoe",
        _olmoe,
        {
            **BASE,
            **ROPE,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": None,
            "attention_bias": False,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
        extra={"head_dim": None},
        aliases={"num_local_experts": "num_experts"},
        only={"clip_qkv": ((None,), "it clips after the norms of queries and keys")},
    ),
    Family(
        "gpt_oss",
        _gpt_oss,
        {
            **{key: value for key, value in BASE.items() if key != "hidden_act"},
            **ROPE,
            **AUXILIARY,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "layer_types": None,
            "attention_bias": True,
            "swiglu_limit": 7.0,
        },
        extra={"initial_context_length": None, "experts_per_token": None},
        aliases={"num_experts": "num_local_experts"},
        only={
            "hidden_act": (("silu", "swish"), "the experts' activation is fixed"),
            "swiglu_alpha": ((1.702,), "the experts' activation is fixed"),
        },
    ),
    Family(
        "minimax_m2",
        _minimax_m2,
        {**BASE, **ROPE},
        extra={
            "rotary_dim": None,
            "partial_rotary_factor": None,
            "attn_type_list": None,
            "router_jitter_noise": 0.0,
        },
        aliases={"num_experts": "num_local_experts"},
        only={
            "scoring_func": (("sigmoid",), "the family's scores are sigmoids"),
            "use_routing_bias": ((True,), "the family has a correction bias"),
            "use_qk_norm": ((True,), "the family always has these norms"),
            "qk_norm_type": (("per_layer",), "the family's norms span the full width"),
            "shared_intermediate_size": ((0, None), "the family has no shared expert"),
            "sliding_window": ((None,), "the family has no windows"),
        },
        left_out={
            "num_mtp_modules": MTP,
            "use_mtp": MTP,
            "mtp_transformer_layers": MTP,
            "router_aux_loss_coef": "a loss on a softmax of logits whose sigmoids route",
        },
        ships_code=True,
    ),
)
