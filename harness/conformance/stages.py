"""What each stage of a MoE layer must give, in float64, and how far correct arithmetic may stray.

Letters: T tokens, D d_model, F d_ff of an expert, E experts, K top-k.

A stage is judged on the implementation's own input to that stage, so an error is reported where it is made
and not where it shows. The bounds are first-order forms of standard ones (Higham, Accuracy and Stability
of Numerical Algorithms): no constant in them was fitted to an implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.evidence.margins import dot_bound, gamma, topk_gap, unit_roundoff
from harness.spec.architecture import Architecture, FeedForward, Moe, Router

Weights = Mapping[str, Tensor]

ELEMENTARY = 8
"""Roundings granted to exp, sigmoid, erf or tanh and the few products around them: libraries compute
these to 1 or 2 units in the last place, and sigmoid and softmax take three operations more."""

LIPSCHITZ = {"relu": 1.0, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "clamped_swiglu": 1.1}
"""The steepest slope of each activation: 1.0998 for x sigmoid(x) (that of x sigmoid(1.702 x) is the same,
since scaling x changes no slope), 1.1290 for GELU."""


@dataclass(frozen=True)
class Judged:
    """What a stage must give, and how far a correct one may be from it, elementwise."""

    value: Tensor
    bound: Tensor


def logits(weights: Weights, layer: int, hidden: Tensor, dtype: torch.dtype) -> Judged:
    """[T, D] -> router logits W x + b, [T, E]."""
    weight = weights[f"layers.{layer}.moe.router.weight"].double()
    bias = weights.get(f"layers.{layer}.moe.router.bias")
    value = hidden.double() @ weight.T
    if bias is not None:
        value = value + bias.double()
    return Judged(value, dot_bound(weight, hidden, bias, dtype=dtype))


def scores(router: Router, logits: Tensor, dtype: torch.dtype) -> Judged:
    """[T, E] -> softmax over all experts or sigmoid of each, [T, E].

    exp(x) errs relatively by u |x| from rounding its argument, and a sum of E terms by gamma_E.
    """
    x = logits.double()
    value = x.sigmoid() if router.score == "sigmoid" else x.softmax(-1)
    span = x.abs().amax(-1, keepdim=True) * 2
    relative = unit_roundoff(dtype) * (span + x.shape[-1] + ELEMENTARY)
    # Below the smallest normal number nothing is relative any more.
    return Judged(value, relative * value + torch.finfo(dtype).tiny)


def keys(router: Router, scores: Tensor, logits: Tensor, correction: Tensor | None) -> Tensor:
    """[T, E]: what the selection maximises, before any group is excluded."""
    value = (logits if router.order == "after_topk" else scores).double()
    return value if correction is None else value + correction.double()


def select(moe: Moe, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Experts [T, K] with the largest keys, and by how much [T] a key would have to move to change them.

    With groups only the experts of the best ones are candidates; a group's value is the sum of two keys
    (or one), so half the gap between groups is what two keys have to move.
    """
    router = moe.router
    gap = torch.full(keys.shape[:1], torch.inf, dtype=keys.dtype)
    if router.n_groups > 1:
        members = keys.unflatten(-1, (router.n_groups, -1))
        count = 1 if router.group_score == "max" else 2
        value = members.topk(count, dim=-1).values.sum(-1)
        gap = topk_gap(value, router.topk_groups) / count
        best = value.topk(router.topk_groups, dim=-1).indices
        allowed = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best, True)
        keys = keys.masked_fill(~allowed.repeat_interleave(members.shape[-1], -1), -torch.inf)
    return keys.topk(moe.top_k, dim=-1).indices, torch.minimum(gap, topk_gap(keys, moe.top_k))


def combine_weights(
    router: Router, scores: Judged, logits: Tensor, indices: Tensor, dtype: torch.dtype
) -> Judged:
    """Combine weights [T, K] of the experts `indices` [T, K]; where an index is -1 (dropped), 0.

    What is dropped still took part in the normalisation.
    """
    kept = indices >= 0
    at = indices.clamp(min=0)
    slots = indices.shape[-1]
    if router.order == "after_topk":
        x = logits.double().gather(-1, at)
        value = x.softmax(-1)
        relative = unit_roundoff(dtype) * (2 * x.abs().amax(-1, keepdim=True) + slots + ELEMENTARY)
        bound = relative * value
    else:
        value, bound = scores.value.gather(-1, at), scores.bound.gather(-1, at)
        growth = torch.ones_like(value)
        if router.normalise:
            total = value.sum(-1, keepdim=True)
            # More than 1 only where scores of both signs cancel in their sum, as biased ones may.
            growth = value.abs().sum(-1, keepdim=True) / total.abs()
            bound = (bound + value.abs() * bound.sum(-1, keepdim=True) / total.abs()) / total.abs()
            value = value / total
        bound = bound + gamma(slots + ELEMENTARY, dtype) * growth * value.abs()
    value, bound = value * router.scaling_factor, bound * router.scaling_factor
    return Judged(value.where(kept, 0), bound.where(kept, 0) + torch.finfo(dtype).tiny)


def combine(
    architecture: Architecture,
    weights: Weights,
    layer: int,
    hidden: Tensor,
    indices: Tensor,
    combine_weights: Judged,
    dtype: torch.dtype,
) -> Judged:
    """Output [T, D] of the MoE layer: sum_k w_k expert_k(x), plus the shared experts' part."""
    moe = architecture.moe
    assert moe is not None
    at = f"layers.{layer}.moe"
    x = Judged(hidden.double(), torch.zeros_like(hidden, dtype=torch.float64))
    value = torch.zeros_like(x.value)
    bound = torch.zeros_like(x.value)
    for expert in range(moe.n_experts):
        tokens, slots = (indices == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        matrices = {name: weights[f"{at}.experts.{name}"][expert] for name in _names(moe.expert)}
        out = feed_forward(moe.expert, matrices, hidden[tokens], dtype)
        w, dw = (part[tokens, slots, None] for part in (combine_weights.value, combine_weights.bound))
        value.index_add_(0, tokens, w * out.value)
        bound.index_add_(0, tokens, w.abs() * out.bound + dw * out.value.abs())
        bound.index_add_(0, tokens, gamma(moe.top_k + 2, dtype) * (w * out.value).abs())
    if moe.shared is not None:
        matrices = {
            name: weights[
                f"{at}.shared." + (name.replace("_bias", ".bias") if "_" in name else f"{name}.weight")
            ]
            for name in _names(moe.shared)
        }
        out = feed_forward(moe.shared, matrices, hidden, dtype)
        if moe.shared_gate:
            weight = weights[f"{at}.shared_gate.weight"].double()
            z = x.value @ weight.T
            gate = z.sigmoid()
            # sigmoid is nowhere steeper than 1/4.
            err = dot_bound(weight, hidden, dtype=dtype) / 4 + gamma(ELEMENTARY, dtype) * gate
            out = Judged(out.value * gate, out.bound * gate + out.value.abs() * err)
        value, bound = value + out.value, bound + out.bound
    return Judged(value, bound + gamma(2, dtype) * value.abs())


def feed_forward(ff: FeedForward, matrices: Weights, x: Tensor, dtype: torch.dtype) -> Judged:
    """[rows, D] -> [rows, D] through one network, its matrices as [out, in] under gate, up, down (_bias)."""
    w = {name: matrix.double() for name, matrix in matrices.items()}
    up = linear(w["up"], w.get("up_bias"), x, dtype)
    gate = linear(w["gate"], w.get("gate_bias"), x, dtype) if ff.gated else up
    slope = LIPSCHITZ[ff.activation]
    if ff.activation == "clamped_swiglu":
        assert ff.clamp is not None
        g = gate.value.clamp(max=ff.clamp)
        curved, other = g * torch.sigmoid(1.702 * g), up.value.clamp(-ff.clamp, ff.clamp) + 1
    else:
        curved, other = curve(ff.activation, gate.value), up.value
    if ff.gated:
        hidden = curved * other
        spread = slope * gate.bound * other.abs() + curved.abs() * up.bound
    else:
        hidden, spread = curved, slope * up.bound
    spread = spread + gamma(ELEMENTARY, dtype) * hidden.abs()
    bias = w.get("down_bias")
    value = hidden @ w["down"].T
    bound = dot_bound(w["down"], hidden, bias, dtype=dtype) + spread @ w["down"].abs().T
    return Judged(value if bias is None else value + bias, bound)


def linear(weight: Tensor, bias: Tensor | None, x: Tensor, dtype: torch.dtype) -> Judged:
    """[rows, in] -> W x + b, [rows, out]."""
    value = x.double() @ weight.double().T
    value = value if bias is None else value + bias.double()
    return Judged(value, dot_bound(weight, x, bias, dtype=dtype))


def curve(activation: str, x: Tensor) -> Tensor:
    """The activation of each x; not clamped_swiglu, which has a clamp."""
    match activation:
        case "relu":
            return x.clamp(min=0)
        case "silu":
            return x * x.sigmoid()
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        case _:  # gelu_tanh (arXiv 1606.08415, section 2)
            return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _names(ff: FeedForward) -> tuple[str, ...]:
    names = ("gate", "up", "down") if ff.gated else ("up", "down")
    return (*names, *(f"{name}_bias" for name in names)) if ff.bias else names
