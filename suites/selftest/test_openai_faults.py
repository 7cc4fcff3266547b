"""Requests and endpoints that fail: no neighbour's answer changes or is lost, and a failure has a cause."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("httpx2")

from harness.implementations import AdapterError
from harness.reference.engine import Arrival, Completion, Engine, Limits, Request, Sampling
from suites.selftest.fake_endpoint import FAULTS, Endpoint, V, tiny_model
from suites.selftest.test_openai_adapter import PROMPT, expected, model

VICTIM = 777
"""The seed of the request that meets the fault."""
TIMEOUT_S = 3.0
"""Long for the neighbours on slow cores, short for those who wait for it."""
NEVER_ENDING = frozenset(("stall", "stall-at-once", "trickle", "endless"))
"""Faults that only the timeout ends; the others have a longer one, which is not to be reached."""
TOGETHER = 8
"""Requests that meet the fault at the same time, so that 200 are not 200 times the timeout."""
NEIGHBOURS = [Request((*PROMPT[: 2 + index], index), 5 + index, Sampling(seed=index)) for index in range(4)]
CAUSES = {
    "500": "answered 500: ",
    "404": "answered 404: ",
    "401": "answered 401: ",
    "429": "answered 429: ",
    "html": r"answered what is no JSON|was to stream, but answered text/html: <html>",
    "redirect": r"redirects \(307\) to another place",
    "close": "broke off: ",
    "close-at-once": "broke off: ",
    "stall": r"took longer than [13] s",
    "stall-at-once": r"took longer than [13] s",
    "trickle": r"took longer than [13] s",
    "endless": r"took longer than [13] s|has more than 16777216 bytes",
    "garbage": r"is no JSON|broke off: |without an end|finish_reason None",
    "invalid-json": "is no JSON",
    "invalid-utf8": "is not UTF-8",
    "wrong-shape": "is a JSON list, not an object",
    "null": "is a JSON list, not a string",
    "no-finish": "finish_reason None",
    "error-event": "reports an error: the worker died",
    "too-long": "broke off: ",
    "too-short": r"is no JSON|broke off: ",
    "no-choices": "no list `choices` of one object",
}
"""Of each fault, what the error says."""
ODD = {
    "oversized": Request(tuple(range(V)) * 8, 5, Sampling(seed=VICTIM)),
    "malformed": Request((1, V + 9, 2), 5, Sampling(seed=VICTIM)),
    "slow": Request(PROMPT, 30, Sampling(seed=VICTIM)),
    "cancelled": Request(PROMPT, 30, Sampling(seed=VICTIM)),
}
"""Requests that a server is to bear; cancelled ones go away after 0 to 5 tokens."""
TRIES = pytest.mark.parametrize("tries", [3, pytest.param(200, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def alone() -> list[Completion]:
    """What each neighbour is answered when it is alone, in this process."""
    return [expected(request) for request in NEIGHBOURS]


def judge(got: list[Completion], alone: list[Completion], where: str) -> None:
    """Neighbours are answered as when they are alone."""
    for one, want in zip(got, alone, strict=True):
        assert (one.tokens, one.finish_reason) == (want.tokens, want.finish_reason), f"{where}: {one.error}"


def odd_arrivals(kind: str, attempt: int, unit: float) -> tuple[list[Arrival], int]:
    """Neighbours with an odd request among them, in some order at some times, and where that one is."""
    draws = random.Random(attempt)
    arrivals = [Arrival(request, at=unit * draws.randrange(6)) for request in NEIGHBOURS]
    cancel = draws.randrange(6) if kind == "cancelled" else None
    place = draws.randrange(len(arrivals) + 1)
    arrivals.insert(place, Arrival(ODD[kind], at=unit * draws.randrange(6), cancel_after=cancel))
    return arrivals, place


def judge_odd(kind: str, one: Completion, cancel_after: int | None) -> None:
    """The odd request itself ends as it should."""
    if kind in ("oversized", "malformed"):
        assert (one.finish_reason, one.tokens) == ("error", ())
        assert one.error
        assert "Traceback" not in one.error
    else:
        whole = expected(ODD[kind]).tokens
        count = len(whole) if cancel_after is None else cancel_after
        reason = "length" if cancel_after is None else "cancelled"
        assert (one.tokens, one.finish_reason) == (whole[:count], reason)


@TRIES
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_request_leaves_its_neighbours_alone_in_the_engine(kind, tries, alone) -> None:
    """In one engine of this process, with few pages, an odd request neither changes nor loses an answer."""
    engine = Engine(tiny_model(), Limits(sequences=3, page_size=4, pages=20, chunk=8))
    for attempt in range(tries):
        arrivals, place = odd_arrivals(kind, attempt, unit=1.0)
        completions = list(engine.run(arrivals).completions)
        odd = completions.pop(place)
        judge(completions, alone, f"{kind}, try {attempt}")
        judge_odd(kind, odd, arrivals[place].cancel_after)


@TRIES
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_request_leaves_its_neighbours_alone_over_http(kind, tries, alone, tmp_path: Path) -> None:
    """Over HTTP an odd request neither changes nor loses a neighbour's answer."""
    with Endpoint() as endpoint:
        session = model(endpoint, tmp_path, "requests=2000").start()
        for attempt in range(tries):
            arrivals, place = odd_arrivals(kind, attempt, unit=0.003)
            completions = list(session.run(arrivals).completions)
            odd = completions.pop(place)
            judge(completions, alone, f"{kind}, try {attempt}")
            judge_odd(kind, odd, arrivals[place].cancel_after)


@TRIES
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_is_an_outcome_with_its_cause(fault, tries, alone, tmp_path: Path) -> None:
    """However an endpoint breaks an answer, that one says why, in time, and its neighbours are answered."""
    victims = [Request(PROMPT, 6, Sampling(seed=VICTIM))] * TOGETHER
    with Endpoint(faults={VICTIM: fault}) as endpoint:
        timeout_s = TIMEOUT_S if fault in NEVER_ENDING else 10 * TIMEOUT_S
        served = model(endpoint, tmp_path, f"timeout={timeout_s}", "requests=20000")
        session = served.start()
        for attempt in range(max(2, -(-tries // TOGETHER))):
            begin = time.monotonic()
            if attempt % 2:
                got = list(session.run(list(map(Arrival, [*NEIGHBOURS, *victims]))).completions)
            else:
                got = list(served.generate([*NEIGHBOURS, *victims]))
            took = time.monotonic() - begin
            judge(got[: len(NEIGHBOURS)], alone, f"{fault}, try {attempt}")
            for broken in got[len(NEIGHBOURS) :]:
                assert broken.finish_reason == "error", broken
                assert re.search(CAUSES[fault], broken.error), broken.error
                assert "\n" not in broken.error
            # one timeout until the last byte, one more for it, and what two slow cores need
            assert took < 2 * timeout_s + 5


BROKEN_FROM_THE_START = sorted({*FAULTS} - {"wrong-shape", "no-choices", "null", "no-finish", "error-event"})
"""Not those whose answers are JSON: what that says is read when a completion is asked for."""


@pytest.mark.parametrize("fault", BROKEN_FROM_THE_START)
def test_an_endpoint_that_answers_nothing_proper_is_no_implementation(fault, tmp_path: Path) -> None:
    """Where even the plainest completion fails, the address is refused with the cause, in one sentence."""
    with Endpoint(faults={None: fault}) as endpoint:
        begin = time.monotonic()
        with pytest.raises(AdapterError, match=CAUSES[fault]) as caught:
            model(endpoint, tmp_path, "timeout=1")
        assert time.monotonic() - begin < 2 * TIMEOUT_S + 5
        assert "\n" not in str(caught.value)


def test_every_fault_is_seen_to_break_something(tmp_path: Path) -> None:
    """The same request without the fault is served: it is the fault that breaks it."""
    victim = Request(PROMPT, 20, Sampling(seed=VICTIM))
    with Endpoint() as endpoint:
        served = model(endpoint, tmp_path)
        want = expected(victim)
        assert served.generate([victim])[0] == replace(want, cached_tokens=0, rounds=0)
    assert set(CAUSES) == set(FAULTS)
