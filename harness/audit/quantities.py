"""The quantities that claims may name, with the theory behind each.

A claim's `quantity` is one of QUANTITIES, or an axis by its name: "architecture.n_layers" (any leaf),
"training.gpus", "serving.batch" (any entry of these tables).

Blocks. Quantities are judged in blocks of few axes each: all leaves of the architecture, the run (how much
compute, on what, how long, for how much), where weights lie in training and in serving, what serving costs, what
each expert gets. An axis of two blocks runs in each of them separately, and the claims on its value are tests in
both. That leaves more completions than one grid over all axes would, never fewer: a set of claims that no
completion of one block admits is in conflict for certain, and what is reported as consistent or undetermined
could only be narrowed by a joint search.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from harness.audit.axes import Numbers
from harness.audit.quantity import Quantity, Side
from harness.spec import Architecture
from harness.theory import flops, parameters, serving, training

QUANTITIES: dict[str, Quantity] = {}

LINKS: Mapping[str, str] = {"parameters.total": "total", "parameters.active": "active"}
"""Counts of the architecture that other blocks take as given, and the argument they are there."""

Closed = Callable[..., Any]


def quantity(
    name: str, dimension: str, block: str, formula: str, *axes: str, side: Side = "exact"
) -> Callable[[Closed], Closed]:
    """Register a closed form; its arguments that are no axis are constants which a claim gives."""

    def register(compute: Closed) -> Closed:
        named = {argument(axis) for axis in axes}
        wanted = [p for p in inspect.signature(compute).parameters.values() if p.name not in named]
        given = tuple(p.name for p in wanted if p.default is inspect.Parameter.empty)
        optional = tuple(p.name for p in wanted if p.name not in given)
        QUANTITIES[name] = Quantity(name, dimension, block, axes, given, optional, side, compute, formula)
        return compute

    return register


def argument(axis: str) -> str:
    """The argument that an axis is passed as."""
    return LINKS.get(axis, axis.rpartition(".")[2])


def _sum(counts: Mapping[str, Any], names: frozenset[str] | None = None) -> Any:
    """Sum of components, small arrays first: adding in the order of size spares most of the work."""
    parts = [part for name, part in counts.items() if names is None or name in names]
    total: Any = 0
    for part in sorted(parts, key=np.size):
        total = total + part
    return total


def _counted(architecture: Architecture, counts: Mapping[str, Any], convention: str) -> Any:
    """`parameters.total` or `.active` of arrays: float64 sums of whole numbers below 2**53 are exact in any order."""
    if convention not in parameters.CONVENTIONS:
        raise ValueError(f"no counting convention {convention!r}; there are {', '.join(parameters.CONVENTIONS)}")
    included = parameters.CONVENTIONS[convention].components
    total = _sum(counts, included)
    if architecture.tie_embeddings and "unembedding" in included and "embedding" not in included:
        total = total + counts["embedding"]
    return total


# The architecture ---------------------------------------------------------------------------------------------

ARCHITECTURE = "architecture"


@quantity("parameters.total", "parameters", ARCHITECTURE, "experts + attention + rest", ARCHITECTURE)
def _total(architecture: Architecture, convention: str = "all") -> Any:
    return _counted(architecture, parameters.by_component(architecture), convention)


@quantity("parameters.active", "parameters", ARCHITECTURE, "active_experts + attention + rest", ARCHITECTURE)
def _active(architecture: Architecture, convention: str = "all") -> Any:
    return _counted(architecture, parameters.active_by_component(architecture), convention)


@quantity("parameters.growth", "x", ARCHITECTURE, "total / baseline", "parameters.total")
def _growth(total: Numbers, baseline: float) -> Any:
    return total / baseline


@quantity("parameters.expert", "parameters", ARCHITECTURE,
          "n_moe_layers * (2 + gated) * d_model * d_ff + expert_biases", ARCHITECTURE)  # fmt: skip
def _expert(architecture: Architecture) -> Any:
    return parameters.one_expert(architecture)


@quantity("parameters.attention", "parameters", ARCHITECTURE,
          "2 * n_layers * d_model * head_dim * (n_heads + n_kv_heads) + attention_other", ARCHITECTURE)  # fmt: skip
def _attention(architecture: Architecture) -> Any:
    return parameters.part(architecture, "attention")


@quantity("parameters.embeddings", "parameters", ARCHITECTURE, "embeddings", ARCHITECTURE)
def _embeddings(architecture: Architecture) -> Any:
    counts = parameters.by_component(architecture)
    return counts["embedding"] + counts["positions"] + counts["unembedding"]


@quantity("parameters.feed_forward", "parameters", ARCHITECTURE, "feed_forward", ARCHITECTURE)
def _feed_forward(architecture: Architecture) -> Any:
    counts = parameters.by_component(architecture)
    return _sum({name: n for name, n in counts.items() if name.split(".")[0] in ("experts", "shared", "ffn", "router")})


@quantity("flops.forward", "FLOP", ARCHITECTURE, "2 * active_matrices + scores", ARCHITECTURE)
def _forward(architecture: Architecture, context: int) -> Any:
    counts = flops.token_by_component(architecture, context)
    return _sum(counts)


@quantity("flops.dense_forward", "FLOP", ARCHITECTURE, "2 * total", "parameters.total")
def _dense_forward(total: Numbers) -> Any:
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


# The training run ---------------------------------------------------------------------------------------------

RUN = "run"


@quantity("training.flops", "FLOP", RUN, "6 * active * tokens", "parameters.active", "training.tokens")
def _training_flops(active: Numbers, tokens: Numbers, convention: str = "6n") -> Any:
    if convention != "6n":
        raise ValueError(f"training FLOPs are audited under the convention \"6n\", not {convention!r}")
    return 6 * active * tokens


@quantity(
    "training.mfu",
    "x",
    RUN,
    "6 * active * tokens / (gpus * peak_flops * days * 86400)",
    "parameters.active",
    "training.tokens",
    "training.gpus",
    "training.peak_flops",
    "training.days",
)
def _mfu(active: Numbers, tokens: Numbers, gpus: Any, peak_flops: Any, days: Any) -> Any:
    return training.implied_mfu(6 * active * tokens, gpus, peak_flops, days)


@quantity(
    "training.cost",
    "USD",
    RUN,
    "gpus * days * 24 * gpu_hour_usd",
    "training.gpus",
    "training.days",
    "training.gpu_hour_usd",
)
def _cost(gpus: Any, days: Any, gpu_hour_usd: Any) -> Any:
    return training.cost(gpus, days, gpu_hour_usd)


@quantity("training.rent", "USD", "rent", "gpus * days * 24 * gpu_hour_usd")
def _rent(gpus: float, days: float, gpu_hour_usd: float) -> Any:
    return training.cost(gpus, days, gpu_hour_usd)


@quantity(
    "training.unique_text_tokens",
    "tokens",
    "data",
    "tokens / text_epochs",
    "training.tokens",
    "training.text_epochs",
    side="most",
)
def _unique_text(tokens: Numbers, text_epochs: Numbers) -> Any:
    return tokens / text_epochs


# Where weights lie --------------------------------------------------------------------------------------------

STATES = "training layout"
NODES = "serving layout"


@quantity(
    "training.weights_per_gpu",
    "B",
    STATES,
    "total * bytes_per_parameter / (tensor_parallel * pipeline_parallel)",
    "parameters.total",
    "training.tensor_parallel",
    "training.pipeline_parallel",
)
def _training_weights(
    total: Numbers, tensor_parallel: Any, pipeline_parallel: Any, bytes_per_parameter: float
) -> Any:
    return serving.weight_bytes_per_device(total, bytes_per_parameter, tensor_parallel, pipeline_parallel)


@quantity(
    "training.spare_memory",
    "B",
    STATES,
    "gpu_memory - total / (tensor_parallel * pipeline_parallel) * ("
    "weight_bytes / (replicas if zero_stage >= 3 else 1)"
    " + gradient_bytes / (replicas if zero_stage >= 2 else 1)"
    " + optimizer_bytes / (replicas if zero_stage >= 1 else 1))",
    "parameters.total",
    "training.tensor_parallel",
    "training.pipeline_parallel",
    "training.zero_stage",
    "training.gpus",
    "training.gpu_memory",
)
def _spare_memory(
    total: Numbers,
    tensor_parallel: Numbers,
    pipeline_parallel: Numbers,
    zero_stage: Numbers,
    gpus: Numbers,
    gpu_memory: Numbers,
    weight_bytes: float,
    gradient_bytes: float,
    optimizer_bytes: float,
) -> Any:
    """ZeRO (arXiv 1910.02054), section 3.1: stage 1 shards Adam's states over the replicas, 2 gradients too, 3 all."""
    ways = tensor_parallel * pipeline_parallel
    replicas = gpus / ways
    per_parameter = (
        weight_bytes / np.where(zero_stage >= 3, replicas, 1)
        + gradient_bytes / np.where(zero_stage >= 2, replicas, 1)
        + optimizer_bytes / np.where(zero_stage >= 1, replicas, 1)
    )
    return gpu_memory - total / ways * per_parameter


@quantity("serving.gpus", "GPUs", NODES, "tensor_parallel * pipeline_parallel", "serving.tensor_parallel",
          "serving.pipeline_parallel")  # fmt: skip
def _serving_gpus(tensor_parallel: Any, pipeline_parallel: Any) -> Any:
    return tensor_parallel * pipeline_parallel


@quantity("serving.parameters_per_node", "parameters", NODES, "total / (pipeline_parallel - 1 + head_share)",
          "parameters.total", "serving.pipeline_parallel", "serving.head_share")  # fmt: skip
def _per_node(total: Numbers, pipeline_parallel: Any, head_share: Any) -> Any:
    """Of a node that is not the head: the head holds `head_share` of what the others hold."""
    return serving.parameters_per_node(total, pipeline_parallel - 1 + head_share)


@quantity(
    "serving.weights_per_gpu",
    "B",
    NODES,
    "total * bytes_per_parameter / (tensor_parallel * (pipeline_parallel - 1 + head_share))",
    "parameters.total",
    "serving.tensor_parallel",
    "serving.pipeline_parallel",
    "serving.head_share",
)
def _serving_weights(
    total: Numbers, tensor_parallel: Any, pipeline_parallel: Any, head_share: Any, bytes_per_parameter: float
) -> Any:
    stages = pipeline_parallel - 1 + head_share
    return serving.weight_bytes_per_device(total, bytes_per_parameter, tensor_parallel, stages)


# What serving costs, and what bandwidth allows ------------------------------------------------------------------


@quantity("parameters.active_growth", "x", "davinci", "active / baseline", "parameters.active")
def _active_growth(active: Numbers, baseline: float) -> Any:
    return active / baseline


@quantity(
    "serving.cost_per_1k_tokens",
    "USD",
    "serving cost",
    "gpus * gpu_hour_usd / 3600 * 1000 * 2 * active / (gpus * peak_flops)",
    "parameters.active",
    "training.gpu_hour_usd",
    side="least",
)
def _serving_cost(active: Numbers, gpu_hour_usd: Any, gpus: float, peak_flops: float) -> Any:
    """The floor at which every FLOP of the peak is used; memory and network can only add to it."""
    return serving.minimal_cost_per_1k_tokens(2 * active, gpus, peak_flops, gpu_hour_usd)


@quantity("roofline.decode_tokens_per_second", "tokens/s", "roofline",
          "gpus * bandwidth / (parameters * bytes_per_parameter)", side="most")  # fmt: skip
def _decode_rate(parameters: float, bytes_per_parameter: float, gpus: float, bandwidth: float) -> Any:
    """One sequence: each token reads all the weights once (Pope et al. 2022, arXiv 2211.05102, section 2)."""
    return gpus * bandwidth / (parameters * bytes_per_parameter)


@quantity("roofline.decode_utilisation", "x", "roofline",
          "2 * parameters * tokens_per_second / (gpus * peak_flops)")  # fmt: skip
def _decode_utilisation(parameters: float, tokens_per_second: float, gpus: float, peak_flops: float) -> Any:
    return training.mfu(2 * parameters, tokens_per_second, gpus, peak_flops)


@quantity("roofline.parameter_limit", "parameters", "roofline",
          "gpus * bandwidth / (tokens_per_second * bytes_per_parameter)", side="most")  # fmt: skip
def _parameter_limit(tokens_per_second: float, bytes_per_parameter: float, gpus: float, bandwidth: float) -> Any:
    return gpus * bandwidth / (tokens_per_second * bytes_per_parameter)


@quantity("roofline.intensity", "FLOP/byte", "intensity", "2 * batch / bytes_per_parameter",
          "serving.bytes_per_parameter")  # fmt: skip
def _intensity(bytes_per_parameter: Numbers, batch: float) -> Any:
    """A weight that is read once is multiplied and added once for every token of the batch."""
    return 2 * batch / bytes_per_parameter


@quantity("memory.cache_example", "B", "cache",
          "2 * layers * heads * head_dim * bytes_per_element * context * batch")  # fmt: skip
def _cache(
    layers: int, heads: int, head_dim: int, batch: int, context: int, bytes_per_element: int
) -> Any:
    """Keys and values of every head, as `harness.theory.memory` counts them for a whole architecture."""
    return 2 * layers * heads * head_dim * bytes_per_element * context * batch


# What each expert gets ------------------------------------------------------------------------------------------

LOAD = "load"
_ROUTED = ("architecture.moe.n_experts", "architecture.moe.top_k")


@quantity("routing.training_tokens_per_expert", "tokens", LOAD, "batch_tokens * top_k / n_experts",
          "training.batch_tokens", *_ROUTED)  # fmt: skip
def _training_load(batch_tokens: Numbers, n_experts: Numbers, top_k: Numbers) -> Any:
    return batch_tokens * top_k / n_experts


@quantity("routing.serving_tokens_per_expert", "tokens", LOAD, "batch * top_k / n_experts",
          "serving.batch", *_ROUTED)  # fmt: skip
def _serving_load(batch: Numbers, n_experts: Numbers, top_k: Numbers) -> Any:
    return batch * top_k / n_experts


@quantity("routing.most_tokens_of_an_expert", "tokens", "imbalance", "batch", side="most")
def _most_tokens(batch: float) -> Any:
    """A token's k experts are distinct, so that no expert gets a token twice."""
    return batch


@quantity("reading.tokens_per_second", "tokens/s", "reading",
          "known_tokens_per_second * words_per_minute / known_words_per_minute")  # fmt: skip
def _reading(
    words_per_minute: float, known_words_per_minute: float, known_tokens_per_second: float
) -> Any:
    """A reader's rate in proportion to a known one: the same tokens for each word."""
    return known_tokens_per_second * words_per_minute / known_words_per_minute


@quantity("vision.io_ratio", "x", "vision", "vision_bytes / text_bytes")
def _io_ratio(vision_bytes: float, text_bytes: float) -> Any:
    return vision_bytes / text_bytes


def terms(architecture: Architecture, context: int = 0) -> dict[str, float]:
    """Numbers of one architecture under the names that formulas of the block "architecture" use."""
    counts, active = parameters.by_component(architecture), parameters.active_by_component(architecture)
    work = flops.token_by_component(architecture, context)
    experts = counts["experts.weights"] + counts["experts.biases"]
    attention, heads = parameters.part(architecture, "attention"), architecture.attention
    plain = 2 * architecture.n_layers * architecture.d_model * heads.head_dim * (heads.n_heads + heads.n_kv_heads)
    moe, ffn = architecture.moe, architecture.moe.expert if architecture.moe else architecture.ffn
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
        "active_experts": active["experts.weights"] + active["experts.biases"],
        "expert_biases": expert - routed * parameters.matrix_parameters(architecture.d_model, ffn),
        "attention": attention,
        "attention_other": attention - plain,
        "rest": sum(counts.values()) - experts - attention,
        "total": sum(counts.values()),
        "active": sum(active.values()),
        "active_matrices": parameters.active(architecture, "matmul"),
        "scores": work["attention.scores"] + work["attention.values"],
        "embeddings": _embeddings(architecture),
        "feed_forward": _feed_forward(architecture),
    }
