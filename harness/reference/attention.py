"""Attention: multi-head, grouped-query, multi-query, and multi-head latent attention.

Letters: B sequences, S new tokens, L = past + S tokens, D d_model, H query heads, G key/value heads,
h head_dim (of queries and keys), v value width of a head.
Each stage is a method: project -> rotate -> (cache) -> expand_kv -> mask -> scores -> values -> o.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.reference.layers import Linear, Norm, Options, at_least_float32, empty
from harness.reference.rope import Rotary, yarn_mscale
from harness.reference.trace import LayerCache
from harness.spec import architecture as spec


@dataclass(frozen=True)
class Context:
    """Where the new tokens stand."""

    positions: Tensor
    """[B, S] int64: of the new tokens."""
    real: Tensor
    """[B, L] bool: True at real tokens, past and new; False at padding."""


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); multi-head if G = H, multi-query if G = 1."""

    def __init__(self, a: spec.Architecture, layer: int, *, options: Options) -> None:
        super().__init__()
        t = a.attention
        self.n_heads, self.head_dim, self.clip = t.n_heads, t.head_dim, t.qkv_clip
        self.window = t.window if a.is_window_layer(layer) else None
        self.scale = t.scale if t.scale is not None else t.head_dim**-0.5
        self.rotary = self._rotary(a)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.norm_over = t.qk_norm
        self.sinks = empty(t.n_heads, options=options) if t.sinks else None
        self._create(a, options)

    def _rotary(self, a: spec.Architecture) -> Rotary | None:
        rope = a.attention.rope
        return None if rope is None else Rotary(rope, rope.dim or a.attention.head_dim, a.max_positions)

    def _create(self, a: spec.Architecture, options: Options) -> None:
        t, d = a.attention, a.d_model
        q_width, kv_width = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
        self.q = Linear(d, q_width, bias=t.qkv_bias, options=options)
        self.k = Linear(d, kv_width, bias=t.qkv_bias, options=options)
        self.v = Linear(d, kv_width, bias=t.qkv_bias, options=options)
        self.o = Linear(q_width, d, bias=t.o_bias, options=options)
        if t.qk_norm != "none":
            norm = spec.Norm(eps=a.norm.eps)
            per_head = t.qk_norm == "head"
            self.q_norm = Norm(norm, t.head_dim if per_head else q_width, options=options)
            self.k_norm = Norm(norm, t.head_dim if per_head else kv_width, options=options)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> queries [B, S, H, h], keys and values [B, S, G, h].

        A norm over the full width comes before the split into heads (OLMoE), one per head after it
        (Qwen3); the clamp is last, as in OLMoE (DBRX clamps and has no norm).
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm_over == "width":
            q, k = self.normalise(q, k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.norm_over == "head":
            q, k = self.normalise(q, k)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        return q, k, v

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """RMSNorm of queries and keys over their last dimension."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of queries and keys by positions [B, S]; nothing without rope."""
        if self.rotary is None:
            return q, k
        return self.rotary(q, positions), self.rotary(k, positions)

    def expand_kv(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, G, h] -> [B, L, H, h]: head i reads key/value head i // (H / G)."""
        repeat = self.n_heads // k.shape[2]
        return k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)

    def mask(self, context: Context) -> Tensor:
        """[B, S, L] bool: which tokens each new token sees.

        Real tokens up to itself, and under a window the window - 1 real tokens before it. Every token
        sees itself, so that a padding row has a softmax too; no real token sees padding.
        """
        real = context.real
        key = torch.arange(real.shape[1], device=real.device)
        query = key[-context.positions.shape[1] :, None]
        seen = (key <= query) & real[:, None, :]
        if self.window is not None:
            count = real.cumsum(1)
            seen &= count[:, query[:, 0], None] - count[:, None, :] < self.window
        return seen | (key == query)

    def scores(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Attention weights [B, H, S, L] of queries [B, S, H, h] over keys [B, L, H, h].

        softmax(scale q k^T) over the tokens seen, in at least float32 (arXiv 1706.03762, eq. 1). A sink
        (gpt-oss model code) is one more logit per head that takes weight and has no value.
        """
        logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * self.scale
        logits = logits.to(at_least_float32(q.dtype)).masked_fill(~seen[:, None], -torch.inf)
        if self.sinks is None:
            return logits.softmax(-1).to(q.dtype)
        sink = self.sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1].to(q.dtype)

    def forward(self, x: Tensor, context: Context, past: LayerCache | None) -> tuple[Tensor, LayerCache]:
        """[B, S, D] -> [B, S, D] before the residual sum, and the cache with the new tokens in it."""
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, context.positions)
        if past is not None:
            k, v = torch.cat([past.keys, k], dim=1), torch.cat([past.values, v], dim=1)
        cache = LayerCache(k, v)
        k, v = self.expand_kv(k, v)
        weights = self.scores(q, k, self.mask(context))
        mixed = (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        out: Tensor = self.o(mixed)
        return out, cache


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), expanded naively.

    What is cached is the latent (as `values`) and the shared rotated key part (as `keys`); `expand_kv`
    makes per-head keys and values of them. An explicit `attention.scale` is the whole factor; else
    1 / sqrt(h), times the square of yarn's mscale where mscale_all_dim is given (DeepSeek-V3 model code).
    """

    def _rotary(self, a: spec.Architecture) -> Rotary | None:
        rope, mla = a.attention.rope, a.attention.mla
        assert mla is not None
        return None if rope is None else Rotary(rope, rope.dim or mla.qk_rope_head_dim, a.max_positions)

    def _create(self, a: spec.Architecture, options: Options) -> None:
        t, d, mla = a.attention, a.d_model, a.attention.mla
        assert mla is not None
        if t.qk_norm != "none" or t.qkv_clip is not None:
            raise ValueError("attention.qk_norm and attention.qkv_clip are not defined under attention.mla")
        self.nope, self.rope_dim, self.v_dim = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        norm = spec.Norm(eps=a.norm.eps)
        q_width = t.n_heads * t.head_dim
        self.low_rank_queries = mla.q_lora_rank is not None
        if mla.q_lora_rank is None:
            self.q = Linear(d, q_width, options=options)
        else:
            self.q_a = Linear(d, mla.q_lora_rank, bias=t.qkv_bias, options=options)
            self.q_a_norm = Norm(norm, mla.q_lora_rank, options=options)
            self.q_b = Linear(mla.q_lora_rank, q_width, options=options)
        self.kv_a = Linear(d, mla.kv_lora_rank + self.rope_dim, bias=t.qkv_bias, options=options)
        self.kv_a_norm = Norm(norm, mla.kv_lora_rank, options=options)
        self.kv_b = Linear(mla.kv_lora_rank, t.n_heads * (self.nope + self.v_dim), options=options)
        self.o = Linear(t.n_heads * self.v_dim, d, bias=t.o_bias, options=options)
        scaling = None if t.rope is None else t.rope.scaling
        if t.scale is None and scaling is not None and scaling.kind == "yarn" and scaling.mscale_all_dim:
            self.scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> queries [B, S, H, h], shared key part [B, S, 1, rope], latent [B, S, 1, kv_lora]."""
        q = self.q_b(self.q_a_norm(self.q_a(x))) if self.low_rank_queries else self.q(x)
        compressed: Tensor = self.kv_a(x)
        latent, k_rope = compressed[..., : -self.rope_dim], compressed[..., -self.rope_dim :]
        return q.unflatten(-1, (self.n_heads, -1)), k_rope[:, :, None], self.kv_a_norm(latent)[:, :, None]

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates the rope part of the queries and the shared key part."""
        if self.rotary is None:
            return q, k
        q_nope, q_rope = torch.split(q, [self.nope, self.rope_dim], dim=-1)
        return torch.cat([q_nope, self.rotary(q_rope, positions)], dim=-1), self.rotary(k, positions)

    def expand_kv(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Shared key part and latent, [B, L, 1, ...] -> keys [B, L, H, h] and values [B, L, H, v]."""
        expanded: Tensor = self.kv_b(v[:, :, 0]).unflatten(-1, (self.n_heads, -1))
        k_nope, values = torch.split(expanded, [self.nope, self.v_dim], dim=-1)
        return torch.cat([k_nope, k.expand(-1, -1, self.n_heads, -1)], dim=-1), values


def make(a: spec.Architecture, layer: int, *, options: Options) -> Attention:
    """The attention that the architecture asks for in layer `layer`."""
    kind = Attention if a.attention.mla is None else LatentAttention
    return kind(a, layer, options=options)
