"""Attention by explicit loops over queries, heads and keys. Letters: D d_model, h head_dim."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from harness.reference.oracle.arithmetic import Array, States, Token, Weights, linear, norm, softmax
from harness.spec.architecture import Architecture, Norm, Rope

Heads = tuple[list[Array], list[Array], list[Array]]
"""Queries (one per head), keys and values (one per key/value head) of one token."""


def _turn(x: Array, rope: Rope | None, dim: int, max_positions: int, position: int) -> Array:
    """One head's vector, its first `dim` entries turned as dim / 2 complex numbers."""
    if rope is None:
        return x
    pairs = [(j, j + dim // 2) if rope.layout == "half" else (2 * j, 2 * j + 1) for j in range(dim // 2)]
    out = x.copy()
    for j, (re, im) in enumerate(pairs):
        frequency, length = _frequency(rope, j, dim, max_positions)
        angle = position * frequency
        z = complex(x[re], x[im]) * length * complex(math.cos(angle), math.sin(angle))
        out[re], out[im] = z.real, z.imag
    return out


def _frequency(rope: Rope, j: int, dim: int, max_positions: int) -> tuple[float, float]:
    """Radians per position of pair j, and the factor on the turned vector."""
    wavelength = 2 * math.pi * rope.theta ** (2 * j / dim)
    s = rope.scaling
    if s is None:
        return 2 * math.pi / wavelength, 1.0
    if s.kind == "linear":
        return 2 * math.pi / (wavelength * s.factor), 1.0
    context = max_positions if s.original_max_positions is None else s.original_max_positions
    slow, fast = 2 * math.pi / (wavelength * s.factor), 2 * math.pi / wavelength
    if s.kind == "llama3":
        if wavelength > context / s.low_freq_factor:
            return slow, 1.0
        if wavelength < context / s.high_freq_factor:
            return fast, 1.0
        smooth = (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        return smooth * fast + (1 - smooth) * slow, 1.0
    # yarn: pair j turns context / wavelength times; solve for the j that turns beta times.
    turns = (s.beta_fast, s.beta_slow)
    start, end = (dim / 2 * math.log(context / (2 * math.pi * beta), rope.theta) for beta in turns)
    if s.truncate:
        start, end = float(math.floor(start)), float(math.ceil(end))
    start, end = max(start, 0.0), min(end, dim - 1.0)
    end = end + 0.001 if start == end else end
    ramp = float(np.clip((j - start) / (end - start), 0, 1))
    stretch = math.log(s.factor) if s.factor > 1 else 0.0
    if s.attention_factor is not None:
        length = s.attention_factor
    elif s.mscale != 0 and s.mscale_all_dim != 0:
        length = (1 + s.mscale * stretch / 10) / (1 + s.mscale_all_dim * stretch / 10)
    else:
        length = 1 + stretch / 10
    return ramp * slow + (1 - ramp) * fast, length


def attention(a: Architecture, i: int, w: Weights, x: States, at: Mapping[Token, int]) -> States:
    """[D] per token -> [D] per token, before the residual sum."""
    t, name = a.attention, f"layers.{i}.attention"
    split = _heads if t.mla is None else _latent_heads
    heads = {token: split(a, name, w, x[token], at[token]) for token in x}
    scale = 1 / math.sqrt(t.head_dim) if t.scale is None else t.scale
    s = None if t.rope is None else t.rope.scaling
    if t.mla is not None and t.scale is None and s is not None and s.kind == "yarn" and s.mscale_all_dim:
        scale *= (0.1 * s.mscale_all_dim * math.log(max(s.factor, 1.0)) + 1) ** 2
    out: States = {}
    for b, place in x:
        seen = [(c, r) for (c, r) in x if c == b and r <= place]
        if a.is_window_layer(i):
            assert t.window is not None
            seen = seen[-t.window :]
        mixed = []
        for head in range(t.n_heads):
            group = head * t.n_kv_heads // t.n_heads
            query = heads[b, place][0][head]
            logits = [scale * float(query @ heads[other][1][group]) for other in seen]
            if t.sinks:
                logits.append(float(w.arrays[f"{name}.sinks"][head]))
            weights = softmax(logits)[: len(seen)]
            mixed.append(sum(p * heads[other][2][group] for p, other in zip(weights, seen, strict=True)))
        out[b, place] = linear(np.concatenate(mixed), w, f"{name}.o")
    return out


def _heads(a: Architecture, name: str, w: Weights, x: Array, position: int) -> Heads:
    t = a.attention
    rms = Norm(eps=a.norm.eps)
    made: list[list[Array]] = []
    for part, n in (("q", t.n_heads), ("k", t.n_kv_heads), ("v", t.n_kv_heads)):
        y = linear(x, w, f"{name}.{part}")
        if t.qk_norm == "width" and part != "v":
            y = norm(y, rms, w, f"{name}.{part}_norm")
        split = [y[g * t.head_dim : (g + 1) * t.head_dim] for g in range(n)]
        if t.qk_norm == "head" and part != "v":
            split = [norm(head, rms, w, f"{name}.{part}_norm") for head in split]
        if t.qkv_clip is not None:
            split = [np.clip(head, -t.qkv_clip, t.qkv_clip) for head in split]
        if part != "v":
            dim = t.head_dim if t.rope is None or t.rope.dim is None else t.rope.dim
            split = [_turn(head, t.rope, dim, a.max_positions, position) for head in split]
        made.append(split)
    return made[0], made[1], made[2]


def _latent_heads(a: Architecture, name: str, w: Weights, x: Array, position: int) -> Heads:
    t, m = a.attention, a.attention.mla
    assert m is not None
    rms = Norm(eps=a.norm.eps)
    if m.q_lora_rank is None:
        q = linear(x, w, f"{name}.q")
    else:
        q = linear(norm(linear(x, w, f"{name}.q_a"), rms, w, f"{name}.q_a_norm"), w, f"{name}.q_b")
    down = linear(x, w, f"{name}.kv_a")
    up = linear(norm(down[: m.kv_lora_rank], rms, w, f"{name}.kv_a_norm"), w, f"{name}.kv_b")
    nope, width = m.qk_nope_head_dim, m.qk_nope_head_dim + m.v_head_dim
    dim = m.qk_rope_head_dim if t.rope is None or t.rope.dim is None else t.rope.dim
    shared = _turn(down[m.kv_lora_rank :], t.rope, dim, a.max_positions, position)
    queries, keys, values = [], [], []
    for h in range(t.n_heads):
        query = q[h * t.head_dim : (h + 1) * t.head_dim]
        turned = _turn(query[nope:], t.rope, dim, a.max_positions, position)
        queries.append(np.concatenate([query[:nope], turned]))
        keys.append(np.concatenate([up[h * width : h * width + nope], shared]))
        values.append(up[h * width + nope : (h + 1) * width])
    return queries, keys, values
