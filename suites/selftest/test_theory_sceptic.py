"""Places where two modules state one thing, and edges of the formulas where they are easily wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.spec import load
from harness.spec.hardware import Hardware, load_hardware
from harness.theory import collectives, communication, sharding, states
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.inference import Mixing, prefill, pricer, steady_state
from harness.theory.layout import Layout, Recompute
from harness.theory.links import links
from harness.theory.precision import precision
from harness.theory.steps import training_step
from harness.theory.vision import CrossAttention

EXACT = 1e-12
"""Relative: the same products in another order."""
BF16 = precision("bfloat16")


def clusters(devices: int) -> Hardware:
    """H100 with clusters of so many devices, joined by a link of a tenth of the network's rate."""
    one = load_hardware("h100")
    slow = one.network_link.model_copy(update={"bandwidth": one.network_link.bandwidth / 10})
    return one.model_copy(update={"cluster": devices, "cluster_link": slow})


@pytest.mark.parametrize("ranks", [9, 12, 15, 1000])
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "all-to-all"])
def test_an_island_that_is_not_full_leaves_no_cluster(kind: collectives.Collective, ranks: int) -> None:
    """A group inside one cluster never takes the link between clusters, whatever its size."""
    hardware, flat = clusters(1024), load_hardware("h100")
    times = [
        collectives.on_islands(kind, collectives.place(ranks, 1, one), 1e9, one) for one in (hardware, flat)
    ]
    assert times[0] == pytest.approx(times[1], rel=EXACT)


def test_experts_beyond_a_cluster_take_the_link_between_clusters() -> None:
    """The ranks that hold a layer's experts lie in clusters as any other group of as many ranks does."""
    hardware = clusters(16)
    for tensor, data, experts in ((1, 64, 64), (8, 8, 64), (8, 8, 8), (2, 32, 16)):
        group = communication.experts_group(Layout(tensor, 1, data, experts), hardware)
        counted = collectives.place(experts, 1, hardware)
        assert (group.local, group.clustered) == (counted.local, counted.clustered)


def test_hybrid_sharding_is_the_same_in_memory_and_in_traffic() -> None:
    """Experts and the rest lie in as many shards as their gathers have ranks, also under context ways."""
    architecture, hardware = load("mixtral-8x7b").architecture, load_hardware("h100")
    for expert_parallel, shards, context, ways in (
        (4, 4, 1, (4, 1)),
        (4, 8, 2, (16, 4)),
        (1, None, 2, (16, 16)),
    ):
        layout = Layout(
            data_parallel=8,
            expert_parallel=expert_parallel,
            context_parallel=context,
            zero_stage=3,
            shard_ways=shards,
        )
        assert sharding.shard_ways(layout) == ways
        dense, experts = sharding.split(sharding.rank_parameters(architecture, layout))
        kept = states.training_memory(architecture, layout, context=1024, microbatches=1)
        assert kept.optimizer == 12 * (-(-dense // ways[0]) - (-experts // ways[1]))
        gathers = [
            next(one.group.ranks for one in communication.data_traffic(layout, hardware, *given, 1))
            for given in ((1.0, 0), (0, 1.0))
        ]
        assert tuple(gathers) == ways


@pytest.mark.parametrize(
    ("stages", "chunks", "layers"), [(4, 2, 10), (4, 2, 9), (8, 2, 61), (4, 3, 17), (4, 1, 30)]
)
def test_the_busiest_stage_is_the_one_with_most_layers_and_the_head(
    stages: int, chunks: int, layers: int
) -> None:
    """A step waits for the largest of all stages' layers and head, counted stage by stage."""
    small = load("llama-3.1-8b").architecture.model_copy(update={"n_layers": layers})
    layout = Layout(pipeline_parallel=stages, virtual_stages=chunks, schedule="interleaved")
    held = [sharding.contents(small, layout, stage) for stage in range(stages)]

    def seconds(n: int, vocabulary: int) -> Any:
        one = small.model_copy(update={"n_layers": n, "vocab_size": vocabulary})
        return training_step(one, load_hardware("h100"), Layout(), batch_tokens=4096, context=4096)

    # Of one microbatch: a layer, and the unembedding, from steps of one device.
    parts = ("compute", "recompute", "elementwise")
    one, two, headless = (
        sum(getattr(seconds(n, vocabulary), part) for part in parts)
        for n, vocabulary in ((1, small.vocab_size), (2, small.vocab_size), (1, 0))
    )
    layer, head = two - one, one - headless
    step = training_step(small, load_hardware("h100"), layout, batch_tokens=stages * 4096, context=4096)
    mean = (layers * layer + head) / stages
    busiest = max(stage.layers * layer + stage.head * head for stage in held)
    assert float(step.imbalance) == pytest.approx(stages * (busiest - mean), rel=1e-9)


def training(efficiency: Efficiency = IDEAL, **layout: Any) -> Any:
    """A step of Mixtral on 64 H100."""
    return training_step(
        load("mixtral-8x7b").architecture,
        load_hardware("h100"),
        Layout(8, 1, 8, **layout),
        batch_tokens=2**22,
        context=4096,
        efficiency=efficiency,
    )


def test_training_follows_the_efficiency_of_experts_and_of_latency() -> None:
    """Slower grouped products lengthen computation alone, longer waits communication alone."""
    plain, grouped, waiting = training(), training(Efficiency(experts=0.5)), training(Efficiency(latency=3))
    mixtral = load("mixtral-8x7b").architecture
    assert mixtral.moe is not None
    per_token = 6 * mixtral.n_layers * mixtral.moe.top_k * 3 * mixtral.d_model * mixtral.moe.expert.d_ff
    peak = load_hardware("h100").peak_flops("bfloat16")
    assert grouped.compute - plain.compute == pytest.approx(per_token * plain.tokens / (64 * peak), rel=1e-9)
    assert grouped.tensor == plain.tensor
    assert waiting.compute == plain.compute
    assert waiting.tensor > plain.tensor
    assert waiting.data > plain.data


@pytest.mark.parametrize("flash", [True, False])
def test_what_takes_no_time_is_no_use_of_the_hardware(flash: bool) -> None:
    """HFU exceeds MFU only where the step itself repeats work; with flash attention "selective" is "none"."""
    ways: tuple[Recompute, ...] = ("none", "selective", "full")
    none, selective, full = (training(flash=flash, recompute=one) for one in ways)
    assert none.hfu == none.mfu
    assert (selective.hfu > selective.mfu) == (not flash)
    assert (selective.recompute > none.recompute) == (not flash)
    assert full.hfu > full.mfu


def test_copies_of_latent_projections_add_their_gradients() -> None:
    """With sequence parallelism every replicated matrix of DeepSeek-V3 is in the tensor ranks' exchange."""
    deepseek, hardware = load("deepseek-v3").architecture, load_hardware("h100")
    layout = Layout(tensor_parallel=8)
    (one,) = communication.replica_traffic(deepseek, layout, hardware, 1)
    moe, mla = deepseek.moe, deepseek.attention.mla
    assert moe is not None
    assert mla is not None
    whole, eighth = (
        sharding.rank_parameters(deepseek, Layout(tensor_parallel=t))["attention.projections"] for t in (1, 8)
    )
    copied = (8 * eighth - whole) / 7 / deepseek.n_layers  # of what is divided, 8 ranks hold no more than one
    assert one.payload == 2 * (copied + 2 * deepseek.d_model + moe.n_experts * deepseek.d_model)


def sent_by(name: str, layout: Layout, **changes: Any) -> Any:
    """Links of a spec's architecture, changed, on H100."""
    architecture = load(name).architecture.model_copy(update=changes)
    return links(architecture, load_hardware("h100"), layout, BF16, IDEAL)


def test_rings_carry_the_heads_of_one_tensor_rank() -> None:
    """Keys and values that t ranks divide are t times less to send; latents are copied, and are not."""
    for name, less in (("llama-3.1-70b", 4), ("deepseek-v3", 1)):
        one, four = (sent_by(name, Layout(tensor_parallel=t, context_parallel=2)).others[1] for t in (1, 4))
        assert one == pytest.approx(less * four, rel=EXACT)


def test_experts_on_other_ranks_spare_only_their_own_reduction() -> None:
    """Attention and shared experts still add up over the tensor ranks where experts are exchanged."""
    layout = Layout(tensor_parallel=4, data_parallel=4, expert_parallel=16)
    dense = Layout(tensor_parallel=4, data_parallel=4)

    def count(name: str, **changes: Any) -> float:
        ways, every = (sent_by(name, one, **changes).reductions[0][0] for one in (layout, dense))
        return float(ways / every)

    mixtral = load("mixtral-8x7b").architecture
    assert mixtral.moe is not None
    moe = mixtral.moe.model_copy(update={"n_experts": 16})
    assert count("mixtral-8x7b", moe=moe) == pytest.approx(1 / 2)
    assert count("mixtral-8x7b", moe=moe, parallel_block=True) == 1
    shared = moe.model_copy(update={"shared": moe.expert})
    assert count("mixtral-8x7b", moe=shared) == 1


@pytest.mark.parametrize(
    ("tensor", "stages", "data"), [(1, 8, 1), (2, 8, 1), (2, 6, 2), (8, 4, 1), (4, 5, 4), (1, 1, 64)]
)
def test_stages_hand_over_inside_an_island_where_they_share_one(tensor: int, stages: int, data: int) -> None:
    """Hand-overs that leave an island, counted device by device, are those that wait for the network."""
    hardware = load_hardware("h100")
    layout = Layout(tensor, stages, data)
    first = [stage * tensor * data // hardware.island for stage in range(stages)]
    leaving = sum(a != b for a, b in itertools.pairwise(first))
    near, far = hardware.island_link.latency, hardware.network_link.latency
    found = sent_by("llama-3.1-8b", layout).handovers[0]
    assert found == pytest.approx(leaving * far + (stages - 1 - leaving) * near)


@pytest.mark.parametrize("mixing", ["even", "whole", "separate"])
def test_replicas_serve_each_as_one_alone(mixing: Mixing) -> None:
    """Data-parallel ranks of a dense model answer d times the requests of one, and none of them faster."""
    llama, hardware = load("llama-3.1-8b").architecture, load_hardware("h100")
    for batch, output in ((8, 500), (200, 100)):
        one, four = (pricer(llama, hardware, Layout(data_parallel=d), BF16) for d in (1, 4))
        alone = steady_state(one, batch, 1000, output, mixing=mixing)
        together = steady_state(four, 4 * batch, 1000, output, mixing=mixing)
        assert together.tpot == pytest.approx(alone.tpot, rel=EXACT)
        assert together.ttft == pytest.approx(alone.ttft, rel=EXACT)
        assert together.ttft >= one.of(prefill(llama, 1, 1000)) * (1 - EXACT)


def test_weights_are_stored_as_they_are_read() -> None:
    """A roofline reads the weights that are in memory, but for tables that are looked up, and vectors."""
    deepseek = load("deepseek-v3").architecture
    assert deepseek.moe is not None
    gated = deepseek.model_copy(update={"moe": deepseek.moe.model_copy(update={"shared_gate": True})})
    hardware, form = load_hardware("h100"), precision("fp8")
    for architecture in (load("mixtral-8x7b").architecture, deepseek, gated):
        kept = states.serving_memory(architecture, Layout(), form, batch=0, context=0).weights
        one = pricer(architecture, hardware, Layout(), form)
        read = one.matrices_read + one.held * one.expert_read + one.logits_read
        counts = sharding.rank_parameters(architecture, Layout())
        small = ("norms", "biases", "sinks")
        unread = sum(n for part, n in counts.items() if part.endswith(small) or part == "router.bias")
        unread += counts["positions"] + counts["embedding"] * (not architecture.tie_embeddings)
        assert kept == pytest.approx(read * hardware.bandwidth.value + 2 * unread, rel=1e-9)


def test_cross_attention_multiplies_each_matrix_once() -> None:
    """FLOPs of a text token that sees nothing and of a visual token are twice all matrices' parameters."""
    for blocks in (
        CrossAttention(4096, 1024, 32, 128, 10, 16384),
        CrossAttention(
            8192, 1280, 64, 128, 20, 28672, kv_heads=8, gated=True, norm_bias=False, head_norms=True
        ),
    ):
        bare = replace(blocks, norm_bias=False, head_norms=False)
        matrices = bare.parameters - blocks.blocks * (2 * blocks.d_model + 2)  # norms and gates
        assert blocks.flops_per_text_token(0) + blocks.flops_per_visual_token() == 2 * matrices


def test_arrays_of_layouts_are_their_elements() -> None:
    """A step over arrays of stages and chunks is that of each layout, shards and imbalance included."""
    architecture, hardware = load("deepseek-v3").architecture, load_hardware("h100")
    stages, chunks = np.array([2, 4, 4, 8]), np.array([2, 1, 3, 2])
    layout = Layout(
        8, stages, 64 // stages, 8, schedule="interleaved", virtual_stages=chunks, zero_stage=1, shard_ways=4
    )
    given: dict[str, Any] = {"batch_tokens": 2**23, "context": 4096}
    found = training_step(architecture, hardware, layout, **given).seconds
    for i, (p, v) in enumerate(zip(stages.tolist(), chunks.tolist(), strict=True)):
        one = replace(layout, pipeline_parallel=p, data_parallel=64 // p, virtual_stages=v)
        each = training_step(architecture, hardware, one, **given).seconds
        assert found[i] == pytest.approx(float(each), rel=1e-9)
