"""Between which values a count lies when dimensions are unknown, from their domains alone."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor
from typing import Any

from harness.spec import Architecture, Spec
from harness.spec.domains import ordered, value_at

INCREASING = frozenset(
    {
        "d_model",
        "n_layers",
        "vocab_size",
        "max_positions",
        "attention.n_heads",
        "attention.n_kv_heads",
        "attention.head_dim",
        "ffn.d_ff",
        "ffn.gated",
        "moe.n_experts",
        "moe.top_k",
        "moe.expert.d_ff",
        "moe.expert.gated",
        "moe.shared.d_ff",
        "moe.shared.gated",
    }
)
"""Leaves in which every count of parameters, FLOPs and bytes is non-decreasing."""


def corners(spec: Spec) -> tuple[Architecture, Architecture] | None:
    """The architectures with every unknown at its least and at its largest value.

    Counts of all completions lie between theirs, whether or not the corners themselves would validate.
    None if an unknown is no dimension, so that nothing of the kind follows.
    """
    if not {leaf.path for leaf in spec.unknowns} <= INCREASING:
        return None
    least = _assignment(spec, lambda values: floor(min(values)))
    largest = _assignment(spec, lambda values: ceil(max(values)))
    return spec.vectorised(least), spec.vectorised(largest)


def _assignment(spec: Spec, pick: Callable[[tuple[Any, ...]], int]) -> dict[str, Any]:
    """Every unknown at the `pick` of its values, after the leaf that it is a factor of."""
    unknowns = {leaf.path: leaf for leaf in spec.unknowns}
    values: dict[str, Any] = {}
    for path in ordered(unknowns):
        domain = unknowns[path].domain
        assert domain is not None  # the loader refuses an unknown without one
        base = values.get(domain.of, value_at(spec.template, domain.of)) if domain.of else None
        values[path] = pick(domain.given(base))
    return values
