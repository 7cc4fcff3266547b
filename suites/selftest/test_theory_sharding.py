"""Parameters of one rank, against an enumeration of what every rank owns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec import Architecture, SpecError, load
from harness.spec.architecture import Attention, FeedForward, Moe, Rope
from harness.theory import flops, parameters
from harness.theory.layout import Layout, check
from harness.theory.sharding import contents, rank_parameters, telling_stages
from suites.selftest.test_theory_laws import architectures

Atom = tuple[str, tuple[Any, ...]]
"""A component, and which row, column or head of which layer: what is never divided further."""


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[Architecture, Layout]:
    """Any small architecture on any layout that can hold it."""
    architecture = draw(architectures())
    heads, groups = architecture.attention.n_heads, architecture.attention.n_kv_heads
    latent = architecture.attention.mla is not None
    d_ff = architecture.ffn.d_ff if architecture.ffn else 0
    ways = [
        t
        for t in range(1, heads + 1)
        if heads % t == 0 and d_ff % t == 0 and (latent or groups % t == 0 or t % groups == 0)
    ]
    moe = architecture.moe
    expert_ways = [e for e in range(1, moe.n_experts + 1) if moe.n_experts % e == 0] if moe else [1]
    widths = [w for w in (1, 2, 3) if moe is None or moe.expert.d_ff % w == 0]
    schedule, v = draw(st.sampled_from([("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)]))
    if v > architecture.n_layers:
        schedule, v = "1f1b", 1
    t, e, w = draw(st.sampled_from(ways)), draw(st.sampled_from(expert_ways)), draw(st.sampled_from(widths))
    layout = Layout(
        tensor_parallel=t,
        pipeline_parallel=draw(st.integers(1, architecture.n_layers // v)),
        data_parallel=e * w * draw(st.integers(1, 2)),
        expert_parallel=e,
        expert_tensor_parallel=w,
        schedule=schedule,
        virtual_stages=v,
    )
    check(architecture, layout)
    return architecture, layout


def owns(rank: int, ways: int, count: int) -> range:
    """The slice of `count` things, divided over `ways` from the first on, that falls to a rank."""
    each = -(-count // ways)
    return range(rank * each, min((rank + 1) * each, count))


def chunks(architecture: Architecture, layout: Layout, where: str) -> list[range]:
    """Layers of each chunk: dealt out one by one, and the leftover ones where they go."""
    n = layout.pipeline_parallel * layout.virtual_stages
    sizes = [architecture.n_layers // n] * n
    left = architecture.n_layers - sum(sizes)
    start = {"first": 0, "middle": (n - left) // 2, "last": n - left}[where]
    for chunk in range(start, start + left):
        sizes[chunk] += 1
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(n)]


def on_stage(layout: Layout, stage: int) -> list[int]:
    """Numbers of the chunks on one stage."""
    p = layout.pipeline_parallel
    if layout.schedule == "zbv":
        return [stage, 2 * p - 1 - stage]
    return [stage + turn * p for turn in range(layout.virtual_stages)]


def attention_atoms(architecture: Architecture, t: int, rank: int) -> Iterator[tuple[Atom, int]]:
    """One layer's attention on one tensor rank."""
    a, d = architecture.attention, architecture.d_model
    for head in owns(rank, t, a.n_heads):
        yield ("attention.sinks", (head,)), int(a.sinks)
        if a.mla is not None:
            m = a.mla
            yield ("attention.projections", ("query", head)), a.head_dim * (m.q_lora_rank or d)
            expansion = m.kv_lora_rank * (m.qk_nope_head_dim + m.v_head_dim)
            yield ("attention.projections", ("expand", head)), expansion
            yield ("attention.projections", ("out", head)), m.v_head_dim * d
        else:
            yield ("attention.projections", ("query", head)), d * a.head_dim
            yield ("attention.projections", ("out", head)), d * a.head_dim
            yield ("attention.biases", ("query", head)), a.qkv_bias * a.head_dim
            yield ("attention.norms", ("query", head)), (a.qk_norm == "width") * a.head_dim
    yield ("attention.biases", ("out",)), a.o_bias * d
    if a.mla is not None:
        rank_q, latent = a.mla.q_lora_rank or 0, a.mla.kv_lora_rank + a.mla.qk_rope_head_dim
        yield ("attention.projections", ("down",)), d * (rank_q + latent)
        yield ("attention.biases", ("down",)), a.qkv_bias * (rank_q + latent)
        yield ("attention.norms", ("latent",)), rank_q + a.mla.kv_lora_rank
        return
    # With more ranks than groups, t / G neighbours hold the same group.
    ways = min(t, a.n_kv_heads)
    for group, kind in product(owns(rank * ways // t, ways, a.n_kv_heads), ("key", "value")):
        yield ("attention.projections", (kind, group)), d * a.head_dim
        yield ("attention.biases", (kind, group)), a.qkv_bias * a.head_dim
        yield ("attention.norms", (kind, group)), (a.qk_norm == "width" and kind == "key") * a.head_dim
    yield ("attention.norms", ("each",)), (a.qk_norm == "head") * 2 * a.head_dim


def network_atoms(d: int, ffn: FeedForward, prefix: str, ways: int, rank: int) -> Iterator[tuple[Atom, int]]:
    """One feed-forward network on one of the ranks that share it in width."""
    for column in owns(rank, ways, ffn.d_ff):
        yield (f"{prefix}.weights", (column,)), (2 + ffn.gated) * d
        yield (f"{prefix}.biases", (column,)), ffn.bias * (1 + ffn.gated)
    yield (f"{prefix}.biases", ("out",)), ffn.bias * d


def layer_atoms(
    architecture: Architecture, layout: Layout, layer: int, tensor: int, expert: int, slice_: int
) -> Iterator[tuple[Atom, int]]:
    """One layer on the rank of these places among tensor, expert and width ways."""
    d, moe, t = architecture.d_model, architecture.moe, layout.tensor_parallel
    norm = (1 + architecture.norm.bias) * d * (1 if architecture.parallel_block else 2)
    yield ("norms", ()), norm
    yield from attention_atoms(architecture, t, tensor)
    if not architecture.is_moe_layer(layer):
        assert architecture.ffn is not None
        yield from network_atoms(d, architecture.ffn, "ffn", t, tensor)
        return
    assert moe is not None
    yield ("router.weight", ()), moe.n_experts * d
    yield ("router.bias", ()), moe.router.bias * moe.n_experts
    yield ("shared.gate", ()), moe.shared_gate * d
    if moe.shared is not None:
        yield from network_atoms(d, moe.shared, "shared", t, tensor)
    for one in owns(expert, layout.expert_parallel, moe.n_experts):
        for (name, key), size in network_atoms(d, moe.expert, "experts", layout.expert_width_ways, slice_):
            yield (name, (one, *key)), size


def rank_atoms(
    architecture: Architecture, layout: Layout, layers: list[int], tensor: int, expert: int, slice_: int
) -> dict[Atom, int]:
    """Everything on one rank of the stage of those layers, each thing once."""
    d, t = architecture.d_model, layout.tensor_parallel
    found: dict[Atom, int] = {}
    for layer in layers:
        for (name, key), size in layer_atoms(architecture, layout, layer, tensor, expert, slice_):
            found[name, (layer, *key)] = size
    rows = owns(tensor, t, architecture.vocab_size)
    if 0 in layers:
        found |= {("embedding", (row,)): d for row in rows}
        learned = architecture.positions == "learned"
        found["positions", ()] = learned * architecture.max_positions * d
    if architecture.n_layers - 1 in layers:
        found["norms", ("last",)] = (1 + architecture.norm.bias) * d
        name = "embedding" if architecture.tie_embeddings else "unembedding"
        found |= {(name, (row,)): d for row in rows}
    return found


@given(laid_out(), st.sampled_from(("first", "middle", "last")))
def test_every_parameter_lies_somewhere_and_no_rank_holds_more(
    case: tuple[Architecture, Layout], where: Any
) -> None:
    """The fullest rank of a stage holds what theory says, and all ranks together hold the whole model."""
    architecture, layout = case
    dealt, everywhere = chunks(architecture, layout, where), {}
    for stage in range(layout.pipeline_parallel):
        layers = [layer for chunk in on_stage(layout, stage) for layer in dealt[chunk]]
        fullest: Counter[str] = Counter()
        ranks = (layout.tensor_parallel, layout.expert_parallel, layout.expert_width_ways)
        for place in product(*map(range, ranks)):
            held = rank_atoms(architecture, layout, layers, *place)
            everywhere |= held
            sizes: Counter[str] = Counter()
            for (name, _), size in held.items():
                sizes[name] += size
            fullest |= sizes  # the larger one, component by component
        counted = rank_parameters(architecture, layout, stage, where)
        assert set(counted) == set(parameters.COMPONENTS)
        assert {name: count for name, count in counted.items() if count} == dict(+fullest)
        assert not [name for name, count in counted.items() if type(count) is not int]
    whole: Counter[str] = Counter()
    for (name, _), size in everywhere.items():
        whole[name] += size
    assert dict(+whole) == {name: n for name, n in parameters.by_component(architecture).items() if n}


@given(laid_out(), st.data())
def test_stages_hold_every_layer_once(case: tuple[Architecture, Layout], data: st.DataObject) -> None:
    """Over all stages there are as many layers of each kind as in the model, and one of each end."""
    architecture, layout = case
    n = layout.pipeline_parallel * layout.virtual_stages
    cuts = sorted(data.draw(st.lists(st.integers(0, architecture.n_layers), min_size=n - 1, max_size=n - 1)))
    listed = tuple(b - a for a, b in zip([0, *cuts], [*cuts, architecture.n_layers], strict=True))
    for partition in ("first", "middle", "last", listed):
        held = [contents(architecture, layout, i, partition) for i in range(layout.pipeline_parallel)]
        assert sum(one.layers for one in held) == architecture.n_layers
        assert sum(one.moe_layers for one in held) == architecture.n_moe_layers
        assert sum(one.window_layers for one in held) == flops.n_window_layers(architecture)
        assert sum(one.embedding for one in held) == sum(one.head for one in held) == 1
        if isinstance(partition, str):
            assert max(one.layers for one in held) - min(one.layers for one in held) <= layout.virtual_stages
        # Whatever a stage holds, an earlier or equal one among the telling stages holds it too.
        told = {held[i]: i for i in reversed(telling_stages(architecture, layout, partition))}
        assert all(told[one] <= i for i, one in enumerate(held))


@given(laid_out())
def test_arrays_in_a_layout_are_evaluated_elementwise(case: tuple[Architecture, Layout]) -> None:
    """Arrays of ways, stages, chunks and stage numbers give each layout's own integers."""
    architecture, layout = case
    others = [
        replace(layout, pipeline_parallel=p, virtual_stages=v, schedule="interleaved")
        for p in range(1, architecture.n_layers + 1)
        for v in range(1, architecture.n_layers // p + 1)
    ]
    points = [(one, stage) for one in others for stage in range(one.pipeline_parallel)]
    names = ("tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel", "virtual_stages")
    columns = {name: np.array([getattr(one, name) for one, _ in points]) for name in names}
    together = rank_parameters(
        architecture, replace(others[0], **columns), np.array([stage for _, stage in points])
    )
    for i, (one, stage) in enumerate(points):
        alone = rank_parameters(architecture, one, stage)
        assert alone == {name: np.broadcast_to(n, len(points))[i] for name, n in together.items()}


def leaked() -> Architecture:
    """The shape that the leak's expert and attention sizes agree on."""
    d = 10752
    return Architecture(
        d_model=d,
        n_layers=120,
        vocab_size=100352,
        max_positions=8192,
        attention=Attention(n_heads=96, n_kv_heads=96, head_dim=112, rope=Rope()),
        moe=Moe(n_experts=16, top_k=2, expert=FeedForward(d_ff=4 * d, gated=False, activation="gelu")),
    )


def test_the_120_ranks_of_the_leak() -> None:
    """TP8 x PP15 puts 30.523 GB of 16-bit weights on a rank inside, 30.793 GB on one at either end."""
    architecture, layout = leaked(), Layout(tensor_parallel=8, pipeline_parallel=15)
    check(architecture, layout)
    # Two RMSNorms a layer and a final one, a router, untied tables, no biases, no learned positions.
    assert parameters.total(architecture) == 1_833_372_387_840
    sizes = [2 * sum(rank_parameters(architecture, layout, i).values()) for i in range(15)]
    assert [round(size / 1e9, 3) for size in sizes] == [30.793, *[30.523] * 13, 30.793]
    # 7 more copies of each norm and router than the whole has.
    norms = (2 * 120 + 1) * 10752 + 120 * 16 * 10752
    assert 8 * sum(sizes) // 2 == parameters.total(architecture) + 7 * norms


def test_sixteen_stages_leave_the_ends_fewer_layers() -> None:
    """120 layers on 16 nodes are 7 or 8 a node; the middle has 8 unless another part is named."""
    architecture, layout = leaked(), Layout(tensor_parallel=8, pipeline_parallel=16)
    held = {
        where: [contents(architecture, layout, i, where).layers for i in range(16)]
        for where in ("middle", "last")
    }
    assert held == {"middle": [7] * 4 + [8] * 8 + [7] * 4, "last": [7] * 8 + [8] * 8}
    head = (0, *[8] * 15)  # nothing but the embedding on the first node
    sizes = [sum(rank_parameters(architecture, layout, i, head).values()) for i in range(16)]
    assert sizes[0] == 100352 // 8 * 10752
    assert sizes[1] == max(sizes[:15])


def test_one_key_value_head_is_copied() -> None:
    """Under TP8 a rank of PaLM holds its one key/value head whole, and an eighth of the query heads."""
    palm, layout = load("palm-540b").architecture, Layout(tensor_parallel=8)
    attention, d = palm.attention, palm.d_model
    assert attention.n_kv_heads == 1
    one = attention.head_dim * d
    held = rank_parameters(palm, layout)["attention.projections"]
    assert held == palm.n_layers * (2 * attention.n_heads // 8 + 2) * one


@pytest.mark.parametrize(
    ("partition", "sentence"),
    [
        ((60, 60), "2 chunks .* list 15"),
        ((8,) * 14 + (7,), "119 layers"),
        ((-1, *[8] * 13, 17), "least of them -1"),
    ],
)
def test_listed_partitions_that_do_not_fit_are_refused(partition: tuple[int, ...], sentence: str) -> None:
    """A listed partition needs one number for each chunk, none negative, that add up to the layers."""
    with pytest.raises(SpecError, match=sentence):
        contents(leaked(), Layout(pipeline_parallel=15), 0, partition)
