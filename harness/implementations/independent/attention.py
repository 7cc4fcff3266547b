"""Attention whose softmax runs over blocks of keys, the last block first, and is never held as a whole.

Letters: B sequences, S new tokens, L = past + S tokens, D d_model, H query heads, G key/value heads,
R = H / G, h width of queries and keys, v width of values, Q = R S queries of one key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.implementations.independent.arithmetic import Weights, linear, norm, product, stretch, turned
from harness.spec.architecture import Architecture, Norm

BLOCK = 24
"""Keys at a time."""
Past = tuple[Tensor, Tensor]
"""Of one layer: turned keys [B, L, G, h] and values [B, L, G, v]; of latent attention the shared turned part
of the keys [B, L, 1, rope] and the normed latent [B, L, 1, kv_lora_rank]."""


@dataclass(frozen=True)
class Place:
    """Where the new tokens stand."""

    positions: Tensor
    """[B, S]."""
    real: Tensor
    """[B, L] bool."""

    def seen(self, window: int | None) -> Tensor:
        """[B, S, L] bool: the real tokens up to each new one, the last `window` of them; none at padding."""
        length, new = self.real.shape[1], self.positions.shape[1]
        order = torch.arange(length)
        before = order[None, :] <= order[length - new :, None]
        both = self.real[:, length - new :, None] & self.real[:, None, :] & before
        if window is None:
            return both
        rank = self.real.long().cumsum(1)
        return both & (rank[:, None, :] > rank[:, length - new :, None] - window)


def attention(
    a: Architecture, layer: int, w: Weights, x: Tensor, place: Place, past: Past | None
) -> tuple[Tensor, Past]:
    """[B, S, D] -> [B, S, D] before the residual sum, and what the layer keeps."""
    t, name = a.attention, f"layers.{layer}.attention"
    q, *new = (_heads if t.mla is None else _latent)(a, name, w, x, place.positions)
    keys, values = (new[i] if past is None else torch.cat([past[i], new[i]], 1) for i in (0, 1))
    kept = (keys, values)
    if t.mla is not None:
        up = linear(values[:, :, 0], w, f"{name}.kv_b").unflatten(-1, (t.n_heads, -1))
        shared = keys.expand(-1, -1, t.n_heads, -1)
        keys = torch.cat([up[..., : t.mla.qk_nope_head_dim], shared], -1)
        values = up[..., t.mla.qk_nope_head_dim :]
    groups = keys.shape[2]
    # Head g R + r reads key/value head g: its queries stand beside those of the R - 1 others.
    grouped = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) * _scale(a)
    window = t.window if a.is_window_layer(layer) else None
    seen = place.seen(window).repeat(1, t.n_heads // groups, 1)[:, None]
    sink = w.get(f"{name}.sinks")
    if sink is not None:
        sink = sink.view(groups, -1).repeat_interleave(x.shape[1], 1).expand(grouped.shape[:3])
    mixed = attend(grouped, keys.permute(0, 2, 3, 1), values.transpose(1, 2), seen, sink)
    apart = mixed.unflatten(2, (-1, x.shape[1])).permute(0, 3, 1, 2, 4)
    return linear(apart.flatten(2), w, f"{name}.o"), kept


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sink: Tensor | None) -> Tensor:
    """Queries [B, G, Q, h], keys [B, G, h, L], values [B, G, L, v], seen [B, 1, Q, L] -> [B, G, Q, v].

    The running maximum, denominator and sum of arXiv 2205.14135, section 3.1; a sink [B, G, Q] is where they
    begin. A query that sees nothing gives zeros.
    """
    if sink is None:
        top, below = (
            torch.full(q.shape[:3], -torch.inf, dtype=q.dtype),
            torch.zeros(q.shape[:3], dtype=q.dtype),
        )
    else:
        top = sink.detach()
        below = torch.exp(sink - top)
    above = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=q.dtype)
    for start in reversed(range(0, k.shape[-1], BLOCK)):
        part = slice(start, start + BLOCK)
        logits = product(q, k[..., part]).masked_fill(~seen[..., part], -torch.inf)
        highest = torch.maximum(top, logits.detach().amax(-1))
        level = highest.where(highest.isfinite(), 0.0)
        powers, shrink = torch.exp(logits - level[..., None]), torch.exp(top - level)
        above = above * shrink[..., None] + product(powers, v[..., part, :])
        below, top = below * shrink + powers.sum(-1), highest
    return above / below.where(below > 0, 1.0)[..., None]


def _scale(a: Architecture) -> float:
    t = a.attention
    if t.scale is not None:
        return t.scale
    scaling = None if t.rope is None else t.rope.scaling
    longer = 1.0
    if t.mla is not None and scaling is not None and scaling.kind == "yarn" and scaling.mscale_all_dim:
        longer = stretch(scaling.factor, scaling.mscale_all_dim)
    return float(longer * longer / t.head_dim**0.5)


def _heads(
    a: Architecture, name: str, w: Weights, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries [B, S, H, h] and keys [B, S, G, h], and values [B, S, G, h]."""
    t, rms = a.attention, Norm(eps=a.norm.eps)
    made = []
    for part in ("q", "k", "v"):
        y = linear(x, w, f"{name}.{part}")
        if t.qk_norm == "width" and part != "v":
            y = norm(y, rms, w, f"{name}.{part}_norm")
        y = y.unflatten(-1, (-1, t.head_dim))
        if t.qk_norm == "head" and part != "v":
            y = norm(y, rms, w, f"{name}.{part}_norm")
        if t.qkv_clip is not None:
            y = y.clip(-t.qkv_clip, t.qkv_clip)
        if part != "v":
            dim = (t.rope.dim if t.rope else None) or t.head_dim
            y = turned(y, t.rope, positions, a.max_positions, dim)
        made.append(y)
    return made[0], made[1], made[2]


def _latent(
    a: Architecture, name: str, w: Weights, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, S, H, h], the keys' shared turned part [B, S, 1, rope] and the latent
    [B, S, 1, kv_lora_rank] (arXiv 2405.04434, section 2.1.2)."""
    t, rms, mla = a.attention, Norm(eps=a.norm.eps), a.attention.mla
    assert mla is not None
    if mla.q_lora_rank is None:
        q = linear(x, w, f"{name}.q")
    else:
        q = linear(norm(linear(x, w, f"{name}.q_a"), rms, w, f"{name}.q_a_norm"), w, f"{name}.q_b")
    q = q.unflatten(-1, (t.n_heads, -1))
    down = linear(x, w, f"{name}.kv_a")
    dim = (t.rope.dim if t.rope else None) or mla.qk_rope_head_dim
    nope, rank = mla.qk_nope_head_dim, mla.kv_lora_rank
    spun = turned(q[..., nope:], t.rope, positions, a.max_positions, dim)
    shared = turned(down[:, :, None, rank:], t.rope, positions, a.max_positions, dim)
    latent = norm(down[..., :rank], rms, w, f"{name}.kv_a_norm")
    return torch.cat([q[..., :nope], spun], -1), shared, latent[:, :, None]
