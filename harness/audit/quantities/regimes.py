"""Quantities of inference that assumptions decide: memory, regimes of batch size, speculation, load."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.audit.quantities.registry import quantity
from harness.theory import batching, routing, serving, speculation

# What fits a GPU beside the weights

_CACHED = "2 * layers / pipeline_parallel * kv_heads * head_dim * bytes_per_element"


def _held(
    context: Any,
    cache_fill: Any,
    pipeline_parallel: Any,
    layers: Any,
    kv_heads: Any,
    head_dim: Any,
    bytes_per_element: Any,
) -> Any:
    """Bytes of one sequence's keys and values on one GPU; one key/value head is copied, not divided."""
    return context * cache_fill * 2 * layers / pipeline_parallel * kv_heads * head_dim * bytes_per_element


@quantity(
    "serving.memory_exceeded",
    "B",
    "memory of a context",
    "total * bytes_per_parameter / (tensor_parallel * pipeline_parallel)"
    f" + sequences_in_flight * context * cache_fill * {_CACHED}",
    "parameters.total",
    "serving.tensor_parallel",
    "serving.pipeline_parallel",
    "serving.bytes_per_parameter",
    "assumptions.sequences_in_flight",
    "assumptions.cache_fill",
    side="most",
)
def _memory_exceeded(
    total: Any,
    tensor_parallel: Any,
    pipeline_parallel: Any,
    bytes_per_parameter: Any,
    sequences_in_flight: Any,
    cache_fill: Any,
    context: float,
    layers: float,
    kv_heads: float,
    head_dim: float,
    bytes_per_element: float,
) -> Any:
    """Bytes that one GPU needs for so many sequences: the model does not run in any memory below them."""
    weights = total * bytes_per_parameter / (tensor_parallel * pipeline_parallel)
    one = _held(context, cache_fill, pipeline_parallel, layers, kv_heads, head_dim, bytes_per_element)
    return weights + sequences_in_flight * one


@quantity(
    "serving.batch_is_limited",
    "",
    "memory of a batch",
    "(memory - total * bytes_per_parameter / (tensor_parallel * pipeline_parallel))"
    f" / (context * cache_fill * {_CACHED}) < batch",
    "parameters.total",
    "serving.tensor_parallel",
    "serving.pipeline_parallel",
    "serving.bytes_per_parameter",
    "serving.batch",
    "assumptions.cache_fill",
)
def _batch_is_limited(
    total: Any,
    tensor_parallel: Any,
    pipeline_parallel: Any,
    bytes_per_parameter: Any,
    batch: Any,
    cache_fill: Any,
    memory: float,
    context: float,
    layers: float,
    kv_heads: float,
    head_dim: float,
    bytes_per_element: float,
) -> Any:
    """Whether fewer sequences fit than the batch that is stated: 1 or 0."""
    weights = total * bytes_per_parameter / (tensor_parallel * pipeline_parallel)
    one = _held(context, cache_fill, pipeline_parallel, layers, kv_heads, head_dim, bytes_per_element)
    return ((memory - weights) / one < batch) * 1.0


@quantity(
    "serving.layer_fits_a_node",
    "",
    "node",
    "total / pipeline_parallel * bytes_per_parameter < tensor_parallel * memory",
    "parameters.total",
    "serving.tensor_parallel",
    "serving.pipeline_parallel",
    "serving.bytes_per_parameter",
)
def _layer_fits(
    total: Any, tensor_parallel: Any, pipeline_parallel: Any, bytes_per_parameter: Any, memory: float
) -> Any:
    """Whether a stage with all experts of its layers fits the GPUs of one tensor-parallel node: 1 or 0."""
    return (total / pipeline_parallel * bytes_per_parameter < tensor_parallel * memory) * 1.0


@quantity(
    "memory.cache_over_weights",
    "x",
    "cache over weights",
    "2 * layers * heads * head_dim * bytes_per_element * context * batch"
    " / (parameters * bytes_per_parameter)",
    "serving.bytes_per_parameter",
)
def _cache_over_weights(
    bytes_per_parameter: Any,
    layers: float,
    heads: float,
    head_dim: float,
    batch: float,
    context: float,
    bytes_per_element: float,
    parameters: float,
) -> Any:
    cache = 2 * layers * heads * head_dim * bytes_per_element * context * batch
    return cache / (parameters * bytes_per_parameter)


# Bound by bandwidth, or by compute

_SHARE = "(batch * top_k / n_experts / microbatches_in_flight)"
_SHARED = (
    "serving.batch",
    "architecture.moe.n_experts",
    "architecture.moe.top_k",
    "assumptions.microbatches_in_flight",
)


@quantity(
    "roofline.decode_is_bound_by_bandwidth",
    "",
    "bound of decode",
    f"(2 * {_SHARE} / bytes_of_weight < balance)"
    " * (2 * prompt * top_k / n_experts / bytes_of_weight > balance)",
    *_SHARED,
)
def _decode_bound(
    batch: Any,
    n_experts: Any,
    top_k: Any,
    microbatches_in_flight: Any,
    bytes_of_weight: float,
    balance: float,
    prompt: float,
) -> Any:
    """Whether an expert's weights bound decoding, and one prompt's tokens bind its FLOP/s: 1 or 0.

    Intensity as in roofline.intensity, of the tokens that one expert gets in one pass (Pope et al. 2022,
    arXiv 2211.05102, section 2.1); `balance` is the GPU's FLOP/s over its bytes/s.
    """
    decode = 2 * routing.tokens_per_expert(batch, n_experts, top_k) / microbatches_in_flight
    prefill = 2 * routing.tokens_per_expert(prompt, n_experts, top_k)
    return ((decode / bytes_of_weight < balance) * (prefill / bytes_of_weight > balance)) * 1.0


@quantity(
    "serving.output_over_input_cost",
    "x",
    "input and output",
    f"max(1, balance * bytes_of_weight / (2 * {_SHARE}))",
    *_SHARED,
)
def _output_over_input(
    batch: Any,
    n_experts: Any,
    top_k: Any,
    microbatches_in_flight: Any,
    bytes_of_weight: float,
    balance: float,
) -> Any:
    """An output token's device time over an input token's, which prefill computes at the peak."""
    decode = 2 * routing.tokens_per_expert(batch, n_experts, top_k) / microbatches_in_flight
    return np.maximum(1, balance * bytes_of_weight / decode)


@quantity(
    "roofline.network_falls_slower_than_chips",
    "",
    "network",
    "(1 / 2) ** partition_exponent > 1 / 2",
    "assumptions.partition_exponent",
)
def _network_falls_slower(partition_exponent: Any) -> Any:
    """Whether doubling the chips leaves more than half of the communication time: 1 or 0.

    It falls as chips^-exponent: 0 for 1D and 1/2 for 2D weight-stationary partitioning of the feed-forward
    layer, and for weight-gathered ones (Pope et al. 2022, arXiv 2211.05102, section 3.2).
    """
    return (0.5**partition_exponent > 0.5) * 1.0


@quantity(
    "roofline.bytes_with_more_experts",
    "x",
    "bytes of experts",
    "more * (1 - (1 - top_k / more) ** tokens_in_a_pass)"
    " / (n_experts * (1 - (1 - top_k / n_experts) ** tokens_in_a_pass))"
    " * (n_experts / more) ** expert_shrinkage",
    "architecture.moe.n_experts",
    "architecture.moe.top_k",
    "assumptions.expert_shrinkage",
    "assumptions.tokens_in_a_pass",
)
def _bytes_with_more_experts(
    n_experts: Any, top_k: Any, expert_shrinkage: Any, tokens_in_a_pass: Any, more: float
) -> Any:
    """Bytes of distinct experts that a pass reads with `more` experts, over those with the spec's own.

    `expert_shrinkage` 0: experts keep their size; 1: all experts together keep theirs.
    """
    theirs = routing.expected_distinct_experts(more, top_k, tokens_in_a_pass)
    ours = routing.expected_distinct_experts(n_experts, top_k, tokens_in_a_pass)
    return theirs / ours * (n_experts / more) ** expert_shrinkage


# Speculation

SPECULATION = "speculation"
_ROUND = "((1 - acceptance ** (length + 1)) / (1 - acceptance))"


@quantity(
    "speculation.pays_while_bandwidth_bounds",
    "",
    SPECULATION,
    f"({_ROUND} > 1 + length * draft_cost) * ({_ROUND} < 1 + length)",
    "assumptions.acceptance",
    "assumptions.draft_cost",
)
def _pays(acceptance: Any, draft_cost: Any, length: float) -> Any:
    """Whether a round of `length` proposals is worth a pass that costs the same whatever it holds, and is not
    worth one that costs in proportion to its tokens: 1 or 0.

    Leviathan et al. 2023, arXiv 2211.17192, theorems 3.8 and 3.11; a draft's own operations would only add.
    """
    gains = speculation.speed_up(acceptance, int(length), draft_cost)
    costs = speculation.operations(acceptance, int(length), 0)
    return ((gains > 1) * (costs > 1)) * 1.0


@quantity(
    "speculation.best_length",
    "tokens",
    SPECULATION,
    "best_length(acceptance, draft_cost)",
    "assumptions.acceptance",
    "assumptions.draft_cost",
)
def _best_length(acceptance: Any, draft_cost: Any) -> Any:
    """The draft length of the largest speed-up while a pass costs the same whatever it holds."""
    found = np.vectorize(
        lambda a, c: speculation.best_length(a, lambda length: 1 + length * c), otypes=[float]
    )
    return found(acceptance, draft_cost)


# Batching, and what a cluster costs over a day


@quantity("batching.finished_sequences", "sequences", "batching", "finished(lengths, slots, iterations)")
def _finished(lengths: list[int], slots: int, iterations: int) -> Any:
    """Sequences that continuous batching finishes, each taking the first slot that is free, in order."""
    return batching.continuous(lengths, slots).ended(iterations)


@quantity(
    "serving.cost_over_davinci",
    "x",
    "davinci cost",
    "active / baseline * utilisation_of_davinci",
    "parameters.active",
    "assumptions.utilisation_of_davinci",
)
def _cost_over_davinci(active: Any, utilisation_of_davinci: Any, baseline: float) -> Any:
    """Device time per token goes with the FLOP of one, over the utilisation of the devices."""
    return active / baseline * utilisation_of_davinci


@quantity("serving.cost_without_reuse", "x", "load", "1 / load", "assumptions.load")
def _cost_without_reuse(load: Any) -> Any:
    """What a token costs when the devices are paid for all day, over what it costs while they are in use."""
    return serving.cost_factor_at_load(load)


@quantity(
    "reading.needed_tokens_per_second",
    "tokens/s",
    "readers",
    "known_tokens_per_second * reader_words_per_minute / known_words_per_minute",
    "assumptions.reader_words_per_minute",
)
def _needed(
    reader_words_per_minute: Any, known_words_per_minute: float, known_tokens_per_second: float
) -> Any:
    return known_tokens_per_second * reader_words_per_minute / known_words_per_minute
