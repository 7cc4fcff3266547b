"""What a training step sends, by kind of parallelism: collectives, how often, how many bytes, between whom.

Letters: N tokens of one microbatch on one context-parallel rank, S context, D d_model, K top_k, G n_kv_heads,
h head_dim, t tensor ways, c context ways, e expert ways, w ranks that share one expert, d data-parallel
ranks, m microbatches; `element` bytes of one activation.

Devices are numbered tensor first, then context, data, pipeline (as Megatron-LM does), so that the innermost
groups lie on islands. Numbers may be arrays that broadcast. Left out, as small: the token embedding's
exchange, scalars of the loss, the norm of the gradient, counts of tokens before an all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.spec.architecture import Architecture, Moe
from harness.spec.hardware import Hardware
from harness.theory.collectives import Collective, Group, on_islands, place, sent_bytes
from harness.theory.layout import Layout
from harness.theory.memory import cached_width
from harness.theory.sharding import shards

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that one rank takes part in, one after the other."""

    kind: Collective
    calls: Any
    payload: Any
    """Bytes of one call: the whole buffer, as `harness.theory.collectives` counts it."""
    group: Group

    @property
    def sent(self) -> Any:
        """Bytes that one rank sends in all calls."""
        return self.calls * sent_bytes(self.kind, self.group.ranks, self.payload)

    def seconds(self, hardware: Hardware, share: float = 1.0, latency: float = 1.0) -> Any:
        """Time of all calls on this hardware, each link at that share of its bytes/s and of its latency."""
        return self.calls * on_islands(self.kind, self.group, self.payload, hardware, share, latency)


def total_sent(traffic: tuple[Traffic, ...]) -> Any:
    """Bytes that one rank sends in all of them."""
    return sum(one.sent for one in traffic)


def total_seconds(
    traffic: tuple[Traffic, ...], hardware: Hardware, share: float = 1.0, latency: float = 1.0
) -> Any:
    """Time of all of them, one after the other."""
    return sum(one.seconds(hardware, share, latency) for one in traffic)


def _tensor(layout: Layout, hardware: Hardware) -> Group:
    return place(layout.tensor_parallel, 1, hardware)


def _expert_width(layout: Layout, hardware: Hardware) -> Group:
    return place(layout.expert_width_ways, 1, hardware)


def experts_group(layout: Layout, hardware: Hardware) -> Group:
    """The ranks over which a layer's experts lie: tensor ranks first, then those of other data ranks."""
    ways, width, tensor = layout.expert_parallel, layout.expert_width_ways, layout.tensor_parallel
    near = np.minimum(ways, np.maximum(tensor // width, 1))
    inner = place(near, width, hardware)
    outer = place(-(-ways // near), tensor * layout.context_parallel, hardware)

    def together(inside: Any, outside: Any) -> Any:
        return None if inside is None else np.where(inside == near, near * outside, inside)[()]

    return Group(ways, together(inner.local, outer.local), together(inner.clustered, outer.clustered))


def tensor_traffic(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    tokens: Any,
    direction: Direction,
    *,
    routed: bool,
    element: float = 2.0,
) -> tuple[Traffic, ...]:
    """Tensor parallelism of one layer and one microbatch of N tokens, in one direction.

    Without sequence parallelism an all-reduce of N D elements after attention and after the feed-forward
    network, forward, and before each of them, backward (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    With it a reduce-scatter and an all-gather of the same payload in the place of each (Korthikanti et al.
    2022, arXiv 2205.05198, section 4.2.2; their third all-gather, of an input that the backward pass meets
    again, runs beside a product there and is not counted). A parallel block has one pair, not two.

    Backward without sequence parallelism, t / G ranks that hold the same key/value head add its gradients:
    2 N h elements; and ranks that share each expert in width add those of the combine weights: N K.

    `routed`: the layer's feed-forward network has experts. Split in width over all tensor ranks they behave
    as a dense one. Else tensor ranks divide the tokens among themselves, w of them gather those that their
    expert got, and, without sequence parallelism, all gather the outcome.
    """
    t, w, e = layout.tensor_parallel, layout.expert_width_ways, layout.expert_parallel
    group, moe = _tensor(layout, hardware), architecture.moe
    payload = tokens * architecture.d_model * element
    sequence = layout.sequence_parallel

    def pairs(calls: Any) -> tuple[Traffic, ...]:
        if sequence:
            return (
                Traffic("all-gather", calls, payload, group),
                Traffic("reduce-scatter", calls, payload, group),
            )
        return (Traffic("all-reduce", calls, payload, group),)

    found: tuple[Traffic, ...] = ()
    blocks: Any = 1 if architecture.parallel_block else 2
    if routed and moe is not None:
        whole = np.asarray((e == 1) & (w == t))  # then experts lie as a dense network does
        blocks = np.maximum(blocks - (~whole & (moe.shared is None)), 1)
        wide = _expert_width(layout, hardware)
        got = payload * w / t * np.where(np.asarray(e) > 1, moe.top_k, 1)
        apart = ~whole * 1
        found += (Traffic("all-gather", apart, got, wide), Traffic("reduce-scatter", apart, got, wide))
        if not sequence:
            found += (Traffic("all-gather", apart, payload, group),)
            if direction == "backward":
                weights = tokens * moe.top_k * element
                found += (Traffic("all-reduce", whole * (np.asarray(w) > 1), weights, wide),)
    found = pairs(blocks) + found
    if direction == "backward" and not sequence and architecture.attention.mla is None:
        copies = place(np.maximum(t // architecture.attention.n_kv_heads, 1), 1, hardware)
        found += (Traffic("all-reduce", 2, tokens * architecture.attention.head_dim * element, copies),)
    return found


def head_traffic(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    tokens: Any,
    direction: Direction,
    *,
    element: float = 2.0,
) -> tuple[Traffic, ...]:
    """The same at the unembedding: its input is gathered (with sequence parallelism), its gradient added."""
    group, payload = _tensor(layout, hardware), tokens * architecture.d_model * element
    if layout.sequence_parallel:
        return (Traffic("all-gather" if direction == "forward" else "reduce-scatter", 1, payload, group),)
    return () if direction == "forward" else (Traffic("all-reduce", 1, payload, group),)


def islands_reached(moe: Moe, islands: Any) -> Any:
    """Islands that a token's K experts lie on, on average: each has as many, and routing is uniform.

    n (1 - C(E - E/n, K) / C(E, K)) of n islands; no more than group-limited routing lets it reach
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2: 4 of 8).
    """
    missed: Any = 1.0
    for chosen in range(moe.top_k):
        missed = missed * np.maximum(moe.n_experts - moe.n_experts / islands - chosen, 0)
        missed = missed / (moe.n_experts - chosen)
    most = moe.router.topk_groups * np.maximum(islands / moe.router.n_groups, 1)
    return np.minimum(islands * (1 - missed), most)


def expert_traffic(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    tokens: Any,
    *,
    relayed: bool = False,
    element: float = 2.0,
) -> tuple[Traffic, ...]:
    """Expert parallelism of one MoE layer and one microbatch, in one direction: dispatch and combine.

    Each moves N K D / t elements of a rank, 1 - 1/e of them to other ranks if routing is uniform (GShard,
    Lepikhin et al. 2020, arXiv 2006.16668, section 3.2): exact in expectation. Backward sends as much.
    `relayed`: a token goes to each island that it has experts on once, and from there to the experts' ranks
    (DeepSeek-V3, section 3.2.2). Nothing where there are no experts.
    """
    moe = architecture.moe
    if moe is None:
        return ()
    token = tokens / layout.tensor_parallel * architecture.d_model * element
    group = experts_group(layout, hardware)
    if not relayed:
        return (Traffic("all-to-all", 2, token * moe.top_k, group),)
    reached = islands_reached(moe, group.islands)
    return (
        Traffic("all-to-all", 2, token * reached, Group(group.islands, 1, group.clustered_islands)),
        Traffic("all-to-all", 2, token * moe.top_k, Group(group.local, group.local)),
    )


def context_traffic(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    tokens: Any,
    direction: Direction,
    *,
    element: float = 2.0,
) -> tuple[Traffic, ...]:
    """Context parallelism of one layer and one microbatch of N tokens a rank, in one direction.

    Keys and values of all c N tokens are gathered, forward and again backward, where their gradients are
    reduce-scattered (Llama 3, arXiv 2407.21783, section 3.3.2); a ring (Liu et al. 2023, arXiv 2310.01889)
    moves the same bytes. Key/value heads are divided over t, at most one group a rank; latents are not.
    """
    attention = architecture.attention
    ways = 1 if attention.mla is not None else np.minimum(attention.n_kv_heads, layout.tensor_parallel)
    payload = tokens * layout.context_parallel * cached_width(architecture) / ways * element
    group = place(layout.context_parallel, layout.tensor_parallel, hardware)
    gather = Traffic("all-gather", 1, payload, group)
    if direction == "forward":
        return (gather,)
    return (gather, Traffic("reduce-scatter", 1, payload, group))


def pipeline_traffic(
    architecture: Architecture, layout: Layout, hardware: Hardware, tokens: Any, *, element: float = 2.0
) -> tuple[Traffic, ...]:
    """What an inner stage sends of one microbatch in one direction: N D elements after each of its v chunks.

    Each tensor rank sends its 1/t; without sequence parallelism the receivers then gather the whole (the
    scatter/gather optimization of Narayanan et al. 2021, arXiv 2104.04473, section 4.1). One crossing between
    islands sets the pace.
    """
    t, p = layout.tensor_parallel, layout.pipeline_parallel
    group = place(p, t * layout.context_parallel * layout.data_parallel, hardware)
    payload = tokens * architecture.d_model * element
    found = (Traffic("point-to-point", layout.virtual_stages, payload / t, group),)
    if layout.sequence_parallel:
        return found
    gathers = layout.virtual_stages * (np.asarray(p) > 1)
    return (*found, Traffic("all-gather", gathers, payload, _tensor(layout, hardware)))


def data_traffic(
    layout: Layout,
    hardware: Hardware,
    dense: Any,
    experts: Any,
    microbatches: Any,
    *,
    layers: Any = 1,
    weight_bytes: float = 2.0,
    gradient_bytes: float = 2.0,
) -> tuple[Traffic, ...]:
    """Data parallelism of one step on a rank of `dense` parameters and `experts` parameters of experts.

    Per step, of P bytes of weights and Q of gradients (Rajbhandari et al. 2020, arXiv 1910.02054, section 7:
    2, 2, 2 and 3 times the parameters for stages 0 to 3):
      stage 0  an all-reduce of Q
      stage 1  a reduce-scatter of Q and an all-gather of P
      stage 2  the same, but a rank that keeps only its part of the gradients scatters them m times
      stage 3  m times two all-gathers of P and a reduce-scatter of Q, in `layers` calls each
    Over fewer ranks than all, `shard_ways` (HSDP), those are joined by an all-reduce of each part of Q
    between the sharded copies, once a step. Context ranks hold the same weights, and count as data ranks.
    Experts' parameters have `expert_copies` times c copies; they are sharded over as many fewer ranks as
    there are fewer copies.
    """
    c, d = layout.context_parallel, layout.data_parallel
    found: tuple[Traffic, ...] = ()
    owned = layout.expert_parallel * layout.expert_width_ways
    for count, copies, stride in ((dense, d, layout.tensor_parallel), (experts, layout.expert_copies, owned)):
        if np.ndim(count) == 0 and not count:
            continue
        inner = shards(layout, copies)
        outer = np.maximum(copies // inner, 1)
        near = place(inner * c, stride, hardware)
        far = place(outer, stride * inner * c, hardware)
        weights, gradients = count * weight_bytes, count * gradient_bytes
        if layout.zero_stage == 0:
            everywhere = place(np.maximum(copies, 1) * c, stride, hardware)
            found += (Traffic("all-reduce", 1, gradients, everywhere),)
            continue
        scatters: Any = microbatches if layout.zero_stage > 1 else 1
        gathers: Any = 2 * microbatches if layout.zero_stage == 3 else 1
        parts: Any = layers if layout.zero_stage == 3 else 1
        found += (
            Traffic("all-gather", gathers * parts, weights / parts, near),
            Traffic("reduce-scatter", scatters * parts, gradients / parts, near),
            Traffic("all-reduce", 1, gradients / near.ranks, far),
        )
    return found


def replica_traffic(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    layers: Any,
    *,
    gradient_bytes: float = 2.0,
) -> tuple[Traffic, ...]:
    """Gradients that tensor ranks of one stage of `layers` layers add once a step, with sequence parallelism.

    Norms, routers and the projections into latents see 1/t of the tokens each; t / G ranks hold the same
    key/value head (Megatron-LM adds all so after the last microbatch). Without sequence parallelism
    activations' gradients are added instead.
    """
    if not layout.sequence_parallel:
        return ()
    attention, t, d = architecture.attention, layout.tensor_parallel, architecture.d_model
    moe = architecture.moe
    copied = (1 + architecture.norm.bias) * d * (2 - architecture.parallel_block)
    copied += moe.n_experts * d if moe is not None else 0
    if (mla := attention.mla) is not None:
        copied += d * ((mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim)
    found = (Traffic("all-reduce", 1, layers * copied * gradient_bytes, _tensor(layout, hardware)),)
    if attention.mla is not None:
        return found
    ranks = place(np.maximum(t // attention.n_kv_heads, 1), 1, hardware)
    heads = np.maximum(attention.n_kv_heads // np.minimum(t, attention.n_kv_heads), 1)
    one = 2 * d * attention.head_dim * heads * gradient_bytes
    return (*found, Traffic("all-reduce", 1, layers * one, ranks))
