"""The reference's weights: canonical names, shapes, and draws that hide no defect.

Letters: D d_model, V vocabulary, H heads, G key/value heads, h head_dim, F d_ff, E experts.
Every matrix is [out, in], as in torch.nn.Linear; experts are grouped, [E, out, in].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.spec.architecture import Architecture, FeedForward, Norm

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

NORM_SPREAD = 0.2
"""Standard deviation of drawn norm weights around 1: large enough that a dropped norm weight shows."""
CORRECTION_SPREAD = 0.4
"""Of the correction biases, relative to `std`: of the order of the gaps between sigmoid scores, so that
it changes some selections and not all of them."""


def shapes(architecture: Architecture) -> Shapes:
    """Canonical name -> shape of every learned tensor, in the model's order; tied tensors once."""
    a = architecture
    out: Shapes = {"embedding.weight": (a.vocab_size, a.d_model)}
    if a.positions == "learned":
        out["positions.weight"] = (a.max_positions, a.d_model)
    for i in range(a.n_layers):
        out |= _layer(a, i)
    out |= _norm("final_norm", a.norm, a.d_model)
    if not a.tie_embeddings:
        out["unembedding.weight"] = (a.vocab_size, a.d_model)
    return out


def draw(
    architecture: Architecture,
    generator: torch.Generator,
    *,
    std: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random weights on the CPU by canonical name, normal with standard deviation `std`.

    Norm weights are drawn around 1, biases and correction biases are not zero, and nothing is symmetric:
    at the usual std of 0.02 outputs are so small that most defects hide below any tolerance.
    Drawn in float64 and then cast, so that one seed is one model in every dtype.
    """
    return {
        name: draw_one(name, shape, generator, std).to(dtype) for name, shape in shapes(architecture).items()
    }


def draw_one(name: str, shape: Shape, generator: torch.Generator, std: float) -> Tensor:
    """The float64 draw of one tensor: which law it follows is told by its canonical name."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("norm.weight"):
        return 1 + NORM_SPREAD * noise
    if name.endswith("correction_bias"):
        return CORRECTION_SPREAD * std * noise
    return std * noise


def load(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `parameters` in place, casting dtypes.

    Raises KeyError naming the missing or unused tensors, ValueError naming a misshapen one.
    """
    missing = [name for name in parameters if name not in weights]
    unused = [name for name in weights if name not in parameters]
    if missing:
        raise KeyError(f"missing weights: {', '.join(missing)}")
    if unused:
        raise KeyError(f"weights that the model does not have: {', '.join(unused)}")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            have, want = tuple(weights[name].shape), tuple(parameter.shape)
            raise ValueError(f"{name} has shape {have}, but the model needs {want}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _layer(a: Architecture, i: int) -> Shapes:
    at = f"layers.{i}"
    out = _norm(f"{at}.attention_norm", a.norm, a.d_model) | _attention(f"{at}.attention", a)
    if not a.parallel_block:
        out |= _norm(f"{at}.ffn_norm", a.norm, a.d_model)
    if a.is_moe_layer(i):
        return out | _moe(f"{at}.moe", a)
    assert a.ffn is not None  # Architecture refuses a dense layer without one
    return out | _feed_forward(f"{at}.ffn", a.ffn, a.d_model)


def _norm(at: str, norm: Norm, width: int) -> Shapes:
    out: Shapes = {f"{at}.weight": (width,)}
    if norm.bias:
        out[f"{at}.bias"] = (width,)
    return out


def _linear(at: str, out_width: int, in_width: int, bias: bool) -> Shapes:
    out: Shapes = {f"{at}.weight": (out_width, in_width)}
    if bias:
        out[f"{at}.bias"] = (out_width,)
    return out


def _attention(at: str, a: Architecture) -> Shapes:
    t, d = a.attention, a.d_model
    mla = t.mla
    out: Shapes = {}
    if mla is None:
        q, kv = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
        out |= _linear(f"{at}.q", q, d, t.qkv_bias)
        out |= _linear(f"{at}.k", kv, d, t.qkv_bias)
        out |= _linear(f"{at}.v", kv, d, t.qkv_bias)
        if t.qk_norm != "none":
            per_head = t.qk_norm == "head"
            out[f"{at}.q_norm.weight"] = (t.head_dim if per_head else q,)
            out[f"{at}.k_norm.weight"] = (t.head_dim if per_head else kv,)
        o_in = q
    else:
        q = t.n_heads * t.head_dim
        if mla.q_lora_rank is None:
            out |= _linear(f"{at}.q", q, d, False)
        else:
            out |= _linear(f"{at}.q_a", mla.q_lora_rank, d, t.qkv_bias)
            out[f"{at}.q_a_norm.weight"] = (mla.q_lora_rank,)
            out |= _linear(f"{at}.q_b", q, mla.q_lora_rank, False)
        out |= _linear(f"{at}.kv_a", mla.kv_lora_rank + mla.qk_rope_head_dim, d, t.qkv_bias)
        out[f"{at}.kv_a_norm.weight"] = (mla.kv_lora_rank,)
        out |= _linear(
            f"{at}.kv_b", t.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank, False
        )
        o_in = t.n_heads * mla.v_head_dim
    out |= _linear(f"{at}.o", d, o_in, t.o_bias)
    if t.sinks:
        out[f"{at}.sinks"] = (t.n_heads,)
    return out


def _feed_forward(at: str, ff: FeedForward, d_model: int) -> Shapes:
    out: Shapes = {}
    if ff.gated:
        out |= _linear(f"{at}.gate", ff.d_ff, d_model, ff.bias)
    out |= _linear(f"{at}.up", ff.d_ff, d_model, ff.bias)
    return out | _linear(f"{at}.down", d_model, ff.d_ff, ff.bias)


def _moe(at: str, a: Architecture) -> Shapes:
    moe = a.moe
    assert moe is not None
    e, f, d = moe.n_experts, moe.expert.d_ff, a.d_model
    out = _linear(f"{at}.router", e, d, moe.router.bias)
    if moe.router.correction_bias:
        out[f"{at}.router.correction_bias"] = (e,)
    gated = ("gate",) if moe.expert.gated else ()
    for name in (*gated, "up"):
        out[f"{at}.experts.{name}"] = (e, f, d)
    out[f"{at}.experts.down"] = (e, d, f)
    if moe.expert.bias:
        for name in (*gated, "up"):
            out[f"{at}.experts.{name}_bias"] = (e, f)
        out[f"{at}.experts.down_bias"] = (e, d)
    if moe.shared is not None:
        out |= _feed_forward(f"{at}.shared", moe.shared, d)
        if moe.shared_gate:
            out |= _linear(f"{at}.shared_gate", 1, d, False)
    return out
