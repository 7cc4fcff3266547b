"""What families share: the description of a family, and the parts of an architecture read from common keys.

Defaults are those of the configuration classes of transformers 5.23.0 (models/*/configuration_*.py), because
config.json files rely on them; sizes have none here, although the classes have some: a file without its
sizes is nobody's model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.spec.architecture import (
    Activation,
    Architecture,
    Attention,
    AuxiliaryLoss,
    DType,
    FeedForward,
    Moe,
    Norm,
    Rope,
    Router,
)
from harness.spec.families.fields import MAX_LAYERS, Fields

Kind = Literal["full", "window"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES: Mapping[str, DType] = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
}
LAYER_TYPES: Mapping[str, Kind] = {"full_attention": "full", "sliding_attention": "window"}

BASE: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": None,
}
"""Keys that nearly every family has."""

IGNORED = frozenset(
    {
        *("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "name_or_path"),
        *(
            "_commit_hash",
            "quantization_config",
            "initializer_range",
            "use_cache",
            "pretraining_tp",
            "ep_size",
        ),
        *("gradient_checkpointing", "torchscript", "chunk_size_feed_forward", "tokenizer_class", "prefix"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("output_router_logits", "output_attentions", "output_hidden_states", "output_scores"),
        *(
            "return_dict",
            "return_dict_in_generate",
            "problem_type",
            "finetuning_task",
            "task_specific_params",
        ),
        *("id2label", "label2id", "num_labels", "max_length", "min_length", "do_sample", "early_stopping"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "num_return_sequences"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("exponential_decay_length_penalty", "remove_invalid_values"),
    }
)
"""Keys that leave parameters and forward pass of any family alone: names, tokens, generation, and how many
bits the weights were quantised to."""

TRAINING_NOISE = "noise in training only"
MTP = "multi-token prediction modules, which stand beside the model"
LEFT_OUT: Mapping[str, str] = dict.fromkeys(
    (
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "attn_pdrop"),
        *("router_jitter_noise", "moe_jitter_eps"),
    ),
    TRAINING_NOISE,
)
"""Keys of any family for something that is no part of a spec, and what that is."""

ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_encoder_decoder": ((False,), "an encoder"),
    "add_cross_attention": ((False,), "cross-attention"),
    "cross_attention_hidden_size": ((None,), "cross-attention"),
    "is_decoder": ((False, True), "a switch"),
    "tie_encoder_decoder": ((False,), "an encoder"),
    "pruned_heads": (({}, None), "heads of unequal number"),
}
"""Keys of any family with the values for which a spec is exact; absence is the first of them."""


@dataclass(frozen=True)
class Family:
    """One model_type: what its keys default to, what they may be called, and what they mean."""

    model_type: str
    build: Callable[[Fields], Architecture]
    defaults: Mapping[str, Any]
    """Of keys that its configuration class in transformers has."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys whose absence need not be told, and what it means: of published files alone, or of training."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    """Key -> (values for which the spec is exact, why no other); absence is the first of them."""
    ignored: frozenset[str] = frozenset()
    """Keys that leave parameters and forward pass alone."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Keys for something that is no part of a spec, and what that is: the written spec says so."""
    ships_code: bool = False
    """Published files of the family name modelling code of their own (auto_map)."""


def decoder(
    f: Fields,
    attention: Attention,
    *,
    ffn: FeedForward | None = None,
    moe: Moe | None = None,
    loss: AuxiliaryLoss | None = None,
) -> Architecture:
    """A pre-norm RMSNorm decoder with rotary positions, from the usual names of its sizes."""
    return Architecture(
        d_model=f.count("hidden_size"),
        n_layers=f.count("num_hidden_layers", most=MAX_LAYERS),
        vocab_size=f.count("vocab_size"),
        max_positions=f.count("max_position_embeddings"),
        tie_embeddings=f.flag("tie_word_embeddings"),
        norm=Norm(kind="rmsnorm", eps=f.number("rms_norm_eps")),
        attention=attention,
        ffn=ffn,
        moe=moe,
        auxiliary_loss=loss or AuxiliaryLoss(),
        dtype=dtype(f),
    )


def dtype(f: Fields) -> DType:
    """Of the weights before any quantisation; bfloat16 if the file names none."""
    return "bfloat16" if f.value("dtype") is None else f.word("dtype", DTYPES)


def heads(f: Fields) -> tuple[int, int, int]:
    """(n_heads, n_kv_heads, head_dim): null key/value heads are as many as heads, a null head_dim divides.

    A family that lets head_dim be absent lets it be null; in the others it is a size, which must be given.
    """
    n_heads, d_model = f.count("num_attention_heads"), f.count("hidden_size")
    n_kv_heads = f.count_or_none("num_key_value_heads") or n_heads
    if n_heads % n_kv_heads:
        wrong = f"{n_kv_heads} does not divide num_attention_heads = {n_heads}"
        raise f.refuse("num_key_value_heads", wrong, "every key/value head serves as many query heads")
    head_dim = f.count_or_none("head_dim") if "head_dim" in f.defaults else f.count("head_dim")
    if head_dim is None:
        head_dim = d_model // n_heads
        if d_model % n_heads:
            wrong = f"{n_heads} does not divide hidden_size = {d_model}"
            raise f.refuse("num_attention_heads", wrong, "give head_dim, or sizes that divide")
    return n_heads, n_kv_heads, head_dim


def attention(
    f: Fields,
    rope: Rope,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: Literal["none", "head", "width"] = "none",
    windows: tuple[int | None, Sequence[Kind]] = (None, ("full",)),
    sinks: bool = False,
) -> Attention:
    """Grouped-query attention; `windows` is what one of the functions below returns."""
    n_heads, n_kv_heads, head_dim = heads(f)
    return Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        sinks=sinks,
        window=windows[0],
        pattern=tuple(windows[1]),
        rope=rope,
    )


def window_everywhere(f: Fields) -> tuple[int | None, Sequence[Kind]]:
    """Mistral: a window, unless null, is on every layer."""
    window = f.count_or_none("sliding_window")
    return window, ("full",) if window is None else ("window",)


def windows_by_layer(
    f: Fields, window: int | None, default: Callable[[int], bool]
) -> tuple[int | None, Sequence[Kind]]:
    """By `layer_types`, or without it by `default` (layer -> is a window layer)."""
    n_layers = f.count("num_hidden_layers", most=MAX_LAYERS)
    stated = f.words("layer_types", LAYER_TYPES, n_layers)
    kinds: Sequence[Kind] = stated or [("window" if default(i) else "full") for i in range(n_layers)]
    if "window" not in kinds:
        return None, ("full",)
    if window is None:
        raise f.refuse("sliding_window", "there are window layers without a window", "give its width")
    return window, shortest_period(kinds)


def shortest_period(kinds: Sequence[Kind]) -> Sequence[Kind]:
    """The shortest beginning of `kinds` that, repeated from layer 0, gives all of it."""
    periods = (p for p in range(1, len(kinds)) if kinds[p:] == kinds[:-p])
    return kinds[: next(periods, len(kinds))]


def routed(
    f: Fields,
    expert: FeedForward,
    router: Router,
    *,
    experts: str,
    layers: tuple[int, int, int] = (0, 1, 0),
    shared: FeedForward | None = None,
    shared_gate: bool = False,
    top_k: str = "num_experts_per_tok",
) -> Moe:
    """A mixture of experts; `experts` and `top_k` are keys, layers is (first_dense, period, offset)."""
    n_experts, chosen = f.count(experts), f.count(top_k)
    eligible = n_experts // router.n_groups * router.topk_groups
    if chosen > eligible:
        raise f.refuse(top_k, f"{chosen} experts of {eligible} eligible ones", "choose at most those")
    return Moe(
        n_experts=n_experts,
        top_k=chosen,
        expert=expert,
        shared=shared,
        shared_gate=shared_gate,
        router=router,
        first_dense=layers[0],
        period=layers[1],
        offset=layers[2],
    )


def balanced(f: Fields, key: str = "router_aux_loss_coef") -> AuxiliaryLoss:
    """transformers' load_balancing_loss_func under the coefficient at `key`."""
    weight = f.weight(key)
    return AuxiliaryLoss(balance="huggingface", balance_coefficient=weight) if weight else AuxiliaryLoss()
