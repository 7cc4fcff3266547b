"""What the engine costs beside the model: time per iteration outside of the target's passes.

One request per slot decodes greedily from a short prompt, so that every iteration but the first feeds one
token of each. CPU time of this thread, which other processes do not inflate; the median over iterations.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median

from harness.reference.engine.engine import Engine
from harness.reference.engine.values import Limits, Request, Sampling
from harness.reference.model import ReferenceModel

PROMPT = 8
"""Tokens of each prompt."""


@dataclass(frozen=True)
class Overhead:
    """Median seconds of one iteration with so many sequences."""

    sequences: int
    model: float
    """The target's pass."""
    scheduler: float
    """Which sequences run, and their pages."""
    rest: float
    """Gathering and writing pages, sampling, verification, stopping, the timeline."""

    @property
    def engine(self) -> float:
        """All that is not the model."""
        return self.scheduler + self.rest


def measure(model: ReferenceModel, sequences: int, *, iterations: int = 50) -> Overhead:
    """The cost of one iteration. Raises ValueError where the context is too short for so many iterations."""
    positions = model.architecture.max_positions
    if PROMPT + iterations > positions:
        raise ValueError(f"{iterations} iterations need {PROMPT + iterations} positions of {positions}")
    size = Limits().page_size
    pages = sequences * -(-(PROMPT + iterations) // size)
    clock = time.thread_time
    engine = Engine(model, Limits(sequences, size, pages, chunk=PROMPT * sequences))
    for first in range(sequences):
        prompt = tuple((first + i) % model.architecture.vocab_size for i in range(PROMPT))
        engine.add(Request(prompt, iterations, Sampling(temperature=0.0)))
    engine.clock = clock
    schedule, scheduling = engine.scheduler.schedule, [0.0]

    def timed() -> object:
        begin = clock()
        work = schedule()
        scheduling[0] = clock() - begin
        return work

    engine.scheduler.schedule = timed  # type: ignore[method-assign, assignment]
    rows: list[tuple[float, float, float]] = []
    while engine.scheduler.busy:
        before, begin = engine.model_seconds, clock()
        engine.step()
        whole, passed = clock() - begin, engine.model_seconds - before
        rows.append((passed, scheduling[0], whole - passed - scheduling[0]))
    return Overhead(sequences, *(median(column) for column in zip(*rows[1:], strict=True)))


def per_sequence(measured: Sequence[Overhead]) -> tuple[float, float]:
    """Seconds per iteration, and per iteration and sequence besides: the least-squares line through
    `Overhead.engine` over two numbers of sequences or more."""
    line = linear_regression([m.sequences for m in measured], [m.engine for m in measured])
    return line.intercept, line.slope


def lines(measured: Iterable[Overhead]) -> list[str]:
    """A table in microseconds."""
    columns = ("sequences", "model", "scheduler", "rest")
    rows = [(str(m.sequences), *(f"{s * 1e6:.0f}" for s in (m.model, m.scheduler, m.rest))) for m in measured]
    return ["".join(f"{cell:>11}" for cell in row) for row in (columns, *rows)]
