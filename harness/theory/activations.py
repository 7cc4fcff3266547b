"""Bytes of activations that one rank keeps for the backward pass.

Letters: S tokens of a sequence, b sequences of a microbatch, c context ways, T = S b / c tokens of a
microbatch on one rank, D d_model, F d_ff, H n_heads, h head_dim, E n_experts, K top_k, t tensor ways.

After Korthikanti et al. 2022 (arXiv 2205.05198, section 4), tensor by tensor, so that any width, grouped and
latent attention, gates and experts are counted too: of a layer with F = 4 D and H h = D, two matrices and
dropout, in 16 bits, this is their table 2: T D (10 + 24 / t + 5 H S / (D t)), all over t under sequence
parallelism, without the last term under selective recomputation, 2 T D under full. Beyond the paper: the
statistics of a norm (4 bytes a token, 8 with a mean), and what routing keeps. Kernels are taken to keep what
PyTorch's do: a softmax its output, an activation its input, a matrix product what it multiplies.

Routing is dropless and balanced. Experts' tokens lie on the ranks of the experts: a rank has T K w / t of
the choices, w ways sharing one expert. Under context parallelism every rank has T tokens of everything, and
its queries meet all S keys (ring attention, Liu et al. 2023, arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.spec.architecture import Architecture, FeedForward
from harness.theory.layout import Layout
from harness.theory.memory import BYTES
from harness.theory.pipeline import in_flight
from harness.theory.sharding import (
    Contents,
    Partition,
    contents,
    group_ways,
    most,
    up,
    vocabulary_rows,
)

INDEX_BYTES = 8
"""Of a token's number or of a choice of expert: int64, as PyTorch's top-k gives it."""
STATISTIC_BYTES = 4
"""Of a norm's mean or scale, or of a log-sum-exp: float32."""
LOGIT_BYTES = 4
"""Of a logit that the loss keeps: float32 (Korthikanti et al. 2022, section 4.3)."""


@dataclass(frozen=True)
class Kept:
    """Bytes that one microbatch leaves on one rank, by unit of `Contents`."""

    dense_layer: Any
    moe_layer: Any
    embedding: Any
    """Token numbers, and the mask of dropout after the embedding."""
    head: Any
    """What the final norm and the unembedding read, and the logits."""
    dense_again: Any
    """What recomputing makes anew while one dense layer is differentiated: 0 without recomputation."""
    moe_again: Any


def tokens_of(layout: Layout, context: Any) -> Any:
    """Tokens of one microbatch on one rank: S b / c."""
    return context * layout.microbatch / layout.context_parallel


def _replicated(layout: Layout) -> Any:
    """Ways over which norms, residuals and what they feed are divided."""
    return layout.tensor_parallel if layout.sequence_parallel else 1


def _norms(architecture: Architecture, width: Any) -> Any:
    """Bytes of the statistics and the input of the norms before attention and feed-forward, per token."""
    statistics = STATISTIC_BYTES * (2 if architecture.norm.kind == "layernorm" else 1)
    return (2 - architecture.parallel_block) * (width * architecture.d_model + statistics)


def _attention(architecture: Architecture, layout: Layout, width: Any) -> tuple[Any, Any]:
    """Per token: bytes on every tensor rank without sequence parallelism, and bytes divided by heads."""
    attention, mla, t = architecture.attention, architecture.attention.mla, layout.tensor_parallel
    heads = attention.n_heads / t
    if mla is not None:
        rank = mla.q_lora_rank or 0
        # Each latent twice: before its norm and after it; the rotary key stays within the assembled keys.
        shared = width * 2 * (rank + mla.kv_lora_rank)
        statistics = STATISTIC_BYTES * (1 + (rank > 0))
        by_heads = width * heads * (2 * attention.head_dim + 2 * mla.v_head_dim)
        return shared + statistics, by_heads
    groups = attention.n_kv_heads / group_ways(architecture, layout)
    queries, keys = heads * attention.head_dim, groups * attention.head_dim
    normed = 0 if attention.qk_norm == "none" else width * (queries + keys)
    if attention.qk_norm == "head":
        normed = normed + STATISTIC_BYTES * (heads + groups)
    if attention.qk_norm == "width":
        normed = normed + 2 * STATISTIC_BYTES
    return 0, width * (2 * queries + 2 * keys) + normed


def _scores(architecture: Architecture, layout: Layout, context: Any, width: Any, dropout: bool) -> Any:
    """Bytes of attention weights per query token: softmax output, and under dropout its mask and result."""
    heads = architecture.attention.n_heads / layout.tensor_parallel
    return heads * context * (width + dropout * (width + 1))


def _hidden(ffn: FeedForward, ways: Any, width: Any, gated_kept: int) -> Any:
    """Bytes of width F per token: the input of the activation and of the last matrix, and those of a gate."""
    kept = 2 + (gated_kept - 2) * ffn.gated
    return width * kept * ffn.d_ff / ways


def kept(
    architecture: Architecture,
    layout: Layout,
    context: Any,
    *,
    dropout: bool = False,
    width: Any = 2,
    gated_kept: int = 4,
) -> Kept:
    """What one microbatch of sequences of `context` tokens leaves for its backward pass, in bytes.

    `width`: bytes of one element. `gated_kept`: tensors of width F that a gated feed-forward network keeps:
    gate, up, activated gate and product; 3 where a fused kernel makes the activated gate again. `dropout`:
    after embedding, attention weights, attention and feed-forward network, with masks of one byte.
    """
    d, t, moe = architecture.d_model, layout.tensor_parallel, architecture.moe
    tokens, over = tokens_of(layout, context), _replicated(layout)
    masks = dropout * d
    inputs = (2 - architecture.parallel_block) * width * d  # of the first matrices of attention and ffn
    everywhere, by_heads = _attention(architecture, layout, width)
    everywhere = everywhere + _norms(architecture, width) + inputs + 2 * masks
    scores: Any = _scores(architecture, layout, context, width, dropout)
    if layout.flash:
        scores, log_sums = 0, STATISTIC_BYTES * architecture.attention.n_heads / t
    else:
        log_sums = 0
    attention = everywhere / over + by_heads + log_sums
    ffn = architecture.ffn
    dense = _hidden(ffn, t, width, gated_kept) if ffn is not None else 0
    routed: Any = 0
    if moe is not None:
        chosen = moe.top_k * layout.expert_width_ways / t
        hidden = _hidden(moe.expert, layout.expert_width_ways, width, gated_kept)
        routed = chosen * (2 * width * d + hidden)
        # Scores, the choices and their weights are kept where the token is.
        choices = (INDEX_BYTES + width) * moe.top_k
        routed = routed + (BYTES[moe.router.dtype] * moe.n_experts + choices) / over
        if moe.shared is not None:
            routed = routed + _hidden(moe.shared, t, width, gated_kept)
    whole_dense, whole_moe = attention + dense + scores, attention + routed + scores
    if layout.recompute == "full":
        left: tuple[Any, ...] = (width * d / over, width * d / over, whole_dense, whole_moe)
    elif layout.recompute == "selective":
        left = (whole_dense - scores, whole_moe - scores, scores, scores)
    else:
        left = (whole_dense, whole_moe, 0, 0)
    statistics = STATISTIC_BYTES * (2 if architecture.norm.kind == "layernorm" else 1)
    head = (2 * width * d + statistics) / over + INDEX_BYTES
    head = head + LOGIT_BYTES * vocabulary_rows(architecture, layout)
    embedding = INDEX_BYTES + masks / over
    dense_layer, moe_layer, dense_again, moe_again = (tokens * one for one in left)
    return Kept(dense_layer, moe_layer, tokens * embedding, tokens * head, dense_again, moe_again)


def on_stage(held: Contents, one: Kept, layout: Layout, microbatches: Any, stage: Any) -> tuple[Any, Any]:
    """Bytes that a stage keeps at its fullest moment, and those that recomputing makes for one layer.

    Of as many microbatches as `pipeline.in_flight` says; the logits of one, for a last stage that goes
    back at once, but of all under GPipe.
    """
    p, v = layout.pipeline_parallel, layout.virtual_stages
    flying = in_flight(layout.schedule, p, microbatches, v, stage)
    layers = held.dense_layers * one.dense_layer + held.moe_layers * one.moe_layer
    ends = flying * held.embedding * one.embedding
    ends = ends + (microbatches if layout.schedule == "gpipe" else 1) * held.head * one.head
    again = most((held.dense_layers > 0) * one.dense_again, (held.moe_layers > 0) * one.moe_again)
    return flying * layers + ends, again


def stage_activations(
    architecture: Architecture,
    layout: Layout,
    *,
    context: Any,
    microbatches: Any,
    stage: Any = 0,
    partition: Partition = "middle",
    dropout: bool = False,
    width: Any = 2,
    gated_kept: int = 4,
) -> tuple[Any, Any]:
    """`on_stage` of a stage by its number: bytes kept, and bytes made anew by recomputation."""
    one = kept(architecture, layout, context, dropout=dropout, width=width, gated_kept=gated_kept)
    return on_stage(contents(architecture, layout, stage, partition), one, layout, microbatches, stage)


def pass_activations(
    architecture: Architecture, layout: Layout, held: Contents, tokens: Any, sequences: Any
) -> Any:
    """Elements alive at once in a forward pass that keeps nothing: an estimate from the widest place.

    The residual stream, the norm of it, and the input and output of the widest product beside them; logits
    of one token per sequence, in the width of an activation, where the head is.
    """
    attention, d, t = architecture.attention, architecture.d_model, layout.tensor_parallel
    value = attention.mla.v_head_dim if attention.mla else attention.head_dim
    groups = up(attention.n_kv_heads, group_ways(architecture, layout))
    widest = up(attention.n_heads, t) * (attention.head_dim + value) + groups * (attention.head_dim + value)
    if architecture.ffn is not None:
        widest = most(widest, (2 + architecture.ffn.gated) * architecture.ffn.d_ff / t)
    if architecture.moe is not None:
        moe = architecture.moe
        hidden = (2 + moe.expert.gated) * moe.expert.d_ff / layout.expert_width_ways + 2 * d
        widest = most(widest, moe.top_k * layout.expert_width_ways / t * hidden)
    logits = held.head * vocabulary_rows(architecture, layout) * sequences
    return most(tokens * (2 * d + widest), tokens * d + logits)
