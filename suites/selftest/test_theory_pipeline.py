"""Pipeline schedules in closed form against a simulation of their orders of passes, pass by pass."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec import SpecError
from harness.theory import pipeline
from harness.theory.layout import Schedule

Kind = Literal["F", "I", "W", "B"]
"""Forward, gradient by the input, gradient by the weights, and both gradients at once."""
CLOSE = 1e-9
"""Relative: sums of a few thousand double-precision times."""


class Pass(NamedTuple):
    """One pass of one microbatch through one chunk of layers (from 0, in the order of the model)."""

    kind: Kind
    chunk: int
    microbatch: int


class Played(NamedTuple):
    """What a played schedule took."""

    makespan: float
    longest_span: float
    """From the first to the last pass of one stage."""
    kept: list[int]
    """The most chunks' activations alive at once, by stage."""


def play(orders: Sequence[Sequence[Pass]], seconds: Mapping[Kind, float]) -> Played:
    """Run every stage's passes in their order, each as soon as its inputs are there."""
    chunks = 1 + max(one.chunk for order in orders for one in order)
    done: dict[Pass, float] = {}
    at, clock, start = [0] * len(orders), [0.0] * len(orders), [0.0] * len(orders)
    alive, kept = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, chunk, microbatch = one = order[at[stage]]
                needs = []
                if kind == "F" and chunk:
                    needs = [Pass("F", chunk - 1, microbatch)]
                elif kind == "W":
                    needs = [Pass("I", chunk, microbatch)]
                elif kind in "IB":
                    needs = [Pass("F", chunk, microbatch)]
                    needs += [Pass(kind, chunk + 1, microbatch)] if chunk + 1 < chunks else []
                if any(need not in done for need in needs):
                    break
                begin = max([clock[stage], *(done[need] for need in needs)])
                start[stage] = begin if at[stage] == 0 else start[stage]
                clock[stage] = done[one] = begin + seconds[kind]
                alive[stage] += (kind == "F") - (kind in "BW")
                kept[stage] = max(kept[stage], alive[stage])
                at[stage] += 1
                moved = True
    assert at == [len(order) for order in orders], "the schedule waits for itself"
    return Played(max(clock), max(b - a for a, b in zip(start, clock, strict=True)), kept)


def gpipe(p: int, m: int, stage: int) -> list[Pass]:
    """All forward passes, then all backward passes."""
    forward = [Pass("F", stage, i) for i in range(m)]
    return forward + [Pass("B", stage, i) for i in reversed(range(m))]


def alternating(p: int, m: int, stage: int, warmup: int, delay: int | None) -> list[Pass]:
    """`warmup` forward passes, then one forward and one backward in turn; with a `delay` the gradient by the
    weights comes apart, and so many microbatches later."""
    warmup = min(warmup, m)
    order = [Pass("F", stage, i) for i in range(warmup)]
    for i in range(m):
        order += [Pass("F", stage, warmup + i)] if warmup + i < m else []
        order += [Pass("B" if delay is None else "I", stage, i)]
        order += [Pass("W", stage, i - delay)] if delay is not None and i >= delay else []
    return order + [Pass("W", stage, i) for i in range(max(m - (delay or 0), 0), m) if delay is not None]


def interleaved(p: int, m: int, v: int, stage: int) -> list[Pass]:
    """Rounds of p microbatches through the stage's v chunks; backward through them the other way."""
    rounds = itertools.product(range(m // p), range(v), range(p))
    forward = [Pass("F", turn * p + stage, group * p + i) for group, turn, i in rounds]
    backward = [Pass("B", (v - 1 - one.chunk // p) * p + stage, one.microbatch) for one in forward]
    warmup = min((v - 1) * p + 2 * (p - 1 - stage), m * v)
    order = forward[:warmup]
    for i, one in enumerate(backward):
        order += [*forward[warmup + i : warmup + i + 1], one]
    return order


def zbv(p: int, m: int, stage: int) -> list[Pass]:
    """Two chunks a stage, down and up again (Qi et al. 2023, section 6), from 2 p - 1 microbatches on."""
    chunks = (stage, 2 * p - 1 - stage)
    count = {(kind, side): 0 for kind in "FIW" for side in (0, 1)}
    order: list[Pass] = []

    def run(kinds: str, side: int) -> None:
        for kind in kinds:
            if kind != "F" or count["F", side] < m:
                order.append(Pass(kind, chunks[side], count[kind, side]))  # type: ignore[arg-type]
                count[kind, side] += 1

    run("F" * (2 * (p - stage) - 1), 0)
    for _ in range(stage):
        run("F", 1)
        run("F", 0)
    for _ in range(p - stage):
        run("FIW", 1)
    while count["F", 1] < m:
        run("FIW", 0)
        run("FIW", 1)
    for _ in range(stage):
        run("I", 0)
        run("I", 1)
    while count["I", 0] < m:
        run("IW", 0)
    for side in (1, 0):
        run("W" * (m - count["W", side]), side)
    return order


def orders(schedule: Schedule, p: int, m: int, v: int) -> list[list[Pass]]:
    """The passes of every stage."""
    one: Mapping[Schedule, Any] = {
        "gpipe": lambda i: gpipe(p, m, i),
        "1f1b": lambda i: alternating(p, m, i, p - 1 - i, None),
        "interleaved": lambda i: interleaved(p, m, v, i),
        "zb-h1": lambda i: alternating(p, m, i, p - 1 - i, i),
        "zb-h2": lambda i: alternating(p, m, i, 2 * (p - 1 - i), 2 * i),
        "zbv": lambda i: zbv(p, m, i),
    }
    return [one[schedule](stage) for stage in range(p)]


def chunk_seconds(v: int, forward: float, input_grad: float, weight_grad: float) -> dict[Kind, float]:
    """Times of one chunk from those of a stage."""
    both = (input_grad + weight_grad) / v
    return {"F": forward / v, "I": input_grad / v, "W": weight_grad / v, "B": both}


@st.composite
def cases(draw: st.DrawFn, schedule: Schedule) -> tuple[int, int, int, tuple[float, float, float]]:
    """Stages, microbatches, chunks and times on which the schedule runs."""
    p = draw(st.integers(1, 9))
    v = {"interleaved": draw(st.integers(2, 4)), "zbv": 2}.get(schedule, 1)
    least = {"zb-h1": p, "zb-h2": 2 * p - 1, "zbv": 2 * p - 1}.get(schedule, 1)
    m = draw(st.integers(least, least + 20))
    m = m * p if schedule == "interleaved" else m
    share = st.floats(1, 3)
    weight = draw(st.floats(0.1, 1))
    forward = weight * draw(share)
    input_grad = forward * draw(share) if schedule == "zbv" else weight * draw(share)
    if schedule in ("gpipe", "1f1b", "interleaved"):
        weight = draw(st.floats(0.1, 3))
    return p, m, v, (forward, input_grad, weight)


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
@given(data=st.data())
def test_the_bubble_is_what_the_schedule_idles(schedule: Schedule, data: st.DataObject) -> None:
    """Closed form and played schedule agree to 1e-9, flushed and each stage by itself, at any times."""
    p, m, v, times = data.draw(cases(schedule))
    played = play(orders(schedule, p, m, v), chunk_seconds(v, *times))
    work = m * sum(times)
    flushed = pipeline.bubble(schedule, p, m, v, *times, flush=True)
    assert played.makespan / work - 1 == pytest.approx(flushed, rel=CLOSE, abs=CLOSE)
    alone = pipeline.bubble(schedule, p, m, v, *times, flush=False)
    assert played.longest_span / work - 1 == pytest.approx(alone, rel=CLOSE, abs=CLOSE)
    assert pipeline.efficiency(flushed) == pytest.approx(work / played.makespan, rel=CLOSE)


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
@given(data=st.data())
def test_activations_in_flight_are_those_of_the_schedule(schedule: Schedule, data: st.DataObject) -> None:
    """Every stage of a played schedule keeps exactly as many activations as the closed form says."""
    p, m, v, times = data.draw(cases(schedule))
    played = play(orders(schedule, p, m, v), chunk_seconds(v, *times))
    expected = [pipeline.in_flight(schedule, p, m, v, stage) * v for stage in range(p)]
    assert played.kept == pytest.approx(expected, rel=CLOSE)


def test_bubbles_as_published() -> None:
    """The bubbles of 15 stages, and those of the zero-bubble schedules where all passes take as long."""
    bubble = pipeline.bubble
    # Exact quotients of small integers; 1e-12 is their rounding.
    assert bubble("1f1b", 15, 35) == pytest.approx(0.4, rel=1e-12)
    assert bubble("1f1b", 15, 141) == pytest.approx(14 / 141, rel=1e-12)
    assert bubble("interleaved", 15, 150, 8) == pytest.approx(14 / 1200, rel=1e-12)
    assert bubble("zb-h1", 15, 35) == pytest.approx(14 / (3 * 35), rel=1e-12)
    assert bubble("zb-h2", 15, 35) == 0.0
    assert bubble("zbv", 15, 35, 2) == pytest.approx(14 / (6 * 35), rel=1e-12)
    assert bubble("zbv", 15, 35, 2, flush=False) == 0.0
    assert bubble("zb-h2", 15, 35, flush=True) == bubble("zb-h1", 15, 35)
    # Korthikanti et al. 2022, section 4.2.3: the factor of interleaving on 1F1B's activations.
    assert pipeline.in_flight("interleaved", 8, 64, 3) / pipeline.in_flight("1f1b", 8, 64) == 1 + 7 / 24


@given(st.integers(1, 40), st.integers(1, 200), st.floats(0.1, 9), st.floats(0.1, 9))
def test_gpipe_and_1f1b_idle_alike(p: int, m: int, forward: float, backward: float) -> None:
    """GPipe and 1F1B have equal bubbles, and 1F1B never keeps more; one stage never idles."""
    both = [pipeline.bubble(one, p, m, 1, forward, backward, backward) for one in ("gpipe", "1f1b")]
    assert both[0] == both[1]
    assert pipeline.in_flight("1f1b", p, m) <= pipeline.in_flight("gpipe", p, m)
    assert pipeline.bubble("1f1b", 1, m) == 0.0


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_bubbles_shrink_with_microbatches_and_grow_with_stages(schedule: Schedule) -> None:
    """More microbatches idle less, more stages more; arrays give the numbers of their elements."""
    v = {"interleaved": 2, "zbv": 2}.get(schedule, 1)
    stages, rounds = np.arange(1, 9)[:, None], np.arange(2, 12)[None, :]
    table = pipeline.bubble(schedule, stages, stages * rounds, v, 1.0, 1.2, 0.8)
    assert np.all(np.diff(table, axis=1) <= 0)
    assert np.all(np.diff(pipeline.bubble(schedule, np.arange(1, 9), 840, v, 1.0, 1.2, 0.8)) > 0)
    for i, j in itertools.product(range(8), range(10)):
        p, m = int(stages[i, 0]), int(stages[i, 0] * rounds[0, j])
        assert table[i, j] == pipeline.bubble(schedule, p, m, v, 1.0, 1.2, 0.8)
        kept = pipeline.in_flight(schedule, stages, stages * rounds, v)
        assert kept[i, j] == pipeline.in_flight(schedule, p, m, v)


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches", "chunks", "numbers"),
    [
        ("interleaved", 8, 12, 2, ("12", "8")),
        ("1f1b", 8, 12, 2, ("1f1b", "virtual_stages is 2")),
        ("zbv", 8, 20, 1, ("2 chunks", "is 1")),
        ("zb-h1", 8, 7, 1, ("7", "at least 8")),
        ("zb-h2", 8, 14, 1, ("14", "at least 15")),
        ("zbv", 8, 14, 2, ("14", "at least 15")),
        ("gpipe", 8, 0, 1, ("0 microbatches",)),
        ("chimera", 8, 16, 1, ("chimera", "interleaved")),
    ],
)
def test_schedules_that_cannot_run_are_refused(
    schedule: Any, stages: int, microbatches: int, chunks: int, numbers: tuple[str, ...]
) -> None:
    """A sentence with the numbers, one line; in an array the same case idles for ever."""
    for refused in (pipeline.bubble, pipeline.refuse):
        with pytest.raises(SpecError) as caught:
            refused(schedule, stages, microbatches, chunks)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert all(number in sentence for number in numbers)
    if schedule in pipeline.SCHEDULES:
        assert pipeline.bubble(schedule, np.array([stages]), microbatches, chunks) == np.inf


def test_times_without_a_closed_form_are_refused() -> None:
    """Zero-bubble schedules want the gradient by the weights to be the shortest pass."""
    for schedule, times in (("zb-h1", (1.0, 1.0, 1.1)), ("zb-h2", (2.0, 0.5, 1.0)), ("zbv", (1.2, 1.0, 0.5))):
        with pytest.raises(SpecError, match="closed form"):
            pipeline.bubble(schedule, 4, 16, 2 if schedule == "zbv" else 1, *times)  # type: ignore[arg-type]


def test_orders_are_those_that_torch_ships() -> None:
    """The closed forms hold for the orders of torch.distributed.pipelining too."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kinds = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}

    def shipped(p: int, m: int, v: int) -> list[list[Pass]]:
        """ScheduleZBVZeroBubble or ScheduleInterleaved1F1B, asked for their orders alone."""
        found = []
        for rank in range(p):
            if v == 2 and m >= 2 * p - 1:
                one = SimpleNamespace(pp_group_size=p, _n_microbatches=m, num_stages=2 * p)
                actions = schedules.ScheduleZBVZeroBubble._calculate_single_rank_operations(one, rank)
            else:
                one = SimpleNamespace(
                    pp_group_size=p,
                    _n_microbatches=m,
                    n_local_stages=v,
                    rank=rank,
                    number_of_rounds=m // p,
                    microbatches_per_round=p,
                )
                actions = schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations(one, rank)
            found.append(
                [
                    Pass(kinds[a.computation_type.name], a.stage_index, a.microbatch_index)
                    for a in actions
                    if a
                ]
            )
        return found

    rng = random.Random(7)
    for p in (2, 3, 5, 8):
        times = chunk_seconds(2, 1.0, rng.uniform(1, 2), rng.uniform(0.5, 1))
        total = (times["F"] + times["B"]) * 2 * 3 * p
        played = play(shipped(p, 3 * p, 2), times)
        stage_times = (2 * times["F"], 2 * times["I"], 2 * times["W"])
        assert played.makespan / total - 1 == pytest.approx(
            pipeline.bubble("zbv", p, 3 * p, 2, *stage_times), rel=CLOSE
        )
        assert played.kept == [2 * pipeline.in_flight("zbv", p, 3 * p, 2, i) for i in range(p)]
        times = chunk_seconds(3, 1.0, 1.0, rng.uniform(0.5, 2))
        played = play(shipped(p, 2 * p, 3), times)
        total = (times["F"] + times["B"]) * 3 * 2 * p
        assert played.makespan / total - 1 == pytest.approx(
            pipeline.bubble("interleaved", p, 2 * p, 3), rel=CLOSE
        )
        assert played.kept == pytest.approx(
            [3 * pipeline.in_flight("interleaved", p, 2 * p, 3, i) for i in range(p)]
        )
