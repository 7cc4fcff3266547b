"""Quantities of training, serving, hardware and data, over the entries of [training] and [serving]."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.audit.axes import Numbers
from harness.audit.quantities.registry import quantity
from harness.theory import serving, training

# The training run

RUN = "run"


@quantity("training.flops", "FLOP", RUN, "6 * active * tokens", "parameters.active", "training.tokens")
def _training_flops(active: Any, tokens: Any, convention: str = "6n") -> Any:
    if convention != "6n":
        raise ValueError(f'training FLOPs are audited under the convention "6n", not {convention!r}')
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
def _mfu(active: Any, tokens: Any, gpus: Any, peak_flops: Any, days: Any) -> Any:
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
def _unique_text(tokens: Any, text_epochs: Numbers) -> Any:
    return tokens / text_epochs


# Where weights lie

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
    total: Any, tensor_parallel: Any, pipeline_parallel: Any, bytes_per_parameter: float
) -> Any:
    return serving.weight_bytes_per_device(total, bytes_per_parameter, tensor_parallel, pipeline_parallel)


@quantity(
    "training.spare_memory",
    "B",
    STATES,
    "ways = tensor_parallel * pipeline_parallel\n"
    "replicas = gpus / ways\n"
    "per_parameter = weight_bytes / replicas ** (zero_stage >= 3)"
    " + gradient_bytes / replicas ** (zero_stage >= 2) + optimizer_bytes / replicas ** (zero_stage >= 1)\n"
    "held = total / ways * (1 - experts_share + experts_share / expert_ranks)\n"
    "gpu_memory - held * per_parameter",
    "parameters.total",
    "training.tensor_parallel",
    "training.pipeline_parallel",
    "training.zero_stage",
    "training.gpus",
    "training.gpu_memory",
    "assumptions.expert_ranks",
)
def _spare_memory(
    total: Any,
    tensor_parallel: Numbers,
    pipeline_parallel: Numbers,
    zero_stage: Numbers,
    gpus: Numbers,
    gpu_memory: Numbers,
    expert_ranks: Numbers,
    weight_bytes: float,
    gradient_bytes: float,
    optimizer_bytes: float,
    experts_share: float,
) -> Any:
    """ZeRO (arXiv 1910.02054), section 3.1: stage 1 shards Adam's states, 2 gradients too, 3 all.

    Experts may besides be divided over `expert_ranks` data-parallel ranks; their states are then sharded
    over that many fewer of them, which leaves a few bytes more than is counted here.
    """
    ways = tensor_parallel * pipeline_parallel
    replicas = gpus / ways
    per_parameter = (
        weight_bytes / np.where(zero_stage >= 3, replicas, 1)
        + gradient_bytes / np.where(zero_stage >= 2, replicas, 1)
        + optimizer_bytes / np.where(zero_stage >= 1, replicas, 1)
    )
    kept = 1 - experts_share + experts_share / expert_ranks
    return gpu_memory - total / ways * kept * per_parameter


@quantity(
    "serving.gpus",
    "GPUs",
    NODES,
    "tensor_parallel * pipeline_parallel",
    "serving.tensor_parallel",
    "serving.pipeline_parallel",
)
def _serving_gpus(tensor_parallel: Any, pipeline_parallel: Any) -> Any:
    return tensor_parallel * pipeline_parallel


@quantity(
    "serving.parameters_per_node",
    "parameters",
    NODES,
    "total / (pipeline_parallel - 1 + head_share)",
    "parameters.total",
    "serving.pipeline_parallel",
    "serving.head_share",
)
def _per_node(total: Any, pipeline_parallel: Any, head_share: Any) -> Any:
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
    total: Any, tensor_parallel: Any, pipeline_parallel: Any, head_share: Any, bytes_per_parameter: float
) -> Any:
    stages = pipeline_parallel - 1 + head_share
    return serving.weight_bytes_per_device(total, bytes_per_parameter, tensor_parallel, stages)


# What serving costs, and what bandwidth allows


@quantity("parameters.active_growth", "x", "davinci", "active / baseline", "parameters.active")
def _active_growth(active: Any, baseline: float) -> Any:
    return active / baseline


@quantity(
    "serving.least_cost_per_1k_tokens",
    "USD",
    "price",
    "gpus * gpu_hour_usd / 3600 * 1000 * 2 * active / (gpus * peak_flops)",
    "parameters.active",
    "training.gpu_hour_usd",
    side="least",
)
def _least_cost(active: Any, gpu_hour_usd: Any, gpus: float, peak_flops: float) -> Any:
    """The floor at which every FLOP of the peak is used; memory and network can only add to it."""
    return serving.minimal_cost_per_1k_tokens(2 * active, gpus, peak_flops, gpu_hour_usd)


@quantity(
    "serving.cost_per_1k_tokens",
    "USD",
    "serving cost",
    "gpus * gpu_hour_usd / 3600 * 1000 * 2 * active / (gpus * peak_flops * serving_mfu)",
    "parameters.active",
    "training.gpu_hour_usd",
    "assumptions.serving_mfu",
)
def _serving_cost(active: Any, gpu_hour_usd: Any, serving_mfu: Any, gpus: float, peak_flops: float) -> Any:
    """At the share of the peak that serving reaches: batch, context and the mix of prompts decide it."""
    return serving.minimal_cost_per_1k_tokens(2 * active, gpus, peak_flops * serving_mfu, gpu_hour_usd)


@quantity(
    "roofline.decode_tokens_per_second",
    "tokens/s",
    "roofline",
    "gpus * bandwidth / (parameters * bytes_per_parameter)",
    side="most",
)
def _decode_rate(parameters: float, bytes_per_parameter: float, gpus: float, bandwidth: float) -> Any:
    """One sequence: each token reads all the weights once (Pope et al. 2022, arXiv 2211.05102, section 2)."""
    return gpus * bandwidth / (parameters * bytes_per_parameter)


@quantity(
    "roofline.decode_utilisation", "x", "roofline", "2 * parameters * tokens_per_second / (gpus * peak_flops)"
)
def _decode_utilisation(parameters: float, tokens_per_second: float, gpus: float, peak_flops: float) -> Any:
    return training.mfu(2 * parameters, tokens_per_second, gpus, peak_flops)


@quantity(
    "roofline.parameter_limit",
    "parameters",
    "roofline",
    "gpus * bandwidth / (tokens_per_second * bytes_per_parameter)",
    side="most",
)
def _parameter_limit(
    tokens_per_second: float, bytes_per_parameter: float, gpus: float, bandwidth: float
) -> Any:
    return gpus * bandwidth / (tokens_per_second * bytes_per_parameter)


@quantity(
    "roofline.intensity",
    "FLOP/byte",
    "intensity",
    "2 * batch / bytes_per_parameter",
    "serving.bytes_per_parameter",
)
def _intensity(bytes_per_parameter: Numbers, batch: float) -> Any:
    """A weight that is read once is multiplied and added once for every token of the batch."""
    return 2 * batch / bytes_per_parameter


@quantity(
    "memory.cache_example",
    "B",
    "cache",
    "2 * layers * heads * head_dim * bytes_per_element * context * batch",
)
def _cache(layers: int, heads: int, head_dim: int, batch: int, context: int, bytes_per_element: int) -> Any:
    """Keys and values of every head, as `harness.theory.memory` counts them for a whole architecture."""
    return 2 * layers * heads * head_dim * bytes_per_element * context * batch


# What each expert gets

LOAD = "load"
_ROUTED = ("architecture.moe.n_experts", "architecture.moe.top_k")


@quantity(
    "routing.training_tokens_per_expert",
    "tokens",
    LOAD,
    "batch_tokens * top_k / n_experts",
    "training.batch_tokens",
    *_ROUTED,
)
def _training_load(batch_tokens: Any, n_experts: Numbers, top_k: Numbers) -> Any:
    return batch_tokens * top_k / n_experts


@quantity(
    "routing.serving_tokens_per_expert",
    "tokens",
    LOAD,
    "batch * top_k / n_experts",
    "serving.batch",
    *_ROUTED,
)
def _serving_load(batch: Numbers, n_experts: Numbers, top_k: Numbers) -> Any:
    return batch * top_k / n_experts


@quantity("routing.most_tokens_of_an_expert", "tokens", "imbalance", "batch", side="most")
def _most_tokens(batch: float) -> Any:
    """A token's k experts are distinct, so that no expert gets a token twice."""
    return batch


@quantity(
    "reading.tokens_per_second",
    "tokens/s",
    "reading",
    "known_tokens_per_second * words_per_minute / known_words_per_minute",
)
def _reading(words_per_minute: float, known_words_per_minute: float, known_tokens_per_second: float) -> Any:
    """A reader's rate in proportion to a known one: the same tokens for each word."""
    return known_tokens_per_second * words_per_minute / known_words_per_minute


@quantity("vision.io_ratio", "x", "vision", "vision_bytes / text_bytes")
def _io_ratio(vision_bytes: float, text_bytes: float) -> Any:
    return vision_bytes / text_bytes
