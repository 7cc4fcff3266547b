"""Families without experts: llama, mistral, qwen2, qwen3, gpt2."""

from __future__ import annotations

from harness.spec.architecture import Architecture, Attention, FeedForward, Norm
from harness.spec.families.fields import MAX_LAYERS, Fields
from harness.spec.families.parts import (
    ACTIVATIONS,
    BASE,
    Family,
    attention,
    decoder,
    dtype,
    heads,
    window_everywhere,
    windows_by_layer,
)
from harness.spec.families.rope import ROPE, rope

WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}


def gated(f: Fields, *, bias: bool = False) -> FeedForward:
    """The dense SwiGLU (or GeGLU, ...) network of `intermediate_size`."""
    return FeedForward(
        d_ff=f.count("intermediate_size"), activation=f.word("hidden_act", ACTIVATIONS), bias=bias
    )


def used_window(f: Fields) -> int | None:
    """Qwen: a window counts only if use_sliding_window is true; an unused one may be 0."""
    used = f.flag("use_sliding_window")
    if f.value("sliding_window") is None:
        return None
    window = f.count("sliding_window", least=1 if used else 0)
    return window if used else None


def _llama(f: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    made = attention(f, rope(f, heads(f)[2]), qkv_bias=bias, o_bias=bias)
    return decoder(f, made, ffn=gated(f, bias=f.flag("mlp_bias")))


def _mistral(f: Fields) -> Architecture:
    return decoder(f, attention(f, rope(f, heads(f)[2]), windows=window_everywhere(f)), ffn=gated(f))


def _qwen(f: Fields, *, qkv_bias: bool, o_bias: bool, is_3: bool) -> Architecture:
    window = used_window(f)
    first = f.count("max_window_layers", least=0)
    windows = windows_by_layer(f, window, lambda layer: window is not None and layer >= first)
    made = attention(
        f,
        rope(f, heads(f)[2]),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm="head" if is_3 else "none",
        windows=windows,
    )
    return decoder(f, made, ffn=gated(f))


def _qwen2(f: Fields) -> Architecture:
    return _qwen(f, qkv_bias=True, o_bias=False, is_3=False)


def _qwen3(f: Fields) -> Architecture:
    bias = f.flag("attention_bias")
    return _qwen(f, qkv_bias=bias, o_bias=bias, is_3=True)


def _gpt2(f: Fields) -> Architecture:
    d_model, n_heads = f.count("n_embd"), f.count("n_head")
    if d_model % n_heads:
        raise f.refuse("n_head", f"{n_heads} does not divide n_embd = {d_model}", "give sizes that divide")
    positions = f.count("n_positions")
    if f.value("n_ctx") is not None and f.count("n_ctx") != positions:
        raise f.refuse(
            "n_ctx", f"{f.count('n_ctx')} differs from n_positions = {positions}", "keep one of the two"
        )
    head_dim = d_model // n_heads
    ffn = FeedForward(
        d_ff=f.count_or_none("n_inner") or 4 * d_model,
        gated=False,
        activation=f.word("activation_function", ACTIVATIONS),
        bias=True,
    )
    return Architecture(
        d_model=d_model,
        n_layers=f.count("n_layer", most=MAX_LAYERS),
        vocab_size=f.count("vocab_size"),
        max_positions=positions,
        tie_embeddings=f.flag("tie_word_embeddings"),
        positions="learned",
        norm=Norm(kind="layernorm", eps=f.number("layer_norm_epsilon"), bias=True),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=head_dim,
            qkv_bias=True,
            o_bias=True,
            scale=None if f.flag("scale_attn_weights") else 1.0,
        ),
        ffn=ffn,
        dtype=dtype(f),
    )


FAMILIES = (
    Family(
        "llama",
        _llama,
        {
            **BASE,
            **ROPE,
            "num_key_value_heads": None,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    Family(
        "mistral",
        _mistral,
        {**BASE, **ROPE, "head_dim": None, "sliding_window": 4096},
    ),
    Family(
        "qwen2",
        _qwen2,
        {**BASE, **ROPE, **WINDOWED},
        extra={"head_dim": None},
        only={"use_mrope": ((False,), "positions in three axes")},
    ),
    Family(
        "qwen3",
        _qwen3,
        {**BASE, **ROPE, **WINDOWED, "attention_bias": False},
    ),
    Family(
        "gpt2",
        _gpt2,
        {
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "dtype": None,
        },
        extra={"n_ctx": None},
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        only={
            "scale_attn_by_inverse_layer_idx": ((False,), "a scale for each layer"),
            "reorder_and_upcast_attn": ((False,), "a precision for attention alone"),
        },
        ignored=frozenset(
            {
                *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
                "summary_first_dropout",
            }
        ),
    ),
)
