"""Vectors, norms, activations and feed-forward networks of one token. Letters: D width, F d_ff."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.spec.architecture import FeedForward, Norm

Array = NDArray[np.float64]
Token = tuple[int, int]
"""(sequence, place in it)."""
States = dict[Token, Array]


class Weights:
    """Weights by canonical name, as float64 arrays."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.arrays = {name: w.detach().cpu().to(torch.float64).numpy() for name, w in weights.items()}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that canonical name."""
        return name in self.arrays


def norm(x: Array, kind: Norm, w: Weights, name: str) -> Array:
    """RMSNorm (arXiv 1910.07467, eq. 4) or LayerNorm (arXiv 1607.06450) of one vector."""
    if kind.kind == "layernorm":
        x = x - x.sum() / x.size
    out = w.arrays[f"{name}.weight"] * (x / math.sqrt(float(x @ x) / x.size + kind.eps))
    return out + w.arrays[f"{name}.bias"] if kind.bias else out


def linear(x: Array, w: Weights, name: str) -> Array:
    """W x, plus the bias if the weights have one."""
    y: Array = w.arrays[f"{name}.weight"] @ x
    return y + w.arrays[f"{name}.bias"] if w.has(f"{name}.bias") else y


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v) / sum exp(v), shifted by the largest."""
    powers = [math.exp(v - max(values)) for v in values]
    return [p / math.fsum(powers) for p in powers]


def _act(name: str, z: float) -> float:
    match name:
        case "relu":
            return max(z, 0.0)
        case "silu":
            return z * sigmoid(z)
        case "gelu":
            return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    raise ValueError(name)


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)) without overflow on either side."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def hidden(ff: FeedForward, gate: Array | None, up: Array) -> Array:
    """The hidden layer [F]: activation(up), activation(gate) up, or gpt-oss's clamped product."""
    if gate is None:
        return np.array([_act(ff.activation, float(u)) for u in up])
    pairs = list(zip(map(float, gate), map(float, up), strict=True))
    if ff.activation == "clamped_swiglu":
        c = ff.clamp
        assert c is not None
        low = [(min(g, c), max(-c, min(u, c))) for g, u in pairs]
        return np.array([g * sigmoid(1.702 * g) * (u + 1) for g, u in low])
    return np.array([_act(ff.activation, g) * u for g, u in pairs])


def feed_forward(ff: FeedForward, x: Array, w: Weights, name: str) -> Array:
    """[D] -> [D]: down(hidden(gate(x), up(x)))."""
    gate = linear(x, w, f"{name}.gate") if ff.gated else None
    return linear(hidden(ff, gate, linear(x, w, f"{name}.up")), w, f"{name}.down")
