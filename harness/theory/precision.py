"""In which formats a model is served or trained: what is stored, and what is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.spec.errors import SpecError, did_you_mean
from harness.spec.hardware import Format

BITS: Mapping[Format, float] = {
    "float32": 32,
    "tf32": 32,
    "bfloat16": 16,
    "float16": 16,
    "fp8": 8,
    "int8": 8,
    "fp4": 4.5,
    "mxfp4": 4.25,
    "int4": 4.5,
}
"""Bits of one stored element, block scales included: NVFP4 one FP8 scale for 16 elements, MXFP4 one E8M0
scale for 32 (OCP Microscaling Formats 1.0, table 1), int4 one 16-bit scale for 32 (Kimi-K2's group size);
FP8 scales of 128 x 128 blocks are below 0.1 %."""


@dataclass(frozen=True)
class Precision:
    """Formats of weights, cache and activations, and what the matrix units multiply."""

    name: str
    matrices: Format
    """Weights that every token meets: attention, dense and shared feed-forward."""
    experts: Format
    """Weights of the routed experts."""
    cache: Format
    """Keys and values."""
    multiplied: Format
    """What the matrix units multiply for `matrices`: not below what the hardware has."""
    experts_multiplied: Format
    embeddings: Format = "bfloat16"
    """Both embeddings and the router: quantisers leave them alone."""
    activations: Format = "bfloat16"


PRECISIONS: Mapping[str, Precision] = {
    one.name: one
    for one in (
        Precision("bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        Precision("float16", "float16", "float16", "float16", "float16", "float16", "float16", "float16"),
        Precision("fp8", "fp8", "fp8", "bfloat16", "fp8", "fp8"),
        Precision("fp8-cache", "fp8", "fp8", "fp8", "fp8", "fp8"),
        Precision("int8", "int8", "int8", "bfloat16", "int8", "int8"),
        Precision("int8-weights", "int8", "int8", "bfloat16", "bfloat16", "bfloat16"),
        Precision("nvfp4", "fp4", "fp4", "fp8", "fp4", "fp4"),
        Precision("mxfp4-experts", "bfloat16", "mxfp4", "bfloat16", "bfloat16", "bfloat16"),
        Precision("int4-experts", "bfloat16", "int4", "bfloat16", "bfloat16", "bfloat16"),
    )
}
"""By name; a weight-only format multiplies in bfloat16."""


def precision(name: str) -> Precision:
    """A precision by name. Raises SpecError with the names that there are."""
    if name not in PRECISIONS:
        raise SpecError(f'no precision "{name}"; {did_you_mean(name, PRECISIONS)}')
    return PRECISIONS[name]


def stored_bytes(form: Format) -> float:
    """Bytes of one stored element."""
    return BITS[form] / 8
