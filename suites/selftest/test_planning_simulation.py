"""The simulated server: against a naive one, its invariants, and the closed forms that it must meet.

Letters: N requests, B requests in an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.planning import outcome
from harness.planning.scheduling import ENDLESS, Cache, Policy
from harness.planning.simulation import Record, simulate
from harness.planning.workload import Workload, workload
from harness.theory import batching
from suites.selftest.naive_server import NaiveServer


class Steps:
    """Seconds that depend on every count, in units of 2^-14 s: sums of them are exact in any order."""

    def __init__(self, window: int | None = None, constant: float | None = None) -> None:
        self.window, self.constant = window, constant

    def seconds(self, *counts: float) -> float:
        """Prime weights, so that no count stands for another."""
        if self.constant is not None:
            return self.constant
        return (64 + sum(w * n for w, n in zip((3, 5, 7, 2, 11, 13, 17, 19), counts, strict=False))) / 2**14


QUICK = 1 / 64
"""Seconds of a constant iteration, for arrivals at the very end of one."""


def workloads(longest: int = 12) -> st.SearchStrategy[Workload]:
    """Small loads, of an open or a closed loop; times in units of 2^-6 s, as those of `QUICK`."""
    sizes = st.lists(st.tuples(st.integers(1, longest), st.integers(1, longest)), min_size=1, max_size=14)

    def made(drawn: tuple[Sequence[tuple[int, int]], int, int]) -> Workload:
        pairs, users, seed = drawn
        prompts, outputs = np.array(pairs).T
        gaps = np.random.default_rng(seed).integers(0, 24, size=len(pairs)) / 64
        at = None if users else np.cumsum(gaps) - gaps[0]
        return Workload(prompts, outputs, at, min(users, len(pairs)))

    return st.tuples(sizes, st.integers(0, 5), st.integers(0, 2**16)).map(made)


policies = st.builds(
    lambda slots, batching, room, length, acceptance, cost: Policy(
        slots, batching, None if room is None else slots * (1 + length) + room, length, acceptance, cost
    ),
    st.integers(1, 5),
    st.sampled_from(("static", "continuous")),
    st.none() | st.integers(0, 9),
    st.integers(0, 3),
    st.sampled_from((0.0, 0.5, 0.75, 1.0)),
    st.sampled_from((0.0, 0.25)),
)


@given(
    workloads(),
    policies,
    st.none() | st.integers(1, 9),
    st.none() | st.integers(24, 60),
    st.sampled_from((None, QUICK)),
)
def test_it_is_the_naive_server(
    sent: Workload, policy: Policy, window: int | None, room: int | None, constant: float | None
) -> None:
    """Each request's times are those of a loop over iterations and requests that shares no code with it."""
    cache = ENDLESS if room is None else Cache(room, 1, 1, window)
    cache = cache if float(cache.held(24)) <= cache.room else ENDLESS
    steps = Steps(window, constant)
    found = simulate(sent, steps, policy, cache, seed=3)
    naive = NaiveServer(sent, steps.seconds, policy, cache, window, seed=3).run()
    for name in ("sent", "admitted", "first", "ended", "rounds"):
        assert getattr(found, name).tolist() == [getattr(one, name) for one in naive.requests], name
    assert (found.iterations, found.running) == (naive.iterations, naive.seen)
    assert found.busy == naive.busy


@given(workloads(), policies, st.integers(1, 3))
def test_strides_change_nothing(sent: Workload, policy: Policy, stride: int) -> None:
    """Iterations computed together are exactly those computed one at a time."""
    every, some = (simulate(sent, Steps(5), policy, stride=n) for n in (None, stride))
    for name in ("admitted", "first", "ended", "iterations", "running", "busy", "filling", "written"):
        assert np.array_equal(getattr(every, name), getattr(some, name)), name


@given(workloads(), policies)
def test_first_come_first_served(sent: Workload, policy: Policy) -> None:
    """Nobody is overtaken on the way to a slot or to a first token, and all are answered in order of time."""
    found = simulate(sent, Steps(), policy)
    order = np.argsort(found.sent, kind="stable")
    for times in (found.admitted[order], found.first[order]):
        assert (np.diff(times) >= 0).all()
    assert (found.sent <= found.admitted).all()
    assert (found.admitted < found.first).all()
    assert (found.first <= found.ended).all()


@given(workloads(), policies)
def test_no_slot_is_idle_while_a_request_waits(sent: Workload, policy: Policy) -> None:
    """Whoever waits across an iteration's end finds all slots taken (continuous), or a batch (static)."""
    found = simulate(sent, Steps(), policy)
    for now in np.unique(np.concatenate([found.first, found.ended])):
        waiting = (found.sent <= now) & (found.admitted > now)
        running = int(((found.admitted <= now) & (found.ended > now)).sum())
        if waiting.any():
            assert running == policy.slots if policy.batching == "continuous" else running > 0


def test_caches_admit_as_many_as_fit() -> None:
    """With room for 2.5 requests two run at a time, whatever the slots, and their room is reserved."""
    sent = workload(20, "6", "4", rate=math.inf)
    found = simulate(sent, Steps(), Policy(8), Cache(room=25))
    running = [((found.admitted <= now) & (found.ended > now)).sum() for now in found.admitted]
    assert max(running) == 2
    assert found.reserved == 20 / 25
    assert 0 < found.written / found.busy < found.reserved


@given(workloads(), st.integers(0, 3))
def test_one_slot_knows_no_batching(sent: Workload, length: int) -> None:
    """With one slot static and continuous batching are the same server."""
    static, continuous = (
        simulate(sent, Steps(), Policy(1, kind, None, length, 0.5)) for kind in ("static", "continuous")
    )
    for name in ("admitted", "first", "ended", "iterations", "running", "busy"):
        assert np.array_equal(getattr(static, name), getattr(continuous, name)), name


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 6))
def test_unit_iterations_are_the_closed_schedules(outputs: list[int], slots: int) -> None:
    """With iterations of one second, requests end when `theory.batching` says, and slots are as full."""
    count = len(outputs)
    sent = Workload(np.ones(count, np.int64), np.array(outputs), np.zeros(count))
    for kind, schedule in (("static", batching.static), ("continuous", batching.continuous)):
        found, closed = simulate(sent, Steps(constant=1.0), Policy(slots, kind)), schedule(outputs, slots)
        assert found.ended.tolist() == list(closed.ends)
        # One division more on one side.
        assert found.running / (slots * found.iterations) == pytest.approx(closed.occupancy, rel=1e-15)


def test_the_example_of_the_leak() -> None:
    """In the same slots and time static batching finishes 4 sequences, continuous batching 7."""
    rows = {row[0]: row[1:] for row in outcome.example().rows}
    assert rows == {"static": (4, 12, "66.7%"), "continuous": (7, 8, "100.0%")}


def seeded(seed: int, **changed: Any) -> Record:
    """A load in which everything is drawn."""
    sent = workload(
        300, "lognormal:40:0.7", "uniform:1-30", **{"rate": 2.0, "burstiness": 0.5, "seed": seed} | changed
    )
    return simulate(sent, Steps(), Policy(8, chunk=64, draft_length=2, acceptance=0.6), seed=seed)


def test_seeds_reproduce() -> None:
    """The same seed gives the same record, bit for bit, and another one another."""
    first, again, other = seeded(1), seeded(1), seeded(2)
    for name in ("sent", "admitted", "first", "ended", "rounds"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
        assert not np.array_equal(getattr(first, name), getattr(other, name)), name


def test_waiting_grows_with_the_rate() -> None:
    """The same requests, sent faster, wait longer and keep fewer promises; the tokens stay the same."""
    records = [seeded(1, rate=rate) for rate in (0.25, 0.5, 1.0, 2.0, 8.0, math.inf)]
    waits = [float((one.admitted - one.sent).mean()) for one in records]
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]
    bounds = outcome.slo(["ttft=1"])
    kept = [bounds.met(outcome.of_requests(one)).mean() for one in records]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    assert len({int(one.load.outputs.sum()) for one in records}) == 1
