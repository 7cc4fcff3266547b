"""A client that sends requests when they are due, and asks each again alone: a run whose answers under load
differ from those alone is void, and so are its figures.

Letters: N requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from harness.benchmark.metrics import Slo, Summary, summarise
from harness.benchmark.workload import Workload
from harness.implementations.protocols import Streams
from harness.reference.engine import Iteration, Request, Streamed

MOST_CONNECTIONS = 256
"""Requests in flight at most, where no concurrency is given: a thread each."""


@runtime_checkable
class ShowsTimeline(Protocol):
    """A session in this process that shows what its engine did."""

    @property
    def timeline(self) -> Sequence[Iteration]:
        """Every iteration so far."""

    @property
    def slots(self) -> int:
        """Requests that can run at the same time."""


@dataclass(frozen=True)
class Mismatch:
    """A request whose answer under load is not the one that it gets alone."""

    number: int
    loaded: tuple[int, ...]
    alone: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Run:
    """One load and what came of it."""

    summary: Summary
    answers: tuple[Streamed, ...]
    mismatches: tuple[Mismatch, ...]
    compared: int
    """Requests that were answered, and asked again alone."""
    timeline: tuple[Iteration, ...]

    @property
    def void(self) -> str:
        """Why the figures mean nothing, in a sentence; empty where they do."""
        if not self.compared:
            return f"no request was answered; the first: {self.answers[0].completion.error or 'no reason'}"
        if not self.mismatches:
            return ""
        first, count = self.mismatches[0], len(self.mismatches)
        return (
            f"{count} of {self.compared} answers differ from those that the same requests get alone; "
            f"request {first.number}: {first.reason}"
        )


def run(
    session: Streams,
    workload: Workload,
    *,
    concurrency: int | None = None,
    slo: Slo | None = None,
    alone: Callable[[], AbstractContextManager[Streams]] | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Run:
    """Send the workload, then every request alone; `step` is called 2 N times, as each is answered.

    alone opens a fresh session for a request that is asked again, so that nothing cached under load can make
    the same answer wrong twice; without it (a server that runs elsewhere) the same session is asked.
    concurrency bounds the requests in flight: one that is due then waits at the client, which shows as
    lateness, not as TTFT.
    """
    answers, due = _load(session, workload, concurrency, step)
    shown = isinstance(session, ShowsTimeline)
    timeline = tuple(session.timeline) if isinstance(session, ShowsTimeline) else ()
    slots = session.slots if isinstance(session, ShowsTimeline) else None
    summary = summarise(answers, due, slo=slo or Slo(), timeline=timeline if shown else (), slots=slots)
    opened = alone or (lambda: nullcontext(session))
    mismatches, compared = _again(opened, workload.requests, answers, step)
    return Run(summary, answers, mismatches, compared, timeline)


def _load(
    session: Streams, workload: Workload, concurrency: int | None, step: Callable[[str], None]
) -> tuple[tuple[Streamed, ...], tuple[float, ...]]:
    def send(request: Request) -> Streamed:
        answer = session.stream(request)
        step("under load")
        return answer

    workers = min(len(workload.requests), concurrency or MOST_CONNECTIONS)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="client")
    try:
        start = time.perf_counter()
        due = tuple(start + at for at in workload.at)
        pending: list[Future[Streamed]] = []
        for request, at in zip(workload.requests, due, strict=True):
            time.sleep(max(0.0, at - time.perf_counter()))
            pending.append(pool.submit(send, request))
        return tuple(one.result() for one in pending), due
    finally:
        # Not as a context, which would wait for requests that nobody wants any more: Ctrl-C ends the load,
        # and closing the session ends those in flight.
        pool.shutdown(wait=False, cancel_futures=True)


def _again(
    opened: Callable[[], AbstractContextManager[Streams]],
    requests: Sequence[Request],
    answers: Sequence[Streamed],
    step: Callable[[str], None],
) -> tuple[tuple[Mismatch, ...], int]:
    found: list[Mismatch] = []
    compared = 0
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        step("each alone")
        if answer.completion.finish_reason == "error":
            continue
        compared += 1
        with opened() as session:
            alone, loaded = session.stream(request).completion, answer.completion
        reason = ""
        if alone.finish_reason != loaded.finish_reason:
            reason = f"it ended by {loaded.finish_reason} under load, by {alone.finish_reason} alone"
        elif alone.tokens != loaded.tokens:
            pairs = zip(alone.tokens, loaded.tokens, strict=False)
            at = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (alone.tokens, loaded.tokens)))
            )
            reason = f"they part at token {at} of {len(alone.tokens)}"
        if reason:
            found.append(Mismatch(number, tuple(loaded.tokens), tuple(alone.tokens), reason))
    return tuple(found), compared
