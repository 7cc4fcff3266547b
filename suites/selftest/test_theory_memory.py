"""Memory of one rank in training and in serving: limits, order, published figures, and what fits."""

from __future__ import annotations

import itertools
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spec import Architecture, SpecError, load
from harness.spec.hardware import load_hardware
from harness.theory import fitting, memory, parameters
from harness.theory.layout import Layout
from harness.theory.pipeline import in_flight
from harness.theory.precision import PRECISIONS
from harness.theory.sharding import contents, largest_block, rank_parameters, shard_ways
from harness.theory.states import Memory, States, serving_memory, training_memory
from suites.selftest.test_theory_activations import MODELS
from suites.selftest.test_theory_laws import architectures
from suites.selftest.test_theory_sharding import laid_out, leaked

BF16 = PRECISIONS["bfloat16"]
STATES = ("weights", "gradients", "optimizer")


def of_states(one: Memory) -> Any:
    """Bytes of weights, gradients and optimizer."""
    return one.weights + one.gradients + one.optimizer


@given(architectures(), st.integers(1, 40), st.integers(0, 4))
def test_one_device_keeps_the_whole_model(architecture: Architecture, context: int, batch: int) -> None:
    """Without parallelism weights, cache and states are those of the whole model."""
    one = serving_memory(architecture, Layout(), BF16, batch=batch, context=context)
    assert one.weights == memory.weight_bytes(architecture, "bfloat16")
    assert one.cache == memory.kv_cache_bytes(architecture, context, batch, "bfloat16")
    expanded = serving_memory(architecture, Layout(), BF16, batch=batch, context=context, mla="expanded")
    assert expanded.cache == memory.kv_cache_bytes(architecture, context, batch, "bfloat16", "expanded")
    trained = training_memory(architecture, Layout(), context=context, microbatches=1)
    assert of_states(trained) == 16 * parameters.total(architecture)
    for found in (one, trained):
        assert found.total == sum(getattr(found, part.name) for part in fields(Memory))


@given(laid_out(), st.integers(1, 20), st.integers(1, 5))
def test_more_sharding_never_takes_more(
    case: tuple[Architecture, Layout], context: int, microbatches: int
) -> None:
    """Each stage of ZeRO keeps at most what the one before keeps, and HSDP at least what FSDP keeps."""
    architecture, layout = case
    kept = [
        training_memory(
            architecture, replace(layout, zero_stage=zero), context=context, microbatches=microbatches
        )
        for zero in range(4)
    ]
    for less, more in itertools.pairwise(reversed(kept)):
        assert of_states(less) <= of_states(more)
        assert less.activations == more.activations
    whole = sum(rank_parameters(architecture, layout).values())
    assert of_states(kept[0]) == 16 * whole
    hybrid = replace(layout, zero_stage=3, shard_ways=1)
    assert shard_ways(hybrid)[0] == layout.context_parallel
    shared = training_memory(architecture, hybrid, context=context, microbatches=1)
    assert of_states(shared) >= of_states(kept[3])
    # Shards together hold everything, and at most one padded element a rank and kind more.
    for one, need in ((layout, kept[3]), (hybrid, shared)):
        ways = shard_ways(one)
        assert 16 * whole / max(ways) <= of_states(need) <= 16 * (whole / min(ways) + 2)


@given(laid_out(), st.integers(1, 20), st.sampled_from(("tensor", "pipeline", "context", "data")))
def test_more_ways_never_take_more(case: tuple[Architecture, Layout], context: int, way: str) -> None:
    """Twice the ways of any kind never raise what the largest rank keeps, in training or in serving."""
    architecture, layout = case
    layout = replace(layout, zero_stage=1, schedule="1f1b", virtual_stages=1)
    field = f"{way}_parallel"
    more = replace(layout, **{field: 2 * getattr(layout, field)})
    heads, groups, t = architecture.attention.n_heads, architecture.attention.n_kv_heads, more.tensor_parallel
    if way == "tensor" and (heads % t or (groups % t and t % groups)):
        return
    if way == "pipeline":
        # Periods and dense layers make stages unequal: a finer cut may then gather what a coarser one parted.
        if more.pipeline_parallel > architecture.n_layers or architecture.moe is not None:
            return
        more = replace(more, data_parallel=layout.data_parallel)

    def need(one: Layout) -> tuple[float, float]:
        trained = fitting.worst_training_memory(architecture, one, context=context, microbatches=1)
        served = fitting.worst_serving_memory(architecture, one, BF16, batch=3, context=context)
        return of_states(trained) + trained.activations, served.weights + served.cache

    # Rounding of double-precision sums.
    assert all(b <= a * (1 + 1e-12) for a, b in zip(need(layout), need(more), strict=True))


@given(laid_out(), st.integers(1, 30))
def test_microbatches_in_flight_are_what_the_schedule_says(
    case: tuple[Architecture, Layout], microbatches: int
) -> None:
    """On a stage without ends activations are one microbatch's times `in_flight`."""
    architecture, layout = case
    p, v = layout.pipeline_parallel, layout.virtual_stages
    for stage in range(p):
        held = contents(architecture, layout, stage)
        if held.embedding or held.head:
            continue
        found = training_memory(architecture, layout, context=7, microbatches=microbatches, stage=stage)
        alone = training_memory(architecture, layout, context=7, microbatches=1, stage=stage)
        flying = in_flight(layout.schedule, p, microbatches, v, stage) / in_flight(
            layout.schedule, p, 1, v, stage
        )
        assert found.activations == pytest.approx(alone.activations * flying, rel=1e-12)


@settings(deadline=None)
@given(laid_out(), st.sampled_from(("none", "selective", "full")), st.integers(0, 3), st.booleans())
def test_the_worst_stage_is_the_worst_of_all(
    case: tuple[Architecture, Layout], recompute: Any, zero: int, flash: bool
) -> None:
    """For arrays of layouts the branch-free memory is, layout by layout, the largest of all its stages'."""
    architecture, layout = case
    v = layout.virtual_stages
    base = replace(layout, recompute=recompute, zero_stage=zero, flash=flash)
    grid = list(itertools.product(range(1, architecture.n_layers // v + 1), (1, 3), (1, 2, 9)))
    columns = np.array(grid).T
    arrays = replace(base, pipeline_parallel=columns[0], microbatch=columns[1])
    trained = fitting.worst_training_memory(architecture, arrays, context=11, microbatches=columns[2])
    served = fitting.worst_serving_memory(architecture, arrays, BF16, batch=columns[2], context=11)
    for i, (p, b, m) in enumerate(grid):
        one = replace(base, pipeline_parallel=p, microbatch=b)
        stages = [
            training_memory(architecture, one, context=11, microbatches=m, stage=stage) for stage in range(p)
        ]
        assert trained.total[i] == max(stage.total for stage in stages)
        assert trained.weights[i] in {stage.weights for stage in stages}
        assert served.total[i] == max(
            serving_memory(architecture, one, BF16, batch=m, context=11, stage=stage).total
            for stage in range(p)
        )


def test_arrays_in_an_architecture_are_evaluated_elementwise() -> None:
    """Arrays of widths, heads, layers and experts give, element by element, each architecture's own bytes."""
    spec, layout = load("mixtral-8x7b"), Layout(4, 3, 8, 2, zero_stage=1, flash=False)
    grid: dict[str, list[int]] = {
        "d_model": [4096, 10752],
        "n_layers": [7, 32],
        "attention.n_heads": [32, 96],
        "attention.n_kv_heads": [1, 8],
        "moe.n_experts": [8, 16],
        "moe.expert.d_ff": [14336],
        "moe.expert.gated": [0, 1],
    }
    points = list(itertools.product(*grid.values()))
    columns = dict(zip(grid, np.array(points, dtype=np.float64).T, strict=True))

    def both(architecture: Architecture) -> list[Any]:
        trained = fitting.worst_training_memory(architecture, layout, context=512, microbatches=9)
        served = fitting.worst_serving_memory(architecture, layout, BF16, batch=3, context=512)
        return [getattr(one, part.name) for one in (trained, served) for part in fields(Memory)]

    together = both(spec.vectorised(columns))
    for i, point in enumerate(points):
        alone = both(spec.vectorised(dict(zip(grid, point, strict=True))))
        # Sums of other orders round differently.
        assert [np.broadcast_to(part, len(points))[i] for part in together] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("zero", "gradient", "gigabytes"), [(1, 2, 61.9), (1, 4, 92.4), (2, 2, 31.5), (3, 2, 1.2)]
)
def test_states_of_the_leak(zero: int, gradient: int, gigabytes: float) -> None:
    """TP8 x PP15 x DP208 keeps 61.9 GB of states at ZeRO-1, far over 40 GB; 1.2 GB as FSDP."""
    layout = Layout(8, 15, 208, zero_stage=zero)
    one = training_memory(
        leaked(), layout, context=8192, microbatches=35, stage=7, states=States(gradient=gradient)
    )
    assert of_states(one) / 1e9 == pytest.approx(gigabytes, abs=0.051)  # printed to one decimal


def test_fsdp_gathers_a_block() -> None:
    """FSDP holds two unsharded layers' weights and one layer's gradients beside its shards."""
    layout = Layout(8, 15, 208, zero_stage=3)
    block = largest_block(leaked(), layout, contents(leaked(), layout, 7))
    assert block == (sum(rank_parameters(leaked(), layout, 7).values())) / 8
    one = training_memory(leaked(), layout, context=8192, microbatches=35, stage=7)
    assert one.transient == block * (2 * 2 + 2)


@pytest.mark.parametrize(
    ("name", "gib"), [("22B", 45.5625), ("175B", 45.5625), ("530B", 31.640625), ("1T", 32.958984375)]
)
def test_korthikanti_figure_1_states(name: str, gib: float) -> None:
    """Parameters and optimizer of figure 1 are 18 bytes for each of the layers' matrices, over all ranks."""
    architecture, layout, microbatches = MODELS[name]
    held = rank_parameters(architecture, layout, 0)
    matrices = held["attention.projections"] + held["ffn.weights"]
    assert matrices * 18 / 2**30 == gib
    whole = training_memory(
        architecture, layout, context=2048, microbatches=microbatches, states=States(gradient=4)
    )
    # The figure leaves out the tables of the first stage, 11 % of the largest model's, biases and norms.
    tables = held["embedding"] + held["positions"]
    assert of_states(whole) / 18 == pytest.approx(matrices + tables, rel=1e-3)
    assert of_states(whole) / 2**30 < 1.12 * gib


def test_expert_states_are_sharded_over_their_copies() -> None:
    """Of 128 ranks with experts 64 ways, experts' states are halved and all others' divided by 128."""
    deepseek = load("deepseek-v3").architecture
    layout = Layout(1, 16, 128, 64, zero_stage=1)
    counts = rank_parameters(deepseek, layout, 5)
    experts = counts["experts.weights"]
    one = training_memory(deepseek, layout, context=4096, microbatches=8, stage=5)
    rest = -(-(sum(counts.values()) - experts) // 128)
    assert one.optimizer == 12 * (experts // 2 + rest)
    assert one.weights == 2 * sum(counts.values())


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_checkpoint_sizes_of_gpt_oss(name: str, gib: float) -> None:
    """MXFP4 experts and the rest in 16 bits are the checkpoint sizes of the model card's table 1."""
    one = serving_memory(load(name).architecture, Layout(), PRECISIONS["mxfp4-experts"], batch=1, context=1)
    assert one.weights / 2**30 == pytest.approx(gib, abs=0.05)  # printed to one decimal


def test_caches_are_copied_where_heads_run_out() -> None:
    """Under TP8 one key/value head (PaLM) and latents (DeepSeek) are on every rank, 8 heads are parted."""
    for name, ways in (("palm-540b", 1), ("deepseek-v3", 1), ("llama-3.1-70b", 8), ("qwen3-235b-a22b", 4)):
        architecture = load(name).architecture
        one, eight = (
            serving_memory(architecture, Layout(t), BF16, batch=5, context=2048).cache for t in (1, 8)
        )
        assert one == ways * eight, name
        two = serving_memory(architecture, Layout(context_parallel=2), BF16, batch=5, context=2048)
        assert one == 2 * two.cache
    sequences = serving_memory(load("deepseek-v3").architecture, Layout(), BF16, batch=1, context=1)
    assert sequences.cache == 70272  # bytes a token, as DeepSeek-V3's 61 x (512 + 64) elements


@given(laid_out(), st.floats(0.5, 4), st.integers(1, 9))
def test_the_largest_batch_fits_and_one_more_does_not(
    case: tuple[Architecture, Layout], room: float, context: int
) -> None:
    """The largest batch and microbatch fit the device, and one more sequence does not."""
    architecture, layout = case
    need = fitting.worst_serving_memory(architecture, layout, BF16, batch=0, context=context).total
    device = load_hardware("h100")
    usable = (need * room + 1) / device.memory.value
    size = usable * device.memory.value
    batch = fitting.largest_batch(architecture, layout, BF16, device, context=context, usable=usable)

    def total(n: int) -> float:
        return float(fitting.worst_serving_memory(architecture, layout, BF16, batch=n, context=context).total)

    assert batch == 0 or total(batch) <= size
    assert total(batch + 1) > size
    most = fitting.largest_microbatch(
        architecture, layout, device, context=context, microbatches=4, usable=8 * usable
    )

    def trained(n: int) -> float:
        one = replace(layout, microbatch=n)
        found = fitting.worst_training_memory(architecture, one, context=context, microbatches=4)
        return float(found.total)

    assert most == 0 or trained(most) <= 8 * size
    assert trained(most + 1) > 8 * size


def test_largest_batches_of_arrays() -> None:
    """Arrays of layouts have each its own largest batch; 0 where weights alone are too large."""
    llama, device = load("llama-3.1-70b").architecture, load_hardware("h100")
    ways = np.array([1, 2, 4, 8])
    found = fitting.largest_batch(llama, Layout(ways), BF16, device, context=4096, usable=0.9)
    alone = [
        fitting.largest_batch(llama, Layout(int(t)), BF16, device, context=4096, usable=0.9) for t in ways
    ]
    assert list(found) == alone
    assert alone[0] == 0
    assert alone[1] < alone[2] < alone[3]


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    """A rank that is too large ends in one sentence with its parts, the device's bytes and what helps."""
    layout, device = Layout(8, 15, 208, zero_stage=1, recompute="full"), load_hardware("a100-40gb")
    need = fitting.worst_training_memory(leaked(), layout, context=8192, microbatches=35)
    with pytest.raises(
        SpecError, match=r"needs 66\.\d GB \(weights 30\.8 GB, gradients 30\.8 GB, .* has 40\.0 GB"
    ):
        fitting.refuse(need, device)
    fitting.refuse(need, load_hardware("a100-80gb"))
    with pytest.raises(SpecError, match=r"has 40\.0 GB"):
        fitting.refuse(need, load_hardware("a100-80gb"), usable=0.5)


def test_a_search_evaluates_its_layouts_at_once() -> None:
    """The worst stage's memory of 1e5 layouts of DeepSeek-V3 takes no time like that of a loop over them."""
    deepseek, rng, n = load("deepseek-v3").architecture, np.random.default_rng(0), 100_000
    layout = Layout(
        tensor_parallel=2 ** rng.integers(0, 4, n),
        pipeline_parallel=rng.integers(1, 31, n),
        data_parallel=2 ** rng.integers(3, 8, n),
        expert_parallel=2 ** rng.integers(0, 4, n),
        virtual_stages=rng.integers(1, 3, n),
        schedule="interleaved",
        microbatch=2 ** rng.integers(0, 3, n),
        zero_stage=1,
    )
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.process_time()
        found = fitting.worst_training_memory(deepseek, layout, context=4096, microbatches=60)
        seconds.append(time.process_time() - start)
    assert found.total.shape == (n,)
    assert min(seconds) < 2  # 0.1 s here, and 4 s one by one, whatever the machine
