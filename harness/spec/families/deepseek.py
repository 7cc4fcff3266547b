"""Families with DeepSeek's experts: deepseek_v2, deepseek_v3, kimi_k2 and, with grouped queries, glm4_moe."""

from __future__ import annotations

from typing import Any

from harness.spec.architecture import Architecture, Attention, AuxiliaryLoss, FeedForward, Mla, Router
from harness.spec.families.experts import dense_unless_all_routed, expert
from harness.spec.families.fields import MAX_LAYERS, Fields
from harness.spec.families.parts import ACTIVATIONS, BASE, MTP, Family, attention, decoder, heads, routed
from harness.spec.families.rope import ROPE, rope


def leading_dense(f: Fields) -> tuple[int, int, int]:
    """DeepSeek and GLM: the first first_k_dense_replace layers are dense, all others route."""
    n_layers, first = f.count("num_hidden_layers", most=MAX_LAYERS), f.count("first_k_dense_replace", least=0)
    if first >= n_layers:
        raise f.refuse(
            "first_k_dense_replace", f"{first} of {n_layers} layers leave none with experts", "lower it"
        )
    return first, 1, 0


def shared_experts(f: Fields, *, bias: bool = False) -> FeedForward | None:
    """n_shared_experts of the routed experts' width, as the one network that they are together."""
    count, width = f.count("n_shared_experts", least=0), f.count("moe_intermediate_size")
    if count == 0:
        return None
    return FeedForward(d_ff=count * width, activation=f.word("hidden_act", ACTIVATIONS), bias=bias)


def groups(f: Fields) -> tuple[int, int]:
    """(n_group, topk_group), which must fit the number of experts."""
    n_experts, n_groups, chosen = f.count("n_routed_experts"), f.count("n_group"), f.count("topk_group")
    if n_experts % n_groups:
        raise f.refuse(
            "n_group", f"{n_groups} does not divide n_routed_experts = {n_experts}", "make groups equal"
        )
    if chosen > n_groups:
        raise f.refuse("topk_group", f"{chosen} groups of n_group = {n_groups}", "choose at most those")
    return n_groups, chosen


def sigmoid_router(f: Fields) -> Router:
    """DeepSeek-V3's router: sigmoid scores, a correction bias that selects, groups by their best two."""
    n_groups, chosen = groups(f)
    if n_groups > 1 and f.count("n_routed_experts") < 2 * n_groups:
        raise f.refuse("n_group", "a group of one expert has no best two", "make groups larger")
    return Router(
        score="sigmoid",
        normalise=f.flag("norm_topk_prob"),
        correction_bias=True,
        n_groups=n_groups,
        topk_groups=chosen,
        scaling_factor=f.number("routed_scaling_factor"),
    )


def _glm4_moe(f: Fields) -> Architecture:
    layers = leading_dense(f)
    moe = routed(
        f,
        expert(f, "moe_intermediate_size"),
        sigmoid_router(f),
        experts="n_routed_experts",
        layers=layers,
        shared=shared_experts(f),
    )
    made = attention(
        f,
        rope(f, heads(f)[2], partial=0.5),
        qkv_bias=f.flag("attention_bias"),
        qk_norm="head" if f.flag("use_qk_norm") else "none",
    )
    return decoder(f, made, ffn=dense_unless_all_routed(f, layers), moe=moe)


def latent_attention(f: Fields, *, interleaved: bool) -> Attention:
    """MLA. Raises ConfigError if its keys say anything that the latent norms or biases cannot follow."""
    n_heads = f.count("num_attention_heads")
    kv_heads = f.count_or_none("num_key_value_heads")
    if kv_heads not in (None, n_heads):
        wrong = f"{kv_heads} differs from num_attention_heads = {n_heads}"
        raise f.refuse("num_key_value_heads", wrong, "latent attention has as many")
    nope, turned = f.count("qk_nope_head_dim"), f.count("qk_rope_head_dim")
    for key, width in (("qk_head_dim", nope + turned), ("head_dim", turned)):
        if f.count_or_none(key) not in (None, width):
            raise f.refuse(key, f"{f.count(key)} contradicts the widths of its parts", f"it must be {width}")
    rotary = rope(f, turned, layout="interleaved" if interleaved else "half")
    return Attention(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=nope + turned,
        rope=rotary,
        mla=Mla(
            q_lora_rank=f.count_or_none("q_lora_rank"),
            kv_lora_rank=f.count("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=turned,
            v_head_dim=f.count("v_head_dim"),
        ),
    )


def sequence_loss(f: Fields) -> AuxiliaryLoss:
    """DeepSeek's balance loss: over each sequence, or (seq_aux = false) over the batch."""
    weight, by_sequence = f.weight("aux_loss_alpha"), f.flag("seq_aux")
    if not weight:
        return AuxiliaryLoss()
    return AuxiliaryLoss(balance="sequence" if by_sequence else "switch", balance_coefficient=weight)


def _deepseek_v3(f: Fields) -> Architecture:
    layers = leading_dense(f)
    moe = routed(
        f,
        expert(f, "moe_intermediate_size"),
        sigmoid_router(f),
        experts="n_routed_experts",
        layers=layers,
        shared=shared_experts(f),
    )
    made = latent_attention(f, interleaved=f.flag("rope_interleave"))
    return decoder(f, made, ffn=dense_unless_all_routed(f, layers), moe=moe, loss=sequence_loss(f))


def softmax_router(f: Fields) -> Router:
    """DeepSeek-V2's router: softmax scores that are never renormalised, groups by their best one."""
    scaling = f.number("routed_scaling_factor")
    if not f.word("topk_method", {"greedy": False, "group_limited_greedy": True}):
        for key in ("n_group", "topk_group"):  # without effect under greedy selection
            f.count_or_none(key)
        return Router(normalise=False, scaling_factor=scaling)
    n_groups, chosen = groups(f)
    return Router(
        normalise=False, n_groups=n_groups, topk_groups=chosen, group_score="max", scaling_factor=scaling
    )


def _deepseek_v2(f: Fields) -> Architecture:
    layers, bias = leading_dense(f), f.flag("mlp_bias")
    moe = routed(
        f,
        expert(f, "moe_intermediate_size"),
        softmax_router(f),
        experts="n_routed_experts",
        layers=layers,
        shared=shared_experts(f, bias=bias),
    )
    return decoder(
        f,
        latent_attention(f, interleaved=True),
        ffn=dense_unless_all_routed(f, layers, bias=bias),
        moe=moe,
        loss=sequence_loss(f),
    )


DEEPSEEK: dict[str, Any] = {**BASE, **ROPE}
DEEPSEEK_EXTRA = {"aux_loss_alpha": None, "seq_aux": True, "head_dim": None, "qk_head_dim": None}
DEEPSEEK_ONLY = {
    "attention_bias": ((False,), "biases inside latent attention"),
    "rms_norm_eps": ((1e-6,), "the latents' norms have 1e-6 in any case"),
    "moe_layer_freq": ((1,), "every layer after the first ones routes"),
}
DEEPSEEK_LEFT_OUT = {"num_nextn_predict_layers": MTP, "num_mtp_layers": MTP}


def _v3(model_type: str) -> Family:
    return Family(
        model_type,
        _deepseek_v3,
        {
            **DEEPSEEK,
            "rope_interleave": True,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
        },
        extra=DEEPSEEK_EXTRA,
        aliases={"num_local_experts": "n_routed_experts"},
        only={
            **DEEPSEEK_ONLY,
            "topk_method": (("noaux_tc",), "the family selects with a correction bias"),
            "scoring_func": (("sigmoid",), "the family's scores are sigmoids"),
        },
        left_out=DEEPSEEK_LEFT_OUT,
        ships_code=True,
    )


FAMILIES = (
    _v3("deepseek_v3"),
    _v3("kimi_k2"),
    Family(
        "deepseek_v2",
        _deepseek_v2,
        {
            **DEEPSEEK,
            "num_key_value_heads": None,
            "mlp_bias": False,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
        },
        extra=DEEPSEEK_EXTRA,
        aliases={"num_experts": "n_routed_experts"},
        only={
            **DEEPSEEK_ONLY,
            "scoring_func": (("softmax",), "the family's scores are a softmax"),
            "norm_topk_prob": ((False,), "transformers and DeepSeek's own code differ when it is true"),
        },
        left_out=DEEPSEEK_LEFT_OUT,
        ships_code=True,
    ),
    Family(
        "glm4_moe",
        _glm4_moe,
        {
            **BASE,
            **ROPE,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "use_qk_norm": False,
        },
        extra={"head_dim": None, "partial_rotary_factor": None},
        aliases={"num_local_experts": "n_routed_experts"},
        only={
            "topk_method": (("noaux_tc",), "the family selects with a correction bias"),
            "scoring_func": (("sigmoid",), "the family's scores are sigmoids"),
        },
        left_out=DEEPSEEK_LEFT_OUT,
    ),
)
