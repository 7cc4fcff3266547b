"""Models and runs of published tables whose specs are not shipped: only what their figures need."""

from __future__ import annotations

from harness.spec.architecture import Architecture, Attention, FeedForward, Moe, Norm, Rope

CONTEXT = 2048
"""Tokens of a sequence in all these runs."""
VOCABULARY = 51_200


def gpt(hidden: int, layers: int, heads: int, vocabulary: int = VOCABULARY) -> Architecture:
    """A GPT as in Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473, section 5)."""
    return Architecture(
        d_model=hidden,
        n_layers=layers,
        vocab_size=vocabulary,
        max_positions=CONTEXT,
        tie_embeddings=True,
        positions="learned",
        norm=Norm(kind="layernorm", bias=True),
        attention=Attention(
            n_heads=heads, n_kv_heads=heads, head_dim=hidden // heads, qkv_bias=True, o_bias=True
        ),
        ffn=FeedForward(d_ff=4 * hidden, gated=False, activation="gelu", bias=True),
        dtype="float16",
    )


def gshard(experts: int, layers: int) -> Architecture:
    """Experts in every other layer (GShard, Lepikhin et al. 2020, arXiv 2006.16668, section 3 and table 1):
    width 1024, d_ff 8192, two matrices, top-2."""
    network = FeedForward(d_ff=8192, gated=False, activation="relu")
    return Architecture(
        d_model=1024,
        n_layers=layers,
        vocab_size=64_000,
        max_positions=1024,
        positions="none",
        attention=Attention(n_heads=16, n_kv_heads=16, head_dim=128),
        ffn=network,
        moe=Moe(n_experts=experts, top_k=2, expert=network, period=2, offset=1),
    )


def leaked(heads: int = 96, kv_heads: int | None = None) -> Architecture:
    """GPT-4's shape as the leak's expert and attention sizes agree on it: d_model 10752, d_ff four times
    that, two matrices, 16 experts of which 2, 120 layers; multi-head, unless `kv_heads` says less."""
    width = 10_752
    return Architecture(
        d_model=width,
        n_layers=120,
        vocab_size=100_352,
        max_positions=8192,
        attention=Attention(
            n_heads=heads, n_kv_heads=kv_heads or heads, head_dim=width // heads, rope=Rope()
        ),
        moe=Moe(n_experts=16, top_k=2, expert=FeedForward(d_ff=4 * width, gated=False, activation="gelu")),
        dtype="float16",
    )
