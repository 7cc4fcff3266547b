"""Products, norms, activations and rotations. Letters: D width, F d_ff, h head_dim, r rotated dimensions;
"..." any leading dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from harness.spec.architecture import FeedForward, Norm, Rope

Weights = Mapping[str, Tensor]
"""Float64 tensors by canonical name."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] @ [..., K, N], as the sum of the second half of K and the first."""
    half = a.shape[-1] // 2
    return a[..., half:] @ b[..., half:, :] + a[..., :half] @ b[..., :half, :]


def total(x: Tensor) -> Tensor:
    """[..., D] -> [...]: the sum from the last to the first."""
    return x.flip(-1).sum(-1)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """[..., in] -> [..., out], with the bias if the weights have one."""
    y = product(x, w[f"{name}.weight"].transpose(0, 1))
    bias = w.get(f"{name}.bias")
    return y if bias is None else bias + y


def norm(x: Tensor, kind: Norm, w: Weights, name: str) -> Tensor:
    """RMSNorm (arXiv 1910.07467, eq. 4) or LayerNorm (arXiv 1607.06450) over the last dimension."""
    width = x.shape[-1]
    if kind.kind == "layernorm":
        x = x - (total(x) / width)[..., None]
    y = x / (total(x * x) / width + kind.eps)[..., None].sqrt() * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if kind.bias else y


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), through its logarithm."""
    return torch.exp(-torch.logaddexp(-x, torch.zeros_like(x)))


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    powers = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return powers / total(powers)[..., None]


def hidden(ff: FeedForward, gate: Tensor | None, up: Tensor) -> Tensor:
    """[..., F] pre-activations -> [..., F]; gpt-oss's clamped product where that is the activation."""
    if gate is None:
        return _curve(ff.activation, up)
    if ff.activation == "clamped_swiglu":
        limit = torch.tensor(ff.clamp, dtype=gate.dtype)
        low, bounded = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
        return low * sigmoid(1.702 * low) * (1 + bounded)
    return up * _curve(ff.activation, gate)


def _curve(name: str, x: Tensor) -> Tensor:
    match name:
        case "relu":
            return x.where(x > 0, 0.0)
        case "silu":
            return x * sigmoid(x)
        case "gelu":
            return 0.5 * x * torch.erfc(-x / math.sqrt(2))
        case "gelu_tanh":  # (1 + tanh z) / 2 is the sigmoid of 2 z
            return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    raise ValueError(f"{name} is not an activation of one argument")


def feed_forward(ff: FeedForward, x: Tensor, w: Weights, name: str) -> Tensor:
    """[..., D] -> [..., D]."""
    gate = linear(x, w, f"{name}.gate") if ff.gated else None
    return linear(hidden(ff, gate, linear(x, w, f"{name}.up")), w, f"{name}.down")


def turned(x: Tensor, rope: Rope | None, positions: Tensor, max_positions: int, dim: int) -> Tensor:
    """x [B, S, n, h], its first `dim` entries turned as dim / 2 complex numbers by positions [B, S]
    (arXiv 2104.09864, section 3.4.2)."""
    if rope is None:
        return x
    if dim % 2:
        raise ValueError(f"attention.rope: {dim} rotated dimensions cannot be paired; make it even")
    speeds, length = speed(rope, dim, max_positions)
    angle = positions.double()[..., None, None] * torch.tensor(speeds, dtype=torch.float64)
    front, rest = x[..., :dim], x[..., dim:]
    halves = rope.layout == "half"
    pairs = front.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else front.unflatten(-1, (-1, 2))
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.full_like(angle, length), angle)
    back = torch.view_as_real(spun)
    return torch.cat([(back.transpose(-1, -2) if halves else back).flatten(-2), rest], dim=-1)


def speed(rope: Rope, dim: int, max_positions: int) -> tuple[list[float], float]:
    """Radians per position of each pair, and the length of the turned vector over that of the vector.

    Each scaling is a share of the plain speed: 1 / factor where it is slowed, 1 where it is not, and in
    between by wavelength (Llama 3.1 model code) or by pair (arXiv 2309.00071, section 3.2).
    """
    plain = [math.exp(-math.log(rope.theta) * 2 * j / dim) for j in range(dim // 2)]
    s = rope.scaling
    if s is None:
        return plain, 1.0
    slow = [1 / s.factor] * len(plain)
    context = s.original_max_positions or max_positions
    if s.kind == "linear":
        return [a * b for a, b in zip(plain, slow, strict=True)], 1.0
    if s.kind == "llama3":
        turns = [context * v / math.tau for v in plain]
        free = [_ramp(t, s.low_freq_factor, s.high_freq_factor) for t in turns]
        length = 1.0
    else:
        pair = [
            dim / 2 * (math.log(context) - math.log(math.tau * beta)) / math.log(rope.theta)
            for beta in (s.beta_fast, s.beta_slow)
        ]
        if s.truncate:
            pair = [float(math.floor(pair[0])), float(math.ceil(pair[1]))]
        first, last = max(pair[0], 0.0), min(pair[1], dim - 1.0)
        last += 0.001 * (first == last)
        free = [1 - _ramp(float(j), first, last) for j in range(len(plain))]
        length = _length(s.attention_factor, s.factor, s.mscale, s.mscale_all_dim)
    return [v * (f + (1 - f) / s.factor) for v, f in zip(plain, free, strict=True)], length


def _ramp(x: float, low: float, high: float) -> float:
    return min(max((x - low) / (high - low), 0.0), 1.0)


def stretch(factor: float, mscale: float) -> float:
    """1 + mscale ln(factor) / 10; 1 where nothing is stretched (arXiv 2309.00071, eq. 22)."""
    return 1 + mscale * math.log(factor) / 10 if factor > 1 else 1.0


def _length(given: float | None, factor: float, mscale: float, all_dim: float) -> float:
    if given is not None:
        return given
    if mscale == 0 or all_dim == 0:
        return stretch(factor, 1.0)
    return stretch(factor, mscale) / stretch(factor, all_dim)
