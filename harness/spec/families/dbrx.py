"""The family dbrx: sizes in two nested objects, LayerNorm without bias, clipped projections."""

from __future__ import annotations

from harness.spec.architecture import Architecture, Attention, FeedForward, Norm, Router
from harness.spec.families.fields import MAX_LAYERS, ConfigError, Fields
from harness.spec.families.parts import ACTIVATIONS, IGNORED, LEFT_OUT, ONLY, Family, balanced, dtype, routed
from harness.spec.families.rope import ROPE, rope

DBRX_FFN = {
    "uniform_expert_assignment": False,
    "hidden_size": None,
    "ffn_act_fn": None,
    "moe_loss_weight": 0.01,
    "moe_normalize_expert_weights": 1.0,
}

NOT_OF_THE_PART = frozenset({*IGNORED, *LEFT_OUT, *ONLY, "tie_word_embeddings", "torch_dtype", "dtype"})
"""Keys that files of transformers 4 repeat in every nested object, where they have no meaning."""


def _dbrx(f: Fields) -> Architecture:
    attn = Fields(f.table("attn_config") or {}, {"clip_qkv": None}, prefix="attn_config.")
    ffn = Fields(f.table("ffn_config") or {}, DBRX_FFN, prefix="ffn_config.")
    d_model, n_heads = f.count("hidden_size"), f.count("num_attention_heads")
    n_kv_heads, theta = attn.count("kv_n_heads"), attn.number("rope_theta")
    if d_model % n_heads:
        raise f.refuse(
            "num_attention_heads", f"{n_heads} does not divide d_model = {d_model}", "make it divide"
        )
    if n_heads % n_kv_heads:
        raise attn.refuse("kv_n_heads", f"{n_kv_heads} does not divide n_heads = {n_heads}", "make it divide")
    turned = rope(f, d_model // n_heads, theta=theta)
    if turned.theta != theta:
        raise attn.refuse(
            "rope_theta", f"{theta:g} contradicts {turned.theta:g} outside attn_config", "keep one"
        )
    if f.count_or_none("num_key_value_heads") not in (None, n_kv_heads):
        raise f.refuse("num_key_value_heads", "it differs from attn_config.kv_n_heads", "keep one of the two")
    if ffn.value("hidden_size") is not None and ffn.count("hidden_size") != d_model:
        raise ffn.refuse("hidden_size", f"it differs from d_model = {d_model}", "keep one of the two")
    ffn.only("uniform_expert_assignment", (False,), "routing by turns")
    ffn.only("moe_normalize_expert_weights", (1.0, None), "weights divided by a norm other than their sum")
    act = Fields(ffn.table("ffn_act_fn") or {}, {"name": "silu"}, prefix="ffn_config.ffn_act_fn.")
    network = FeedForward(d_ff=ffn.count("ffn_hidden_size"), activation=act.word("name", ACTIVATIONS))
    router = Router(normalise=ffn.value("moe_normalize_expert_weights") is not None)
    moe = routed(ffn, network, router, experts="moe_num_experts", top_k="moe_top_k")
    loss = balanced(ffn, "moe_loss_weight")
    if (
        f.value("router_aux_loss_coef") is not None
        and f.weight("router_aux_loss_coef") != loss.balance_coefficient
    ):
        raise f.refuse(
            "router_aux_loss_coef", "it differs from ffn_config.moe_loss_weight", "keep one of the two"
        )
    made = Architecture(
        d_model=d_model,
        n_layers=f.count("num_hidden_layers", most=MAX_LAYERS),
        vocab_size=f.count("vocab_size"),
        max_positions=f.count("max_position_embeddings"),
        norm=Norm(kind="layernorm"),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=d_model // n_heads,
            qkv_clip=attn.number_or_none("clip_qkv"),
            rope=turned,
        ),
        moe=moe,
        auxiliary_loss=loss,
        dtype=dtype(f),
    )
    for part in (attn, ffn, act):
        for key in part.leftovers(NOT_OF_THE_PART):
            raise ConfigError(part.prefix + key, "a spec knows no such key of dbrx", "remove it")
    return made


FAMILIES = (
    Family(
        "dbrx",
        _dbrx,
        {**ROPE, "dtype": None},
        aliases={
            "d_model": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_layers": "num_hidden_layers",
            "max_seq_len": "max_position_embeddings",
        },
        only={"tie_word_embeddings": ((False,), "the family never ties them")},
        extra={"num_key_value_heads": None, "router_aux_loss_coef": None},
        ships_code=True,
    ),
)
