"""The small parts: linear layer, norms, activations and the dense feed-forward network.

Letters: D width of the residual stream, F d_ff; "..." any leading dimensions.
Parameters are created empty: weights are drawn or loaded afterwards, never from the global RNG.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.spec import architecture as spec

SWIGLU_ALPHA = 1.702
"""Of gpt-oss: gate * sigmoid(1.702 gate), the sigmoid approximation of GELU (arXiv 1606.08415)."""


class Options(TypedDict):
    """Where and as what parameters are created."""

    device: torch.device
    dtype: torch.dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a row are taken: float32, or float64 if the input is."""
    return torch.promote_types(dtype, torch.float32)


def empty(*shape: int, options: Options) -> nn.Parameter:
    """A parameter whose values are still to be loaded."""
    return nn.Parameter(torch.empty(shape, **options))


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool = False, options: Options) -> None:
        super().__init__()
        self.weight = empty(out_width, in_width, options=options)
        self.bias = empty(out_width, options=options) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table of rows."""

    def __init__(self, rows: int, width: int, *, options: Options) -> None:
        super().__init__()
        self.weight = empty(rows, width, options=options)

    def forward(self, index: Tensor) -> Tensor:
        """[...] int64 -> [..., width]."""
        return functional.embedding(index, self.weight)


class Norm(nn.Module):
    """RMSNorm x / sqrt(mean(x^2) + eps) * w (arXiv 1910.07467, eq. 4), or LayerNorm (arXiv 1607.06450).

    Statistics and products are taken in at least float32; the result has the input's dtype.
    """

    def __init__(self, norm: spec.Norm, width: int, *, options: Options) -> None:
        super().__init__()
        self.kind, self.eps = norm.kind, norm.eps
        self.weight = empty(width, options=options)
        self.bias = empty(width, options=options) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        wide = x.to(at_least_float32(x.dtype))
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        if self.bias is not None:
            wide = wide + self.bias
        return wide.to(x.dtype)


def activate(ff: spec.FeedForward, gate: Tensor | None, up: Tensor) -> Tensor:
    """The hidden layer of a feed-forward network from its pre-activations, each [..., F].

    Gated (arXiv 2002.05202, section 2): activation(gate) * up. Not gated: activation(up).
    clamped_swiglu (gpt-oss model code): gate' = min(gate, c), up' = clip(up, -c, c),
    gate' * sigmoid(1.702 gate') * (up' + 1).
    """
    if gate is None:
        return _pointwise(ff.activation, up)
    if ff.activation == "clamped_swiglu":
        assert ff.clamp is not None  # FeedForward refuses clamped_swiglu without it
        gate, up = gate.clamp(max=ff.clamp), up.clamp(-ff.clamp, ff.clamp)
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return _pointwise(ff.activation, gate) * up


def _pointwise(activation: spec.Activation, x: Tensor) -> Tensor:
    match activation:
        case "relu":
            return functional.relu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "silu":
            return functional.silu(x)
        case _:
            raise ValueError(f"{activation} is not an activation of one argument")


class FeedForward(nn.Module):
    """A dense feed-forward network: down(activate(gate(x), up(x)))."""

    def __init__(self, ff: spec.FeedForward, d_model: int, *, options: Options) -> None:
        super().__init__()
        self.ff = ff
        self.gate = Linear(d_model, ff.d_ff, bias=ff.bias, options=options) if ff.gated else None
        self.up = Linear(d_model, ff.d_ff, bias=ff.bias, options=options)
        self.down = Linear(ff.d_ff, d_model, bias=ff.bias, options=options)

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """[..., F] pre-activations -> [..., F]."""
        return activate(self.ff, gate, up)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate = None if self.gate is None else self.gate(x)
        out: Tensor = self.down(self.activate(gate, self.up(x)))
        return out
