"""A run with failures, event by event: what `harness.theory.failures` has to agree with."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy


@dataclass(frozen=True)
class Outcome:
    """What became of the seconds of a run; `kept`, `saving`, `lost` and `restarting` add up to `seconds`."""

    seconds: float
    kept: float
    """Work that a finished checkpoint holds."""
    saving: float
    """Checkpoints that were finished."""
    lost: float
    """Work and checkpoints that a failure undid."""
    restarting: float
    """Restarts, those that failed again included."""
    checkpoints: int
    failures: int
    standard_error: float
    """Of `goodput`, from the spread between checkpoints."""

    @property
    def goodput(self) -> float:
        """Share of time in work that is kept."""
        return self.kept / self.seconds


def simulate(
    generator: np.random.Generator,
    *,
    interval: float,
    checkpoint: float,
    mtbf: float,
    restart: float,
    checkpoints: int,
) -> Outcome:
    """One run until so many checkpoints are finished; times in seconds, as in `harness.theory.failures`.

    Failures come as a Poisson process of rate 1 / mtbf and interrupt work, checkpoint and restart alike.
    The job is renewed at every finished checkpoint, since a Poisson process has no memory; the times T
    between them are independent, and goodput = t / mean(T) has the standard error t sd(T) / (mean(T)^2
    sqrt(n)) (delta method). Raises ValueError if a time is negative or the interval or mtbf is 0.
    """
    if min(interval, mtbf) <= 0 or min(checkpoint, restart) < 0 or checkpoints < 2:
        given = f"interval {interval:g}, checkpoint {checkpoint:g}, mtbf {mtbf:g}, restart {restart:g} s"
        raise ValueError(f"want positive times and at least 2 checkpoints, not {given}, {checkpoints}")
    environment = simpy.Environment()
    between = np.empty(checkpoints)
    spent = {"lost": 0.0, "restarting": 0.0}
    failures = 0

    def job() -> Generator[simpy.Event, Any, None]:
        for number in range(checkpoints):
            began = environment.now
            while True:
                tried = environment.now
                try:
                    yield environment.timeout(interval)
                    yield environment.timeout(checkpoint)
                    break
                except simpy.Interrupt:
                    spent["lost"] += environment.now - tried
                yield from restarted()
            between[number] = environment.now - began

    def restarted() -> Generator[simpy.Event, Any, None]:
        while True:
            tried = environment.now
            try:
                yield environment.timeout(restart)
                return
            except simpy.Interrupt:
                pass
            finally:
                spent["restarting"] += environment.now - tried

    def failing(running: simpy.Process) -> Generator[simpy.Event, Any, None]:
        nonlocal failures
        while True:
            yield environment.timeout(generator.exponential(mtbf))
            failures += 1
            running.interrupt()

    running = environment.process(job())
    environment.process(failing(running))
    environment.run(until=running)
    mean, spread = float(between.mean()), float(between.std(ddof=1))
    return Outcome(
        seconds=float(environment.now),
        kept=checkpoints * interval,
        saving=checkpoints * checkpoint,
        **spent,
        checkpoints=checkpoints,
        failures=failures,
        standard_error=interval * spread / (mean**2 * checkpoints**0.5),
    )
