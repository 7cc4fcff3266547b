"""Which layouts a search tries: all that can run, nothing else, and a sentence for the rest."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.planning import layouts
from harness.planning.constraints import parse
from harness.planning.settings import completed, efficiency_of, overlap_of
from harness.planning.space import TRAINED, Space, stages, tensor_ways, training_space
from harness.spec import Architecture, SpecError, load
from harness.theory import pipeline
from harness.theory.layout import Layout, check
from harness.theory.sharding import telling_stages
from harness.validation.silicon_constants import measured

NAMES = ("mixtral-8x7b", "llama-3.1-8b", "deepseek-v3", "gpt-oss-20b")
WAYS = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel")


def small(architecture: Architecture) -> Space:
    """Values of every field, among them some that cannot be."""
    return Space(
        tensor_parallel=(1, 2, 3, 8, 16),
        pipeline_parallel=(1, 2, 3, 5, architecture.n_layers, architecture.n_layers + 1),
        context_parallel=(1, 2),
        expert_parallel=(1, 2, 3, 4),
        microbatch=(1, 3),
        virtual_stages=(1, 2, 5),
        zero_stage=(0, 3),
        schedule=("1f1b", "interleaved", "zb-h1", "zbv"),
        recompute=("none", "full"),
    )


def runs(architecture: Architecture, layout: Layout) -> bool:
    """Whether one layout of plain integers passes the theory's own check."""
    try:
        check(architecture, layout)
    except SpecError:
        return False
    return True


def by_hand(architecture: Architecture, space: Space, gpus: int, least: int) -> set[tuple[int, ...]]:
    """Every shape with the most data-parallel ranks that run, found by counting down."""
    found = set()
    axes = (getattr(space, name) for name in WAYS)
    for ways in itertools.product(*axes):
        tensor, stage, context, expert = ways
        for data in range(gpus // (tensor * stage * context), 0, -1):
            if tensor * stage * context * data < least:
                break
            layout = Layout(tensor, stage, data, expert, context_parallel=context)
            if runs(architecture, layout):
                found.add((*ways, data))
                break
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gpus", [1, 12, 48, 96])
def test_shapes_are_those_that_the_theory_checks(name: str, gpus: int) -> None:
    """The arrays hold exactly the shapes that counting down by hand with `check` finds."""
    architecture = load(name).architecture
    space, ruled_out = small(architecture), layouts.RuledOut()
    least = -(-gpus * 9 // 10)
    found = layouts.shapes(architecture, space, gpus, least, ruled_out)
    rows = zip(*(getattr(found, way) for way in (*WAYS, "data_parallel")), strict=True)
    assert {tuple(map(int, row)) for row in rows} == by_hand(architecture, space, gpus, least)
    tried = len(list(itertools.product(*(getattr(space, way) for way in WAYS))))
    assert len(found) + sum(ruled_out.counts.values()) == tried


def test_halves_of_the_ranks_use_fewer_devices() -> None:
    """With a floor under the devices, shapes with a half and a quarter of the ranks are tried too."""
    architecture = load("llama-3.1-8b").architecture
    found = layouts.shapes(architecture, Space(), 64, 16, layouts.RuledOut())
    assert found.data_parallel.tolist() == [64, 32, 16]


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_are_tried_can_run(name: str) -> None:
    """Every step of a grid fills its schedule and holds a batch within the slack of the one asked for."""
    architecture, sequences, impossible = load(name).architecture, 60, layouts.RuledOut()
    space = small(architecture)
    found = layouts.shapes(architecture, space, 48, 44, impossible)
    grids = layouts.training_grids(architecture, space, found, sequences, impossible)
    assert {grid.layout.schedule for grid in grids} == set(space.schedule)
    for grid in grids:
        one = grid.layout
        rows = (one.pipeline_parallel, one.virtual_stages, one.microbatch, one.data_parallel)
        for p, v, size, data, m in zip(*rows, grid.microbatches, strict=True):
            pipeline.refuse(one.schedule, int(p), int(m), int(v))
            assert p * v <= architecture.n_layers
            assert abs(m * size * data / sequences - 1) <= layouts.BATCH_SLACK


@pytest.mark.parametrize("name", NAMES)
def test_the_microbatches_are_the_nearest_whole_number(name: str) -> None:
    """No other number of microbatches comes nearer to the batch."""
    architecture, sequences = load(name).architecture, 61.3
    space = replace(small(architecture), schedule=("1f1b",))
    found = layouts.shapes(architecture, space, 48, 44, layouts.RuledOut())
    for grid in layouts.training_grids(architecture, space, found, sequences, layouts.RuledOut()):
        each = grid.layout.microbatch * grid.layout.data_parallel
        off = np.abs(grid.microbatches * each - sequences)
        assert (off <= np.abs((grid.microbatches + 1) * each - sequences)).all()
        assert (off <= np.abs((grid.microbatches - 1) * each - sequences))[grid.microbatches > 1].all()


def test_interleaved_steps_come_in_rounds_of_the_stages() -> None:
    """61 sequences over 4 stages are 60 microbatches interleaved, and 61 under 1F1B."""
    architecture = load("llama-3.1-8b").architecture
    space = Space(pipeline_parallel=(4,), virtual_stages=(2,), schedule=("1f1b", "interleaved"))
    found = layouts.shapes(architecture, space, 4, 4, layouts.RuledOut())
    grids = layouts.training_grids(architecture, space, found, 61, layouts.RuledOut())
    steps = {grid.layout.schedule: grid.microbatches.tolist() for grid in grids}
    assert steps == {"1f1b": [61], "interleaved": [60]}


def test_without_a_pipeline_one_schedule_stands_for_all() -> None:
    """One stage is tried under one schedule, whichever are asked for."""
    architecture = load("llama-3.1-8b").architecture
    for schedules in (("gpipe", "1f1b", "zbv"), ("zbv", "zb-h1"), ("interleaved",)):
        space = Space(virtual_stages=(1, 2), schedule=schedules)
        found = layouts.shapes(architecture, space, 4, 4, layouts.RuledOut())
        grids = layouts.training_grids(architecture, space, found, 8, layouts.RuledOut())
        assert sum(map(len, grids)) == 1, schedules


def test_stages_of_a_grid_are_those_that_tell() -> None:
    """The stages beside each layout are the ones among which the theory finds the most memory."""
    architecture = load("deepseek-v3").architecture
    space = replace(small(architecture), pipeline_parallel=(1, 2, 5, 16))
    found = layouts.shapes(architecture, space, 48, 44, layouts.RuledOut())
    for grid in layouts.training_grids(architecture, space, found, 60, layouts.RuledOut()):
        for row in range(len(grid)):
            p, v = (int(ways[row]) for ways in (grid.layout.pipeline_parallel, grid.layout.virtual_stages))
            one = Layout(1, p, schedule=grid.layout.schedule, virtual_stages=v)
            assert set(grid.stages[:, row].tolist()) == set(telling_stages(architecture, one))


@given(layers=st.integers(1, 200), gpus=st.integers(1, 500))
def test_default_stages_are_few_and_even(layers: int, gpus: int) -> None:
    """Every even pipeline with the fewest stages for its depth is tried, and none is lopsided."""
    tried = stages(layers, gpus)
    assert 1 in tried
    assert all(p <= min(layers, gpus) and -(-layers // p) * p <= 1.1 * layers + 1e-9 for p in tried)
    assert {p for p in range(1, min(layers, gpus) + 1) if layers % p == 0} <= set(tried)


def test_tensor_ways_fill_islands_evenly() -> None:
    """Over several islands no group of tensor ranks straddles two of them in part."""
    assert tensor_ways(96, 1024, 8) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert tensor_ways(96, 8, 8) == (1, 2, 3, 4, 6, 8)
    assert tensor_ways(64, 144, 72) == (1, 2, 4, 8, 16, 32, 64)


def test_default_spaces_hold_what_was_really_run() -> None:
    """What Llama 3 405B and DeepSeek-V3 were trained with is among the values that are tried."""
    llama = training_space(load("llama-3.1-405b").architecture, 16384, 8, 8192, 2048)
    assert 8 in llama.tensor_parallel  # Llama 3, arXiv 2407.21783, table 4
    assert 16 in llama.pipeline_parallel
    deepseek = training_space(load("deepseek-v3").architecture, 2048, 8, 4096, 15360)
    assert 16 in deepseek.pipeline_parallel  # DeepSeek-V3, arXiv 2412.19437, section 3.2
    assert 64 in deepseek.expert_parallel
    assert 1 in deepseek.zero_stage


@pytest.mark.parametrize(
    ("name", "values", "gpus", "reason", "sentence"),
    [
        (
            "llama-3.1-8b",
            {"tensor_parallel": "7"},
            7,
            "heads not divisible",
            "32 heads cannot be divided over 7",
        ),
        (
            "llama-3.1-8b",
            {"pipeline_parallel": "40"},
            40,
            "more stages than layers",
            "and there are 32; give at",
        ),
        (
            "mixtral-8x7b",
            {"expert_parallel": "5"},
            5,
            "experts not divisible",
            "8 experts cannot be divided over 5",
        ),
        (
            "llama-3.1-8b",
            {"expert_parallel": "2"},
            2,
            "experts not divisible",
            "model without experts; give 1",
        ),
        (
            "llama-3.1-8b",
            {"tensor_parallel": "8"},
            4,
            "more ranks than GPUs",
            "wants 8 GPUs or more, and there are 4",
        ),
        (
            "mixtral-8x7b",
            {"expert_parallel": "8"},
            4,
            "experts not divisible over ranks",
            "8 ranks for experts",
        ),
        ("llama-3.1-8b", {"pipeline_parallel": "5"}, 8, "GPUs left idle", "uses 5 of 8 GPUs, and at least 8"),
    ],
)
def test_what_cannot_run_is_said_with_its_numbers(
    name: str, values: dict[str, str], gpus: int, reason: str, sentence: str
) -> None:
    """Each reason has its own name and a sentence on one example."""
    ruled_out = layouts.RuledOut()
    space = Space().trying(values, TRAINED)
    assert not len(layouts.shapes(load(name).architecture, space, gpus, gpus, ruled_out))
    assert list(ruled_out.counts) == [reason]
    assert sentence in ruled_out.examples[reason]


def test_a_batch_that_cannot_be_held_is_said_with_its_numbers() -> None:
    """More ranks than sequences rule a layout out by name."""
    architecture, impossible = load("llama-3.1-8b").architecture, layouts.RuledOut()
    found = layouts.shapes(architecture, Space(), 64, 64, impossible)
    assert not layouts.training_grids(architecture, Space(), found, 16, impossible)
    example = impossible.examples["batch too small or not divisible"]
    assert "come to 64 sequences, and the batch has 16" in example


FIELDS = {"tensor_parallel": None, "gpus": None, "memory": None, "schedule": ("1f1b", "zbv")}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("tensor_parallel<=4", [True, True, False]),
        ("tensor_parallel < 4", [True, False, False]),
        ("tensor_parallel=4", [False, True, False]),
        ("tensor_parallel==2, 8", [True, False, True]),
        ("tensor_parallel!=2,8", [False, True, False]),
        ("memory>=7e9", [False, True, True]),
        ("tensor_parallel<gpus", [True, False, False]),
        ("schedule==zbv", [True, True, True]),
        ("schedule!=zbv,1f1b", [False, False, False]),
    ],
)
def test_constraints_mean_what_they_say(text: str, kept: list[bool]) -> None:
    """A constraint keeps the rows that it names, on numbers, words and other fields."""
    columns = {
        "tensor_parallel": np.array([2, 4, 8]),
        "gpus": 4,
        "memory": np.array([6e9, 7e9, 8e9]),
        "schedule": "zbv",
    }
    assert np.broadcast_to(parse(text, FIELDS).holds(columns), 3).tolist() == kept


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tensor_paralel<=8", 'no field "tensor_paralel"; did you mean "tensor_parallel"?'),
        ("tensor_parallel", "is no constraint"),
        ("tensor_parallel<=", "is no constraint"),
        ("tensor_parallel<=eight", 'cannot be "eight"; give a number'),
        ("tensor_parallel<=nan", 'cannot be "nan"; give a number'),
        ("tensor_parallel<=1,2", "compares with 2 values"),
        ("schedule==1f1c", 'did you mean "1f1b"?'),
        ("schedule<=zbv", "orders words"),
        ("schedule==gpus", 'schedule is never "gpus"'),
        ("__import__('os')==1", "is no constraint"),
    ],
)
def test_a_constraint_that_is_none_is_refused(text: str, sentence: str) -> None:
    """What cannot be read as a constraint ends in one sentence; nothing is run."""
    with pytest.raises(SpecError) as caught:
        parse(text, FIELDS)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tensor": "2"}, 'no field "tensor"'),
        ({"tensor_parallel": "0"}, "give a whole number from 1"),
        ({"tensor_parallel": "1.5"}, "give a whole number from 1"),
        ({"zero_stage": "4"}, "give a whole number from 0 to 3"),
        ({"recompute": "some"}, 'recompute is never "some"'),
        ({"batch": "8"}, 'no field "batch"'),
    ],
)
def test_values_that_cannot_be_tried_are_refused(values: dict[str, str], sentence: str) -> None:
    """What to try is checked field by field."""
    with pytest.raises(SpecError, match=sentence):
        Space().trying(values, TRAINED)


def test_every_field_that_may_be_tried_exists() -> None:
    """Names of a space are names of a layout."""
    assert set(TRAINED) <= {one.name for one in fields(Layout)} & {one.name for one in fields(Space)}


@pytest.mark.parametrize(
    "text",
    [
        "compute=0",
        "compute=1.1",
        "memory=nan",
        "compute",
        "layer_seconds=-1",
        "latency=-1",
        "speed=1",
        "measured:nobody",
    ],
)
def test_an_efficiency_that_cannot_be_is_refused(text: str) -> None:
    """Shares are above 0 and at most 1, times are not negative, names are known."""
    with pytest.raises(SpecError):
        efficiency_of([text], measured)


def test_settings_are_read_by_field() -> None:
    """Shares and seconds land where their names say."""
    assert efficiency_of(["compute=0.5", "layer_seconds=1e-5"], measured).layer_seconds == 1e-5
    assert overlap_of(["expert=0"]).expert == 0
    with pytest.raises(SpecError, match="is no share; give 0 to 1"):
        overlap_of(["expert=2"])


def test_measured_efficiency_is_a_start_that_a_setting_changes() -> None:
    """What was fitted to an engine's rows, but for what is given beside it."""
    found = efficiency_of(["memory=0.5", "measured:vllm"], measured)
    assert found == replace(measured("vllm"), memory=0.5)
    assert efficiency_of(["measured"], measured) == measured("mean") != measured("vllm")
    with pytest.raises(SpecError, match="cannot both be"):
        efficiency_of(["measured", "measured:vllm"], measured)


def test_an_architecture_with_unknowns_says_how_to_complete_it() -> None:
    """The refusal names the option for every unknown; with all of them given there is none."""
    leak = load("gpt4-leak")
    with pytest.raises(SpecError) as caught:
        completed(leak, ["architecture.d_model=10752"])
    unknown = {leaf.path for leaf in leak.unknowns} - {"d_model"}
    assert all(f"--set architecture.{path}=" in str(caught.value) for path in unknown)
    assert "d_model=" not in str(caught.value)


def test_a_complete_architecture_may_be_changed() -> None:
    """A leaf that is set replaces the spec's own, and an unknown leaf is refused."""
    document = load("mixtral-8x7b")
    assert completed(document, ["architecture.moe.top_k=1"]).moe.top_k == 1
    assert completed(document, ["moe.expert.gated=false"]).moe.expert.gated is False
    with pytest.raises(SpecError, match="is no leaf of the architecture"):
        completed(document, ["architecture.d_modle=1"])
