"""What a forward pass leaves behind: the routing of each MoE layer, and the cache of each layer.

Letters: B sequences, S new tokens, L = past + S tokens, T = B * S, D d_model, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutingTrace:
    """Every stage of one MoE layer's routing."""

    layer: int
    """Index of the transformer layer."""
    hidden: Tensor
    """[T, D]: input of the MoE layer."""
    logits: Tensor
    """[T, E]: the router's linear layer."""
    scores: Tensor
    """[T, E]: after the score function (over all experts), before any correction bias."""
    selected: Tensor
    """[T, K] int64: the top-k choice, before anything is dropped over capacity."""
    indices: Tensor
    """[T, K] int64: the experts that compute; -1 where a slot was dropped."""
    weights: Tensor
    """[T, K]: combine weights, 0 where dropped."""
    output: Tensor
    """[T, D]: output of the MoE layer, shared experts included, before the residual sum."""


@dataclass(frozen=True)
class LayerCache:
    """What one attention layer keeps of the past.

    Grouped-query attention keeps rotated keys [B, L, G, h] and values [B, L, G, h]. Latent attention
    keeps the rotated shared key part [B, L, 1, rope] and the normed latent [B, L, 1, kv_lora_rank].
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Cache:
    """The state between two calls of `ReferenceModel.extend`."""

    layers: tuple[LayerCache, ...]
    real: Tensor
    """[B, L] bool: True at real tokens, False at padding."""

    @property
    def length(self) -> int:
        """L: tokens of each sequence so far, padding included."""
        return self.real.shape[1]
