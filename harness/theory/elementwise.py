"""Bytes that everything but matrix products moves in a forward pass: what memory, not arithmetic, bounds.

Letters: D d_model, F d_ff, K top_k, H n_heads, G n_kv_heads, h head_dim, S context, t tensor ways.

Each operation reads its inputs and writes its output once, in `element` bytes (Korthikanti et al. 2022,
arXiv 2205.05198, section 4.1, lists them; fused neighbours count as one): two norms 2 D each, two additions
to the residual stream 3 D each, the activation 2 F (3 F if gated), rotary embedding 2 (H + G) h. Experts
take K F, and K D four times more, to sort tokens by expert and back. Without flash attention scores are
written, normalised and read again: 4 H S; with it they stay on the chip (Dao et al. 2022, arXiv 2205.14135).
Backward moves twice as much: an operation reads a gradient beside its input, and writes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.spec.architecture import Architecture, FeedForward
from harness.theory.layout import Layout
from harness.theory.parameters import n_moe_layers


@dataclass(frozen=True)
class Moved:
    """Bytes of the mean layer for one token on one tensor rank, forward."""

    stream: Any
    """Norms and additions: over t with sequence parallelism, whole without (section 4.2.2)."""
    inner: Any
    """Activations, rotary embedding and sorting, over t."""
    scores: Any
    """What flash attention saves, over t."""

    @property
    def total(self) -> Any:
        """All of it."""
        return self.stream + self.inner + self.scores


def moved_bytes(architecture: Architecture, layout: Layout, context: Any, element: float = 2.0) -> Moved:
    """Bytes per token and layer of a training or prefill pass over sequences of S tokens."""
    attention, d, t = architecture.attention, architecture.d_model, layout.tensor_parallel
    moe, dense = architecture.moe, architecture.ffn
    stream = (2 * (2 - architecture.parallel_block) + 3 * 2) * d
    heads = attention.n_heads + attention.n_kv_heads
    inner: Any = 2 * heads * attention.head_dim * (architecture.positions == "rope")
    routed = n_moe_layers(architecture) / architecture.n_layers
    if dense is not None:
        inner = inner + (1 - routed) * _activation(dense)
    if moe is not None:
        shared = _activation(moe.shared) if moe.shared is not None else 0
        inner = inner + routed * (moe.top_k * (_activation(moe.expert) + 4 * d) + shared)
    scores = 0 if layout.flash else 4 * attention.n_heads * context
    ways = t if layout.sequence_parallel else 1
    return Moved(stream * element / ways, inner * element / t, scores * element / t)


def _activation(ffn: FeedForward) -> Any:
    return (2 + ffn.gated) * ffn.d_ff
