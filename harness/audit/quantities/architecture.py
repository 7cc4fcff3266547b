"""Quantities of the architecture, over all of its leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.audit.quantities.registry import quantity
from harness.spec import Architecture
from harness.theory import flops, parameters

ARCHITECTURE = "architecture"
"""The block, and the axis that stands for all leaves."""


def _sum(counts: Mapping[str, Any], names: frozenset[str] | None = None) -> Any:
    """Sum of components, small arrays first: adding in the order of size spares most of the work."""
    parts = [part for name, part in counts.items() if names is None or name in names]
    total: Any = 0
    for part in sorted(parts, key=np.size):
        total = total + part
    return total


def _counted(architecture: Architecture, counts: Mapping[str, Any], convention: str) -> Any:
    """What `parameters.total` and `.active` add up; whole numbers below 2**53 add exactly in any order."""
    if convention not in parameters.CONVENTIONS:
        raise ValueError(
            f"no counting convention {convention!r}; there are {', '.join(parameters.CONVENTIONS)}"
        )
    included = parameters.CONVENTIONS[convention].components
    total = _sum(counts, included)
    if architecture.tie_embeddings and "unembedding" in included and "embedding" not in included:
        total = total + counts["embedding"]
    return total


@quantity("parameters.total", "parameters", ARCHITECTURE, "experts + attention + rest", ARCHITECTURE)
def _total(architecture: Architecture, convention: str = "all") -> Any:
    return _counted(architecture, parameters.by_component(architecture), convention)


@quantity("parameters.active", "parameters", ARCHITECTURE, "active_experts + attention + rest", ARCHITECTURE)
def _active(architecture: Architecture, convention: str = "all") -> Any:
    return _counted(architecture, parameters.active_by_component(architecture), convention)


@quantity("parameters.growth", "x", ARCHITECTURE, "total / baseline", "parameters.total")
def _growth(total: Any, baseline: float) -> Any:
    return total / baseline


@quantity(
    "parameters.expert",
    "parameters",
    ARCHITECTURE,
    "n_moe_layers * (2 + gated) * d_model * d_ff + expert_biases",
    ARCHITECTURE,
)
def _expert(architecture: Architecture) -> Any:
    return parameters.one_expert(architecture)


@quantity(
    "parameters.attention",
    "parameters",
    ARCHITECTURE,
    "2 * n_layers * d_model * head_dim * (n_heads + n_kv_heads) + attention_other",
    ARCHITECTURE,
)
def _attention(architecture: Architecture) -> Any:
    return parameters.part(architecture, "attention")


@quantity("parameters.embeddings", "parameters", ARCHITECTURE, "embeddings", ARCHITECTURE)
def _embeddings(architecture: Architecture) -> Any:
    counts = parameters.by_component(architecture)
    return counts["embedding"] + counts["positions"] + counts["unembedding"]


@quantity("parameters.feed_forward", "parameters", ARCHITECTURE, "feed_forward", ARCHITECTURE)
def _feed_forward(architecture: Architecture) -> Any:
    counts = parameters.by_component(architecture)
    return _sum(
        {
            name: n
            for name, n in counts.items()
            if name.split(".")[0] in ("experts", "shared", "ffn", "router")
        }
    )


@quantity("flops.forward", "FLOP", ARCHITECTURE, "2 * active_matrices + scores", ARCHITECTURE)
def _forward(architecture: Architecture, context: int) -> Any:
    counts = flops.token_by_component(architecture, context)
    return _sum(counts)


@quantity("flops.dense_forward", "FLOP", ARCHITECTURE, "2 * total", "parameters.total")
def _dense_forward(total: Any) -> Any:
    return 2 * total


@quantity("architecture.d_ff_ratio", "x", ARCHITECTURE, "(not gated) * d_ff / d_model", ARCHITECTURE)
def _d_ff_ratio(architecture: Architecture) -> Any:
    ffn = architecture.moe.expert if architecture.moe else architecture.ffn
    assert ffn is not None  # a layer is one or the other
    return np.logical_not(ffn.gated) * ffn.d_ff / architecture.d_model


@quantity("architecture.query_ratio", "x", ARCHITECTURE, "n_heads * head_dim / d_model", ARCHITECTURE)
def _query_ratio(architecture: Architecture) -> Any:
    return architecture.attention.n_heads * architecture.attention.head_dim / architecture.d_model


@quantity(
    "serving.even_split",
    "",
    ARCHITECTURE,
    "(n_layers % even_on == 0) * (n_layers % uneven_on != 0)",
    ARCHITECTURE,
)
def _even_split(architecture: Architecture, even_on: int, uneven_on: int) -> Any:
    layers = np.asarray(architecture.n_layers)
    return (np.mod(layers, even_on) == 0) & (np.mod(layers, uneven_on) != 0)


def terms(architecture: Architecture, context: int = 0, convention: str = "all") -> dict[str, float]:
    """Numbers of one architecture under the names that formulas of the block "architecture" use.

    What adds up to the total or the active parameters is what `convention` counts of it.
    """
    counts, active = parameters.by_component(architecture), parameters.active_by_component(architecture)
    included = parameters.CONVENTIONS[convention].components
    work = flops.token_by_component(architecture, context)
    total, used = parameters.total(architecture, convention), parameters.active(architecture, convention)
    routed_names = included & {"experts.weights", "experts.biases"}
    experts = _sum(counts, routed_names)
    attention = _sum(counts, frozenset(name for name in included if name.startswith("attention.")))
    heads = architecture.attention
    plain = (
        2 * architecture.n_layers * architecture.d_model * heads.head_dim * (heads.n_heads + heads.n_kv_heads)
    )
    ffn = architecture.moe.expert if architecture.moe else architecture.ffn
    assert ffn is not None  # a layer is one or the other
    expert, routed = parameters.one_expert(architecture), parameters.n_moe_layers(architecture)
    return {
        "d_model": architecture.d_model,
        "n_layers": architecture.n_layers,
        "n_moe_layers": routed,
        "n_heads": heads.n_heads,
        "n_kv_heads": heads.n_kv_heads,
        "head_dim": heads.head_dim,
        "d_ff": ffn.d_ff,
        "gated": int(ffn.gated),
        "experts": experts,
        "active_experts": _sum(active, routed_names),
        "expert_biases": expert - routed * parameters.matrix_parameters(architecture.d_model, ffn),
        "attention": attention,
        "attention_other": attention - plain,
        "rest": total - experts - attention,
        "total": total,
        "active": used,
        "active_matrices": parameters.active(architecture, "matmul"),
        "scores": work["attention.scores"] + work["attention.values"],
        "embeddings": _embeddings(architecture),
        "feed_forward": _feed_forward(architecture),
    }
