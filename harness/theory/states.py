"""What one rank keeps in memory in training and in serving, in bytes.

Letters: P parameters of one rank, n ways over which their states are sharded.

Model states of mixed-precision Adam take 2 + 2 + 12 bytes a parameter (ZeRO, Rajbhandari et al. 2020,
arXiv 1910.02054, section 3.1: 16-bit weights and gradients; 32-bit weights, momentum and variance). ZeRO
divides the optimizer's by n at stage 1, the gradients' too at stage 2, the weights' too at stage 3 (section
5), which is FSDP (Zhao et al. 2023, arXiv 2304.11277); HSDP shards over fewer ranks than hold copies and
copies the shards (its section 3.2.2). n is what `sharding.shard_ways` says: without HSDP the copies that
there are, data x context ranks, and for routed experts `Layout.expert_copies` x context ranks. A shard is
flat: P / n elements rounded up, however the tensors lie in it; what shards tensor by tensor, or by rows,
fills its fullest rank more.

Not counted: what the runtime itself takes, communication buffers and fragmentation; the share of a device
that is left beside them is `usable` in `harness.theory.fitting`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from harness.spec.architecture import Architecture
from harness.spec.hardware import Format
from harness.theory import activations, memory
from harness.theory.layout import Layout
from harness.theory.precision import Precision, stored_bytes
from harness.theory.sharding import (
    Contents,
    Partition,
    contents,
    group_ways,
    largest_block,
    least,
    rank_parameters,
    shard_ways,
    split,
    up,
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: Any
    gradients: Any
    optimizer: Any
    activations: Any
    """Kept for the backward pass; in serving, alive at once in a forward pass."""
    cache: Any
    """Keys and values."""
    transient: Any = 0
    """Made and freed again within a pass: blocks that FSDP gathers, a layer that is recomputed."""

    @property
    def total(self) -> Any:
        """Bytes in all."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class States:
    """Bytes of one parameter's states, and how many blocks FSDP holds unsharded."""

    weight: float = 2
    gradient: float = 2
    optimizer: float = 12
    blocks: int = 2
    """The one that is computed and the one fetched ahead of it."""


MIXED_ADAM = States()
"""Mixed precision with 16-bit gradients; States(gradient=4) accumulates them in float32 (Megatron-LM)."""


def training_memory(
    architecture: Architecture,
    layout: Layout,
    *,
    context: Any,
    microbatches: Any,
    stage: Any = 0,
    states: States = MIXED_ADAM,
    partition: Partition = "middle",
    dropout: bool = False,
    width: Any = 2,
    gated_kept: int = 4,
) -> Memory:
    """One rank of `stage` in training steps of `microbatches` microbatches, `context` tokens a sequence.

    `dropout`, `width` and `gated_kept` as in `activations.kept`. Numbers may be arrays that broadcast.
    """
    held = contents(architecture, layout, stage, partition)
    one = activations.kept(architecture, layout, context, dropout=dropout, width=width, gated_kept=gated_kept)
    return _training(architecture, layout, held, one, microbatches, stage, states, partition)


def _training(
    architecture: Architecture,
    layout: Layout,
    held: Contents,
    one: activations.Kept,
    microbatches: Any,
    stage: Any,
    states: States,
    partition: Partition,
) -> Memory:
    rest, experts = split(rank_parameters(architecture, layout, stage, partition))
    whole = rest + experts
    copies, expert_copies = shard_ways(layout)
    sharded = up(rest, copies) + up(experts, expert_copies)
    kept, again = activations.on_stage(held, one, layout, microbatches, stage)
    gathered: Any = 0
    if layout.zero_stage >= 3:
        gathered = largest_block(architecture, layout, held) * (
            states.blocks * states.weight + states.gradient
        )
    return Memory(
        weights=states.weight * (sharded if layout.zero_stage >= 3 else whole),
        gradients=states.gradient * (sharded if layout.zero_stage >= 2 else whole),
        optimizer=states.optimizer * (sharded if layout.zero_stage >= 1 else whole),
        activations=kept,
        cache=0,
        transient=gathered + again,
    )


def serving_memory(
    architecture: Architecture,
    layout: Layout,
    precision: Precision,
    *,
    batch: Any,
    context: Any,
    stage: Any = 0,
    tokens: Any = None,
    partition: Partition = "middle",
    mla: memory.LatentCache = "latent",
) -> Memory:
    """One rank of `stage` serving `batch` sequences (of its data-parallel rank) of `context` tokens each.

    Weights go by `Precision`: routed experts' matrices, other matrices, and the rest (tables, routers, the
    gate of shared experts, norms, biases) in `embeddings`. `tokens` of the largest pass; None: one for each
    sequence. Caches hold what each layer can still see, divided by key/value heads where there are enough,
    and by context ways.
    """
    held = contents(architecture, layout, stage, partition)
    counts = rank_parameters(architecture, layout, stage, partition)
    weights = sum(count * stored_bytes(_format(name, precision)) for name, count in counts.items())
    live = activations.pass_activations(
        architecture, layout, held, batch if tokens is None else tokens, batch
    )
    return Memory(
        weights=weights,
        gradients=0,
        optimizer=0,
        activations=live * stored_bytes(precision.activations),
        cache=batch * sequence_cache(architecture, layout, precision, held, context, mla),
    )


def _format(component: str, precision: Precision) -> Format:
    if component == "experts.weights":
        return precision.experts
    matrix = component.endswith((".weights", ".projections"))
    return precision.matrices if matrix else precision.embeddings


def sequence_cache(
    architecture: Architecture,
    layout: Layout,
    precision: Precision,
    held: Contents,
    context: Any,
    mla: memory.LatentCache = "latent",
) -> Any:
    """Bytes of one sequence's keys and values on one rank.

    Key/value heads are divided over the tensor ways as far as they go; the one head of multi-query
    attention, and latents, are copied to every tensor rank (Pope et al. 2022, arXiv 2211.05102, section 3.3).
    """
    window = architecture.attention.window
    seen = context if window is None else least(context, window)
    cached = (held.layers - held.window_layers) * context + held.window_layers * seen
    width: Any = memory.cached_width(architecture, mla)
    if architecture.attention.mla is None or mla == "expanded":
        groups, ways = architecture.attention.n_kv_heads, group_ways(architecture, layout)
        width = width // groups * up(groups, ways)
    return cached * width * stored_bytes(precision.cache) / layout.context_parallel
