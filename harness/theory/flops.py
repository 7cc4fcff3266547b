"""Floating-point operations of a forward pass, by component; a multiply-add is 2.

Letters: B sequences, S tokens per sequence, C tokens already cached, D d_model, V vocab_size, L n_layers,
H n_heads, h head_dim, v width of one head's value (h, or v_head_dim under MLA), W attention window.

Only matrix products count (Kaplan et al. 2020, arXiv 2001.08361, table 1; PaLM, arXiv 2204.02311,
appendix B): norms, activations, softmax, rotary embedding, table look-ups and bias sums do not. A token
costs 2 FLOP per matrix parameter it meets, and 2 h + 2 v per head for every key it is multiplied with.

Which keys, is the convention `attention`:
  "full"    all C + S keys for each of the S queries, masked or not, on window layers too: what an eager
            implementation multiplies, and a FLOP counter sees;
  "causal"  only the pairs that the mask admits, at most W keys per query on a window layer: what has to be
            computed, and what one decode step costs.

How latent attention runs, is the variant `mla` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
  "expanded"    every new token's latent becomes keys and values once, and those are multiplied and cached;
  "recomputed"  latents are cached, and in every pass those of all C + S tokens become keys and values again
                (transformers 5): the same as "expanded" while nothing is cached;
  "absorbed"    the expansion is folded into query and output, and the latents themselves are multiplied.

Routed experts are counted dropless, top-k for every token: with a capacity factor this is the upper bound.
"""

from __future__ import annotations

from typing import Literal

from harness.spec.architecture import Architecture
from harness.theory import parameters

Pairs = Literal["full", "causal"]
Logits = Literal["all", "last"]
LatentAttention = Literal["expanded", "recomputed", "absorbed"]

COMPONENTS: tuple[str, ...] = (
    "attention.projections",
    "attention.scores",
    "attention.values",
    "router",
    "experts",
    "shared",
    "ffn",
    "unembedding",
)
"""Scores are queries times keys, values are attention weights times values; the rest are matrices."""


def n_window_layers(architecture: Architecture) -> int:
    """Layers that attend through the sliding window."""
    pattern = architecture.attention.pattern
    return sum(
        parameters.congruent(architecture.n_layers, len(pattern), place)
        for place, kind in enumerate(pattern)
        if kind == "window"
    )


def admitted_pairs(queries: int, cached: int, window: int | None) -> int:
    """Query-key pairs that a causal mask admits: the sum of min(cached + i, window) for i = 1 .. queries."""

    def triangle(n: int) -> int:
        inside = n if window is None else min(n, window)
        return inside * (inside + 1) // 2 + (n - inside) * inside

    return triangle(cached + queries) - triangle(cached)


def _forward(
    architecture: Architecture,
    tokens: int,
    logits: int,
    full_pairs: int,
    window_pairs: int,
    cached: int,
    mla: LatentAttention,
) -> dict[str, int]:
    """FLOPs of `tokens` tokens, `logits` of which reach the unembedding, with so many query-key
    pairs per head on a full and on a window layer, and `cached` tokens of all sequences before them."""
    attention = architecture.attention
    latent = attention.mla
    key_width, value_width = attention.head_dim, attention.head_dim
    if latent is not None and mla == "absorbed":
        key_width, value_width = latent.kv_lora_rank + latent.qk_rope_head_dim, latent.kv_lora_rank
    elif latent is not None:
        value_width = latent.v_head_dim
    again = (mla == "recomputed") * cached * architecture.n_layers * parameters.latent_expansion(attention)
    windowed = n_window_layers(architecture)
    pairs = (architecture.n_layers - windowed) * full_pairs + windowed * window_pairs
    matrices = parameters.active_by_component(architecture)
    return {
        # Absorbed or not, the expansion matrices meet each new token once.
        "attention.projections": 2 * tokens * matrices["attention.projections"] + 2 * again,
        "attention.scores": 2 * attention.n_heads * key_width * pairs,
        "attention.values": 2 * attention.n_heads * value_width * pairs,
        "router": 2 * tokens * matrices["router.weight"],
        "experts": 2 * tokens * matrices["experts.weights"],
        "shared": 2 * tokens * (matrices["shared.weights"] + matrices["shared.gate"]),
        "ffn": 2 * tokens * matrices["ffn.weights"],
        # The table exists once when it is tied, and multiplies either way.
        "unembedding": 2 * logits * matrices["embedding"],
    }


def forward_by_component(
    architecture: Architecture,
    batch: int,
    seq: int,
    *,
    cached: int = 0,
    attention: Pairs = "full",
    logits: Logits = "all",
    mla: LatentAttention = "expanded",
) -> dict[str, int]:
    """FLOPs of one forward pass over B sequences of S new tokens, each after C cached ones.

    logits "all" multiplies every token by the unembedding, "last" only the last one of a sequence.
    A prefill has cached = 0; a decode step at context length c has seq = 1, cached = c - 1.
    """
    window = architecture.attention.window
    if attention == "full":
        full = windowed = seq * (cached + seq)
    else:
        full, windowed = admitted_pairs(seq, cached, None), admitted_pairs(seq, cached, window)
    reached = batch * (seq if logits == "all" else 1)
    return _forward(architecture, batch * seq, reached, batch * full, batch * windowed, batch * cached, mla)


def forward_total(
    architecture: Architecture,
    batch: int,
    seq: int,
    *,
    cached: int = 0,
    attention: Pairs = "full",
    logits: Logits = "all",
    mla: LatentAttention = "expanded",
) -> int:
    """The sum of `forward_by_component` with the same arguments: FLOPs of the whole pass."""
    return sum(
        forward_by_component(
            architecture, batch, seq, cached=cached, attention=attention, logits=logits, mla=mla
        ).values()
    )


def token_by_component(
    architecture: Architecture,
    context: int,
    *,
    attention: Pairs = "full",
    mla: LatentAttention = "expanded",
) -> dict[str, int]:
    """The parts of `forward_per_token` with the same arguments."""
    window = architecture.attention.window
    windowed = context if attention == "full" or window is None else min(context, window)
    cached = 0 if attention == "full" else max(context - 1, 0)
    return _forward(architecture, 1, 1, context, windowed, cached, mla)


def forward_per_token(
    architecture: Architecture,
    context: int,
    *,
    attention: Pairs = "full",
    mla: LatentAttention = "expanded",
) -> int:
    """FLOPs of one token that is multiplied with `context` keys, itself among them, logits included.

    "full": each token's share of a prefill of `context` tokens as an eager implementation runs it.
    "causal": one decode step at that context length. A context of 0 leaves the attention term out.
    """
    return sum(token_by_component(architecture, context, attention=attention, mla=mla).values())
