"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its stretched variants.

Letters: B sequences, S tokens, H heads, h head_dim, r rotated dimensions of each head (r <= h, even).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.reference.layers import at_least_float32
from harness.spec.architecture import Rope, RopeScaling


def frequencies(rope: Rope, dim: int, max_positions: int) -> tuple[list[float], float]:
    """Radians per position of each of the dim / 2 pairs, and the factor on cos and sin.

    Unscaled: theta^(-2j / dim), factor 1 (arXiv 2104.09864, section 3.2.2).
    """
    plain: list[float] = [rope.theta ** (-2 * j / dim) for j in range(dim // 2)]
    scaling = rope.scaling
    if scaling is None:
        return plain, 1.0
    original = scaling.original_max_positions or max_positions
    match scaling.kind:
        case "linear":
            return [f / scaling.factor for f in plain], 1.0
        case "llama3":
            return [_llama3(f, scaling, original) for f in plain], 1.0
        case "yarn":
            keep = _yarn_extrapolated(rope.theta, dim, scaling, original)
            scaled = [f * k + f / scaling.factor * (1 - k) for f, k in zip(plain, keep, strict=True)]
            return scaled, yarn_attention_factor(scaling)


def _llama3(frequency: float, scaling: RopeScaling, original: int) -> float:
    """Llama 3.1 model code: long wavelengths / factor, short ones kept, linear in 1 / wavelength between."""
    turns = original * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if turns < low:
        return frequency / scaling.factor
    if turns > high:
        return frequency
    keep = (turns - low) / (high - low)
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def _yarn_extrapolated(theta: float, dim: int, scaling: RopeScaling, original: int) -> list[float]:
    """Share of each pair's frequency that is kept: 1 - ramp (arXiv 2309.00071, eq. 18-21).

    The ramp runs over pair indices, from the pair that turns beta_fast times in the original context
    to the one that turns beta_slow times; rounded outwards to whole pairs if `truncate`.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the published code: a step, without dividing by zero
    return [1 - min(max((j - low) / (high - low), 0.0), 1.0) for j in range(dim // 2)]


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, and 1 for factors that do not stretch (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """Factor on cos and sin: explicit, or from both mscales (DeepSeek-V3 model code), or the paper's."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_mscale(scaling.factor, 1.0)


class Rotary:
    """Rotates the first `dim` dimensions of every head by its token's position."""

    def __init__(self, rope: Rope, dim: int, max_positions: int) -> None:
        if dim % 2:
            raise ValueError(f"attention.rope: {dim} rotated dimensions cannot be paired; make it even")
        self.dim, self.layout = dim, rope.layout
        self.frequencies, self.factor = frequencies(rope, dim, max_positions)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float64 [B, S, 1, r / 2], of positions [B, S]."""
        table = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        angle = positions.to(torch.float64)[..., None, None] * table
        return angle.cos() * self.factor, angle.sin() * self.factor

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, S, H, h], its first r dimensions rotated in at least float32, in x's dtype."""
        dtype = at_least_float32(x.dtype)
        cos, sin = (table.to(dtype) for table in self.angles(positions))
        turned, kept = x[..., : self.dim].to(dtype), x[..., self.dim :]
        if self.layout == "half":
            one, two = turned.chunk(2, dim=-1)
            turned = torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
        else:
            one, two = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([one * cos - two * sin, two * cos + one * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), kept], dim=-1)
