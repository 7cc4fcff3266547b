"""Which parameters one rank holds under a layout: exact integers, by component.

Letters: D d_model, V vocab_size, F d_ff, H n_heads, G n_kv_heads, t tensor ways, p pipeline stages, v chunks
of layers on one stage, e expert ways, w ways that split one expert in width.

Over the tensor ways (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053, section 3) are divided: query and
output heads; key/value heads, or copied where t exceeds G, one group a rank (t a multiple of G); d_ff; the
rows of the vocabulary's tables, padded up to a multiple of t. Every tensor rank holds a copy of the norms, of
the router, of the biases of matrices that are divided by their input, of learned positions, and of the
projections into and the norms of MLA's latents (each head needs them whole); the expansions of the latents
go by heads. Experts lie e ways (GShard, Lepikhin et al. 2020, arXiv 2006.16668, section 3.1), each w ways in
width. The embedding lies on the stage of the first layer, the final norm and the unembedding on that of the
last one; a tied table on both. Chunk j of p v is on stage j % p, under "zbv" in a V: down the stages and up
again (Qi et al. 2023, arXiv 2401.10241, section 6), so that stage 0 has both ends.

Everything is branch-free in the numbers of the layout, in `stage` and in the dimensions of the architecture.
Shares that do not divide are rounded up, as padding would; `layout.check` says which of them no engine takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.spec.architecture import Architecture, FeedForward
from harness.spec.errors import SpecError
from harness.theory import parameters
from harness.theory.layout import Layout
from harness.theory.parameters import congruent

Partition = tuple[int, ...] | Literal["first", "middle", "last"]
"""Layers of each chunk in the order of the model, or which chunks take the layers that do not divide."""
EXPERTS = frozenset({"experts.weights", "experts.biases"})
"""Components that lie on expert-parallel ranks, whose copies are fewer than those of the rest."""


@dataclass(frozen=True)
class Contents:
    """What lies on one pipeline stage."""

    layers: Any
    moe_layers: Any
    window_layers: Any
    embedding: Any
    """1 where the token embedding is, else 0."""
    head: Any
    """1 where the final norm and the unembedding are, else 0."""
    both: Any
    """1 where the two are together."""

    @property
    def dense_layers(self) -> Any:
        """Layers whose feed-forward network is dense."""
        return self.layers - self.moe_layers


def contents(
    architecture: Architecture, layout: Layout, stage: Any, partition: Partition = "middle"
) -> Contents:
    """What lies on `stage` (from 0). Layers are spread as evenly as can be, unless `partition` lists them.

    "middle" gives the layers that are left over to the middle chunks, which hold no vocabulary (as Llama 3
    does, arXiv 2407.21783, section 3.3.2). Raises SpecError where a listed partition does not fit.
    """
    p, v = layout.pipeline_parallel, layout.virtual_stages
    if not isinstance(partition, str):
        fits(architecture, layout, partition)
    last = p * v - 1
    layers, moe, window, first_here, last_here = 0, 0, 0, 0, 0
    for turn in range(int(np.max(v))):
        chunk = turn * p + (p - 1 - stage if layout.schedule == "zbv" and turn % 2 else stage)
        here = 1 if isinstance(v, int) else turn < v
        start = _first_layer(architecture.n_layers, p * v, chunk, partition)
        stop = _first_layer(architecture.n_layers, p * v, chunk + 1, partition)
        layers = layers + here * (stop - start)
        moe = moe + here * (_moe_before(architecture, stop) - _moe_before(architecture, start))
        window = window + here * (_windows_before(architecture, stop) - _windows_before(architecture, start))
        first_here = first_here + here * (1 * (chunk == 0))
        last_here = last_here + here * (1 * (chunk == last))
    return Contents(layers, moe, window, first_here, last_here, first_here * last_here)


def fits(architecture: Architecture, layout: Layout, partition: tuple[int, ...]) -> None:
    """Raise SpecError, with the numbers, where a listed partition does not suit one layout."""
    chunks = layout.pipeline_parallel * layout.virtual_stages
    if len(partition) != chunks:
        raise SpecError(
            f"{len(partition)} chunks of layers are listed for {layout.pipeline_parallel} stages of "
            f"{layout.virtual_stages}; list {chunks}"
        )
    if sum(partition) != architecture.n_layers or min(partition) < 0:
        raise SpecError(
            f"the listed chunks have {sum(partition)} layers, the least of them {min(partition)}; "
            f"list {architecture.n_layers} in all, none below 0"
        )


def _first_layer(layers: Any, chunks: Any, chunk: Any, partition: Partition) -> Any:
    """The layer that a chunk begins with; that of the chunk after the last one is the number of layers."""
    if not isinstance(partition, str):
        starts = np.concatenate([[0], np.cumsum(partition)])[chunk]
        return starts if np.ndim(starts) else int(starts)
    each, left = layers // chunks, layers % chunks
    before = {"first": 0, "middle": (chunks - left) // 2, "last": chunks - left}[partition]
    return each * chunk + least(most(chunk - before, 0), left)


def least(a: Any, b: Any) -> Any:
    """The smaller one, elementwise; of two Python numbers a Python number."""
    return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(a, b)


def most(a: Any, b: Any) -> Any:
    """The larger one, elementwise; of two Python numbers a Python number."""
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


def up(count: Any, ways: Any) -> Any:
    """`count` over `ways`, rounded up: the share of the fullest rank, and with padding of every one."""
    return -(-count // ways)


def _moe_before(architecture: Architecture, layer: Any) -> Any:
    """MoE layers among 0 .. layer - 1."""
    moe = architecture.moe
    if moe is None:
        return 0 * layer
    count = congruent(layer, moe.period, moe.offset) - congruent(moe.first_dense, moe.period, moe.offset)
    return (count > 0) * count


def _windows_before(architecture: Architecture, layer: Any) -> Any:
    """Window layers among 0 .. layer - 1."""
    pattern = architecture.attention.pattern
    places = (place for place, kind in enumerate(pattern) if kind == "window")
    return sum((congruent(layer, len(pattern), place) for place in places), 0 * layer)


def group_ways(architecture: Architecture, layout: Layout) -> Any:
    """Ways over which key/value heads are divided: the tensor ways, but at most one group a rank."""
    return least(architecture.attention.n_kv_heads, layout.tensor_parallel)


def vocabulary_rows(architecture: Architecture, layout: Layout) -> Any:
    """Rows of a vocabulary's table on one rank: V over t, rounded up; t times as many are stored in all."""
    return up(architecture.vocab_size, layout.tensor_parallel)


def _attention(architecture: Architecture, layout: Layout) -> dict[str, Any]:
    """One layer's attention on one rank."""
    attention, d, t = architecture.attention, architecture.d_model, layout.tensor_parallel
    heads = up(attention.n_heads, t)
    mla, width = attention.mla, attention.head_dim
    if mla is not None:
        rank, latent = mla.q_lora_rank or 0, mla.kv_lora_rank + mla.qk_rope_head_dim
        projections = heads * width * (rank or d) + d * rank + d * latent
        projections += heads * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
        projections += heads * mla.v_head_dim * d
        biases, norms = attention.qkv_bias * (rank + latent), rank + mla.kv_lora_rank
    else:
        queries, keys = heads * width, up(attention.n_kv_heads, group_ways(architecture, layout)) * width
        projections = d * (2 * queries + 2 * keys)
        biases = attention.qkv_bias * (queries + 2 * keys)
        norms = {"none": 0, "head": 2 * width, "width": queries + keys}[attention.qk_norm]
    return {
        "attention.projections": projections,
        "attention.biases": biases + attention.o_bias * d,
        "attention.norms": norms,
        "attention.sinks": attention.sinks * heads,
    }


def _ffn(d: Any, ffn: FeedForward, ways: Any) -> tuple[Any, Any]:
    """Matrices and biases on one of `ways` ranks that share a feed-forward network in width."""
    width = up(ffn.d_ff, ways)
    return (2 + ffn.gated) * d * width, ffn.bias * ((1 + ffn.gated) * width + d)


def per_unit(architecture: Architecture, layout: Layout) -> dict[str, dict[str, Any]]:
    """What one rank holds of one unit of `Contents`: "layer" (its attention and norms), the feed-forward
    network of a "dense" or a "moe" layer, "embedding", "head"; by component, absent ones left out."""
    d, t, moe, norm = (
        architecture.d_model,
        layout.tensor_parallel,
        architecture.moe,
        1 + architecture.norm.bias,
    )
    table = vocabulary_rows(architecture, layout) * d
    units: dict[str, dict[str, Any]] = {
        "layer": _attention(architecture, layout) | {"norms": norm * d * (2 - architecture.parallel_block)},
        "dense": {},
        "moe": {},
        "embedding": {"embedding": table},
        "head": {"norms": norm * d, "embedding" if architecture.tie_embeddings else "unembedding": table},
    }
    if architecture.positions == "learned":
        units["embedding"]["positions"] = architecture.max_positions * d
    if architecture.ffn is not None:
        weights, biases = _ffn(d, architecture.ffn, t)
        units["dense"] = {"ffn.weights": weights, "ffn.biases": biases}
    if moe is not None:
        experts = up(moe.n_experts, layout.expert_parallel)
        weights, biases = _ffn(d, moe.expert, layout.expert_width_ways)
        units["moe"] = {
            "router.weight": moe.n_experts * d,
            "router.bias": moe.router.bias * moe.n_experts,
            "experts.weights": experts * weights,
            "experts.biases": experts * biases,
            "shared.gate": moe.shared_gate * d,
        }
        if moe.shared is not None:
            weights, biases = _ffn(d, moe.shared, t)
            units["moe"] |= {"shared.weights": weights, "shared.biases": biases}
    return units


def _summed(
    architecture: Architecture, units: Mapping[str, Mapping[str, Any]], held: Contents
) -> dict[str, Any]:
    amounts = {
        "layer": held.layers,
        "dense": held.dense_layers,
        "moe": held.moe_layers,
        "embedding": held.embedding,
        "head": held.head,
    }
    counts: dict[str, Any] = dict.fromkeys(parameters.COMPONENTS, 0)
    for unit, components in units.items():
        for name, count in components.items():
            counts[name] = counts[name] + amounts[unit] * count
    if architecture.tie_embeddings:  # one table serves both ends where they are together
        counts["embedding"] = counts["embedding"] - held.both * units["embedding"]["embedding"]
    return counts


def rank_parameters(
    architecture: Architecture, layout: Layout, stage: Any = 0, partition: Partition = "middle"
) -> dict[str, Any]:
    """Parameters of one rank of pipeline stage `stage`, under the keys of `parameters.COMPONENTS`.

    All ranks of a stage hold the same number, padding of the vocabulary included. Without padding (V and
    every d_ff divisible) the ranks of all stages together hold every parameter, and copies of: what tensor
    ranks replicate, a tied table, and everything once per data- and context-parallel rank. Over all layouts
    the whole is `parameters.total`.
    """
    held = contents(architecture, layout, stage, partition)
    return _summed(architecture, per_unit(architecture, layout), held)


def shards(layout: Layout, copies: Any) -> Any:
    """Of so many data-parallel copies of a parameter, those that its states are sharded over, if they are.

    HSDP divides data-parallel ranks into groups of `shard_ways`, each with all shards; where expert
    parallelism leaves fewer copies, a group has as many fewer.
    """
    groups = 1 if layout.shard_ways is None else most(layout.data_parallel // layout.shard_ways, 1)
    return most(copies // groups, 1)


def shard_ways(layout: Layout) -> tuple[Any, Any]:
    """Ranks that the states of a parameter are sharded over, and those of a routed expert's parameter.

    Context ranks hold the same weights, and count as data-parallel ones.
    """
    c = layout.context_parallel
    return shards(layout, layout.data_parallel) * c, shards(layout, layout.expert_copies) * c


def split(counts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Parameters apart from the routed experts', and those of the routed experts."""
    return (
        sum(count for name, count in counts.items() if name not in EXPERTS),
        sum(counts[name] for name in EXPERTS),
    )


def largest_block(architecture: Architecture, layout: Layout, held: Contents) -> Any:
    """Parameters on one rank of the largest unit that FSDP gathers at once: a layer, or a table."""
    units = {name: sum(unit.values()) for name, unit in per_unit(architecture, layout).items()}
    sizes = (
        (units["layer"] + units["dense"]) * (held.dense_layers > 0),
        (units["layer"] + units["moe"]) * (held.moe_layers > 0),
        units["embedding"] * held.embedding,
        units["head"] * held.head,
    )
    return _largest(sizes)


def _largest(sizes: Iterable[Any]) -> Any:
    found: Any = 0
    for size in sizes:
        found = most(found, size)
    return found


def telling_stages(
    architecture: Architecture, layout: Layout, partition: Partition = "middle"
) -> tuple[int, ...]:
    """Stages among which a rank of the most memory is, for one p and v of plain integers.

    A stage keeps no more microbatches than the ones before it, so of stages with equal contents the first
    is enough; all of them where contents are arrays.
    """
    stages = range(int(layout.pipeline_parallel))
    layers: Any = architecture.n_layers
    if isinstance(layers, np.ndarray):
        return tuple(stages)
    first: dict[Contents, int] = {}
    for stage in stages:
        first.setdefault(contents(architecture, layout, stage, partition), stage)
    return tuple(first.values())
