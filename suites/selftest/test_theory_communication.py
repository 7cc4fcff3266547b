"""What collectives take and what parallelism sends: enumerations, limits, conservation, published volumes."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec import load
from harness.spec.architecture import Architecture
from harness.spec.hardware import Hardware, Link, load_hardware
from harness.theory import collectives, communication, sharding
from harness.theory.collectives import Algorithm, Collective, Group, Wire, place
from harness.theory.layout import Layout

KINDS: tuple[Collective, ...] = get_args(Collective)
ADDING: tuple[Collective, ...] = ("all-reduce", "all-gather", "reduce-scatter")
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
CLOSE = 1e-12
"""Relative: a handful of double-precision operations."""

ranks_ = st.integers(2, 512)
payloads = st.floats(1.0, 1e10)
wires = st.builds(Wire, st.floats(1e9, 1e12), st.floats(1e-7, 1e-4))


@pytest.fixture(scope="module")
def h100() -> Hardware:
    """Eight to an island, switches that add."""
    return load_hardware("h100")


@pytest.fixture(scope="module")
def a100() -> Hardware:
    """Eight to an island."""
    return load_hardware("a100-80gb")


@pytest.fixture(scope="module")
def leak() -> Architecture:
    """The widths that the leak's figures leave: 120 layers of 16 experts, one key/value head."""
    mixtral = load("mixtral-8x7b").architecture
    assert mixtral.moe is not None
    expert = mixtral.moe.expert.model_copy(update={"d_ff": 4 * 10752, "gated": False, "activation": "gelu"})
    attention = mixtral.attention.model_copy(update={"n_heads": 96, "n_kv_heads": 96, "head_dim": 112})
    return mixtral.model_copy(
        update={
            "d_model": 10752,
            "n_layers": 120,
            "vocab_size": 100352,
            "attention": attention,
            "moe": mixtral.moe.model_copy(update={"n_experts": 16, "top_k": 2, "expert": expert}),
        }
    )


def ring_all_reduce(ranks: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """A ring all-reduce of `ranks` chunks, played: what every rank ends with, and the chunks it sent."""
    held = np.random.default_rng(ranks).integers(0, 100, (ranks, ranks))
    total, sent = held.sum(0), [0] * ranks
    for phase, step in itertools.product((0, 1), range(ranks - 1)):
        before = held.copy()
        for rank in range(ranks):
            chunk = (rank - step + phase) % ranks
            after = (rank + 1) % ranks
            held[after, chunk] = before[rank, chunk] + (0 if phase else before[after, chunk])
            sent[rank] += 1
    assert (held == total).all()
    return held, sent


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_a_played_ring_sends_what_the_closed_form_says(ranks: int) -> None:
    """A ring all-reduce, chunk by chunk, adds up and sends 2 (n - 1) / n of the payload from every rank."""
    _, sent = ring_all_reduce(ranks)
    assert sent == [collectives.sent_bytes("all-reduce", ranks, float(ranks))] * ranks
    steps = collectives.seconds("all-reduce", ranks, 0.0, Wire(1.0, 1.0))
    assert steps == 2 * (ranks - 1)


@given(ranks_, payloads, wires)
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(n: int, payload: float, wire: Wire) -> None:
    """In bytes for all, in time for the ring; every rank of an all-gather ends with all n parts."""
    for measure in (collectives.sent_bytes, lambda *of: collectives.seconds(*of, wire)):
        both = measure("reduce-scatter", n, payload) + measure("all-gather", n, payload)
        assert measure("all-reduce", n, payload) == pytest.approx(both, rel=CLOSE)
    # Conservation: what all ranks send is what all ranks miss.
    missing = n * (payload - payload / n)
    assert n * collectives.sent_bytes("all-gather", n, payload) == pytest.approx(missing, rel=CLOSE)
    assert n * collectives.sent_bytes("all-to-all", n, payload) == pytest.approx(missing, rel=CLOSE)


@given(ranks_, payloads, wires)
def test_switches_that_add_are_never_slower(n: int, payload: float, wire: Wire) -> None:
    """In-network <= tree and ring; the fastest is the least of what there is; a tree has fewer rounds."""
    for kind in ADDING:
        times = {one: collectives.seconds(kind, n, payload, wire, one) for one in ALGORITHMS}
        # A switch and two ranks tie; rounding may then decide.
        assert times["in-network"] <= min(times["tree"], times["ring"]) * (1 + CLOSE)
        assert collectives.fastest(kind, n, payload, wire, in_network=True) == min(times.values())
        without = min(times["ring"], times["tree"])
        assert collectives.fastest(kind, n, payload, wire) == without
    small = [collectives.seconds("all-reduce", n, 0.0, wire, one) for one in ("tree", "ring")]
    assert small[0] <= small[1]
    large = [collectives.seconds("all-reduce", n, 1e15, wire, one) for one in ("ring", "tree")]
    assert large[0] <= large[1]
    with pytest.raises(ValueError, match="all-to-all"):
        collectives.seconds("all-to-all", n, payload, wire, "in-network")


@given(st.sampled_from(KINDS), ranks_, payloads, wires, st.floats(0.01, 100))
def test_times_have_the_units_of_time(
    kind: Collective, n: int, payload: float, wire: Wire, factor: float
) -> None:
    """Payload and bandwidth in another unit change nothing; slower by a factor takes it as much longer."""
    time = collectives.fastest(kind, n, payload, wire)
    other_unit = Wire(wire.bandwidth * factor, wire.latency)
    assert collectives.fastest(kind, n, payload * factor, other_unit) == pytest.approx(time, rel=CLOSE)
    slower = Wire(wire.bandwidth / factor, wire.latency * factor)
    assert collectives.fastest(kind, n, payload, slower) == pytest.approx(time * factor, rel=CLOSE)
    assert collectives.fastest(kind, 1, payload, wire) == 0.0
    assert collectives.fastest(kind, n + 1, payload, wire) >= time * (1 - CLOSE)
    assert collectives.fastest(kind, n, payload * 2, wire) >= time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["h100", "a100-80gb", "gb200"])
def test_groups_over_islands_take_longer_and_arrays_agree(kind: Collective, name: str) -> None:
    """Inside an island: the link's own time. Over several: never faster, and growing with the islands."""
    hardware, payload = load_hardware(name), 1e8
    inside = collectives.on_islands(kind, place(8, 1, hardware), payload, hardware)
    add = hardware.in_network
    assert inside == collectives.fastest(kind, 8, payload, hardware.island_link, add)
    ranks, strides = np.array([8, 16, 64, 512]), np.array([1, 2, 8, 72])
    groups = [place(int(n), int(s), hardware) for n in ranks for s in strides]
    times = [collectives.on_islands(kind, group, payload, hardware) for group in groups]
    table = collectives.on_islands(kind, place(ranks[:, None], strides[None, :], hardware), payload, hardware)
    assert table.ravel().tolist() == times
    assert np.all(np.diff(table, axis=0) >= 0)
    assert np.all(np.diff(table, axis=1) >= 0)
    assert collectives.on_islands(kind, place(1, 1, hardware), payload, hardware) == 0.0


@given(st.integers(1, 64), st.integers(1, 16))
def test_hierarchical_gathers_send_each_byte_once(local: int, islands: int) -> None:
    """Between islands and then inside, a rank sends (n - 1) / n of the payload: as much as on one link."""
    n, payload = local * islands, 1.0
    between = collectives.sent_bytes("all-gather", islands, payload / local)
    inside = collectives.sent_bytes("all-gather", local, payload)
    assert between + inside == pytest.approx(collectives.sent_bytes("all-gather", n, payload), abs=CLOSE)


@pytest.mark.parametrize(
    ("island", "stride", "ranks"), [(8, 1, 8), (8, 2, 16), (8, 8, 4), (4, 1, 32), (72, 8, 18)]
)
def test_groups_lie_where_counting_finds_them(island: int, stride: int, ranks: int) -> None:
    """Ranks by islands, counted one by one, are those of the closed form; so is the share that leaves."""
    on = [rank * stride // island for rank in range(ranks)]
    group = place(ranks, stride, load_hardware("h100").model_copy(update={"island": island}))
    assert group == Group(ranks, on.count(0))
    assert group.islands == len(set(on))


@pytest.mark.parametrize(("experts", "k", "ways"), [(4, 1, 2), (4, 2, 4), (6, 3, 3), (8, 2, 2)])
def test_dispatch_moves_the_expected_share_of_assignments(
    h100: Hardware, experts: int, k: int, ways: int
) -> None:
    """Over all equally likely choices of k experts, 1 - 1/e of the assignments are another rank's."""
    owner = [expert // (experts // ways) for expert in range(experts)]
    choices = list(itertools.combinations(range(experts), k))
    away = sum(owner[expert] != 0 for chosen in choices for expert in chosen) / len(choices)
    mixtral = load("mixtral-8x7b").architecture
    assert mixtral.moe is not None
    moe = mixtral.moe.model_copy(update={"n_experts": experts, "top_k": k})
    layout = Layout(data_parallel=ways, expert_parallel=ways)
    (traffic,) = communication.expert_traffic(mixtral.model_copy(update={"moe": moe}), layout, h100, 10)
    assert traffic.sent == pytest.approx(2 * 10 * away * mixtral.d_model * 2, rel=CLOSE)  # there and back


@pytest.mark.parametrize(("experts", "k", "islands"), [(4, 1, 2), (8, 3, 4), (6, 2, 3), (8, 8, 8)])
def test_a_token_reaches_the_islands_of_its_experts(experts: int, k: int, islands: int) -> None:
    """The mean over all choices of k experts of the islands they lie on; groups limit it."""
    moe = load("mixtral-8x7b").architecture.moe
    assert moe is not None
    moe = moe.model_copy(update={"n_experts": experts, "top_k": k})
    choices = itertools.combinations(range(experts), k)
    counts = [len({expert * islands // experts for expert in chosen}) for chosen in choices]
    assert communication.islands_reached(moe, islands) == pytest.approx(np.mean(counts), rel=CLOSE)
    deepseek = load("deepseek-v3").architecture.moe
    assert deepseek is not None
    assert communication.islands_reached(deepseek, 8) == 4
    assert communication.islands_reached(deepseek, 1) == 1


def test_relaying_inside_islands_spares_the_network() -> None:
    """DeepSeek-V3's 64 ranks on 8 islands: 4 copies of a token cross at most, instead of 8 x 7/8."""
    deepseek, hardware = load("deepseek-v3").architecture, load_hardware("h800")
    layout = Layout(data_parallel=128, expert_parallel=64)
    (direct,) = communication.expert_traffic(deepseek, layout, hardware, 4096)
    between, inside = communication.expert_traffic(deepseek, layout, hardware, 4096, relayed=True)
    crossing = direct.calls * direct.payload * (1 - 1 / 8)  # seven of eight islands are others
    assert between.sent == pytest.approx(crossing / 2, rel=CLOSE)
    assert inside.group == Group(8, 8)
    relayed = communication.total_seconds((between, inside), hardware)
    assert relayed < direct.seconds(hardware)


def alone(traffic: tuple[communication.Traffic, ...]) -> list[tuple[str, int, float]]:
    """Kind, calls and bytes of one call, of what leaves a rank."""
    return [
        (one.kind, int(one.calls), float(one.payload)) for one in traffic if one.group.ranks > 1 and one.calls
    ]


def test_a_dense_block_sends_as_megatron_does(h100: Hardware) -> None:
    """Two all-reduces of N D elements a direction; with sequence parallelism two gathers and two scatters."""
    architecture, tokens = load("llama-3.1-70b").architecture, 3 * 2048
    payload = tokens * 8192 * 2
    for way in ("forward", "backward"):
        plain = Layout(tensor_parallel=8, sequence_parallel=False)
        sent = communication.tensor_traffic(architecture, plain, h100, tokens, way, routed=False)
        assert alone(sent) == [("all-reduce", 2, payload)]
        sequence = communication.tensor_traffic(
            architecture, Layout(tensor_parallel=8), h100, tokens, way, routed=False
        )
        assert alone(sequence) == [("all-gather", 2, payload), ("reduce-scatter", 2, payload)]
        assert communication.total_sent(sequence) == pytest.approx(communication.total_sent(sent), rel=CLOSE)
    assert not alone(
        communication.tensor_traffic(architecture, Layout(), h100, tokens, "forward", routed=False)
    )


def test_a_parallel_block_sends_half(h100: Hardware) -> None:
    """PaLM's block adds attention and feed-forward before one all-reduce."""
    palm = load("palm-540b").architecture
    layout = Layout(tensor_parallel=8, sequence_parallel=False)
    sent = communication.tensor_traffic(palm, layout, h100, 100, "forward", routed=False)
    assert alone(sent) == [("all-reduce", 1, 100 * palm.d_model * 2)]


def test_experts_split_in_width_with_one_key_head_add_five_gradients(
    h100: Hardware, leak: Architecture
) -> None:
    """Backward of a layer: 2 N D for the blocks, 2 N h for the copied key and value, N K for the weights."""
    attention = leak.attention.model_copy(update={"n_kv_heads": 1})
    architecture = leak.model_copy(update={"attention": attention})
    layout, n = Layout(tensor_parallel=8, sequence_parallel=False), 77
    forward, backward = (
        alone(communication.tensor_traffic(architecture, layout, h100, n, way, routed=True))
        for way in communication.DIRECTIONS
    )
    assert sum(calls for _, calls, _ in forward) == 2
    assert sum(calls for _, calls, _ in backward) == 5
    assert sum(calls * size for _, calls, size in forward) == 2 * n * 10752 * 2
    assert sum(calls * size for _, calls, size in backward) == (2 * n * 10752 + 2 * n * 112 + n * 2) * 2


@pytest.mark.parametrize("sequence", [True, False])
def test_whole_experts_are_reached_by_all_to_alls(h100: Hardware, leak: Architecture, sequence: bool) -> None:
    """Each rank dispatches its N K / t tokens and combines them; nobody reduces the experts' output."""
    layout = Layout(tensor_parallel=8, data_parallel=2, expert_parallel=16, sequence_parallel=sequence)
    (exchange,) = communication.expert_traffic(leak, layout, h100, 4096)
    assert (exchange.kind, exchange.calls, exchange.payload) == ("all-to-all", 2, 4096 / 8 * 2 * 10752 * 2)
    assert exchange.group == Group(16, 8)
    assert exchange.sent == pytest.approx(2 * exchange.payload * 15 / 16, rel=CLOSE)
    dense, routed = (
        alone(communication.tensor_traffic(leak, layout, h100, 4096, "forward", routed=moe))
        for moe in (False, True)
    )
    assert [calls for _, calls, _ in dense] == ([2, 2] if sequence else [2])
    assert routed == (
        [("all-gather", 1, 4096 * 10752 * 2), ("reduce-scatter", 1, 4096 * 10752 * 2)]
        if sequence
        else [("all-reduce", 1, 4096 * 10752 * 2), ("all-gather", 1, 4096 * 10752 * 2)]
    )


@pytest.mark.parametrize("ways", [2, 8, 208])
def test_data_parallel_volumes_are_those_of_zero(h100: Hardware, ways: int) -> None:
    """2, 2, 2 and 3 times the parameters for stages 0 to 3 in one microbatch (Rajbhandari et al. 2020)."""
    parameters, share = 1e6, (ways - 1) / ways
    for stage, times in enumerate((2, 2, 2, 3)):
        layout = Layout(data_parallel=ways, zero_stage=stage)
        traffic = communication.data_traffic(layout, h100, parameters, 0, 1)
        assert communication.total_sent(traffic) == pytest.approx(times * parameters * 2 * share, rel=CLOSE)
        again = communication.data_traffic(layout, h100, parameters, 0, 5, layers=10)
        growth = {0: 2, 1: 2, 2: 1 + 5, 3: 3 * 5}[stage]
        assert communication.total_sent(again) == pytest.approx(growth * parameters * 2 * share, rel=CLOSE)


def test_hybrid_sharding_moves_less_between_islands(h100: Hardware) -> None:
    """HSDP over an island: gathers stay inside, and 1/8 of the gradients is added between the islands."""
    layout = Layout(data_parallel=64, zero_stage=3, shard_ways=8)
    traffic = communication.data_traffic(layout, h100, 1e9, 0, 1)
    inside = [one for one in traffic if one.kind != "all-reduce"]
    (between,) = (one for one in traffic if one.kind == "all-reduce")
    assert {one.group.islands for one in inside} == {1}
    assert between.group == Group(8, 1)
    assert between.payload == 1e9 * 2 / 8
    whole = communication.data_traffic(Layout(data_parallel=64, zero_stage=3), h100, 1e9, 0, 1)
    assert communication.total_seconds(traffic, h100) < communication.total_seconds(whole, h100)


def test_gradients_of_experts_meet_only_their_copies(h100: Hardware) -> None:
    """With 16 expert ways out of 8 x 32 ranks there are 16 copies of an expert to add up."""
    layout = Layout(tensor_parallel=8, data_parallel=32, expert_parallel=16, zero_stage=1)
    dense, experts = ([one.group.ranks for one in communication.data_traffic(layout, h100, a, b, 1)]
                      for a, b in ((1.0, 0), (0, 1.0)))  # fmt: skip
    assert dense[:2] == [32, 32]
    assert experts[:2] == [16, 16]


def test_context_parallelism_gathers_keys_and_values(h100: Hardware) -> None:
    """Forward a gather of 2 N c G h / t elements; backward it again, and their gradients are scattered."""
    architecture = load("llama-3.1-405b").architecture
    layout, tokens = Layout(tensor_parallel=8, context_parallel=16), 8192
    forward, backward = (
        alone(communication.context_traffic(architecture, layout, h100, tokens, way))
        for way in communication.DIRECTIONS
    )
    payload = tokens * 16 * 2 * 8 * 128 / 8 * 2
    assert forward == [("all-gather", 1, payload)]
    assert backward == [("all-gather", 1, payload), ("reduce-scatter", 1, payload)]


def test_the_leaked_layout_sends_what_was_worked_out(a100: Hardware, leak: Architecture) -> None:
    """8 x 15 x 208 A100: 2.4 s of ZeRO-1 over 25 GB/s NICs, 1.15 s of all-reduces over 300 GB/s NVLink."""
    layout = Layout(
        tensor_parallel=8, pipeline_parallel=15, data_parallel=208, zero_stage=1, sequence_parallel=False
    )
    dense, experts = sharding.split(sharding.rank_parameters(leak, layout, 7))
    assert (dense + experts) * 2 == pytest.approx(30.5e9, rel=2e-3)  # printed with three digits
    traffic = communication.data_traffic(layout, a100, dense, experts, 35)
    # 207/208 x 2 x 30.52 GB / 25 GB/s, printed as 2.4; latencies of eight rounds are 1e-4 of it.
    assert communication.total_seconds(traffic, a100) == pytest.approx(2.43, rel=5e-3)
    forward, backward = (
        communication.tensor_traffic(leak, layout, a100, 8192, way, routed=True)
        for way in communication.DIRECTIONS
    )
    blocks = [one for one in forward + backward if one.payload == 8192 * 10752 * 2]
    assert {round(one.payload / 1e6) for one in blocks} == {176}
    seconds = 8 * 35 * communication.total_seconds(tuple(blocks), a100)
    # Printed as 1.15; the latencies of 14 messages in each of 1,120 all-reduces are 0.16 s more.
    assert seconds - 8 * 35 * 4 * 14 * 1e-5 == pytest.approx(1.15, rel=5e-3)


def test_slower_links_between_clusters_cost_what_two_tiers_of_islands_do() -> None:
    """A cluster is to clusters what an island is to islands; links as fast as the network change nothing."""
    flat = load_hardware("a100-80gb")
    one = Link(
        bandwidth=flat.network_link.bandwidth,
        latency=flat.network_link.latency,
        source="none",
        latency_source="none",
    )
    slow = Link(bandwidth=one.bandwidth / 4, latency=one.latency, source="none", latency_source="none")
    ranks, payload = 512, 1e11  # of which the latency of no ring is a part that shows
    group = place(ranks, 1, flat.model_copy(update={"cluster": 128, "cluster_link": slow}))
    assert (group.local, group.clustered, group.islands) == (8, 128, 64)
    for kind in ("all-reduce", "all-gather", "all-to-all"):
        joined = {
            name: collectives.on_islands(
                kind, group, payload, flat.model_copy(update={"cluster": 128, "cluster_link": link})
            )
            for name, link in (("alike", one), ("slow", slow))
        }
        whole = collectives.on_islands(kind, place(ranks, 1, flat), payload, flat)
        # 10 %: tiers pass their latencies and their last pieces one after the other
        assert joined["alike"] == pytest.approx(whole, rel=0.1), kind
        # what leaves a cluster, four times as slow: 1/128 of the payload, or 3/4 of all messages
        least = 2 if kind == "all-to-all" else 1
        assert joined["slow"] > least * joined["alike"], kind
        inside = collectives.on_islands(
            kind,
            place(128, 1, flat),
            payload,
            flat.model_copy(update={"cluster": 128, "cluster_link": slow}),
        )
        assert inside == pytest.approx(collectives.on_islands(kind, place(128, 1, flat), payload, flat))
