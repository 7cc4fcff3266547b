"""What a search finds is what trying layouts one by one finds, and it says why the others are not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.planning import serving, training
from harness.planning.layouts import ROWS
from harness.planning.search import Question
from harness.planning.selection import pareto
from harness.planning.settings import completed
from harness.spec import SpecError, load
from harness.spec.hardware import load_hardware
from harness.theory.inference import pricer, request_mfu, steady_state
from harness.theory.layout import Layout, check
from harness.theory.precision import Precision, precision
from harness.theory.states import Memory, serving_memory, training_memory
from harness.theory.steps import training_step
from suites.selftest.plans import BATCH, CONTEXT, OUTPUT, PROMPT, TOKENS, TRIED, asked, served, trained


def full(need: Callable[[int], Memory], layout: Layout) -> float:
    """Bytes of the fullest rank, stage by stage."""
    return max(float(need(stage).total) for stage in range(layout.pipeline_parallel))


@dataclass(frozen=True)
class One:
    """A layout that was tried by hand."""

    layout: Layout
    other: Any
    time: float
    memory: float
    usd: float


def by_hand(question: Question) -> Iterator[One]:
    """Every training layout of TRIED that the theory admits, from its functions on plain integers."""
    numbers = [[int(n) for n in TRIED[name].split(",")] for name in list(TRIED)[:5]]
    for tp, pp, ep, cp, size in itertools.product(*numbers):
        if tp * pp * cp > question.gpus:
            continue
        dp = question.gpus // (tp * pp * cp)
        for schedule, zero, recompute in itertools.product(
            ("1f1b", "interleaved", "zbv"), (0, 1, 3), ("none", "full")
        ):
            for chunks in {"interleaved": (2, 4), "zbv": (2,)}.get(schedule, (1,)):
                m = round(BATCH / CONTEXT / (dp * size))
                layout = Layout(
                    tp,
                    pp,
                    dp,
                    ep,
                    context_parallel=cp,
                    zero_stage=zero,
                    schedule=schedule,
                    virtual_stages=chunks,
                    microbatch=size,
                    recompute=recompute,
                )
                if m < 1 or (pp == 1 and schedule != "1f1b"):
                    continue
                try:
                    check(question.architecture, layout)
                    step = training_step(
                        question.architecture,
                        question.hardware,
                        layout,
                        batch_tokens=m * size * dp * CONTEXT,
                        context=CONTEXT,
                    )
                except SpecError:
                    continue
                memory = full(
                    lambda stage, layout=layout, m=m: training_memory(
                        question.architecture, layout, context=CONTEXT, microbatches=m, stage=stage
                    ),
                    layout,
                )
                days = TOKENS / float(step.tokens_per_second) / 86400
                yield One(layout, m, days, memory, days * 24 * layout.devices * question.price)


def nondominated(points: list[tuple[float, float]]) -> set[tuple[float, float]]:
    """The points that no other one beats, compared with every other one."""
    return {
        one
        for one in points
        if not any(two != one and two[0] <= one[0] and two[1] <= one[1] for two in points)
    }


def near(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Rounded to what the order of summation cannot change, in order."""
    return sorted((float(f"{x:.9g}"), float(f"{y:.9g}")) for x, y in points)


@pytest.fixture(scope="module")
def hand() -> list[One]:
    """All of TRIED on 32 GPUs, one by one."""
    return list(by_hand(asked(tries=TRIED)))


def test_the_search_agrees_with_trying_one_by_one(hand: list[One]) -> None:
    """The same number fits, with the same times and memory in the same order, and the same front."""
    question = asked(tries=TRIED, limit=10_000, every=True)
    found = trained(question)
    fitting = [one for one in hand if one.memory <= question.room]
    assert 300 < len(fitting) < len(hand)
    assert (found.evaluated, found.fitting) == (len(hand), len(fitting))
    mine = [(one.facts["days"], one.facts["memory"]) for one in found.ranked]
    assert near(mine) == near([(one.time, one.memory) for one in fitting])
    times = [one.facts["days"] for one in found.ranked]
    assert times == sorted(times)
    front = [(one.facts["days"], one.facts["memory"]) for one in found.front]
    assert near(front) == near(list(nondominated([(one.time, one.memory) for one in fitting])))
    excluded = [(one.facts["days"], one.facts["memory"]) for one in found.excluded]
    assert near(excluded) == near([(o.time, o.memory) for o in hand if o.memory > question.room])


@pytest.mark.parametrize("rank", ["time", "cost", "throughput"])
def test_the_best_is_the_best_by_hand(hand: list[One], rank: str) -> None:
    """Whatever the ranking, the first row is the best layout that fits."""
    question = asked(tries=TRIED, rank=rank, limit=3)
    best = trained(question).ranked[0].facts
    fitting = [one for one in hand if one.memory <= question.room]
    key: Callable[[One], float] = (lambda one: one.usd) if rank == "cost" else (lambda one: one.time)
    assert key(min(fitting, key=key)) == pytest.approx(best["usd" if rank == "cost" else "days"], rel=1e-9)


def test_each_way_to_divide_devices_is_listed_once_with_its_best() -> None:
    """The default list holds the best layout of every shape, in order."""
    question = asked(tries=TRIED, limit=10_000)
    best: dict[tuple[int, ...], float] = {}
    for one in trained(replace(question, every=True)).ranked:
        shape = tuple(one.facts[name] for name in training.GOAL.shape)
        best.setdefault(shape, one.facts["days"])
    listed = {
        tuple(one.facts[name] for name in training.GOAL.shape): one.facts["days"]
        for one in trained(question).ranked
    }
    assert listed == best
    assert list(listed.values()) == sorted(best.values())


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-8b", "gpt-oss-20b"])
def test_every_layout_that_is_returned_can_be_and_fits(name: str) -> None:
    """Each passes `check`, fits stage by stage, uses the GPUs it says, and takes the time it says."""
    question = asked(name, gpus=50)
    found = trained(question)
    for one in (*found.ranked, *found.front):
        layout, facts = one.layout, one.facts
        check(question.architecture, layout)
        assert layout.devices == facts["gpus"]
        assert question.fewest <= layout.devices <= 50
        need = full(
            lambda stage, layout=layout, facts=facts: training_memory(
                question.architecture,
                layout,
                context=CONTEXT,
                microbatches=facts["microbatches"],
                stage=stage,
            ),
            layout,
        )
        assert need == pytest.approx(facts["memory"], rel=1e-12)
        assert need <= question.room
        step = training_step(
            question.architecture,
            question.hardware,
            layout,
            batch_tokens=facts["batch"] * CONTEXT,
            context=CONTEXT,
        )
        assert float(step.seconds) == pytest.approx(facts["seconds"], rel=1e-9)
        rent = facts["days"] * 24 * layout.devices * question.price
        assert facts["usd"] == pytest.approx(rent, rel=1e-9)
        assert not one.why


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-8b", "deepseek-v3"])
def test_serving_layouts_can_be_and_fit(name: str) -> None:
    """Each passes `check`, fits stage by stage, and answers at the time and price that it says."""
    question = asked(name, "h200", 16, limit=5)
    found = served(question)
    for one in (*found.ranked, *found.front):
        layout, facts = one.layout, one.facts
        check(question.architecture, layout)
        assert layout.devices == facts["gpus"] == 16
        form = precision(facts["precision"])
        need = kept(question, layout, form, facts["batch"])
        assert need == pytest.approx(facts["memory"], rel=1e-12)
        assert need <= question.room
        priced = pricer(question.architecture, question.hardware, layout, form)
        stages = layout.pipeline_parallel
        answered = steady_state(priced, facts["sequences"], PROMPT, OUTPUT, stages, "whole")
        assert float(answered.tpot) == pytest.approx(facts["tpot"], rel=1e-9)
        assert float(answered.ttft) == pytest.approx(facts["ttft"], rel=1e-9)
        rate = float(answered.tokens_per_second)
        assert float(request_mfu(priced, PROMPT, OUTPUT, rate)) == pytest.approx(facts["mfu"], rel=1e-9)
        assert facts["usd_per_1k"] == pytest.approx(16 * question.price / 3.6 / rate, rel=1e-9)


def test_the_front_of_serving_is_that_of_all_that_fits() -> None:
    """No layout that fits beats one of the front in both time and price, and the front misses none."""
    question = asked(gpus=8, every=True, limit=100_000)
    found = served(question)
    points = [(one.facts["tpot"], one.facts["usd_per_1k"]) for one in found.ranked]
    assert len(points) == found.fitting > 1000
    front = [(one.facts["tpot"], one.facts["usd_per_1k"]) for one in found.front]
    assert front == sorted(nondominated(list(set(points))))


def test_the_search_for_serving_agrees_with_trying_one_by_one() -> None:
    """The same layouts, batches and precisions fit, with the same time per token and price."""
    tries = {"tensor_parallel": "1,2,8", "pipeline_parallel": "1,2", "expert_parallel": "1,4,8"}
    question = asked(gpus=8, tries=tries | {"batch": "1,3,64,1000"}, every=True, limit=10_000)
    points, evaluated = [], 0
    for tp, pp, ep in itertools.product((1, 2, 8), (1, 2), (1, 4, 8)):
        layout = Layout(tp, pp, 8 // (tp * pp), ep)
        if tp * pp > 8 or not runs(question, layout):
            continue
        for batch, name in itertools.product((1, 3, 64, 1000), ("bfloat16", "fp8")):
            evaluated += 1
            form, together = precision(name), batch * layout.data_parallel
            if kept(question, layout, form, batch) <= question.room:
                priced = pricer(question.architecture, question.hardware, layout, form)
                answer = steady_state(priced, together, PROMPT, OUTPUT, pp, "whole")
                price = 8 * question.price / 3.6 / float(answer.tokens_per_second)
                points.append((float(answer.tpot), price))
    found = served(question)
    assert (found.evaluated, found.fitting) == (evaluated, len(points))
    assert 0 < len(points) < evaluated
    assert near([(one.facts["tpot"], one.facts["usd_per_1k"]) for one in found.ranked]) == near(points)


def runs(question: Question, layout: Layout) -> bool:
    """Whether one layout passes the theory's own check."""
    try:
        check(question.architecture, layout)
    except SpecError:
        return False
    return True


def kept(question: Question, layout: Layout, form: Precision, batch: int) -> float:
    """Bytes of the fullest rank in serving."""
    tokens = batch + max(1, batch / OUTPUT) * PROMPT
    return full(
        lambda stage: serving_memory(
            question.architecture,
            layout,
            form,
            batch=batch,
            context=PROMPT + OUTPUT,
            stage=stage,
            tokens=tokens,
        ),
        layout,
    )


coordinates = st.integers(0, 6).map(float) | st.just(float("inf"))


@given(st.lists(st.tuples(coordinates, coordinates)))
def test_nothing_beats_a_front_and_it_beats_the_rest(points: list[tuple[float, float]]) -> None:
    """Brute force over every pair finds the same front; equal points are in it once."""
    xs, ys = (np.array([one[i] for one in points], dtype=float) for i in (0, 1))
    rows = pareto(xs, ys)
    mine = [points[row] for row in rows]
    finite = [one for one in set(points) if np.isfinite(one).all()]
    assert sorted(mine) == sorted(nondominated(finite))
    assert mine == sorted(mine)


TEXTS = ("data_parallel<={}", "gpus>={}", "memory<={}e9", "microbatches<={}", "bubble_share<={}e-2")


@pytest.mark.parametrize("text", TEXTS)
def test_constraints_hold_and_loosening_one_never_worsens_the_best(text: str) -> None:
    """Rows keep the constraint, and the best time falls as it is loosened."""
    best = []
    for bound in (1, 2, 4, 8, 16, 32, 64):
        question = asked(constraints=(text.format(bound),), limit=3, tries=TRIED)
        try:
            found = trained(question)
        except SpecError:
            best.append(np.inf)
            continue
        for one in (*found.ranked, *found.front):
            assert not one.why
        best.append(found.ranked[0].facts["days"])
    assert len(set(best)) > 1
    assert best == sorted(best, reverse=not text.startswith("gpus"))


def test_more_memory_and_more_devices_never_worsen_the_best() -> None:
    """A smaller reserve, and leave to use fewer devices, add layouts and take none away."""
    reserves = [
        trained(asked(memory_reserve=share, tries=TRIED)).ranked[0].facts["days"]
        for share in (0.5, 0.3, 0.1, 0)
    ]
    assert reserves == sorted(reserves, reverse=True)
    floors = [trained(asked(least_gpus=n, rank="cost", tries=TRIED)) for n in (32, 16, 4, 1)]
    costs = [found.ranked[0].facts["usd"] for found in floors]
    assert costs == sorted(costs, reverse=True)
    assert floors[0].evaluated < floors[1].evaluated < floors[2].evaluated <= floors[3].evaluated


def test_with_fewer_devices_the_front_is_of_time_against_devices() -> None:
    """Where devices may be left unused, each row of the front takes longer on fewer of them."""
    found = trained(asked(least_gpus=4, tries=TRIED))
    assert found.axes == ("days", "gpus")
    gpus = [one.facts["gpus"] for one in found.front]
    assert gpus[0] == 32
    assert gpus == sorted(set(gpus), reverse=True)


def test_a_promise_is_kept_or_said_to_be_broken() -> None:
    """Under an SLO the rows keep it, and what was ruled out says by how much it is missed."""
    free = served(asked(gpus=8, rank="cost"))
    bound = free.ranked[0].facts["tpot"] / 2
    found = served(asked(gpus=8, rank="cost"), slo={"tpot": str(bound)})
    assert all(one.facts["tpot"] <= bound for one in (*found.ranked, *found.front))
    assert found.ranked[0].facts["usd_per_1k"] > free.ranked[0].facts["usd_per_1k"]
    missed = [one for one in found.excluded if f"tpot<={bound:g}" in one.limits]
    assert missed
    assert all("TPOT is" in " ".join(one.why) for one in missed)


def test_thousands_of_layouts_are_evaluated_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The theory is called once for each kind and each ROWS of layouts, so that a search stays quick."""
    calls: list[int] = []
    kinds = 6 * 4 * 3  # schedules, ZeRO stages, recomputation

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(len(given[2].tensor_parallel))
        return training_step(*given, **named)

    monkeypatch.setattr(training, "training_step", counting)
    found = trained(asked("deepseek-v3", gpus=2048, memory_reserve=0))
    assert found.evaluated == sum(calls) > 20_000
    assert len(calls) <= kinds + sum(calls) / ROWS


def test_a_watch_is_told_of_every_layout() -> None:
    """Progress ends at the number of layouts that were announced from the start."""
    told: list[tuple[int, int]] = []
    found = serving.plan(
        asked(gpus=8), prompt=8, output=8, watch=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (found.evaluated, found.evaluated)
    assert {total for _, total in told} == {found.evaluated}


def test_the_leak_is_planned_once_it_is_complete() -> None:
    """With widths given, 25,000 GPUs under TP8 x PP15 hold 208 ranks: 24,960 of them."""
    widths = {
        "d_model": 10752,
        "vocab_size": 100277,
        "attention.n_heads": 168,
        "attention.head_dim": 64,
        "attention.n_kv_heads": 168,
        "moe.expert.gated": "false",
        "moe.expert.d_ff": 43008,
    }
    leak = completed(load("gpt4-leak"), [f"architecture.{path}={value}" for path, value in widths.items()])
    tries = {"tensor_parallel": "8", "pipeline_parallel": "15", "context_parallel": "1", "microbatch": "1"}
    question = Question(leak, load_hardware("a100-80gb"), 25_000, tries=tries)
    best = training.plan(question, batch_tokens=60e6, context=8192).ranked[0]
    assert (best.layout.data_parallel, best.layout.devices) == (208, 24_960)
