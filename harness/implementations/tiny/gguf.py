"""A tiny model as a GGUF file of float32 that llama.cpp loads.

Letters: D d_model, H heads, h head_dim, F d_ff, E experts. Names and keys are those of the package `gguf`,
which llama.cpp publishes; layouts are those that its converter writes (conversion/llama.py there).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.implementations.registry import AdapterError
from harness.implementations.tiny.model import TinyModel
from harness.implementations.tiny.vocabulary import CHAT_TEMPLATE, EOS, characters
from harness.reference.rope import frequencies
from harness.spec.architecture import Architecture

ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
"""Family of transformers -> architecture of llama.cpp."""
PAIRS_NEIGHBOURS = ("llama",)
"""Architectures of llama.cpp whose rotary embedding pairs dimensions 2j and 2j + 1."""
NORMAL = 1
"""The type of a token that is text (gguf.TokenType.NORMAL)."""

NAMES = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "unembedding": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
    "moe.router": "ffn_gate_inp",
    "moe.experts.gate": "ffn_gate_exps",
    "moe.experts.up": "ffn_up_exps",
    "moe.experts.down": "ffn_down_exps",
}
"""Canonical name without its layer and `.weight` -> name in GGUF."""


def write(model: TinyModel, path: Path) -> None:
    """Write the file. Raises AdapterError without gguf, or naming what the writer lacks."""
    name = _architecture(model)
    try:
        import gguf
    except ImportError as error:
        raise AdapterError(f"gguf cannot be imported ({error}): pip install 'moe-harness[gguf]'") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, name)
    _sizes(writer, model.architecture)
    _vocabulary(writer, model.architecture.vocab_size)
    writer.add_name(model.name)
    for key, tensor in tensors(model):
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: TinyModel) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and float32 tensors, [out, in] or [E, out, in]."""
    a = model.architecture
    rope = a.attention.rope
    assert rope is not None  # _architecture refuses a model without one
    if rope.scaling is not None:
        plain = rope.model_copy(update={"scaling": None})
        kept, _ = frequencies(plain, a.attention.head_dim, a.max_positions)
        scaled, _ = frequencies(rope, a.attention.head_dim, a.max_positions)
        yield "rope_freqs.weight", torch.tensor([k / s for k, s in zip(kept, scaled, strict=True)])
    neighbours = ARCHITECTURES[model.family] in PAIRS_NEIGHBOURS
    for key, tensor in model.weights.items():
        layer, name = _place(key)
        paired = neighbours and name in ("attention.q", "attention.k")
        yield (
            f"{layer}{NAMES[name]}.weight",
            neighbouring(tensor, a.attention.head_dim) if paired else tensor,
        )


def neighbouring(rows: Tensor, head_dim: int) -> Tensor:
    """[H h, D], dimensions j and j + h/2 paired -> the same with the pair side by side."""
    pairs: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _architecture(model: TinyModel) -> str:
    a, moe = model.architecture, model.architecture.moe
    unmapped = sorted(key for key in model.weights if _place(key)[1] not in NAMES)  # biases, sinks
    rope = a.attention.rope
    lacking = {
        f"the family {model.family}": model.family not in ARCHITECTURES,
        f"a place for {', '.join(unmapped[:3])}": bool(unmapped),
        "attention.window": a.attention.window is not None,
        "attention.qkv_clip": a.attention.qkv_clip is not None,
        "attention.rope.scaling other than llama3": rope is not None
        and rope.scaling is not None
        and rope.scaling.kind != "llama3",
        "dense layers beside those with experts": moe is not None
        and not all(map(a.is_moe_layer, range(a.n_layers))),
        "weights of the selected experts that are not normalised": model.family == "qwen3_moe"
        and moe is not None
        and not moe.router.normalise,
    }
    missing = [what for what, is_missing in lacking.items() if is_missing]
    if missing:
        raise AdapterError(f"as GGUF nothing can be written of {missing[0]}; --format transformers may do")
    return ARCHITECTURES[model.family]


def _place(key: str) -> tuple[str, str]:
    """GGUF's prefix of the layer, and the canonical name without layer and `.weight`."""
    name = key.removesuffix(".weight")
    if not name.startswith("layers."):
        return "", name
    _, index, name = name.split(".", 2)
    return f"blk.{index}.", name


def _sizes(writer: Any, a: Architecture) -> None:
    attention, moe, rope = a.attention, a.moe, a.attention.rope
    assert rope is not None
    writer.add_block_count(a.n_layers)
    writer.add_context_length(a.max_positions)
    writer.add_embedding_length(a.d_model)
    writer.add_head_count(attention.n_heads)
    writer.add_head_count_kv(attention.n_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(a.norm.eps)
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_vocab_size(a.vocab_size)
    if moe is not None:
        writer.add_feed_forward_length(moe.expert.d_ff)
        writer.add_expert_feed_forward_length(moe.expert.d_ff)
        writer.add_expert_count(moe.n_experts)
        writer.add_expert_used_count(moe.top_k)
    elif a.ffn is not None:
        writer.add_feed_forward_length(a.ffn.d_ff)


def _vocabulary(writer: Any, size: int) -> None:
    # The SentencePiece kind looks every character up as it is, and merges only what is in the vocabulary.
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(characters(size)))
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([NORMAL] * size)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(size - 1)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
