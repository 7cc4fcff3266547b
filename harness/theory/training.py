"""What a training run costs, in FLOPs, device time and money.

Plain arithmetic on floats (or arrays of them); FLOPs stay exact integers while their arguments are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from harness.spec.architecture import Architecture
from harness.theory import parameters
from harness.theory.flops import forward_per_token

FlopConvention = Literal["6n", "6n-matmul", "palm", "forward-x3"]

FLOP_CONVENTIONS: Mapping[FlopConvention, str] = {
    "6n": "6 FLOP per active parameter, both embeddings counted, no attention term (Kaplan et al. 2020)",
    "6n-matmul": "6 FLOP per active matrix parameter, unembedding counted, no attention term",
    "palm": "6 N + 12 L H h S: attention over the full S x S square, no recomputation (PaLM, appendix B)",
    "forward-x3": "three forward passes, full attention: backward is two products for each of forward's",
}

SECONDS_PER_DAY = 86_400
HOURS_PER_DAY = 24


def flops_per_token(architecture: Architecture, context: int, convention: FlopConvention = "6n") -> int:
    """Training FLOPs of one token in a sequence of `context` tokens, under a key of FLOP_CONVENTIONS.

    Raises ValueError on another name.
    """
    attention = architecture.attention
    if convention == "6n":
        return 6 * parameters.active(architecture)
    if convention == "6n-matmul":
        return 6 * parameters.active(architecture, "matmul")
    if convention == "palm":
        square = 12 * architecture.n_layers * attention.n_heads * attention.head_dim * context
        return 6 * parameters.active(architecture) + square
    if convention == "forward-x3":
        return 3 * forward_per_token(architecture, context)
    raise ValueError(f"no FLOP convention {convention!r}; there are {', '.join(FLOP_CONVENTIONS)}")


def mfu(flops_per_token: float, tokens_per_second: float, devices: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the model's FLOP/s over the devices' peak FLOP/s (PaLM, appendix B)."""
    return flops_per_token * tokens_per_second / (devices * peak_flops)


def days(flops: float, devices: float, peak_flops: float, mfu: float) -> float:
    """Days that `devices` of `peak_flops` FLOP/s each need for `flops` at that utilisation."""
    return flops / (devices * peak_flops * mfu * SECONDS_PER_DAY)


def implied_mfu(flops: float, devices: float, peak_flops: float, days: float) -> float:
    """The utilisation at which `devices` finish `flops` in so many days."""
    return flops / (devices * peak_flops * days * SECONDS_PER_DAY)


def device_hours(devices: float, days: float) -> float:
    """Hours of devices that are occupied for so many days, busy or not."""
    return devices * days * HOURS_PER_DAY


def cost(devices: float, days: float, price_per_device_hour: float) -> float:
    """Rent of the devices, in the currency of the price."""
    return device_hours(devices, days) * price_per_device_hour
