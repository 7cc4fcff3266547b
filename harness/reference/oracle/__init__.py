"""The slow oracle: the same model token by token in float64, in numpy, sharing no code with the reference.

It is written for one reader's eye against the papers: vectors, Python loops over tokens, heads, keys and
experts, sorted lists where the reference sorts tensors. Padding is skipped: its rows are zero (indices -1).
Letters: B sequences, S tokens, T = B * S, V vocabulary, D d_model, E experts, K top-k, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.reference.oracle.arithmetic import States, Weights, feed_forward, norm
from harness.reference.oracle.attention import attention
from harness.reference.oracle.moe import mixture
from harness.reference.trace import RoutingTrace
from harness.spec.architecture import Architecture


@dataclass(frozen=True)
class OracleTrace:
    """What the oracle computed, float64 on the CPU."""

    logits: Tensor
    """[B, S, V]; zero at padding."""
    routing: list[RoutingTrace]
    """One per MoE layer; rows of padding are zero, their indices -1."""


def forward(
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    before: Callable[[int, States], States] = lambda _, states: states,
) -> OracleTrace:
    """Logits and routing of tokens [B, S]; mask [B, S] is True at real tokens (default all), positions
    [B, S] default to the number of real tokens before. Weights by canonical name. before(layer, states) is
    what stands before a layer: by default nothing."""
    a, w = architecture, Weights(weights)
    batch, length = tokens.shape
    real = [(b, s) for b in range(batch) for s in range(length) if mask is None or bool(mask[b, s])]
    at = {
        (b, s): sum(1 for (c, r) in real if c == b and r < s) if positions is None else int(positions[b, s])
        for b, s in real
    }
    x: States = {t: w.arrays["embedding.weight"][int(tokens[t])].copy() for t in real}
    if a.positions == "learned":
        x = {t: x[t] + w.arrays["positions.weight"][at[t]] for t in real}
    routing = []
    for i in range(a.n_layers):
        x = before(i, x)
        normed = {t: norm(x[t], a.norm, w, f"layers.{i}.attention_norm") for t in real}
        mixed = attention(a, i, w, normed, at)
        if not a.parallel_block:
            x = {t: x[t] + mixed[t] for t in real}
            normed = {t: norm(x[t], a.norm, w, f"layers.{i}.ffn_norm") for t in real}
        if a.is_moe_layer(i):
            assert a.moe is not None
            added, trace = mixture(a.moe, i, w, normed, (batch, length))
            routing.append(trace)
        else:
            assert a.ffn is not None
            added = {t: feed_forward(a.ffn, normed[t], w, f"layers.{i}.ffn") for t in real}
        x = {t: x[t] + (mixed[t] if a.parallel_block else 0) + added[t] for t in real}
    unembedding = w.arrays["embedding.weight" if a.tie_embeddings else "unembedding.weight"]
    logits = np.zeros((batch, length, a.vocab_size))
    for t in real:
        logits[t] = unembedding @ norm(x[t], a.norm, w, "final_norm")
    return OracleTrace(torch.from_numpy(logits), routing)
